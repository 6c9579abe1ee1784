//! Memory whose end can be given back to the driver and taken again while its addresses stay: what the pages of keys and values lie
//! in, so that they make room for another model on the device.
//!
//! Addresses are reserved for all of it once, and memory is mapped there in chunks. A graph that was captured, and a kernel's
//! argument, know the addresses alone: neither is made anew. What the driver does for a chunk may wait for the device, which serves
//! meanwhile: chunks are large, and of many at once access is given and taken by one call.
#![expect(unsafe_code, reason = "the driver API is a C interface")]

use std::ops::Range;

use cudarc::driver::{DriverError, sys};

use super::device::DeviceError;
use super::gpu::{check, words_of};

/// Most bytes of a chunk, and the least chunks of a pool that is large: it gives back what it need not have, but for part of one.
const MOST_CHUNK: usize = 256 << 20;
const LEAST_CHUNKS: usize = 64;

/// See the [module documentation](self). Freed by its owner, which has the context.
#[derive(Debug)]
pub(super) struct Pool {
    device: sys::CUdevice,
    at: sys::CUdeviceptr,
    /// Bytes that there are addresses for.
    reserved: usize,
    chunk: usize,
    /// Chunks that have memory: the first ones.
    n_mapped: usize,
}

impl Pool {
    /// Addresses for so many bytes, and no memory yet.
    ///
    /// # Errors
    /// The driver's: one that has no such memory.
    pub(super) fn reserve(device: sys::CUdevice, bytes: u64) -> Result<Self, DeviceError> {
        let least = granularity(device)?;
        let reserved = (bytes as usize).max(1).next_multiple_of(least);
        let chunk = (reserved / LEAST_CHUNKS).min(MOST_CHUNK).next_multiple_of(least);
        let mut at = 0;
        // SAFETY: the address is written to a local. The range is given back by `free`.
        let code = unsafe { sys::cuMemAddressReserve(&raw mut at, reserved, 0, 0, 0) };
        reserved_by(code.result())?;
        Ok(Self { device, at, reserved, chunk, n_mapped: 0 })
    }

    /// Of its first byte.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// That it has memory for.
    pub(super) fn bytes(&self) -> u64 {
        self.end_of(self.n_mapped) as u64
    }

    /// Of a chunk.
    pub(super) fn chunk(&self) -> u64 {
        self.chunk as u64
    }

    /// Has memory for the first so many bytes, and for no whole chunk more; of chunks that it has not had, those within `most`.
    ///
    /// # Errors
    /// The driver's. Where no memory was left it has what it got, and after any other error what it had.
    pub(super) fn resize(&mut self, bytes: u64, most: u64) -> Result<(), DeviceError> {
        let wanted = (bytes as usize).min(self.reserved).div_ceil(self.chunk);
        if wanted < self.n_mapped {
            self.unmap(wanted..self.n_mapped)?;
            self.n_mapped = wanted;
        }
        let (mut end, mut mapped) = (self.n_mapped, Ok(()));
        while mapped.is_ok() && end < wanted && self.end_of(end + 1) as u64 <= most {
            mapped = self.map(end);
            end += usize::from(mapped.is_ok());
        }
        let fresh = self.n_mapped..end;
        let allowed = if fresh.is_empty() { Ok(()) } else { self.allow(fresh.clone()) };
        match (mapped, allowed) {
            (mapped @ (Ok(()) | Err(DeviceError::OutOfMemory { .. })), Ok(())) => {
                self.n_mapped = end;
                mapped
            }
            (mapped, allowed) => {
                // Whatever comes of it: there is an error to tell already.
                let _ = self.unmap(fresh);
                mapped.and(allowed)
            }
        }
    }

    /// Gives back memory and addresses, whatever the driver says of it. The context must be the thread's.
    pub(super) fn free(self) {
        let _ = self.unmap(0..self.n_mapped);
        // SAFETY: the range is the one reserved, and nothing is mapped there unless the driver has refused to unmap it.
        let _ = unsafe { sys::cuMemAddressFree(self.at, self.reserved) };
    }

    /// Where so many chunks end.
    fn end_of(&self, n_chunks: usize) -> usize {
        (n_chunks * self.chunk).min(self.reserved)
    }

    /// Address and bytes of chunks.
    fn span(&self, chunks: Range<usize>) -> (sys::CUdeviceptr, usize) {
        let (start, end) = (self.end_of(chunks.start), self.end_of(chunks.end));
        (self.at + start as u64, end - start)
    }

    /// Gives a chunk memory, to which nobody has access yet.
    fn map(&self, chunk: usize) -> Result<(), DeviceError> {
        let (at, size) = self.span(chunk..chunk + 1);
        let (kind, mut handle) = (kind(self.device), 0);
        // SAFETY: the handle is written to a local, and the description outlives the call.
        let code = unsafe { sys::cuMemCreate(&raw mut handle, size, &raw const kind, 0) };
        check("cuMemCreate", code.result())?;
        // SAFETY: the range is part of what is reserved, and nothing is mapped there.
        let mapped = check("cuMemMap", unsafe { sys::cuMemMap(at, size, 0, handle, 0) }.result());
        // SAFETY: the handle is released once. What is mapped stays until it is unmapped.
        let released = check("cuMemRelease", unsafe { sys::cuMemRelease(handle) }.result());
        mapped.and(released)
    }

    /// Gives access to chunks that have been mapped, to none before.
    fn allow(&self, chunks: Range<usize>) -> Result<(), DeviceError> {
        let (at, size) = self.span(chunks);
        let access = sys::CUmemAccessDesc {
            location: kind(self.device).location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the range is mapped, and the description outlives the call.
        let code = unsafe { sys::cuMemSetAccess(at, size, &raw const access, 1) };
        check("cuMemSetAccess", code.result())
    }

    /// Gives back the memory of chunks, which are the last that are mapped.
    fn unmap(&self, chunks: Range<usize>) -> Result<(), DeviceError> {
        if chunks.is_empty() {
            return Ok(());
        }
        let (at, size) = self.span(chunks);
        // SAFETY: the range is made of whole mappings, and its owner has waited for everything that uses it.
        check("cuMemUnmap", unsafe { sys::cuMemUnmap(at, size) }.result())
    }
}

/// One that has no addresses left says what one says that has no memory left.
fn reserved_by(result: Result<(), DriverError>) -> Result<(), DeviceError> {
    check("cuMemAddressReserve", result).map_err(|error| match (error, result) {
        (DeviceError::OutOfMemory { .. }, Err(refused)) => {
            let (code, text) = words_of(refused);
            DeviceError::Driver { call: "cuMemAddressReserve", code, text }
        }
        (error, _) => error,
    })
}

/// Ordinary memory of a device.
fn kind(device: sys::CUdevice) -> sys::CUmemAllocationProp {
    // SAFETY: a description is plain data, for which zeros are valid.
    let mut kind: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    kind.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    kind.location.id = device;
    kind
}

/// What sizes are multiples of.
fn granularity(device: sys::CUdevice) -> Result<usize, DeviceError> {
    let (kind, mut bytes) = (kind(device), 0);
    let which = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // SAFETY: the number is written to a local, and the description outlives the call.
    let code = unsafe { sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const kind, which) };
    check("cuMemGetAllocationGranularity", code.result())?;
    match bytes {
        0 => check("cuMemGetAllocationGranularity", Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_SUPPORTED))),
        bytes => Ok(bytes),
    }
}
