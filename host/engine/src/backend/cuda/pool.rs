//! Memory whose end can be given back to the driver and taken again while its addresses stay: what the pages of keys and values lie
//! in, so that they make room for another model on the device.
//!
//! Addresses are reserved for all of it once, and memory is mapped there in chunks. A graph that was captured, and a kernel's
//! argument, know the addresses alone: neither is made anew.
#![expect(unsafe_code, reason = "the driver API is a C interface")]

use cudarc::driver::{DriverError, sys};

use super::device::DeviceError;
use super::gpu::check;

/// Most bytes of a chunk, and the least chunks of a pool that is large: it gives back what it need not have, but for part of one.
const MOST_CHUNK: usize = 64 << 20;
const LEAST_CHUNKS: usize = 64;

/// See the [module documentation](self). Freed by its owner, which has the context.
#[derive(Debug)]
pub(super) struct Pool {
    device: sys::CUdevice,
    at: sys::CUdeviceptr,
    /// Bytes that there are addresses for.
    reserved: usize,
    chunk: usize,
    /// From the first address on, without a gap.
    mapped: Vec<sys::CUmemGenericAllocationHandle>,
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
        check("cuMemAddressReserve", code.result())?;
        Ok(Self { device, at, reserved, chunk, mapped: Vec::with_capacity(reserved.div_ceil(chunk)) })
    }

    /// Of its first byte.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// That it has memory for.
    pub(super) fn bytes(&self) -> u64 {
        self.end_of(self.mapped.len()) as u64
    }

    /// Of a chunk.
    pub(super) fn chunk(&self) -> u64 {
        self.chunk as u64
    }

    /// Has memory for the first so many bytes, and for no whole chunk more; of chunks that it has not had, those within `most`. On an
    /// error it has what it got.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn resize(&mut self, bytes: u64, most: u64) -> Result<(), DeviceError> {
        let wanted = (bytes as usize).min(self.reserved).div_ceil(self.chunk);
        while self.mapped.len() > wanted {
            self.unmap_last()?;
        }
        while self.mapped.len() < wanted && self.end_of(self.mapped.len() + 1) as u64 <= most {
            self.map_next()?;
        }
        Ok(())
    }

    /// Gives back memory and addresses, whatever the driver says of it. The context must be the thread's.
    pub(super) fn free(mut self) {
        while let Some(handle) = self.mapped.pop() {
            let (start, end) = (self.end_of(self.mapped.len()), self.end_of(self.mapped.len() + 1));
            // SAFETY: as in `unmap_last`; what the driver keeps mapped it keeps.
            unsafe {
                let _ = sys::cuMemUnmap(self.at + start as u64, end - start);
                let _ = sys::cuMemRelease(handle);
            }
        }
        // SAFETY: the range is the one reserved, and nothing is mapped there unless the driver has refused to unmap it.
        let _ = unsafe { sys::cuMemAddressFree(self.at, self.reserved) };
    }

    /// Where so many chunks end.
    fn end_of(&self, n_chunks: usize) -> usize {
        (n_chunks * self.chunk).min(self.reserved)
    }

    fn map_next(&mut self) -> Result<(), DeviceError> {
        let (start, end) = (self.end_of(self.mapped.len()), self.end_of(self.mapped.len() + 1));
        let (at, size) = (self.at + start as u64, end - start);
        let kind = kind(self.device);
        let mut handle = 0;
        // SAFETY: the handle is written to a local, and the description outlives the call.
        let code = unsafe { sys::cuMemCreate(&raw mut handle, size, &raw const kind, 0) };
        check("cuMemCreate", code.result())?;
        let access = sys::CUmemAccessDesc {
            location: kind.location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the range is part of what is reserved, and nothing is mapped there.
        let mapped = check("cuMemMap", unsafe { sys::cuMemMap(at, size, 0, handle, 0) }.result());
        // SAFETY: the range has just been mapped, and the description outlives the call.
        let allow = || unsafe { sys::cuMemSetAccess(at, size, &raw const access, 1) }.result();
        let allowed = mapped.and_then(|()| check("cuMemSetAccess", allow()));
        match allowed {
            Ok(()) => self.mapped.push(handle),
            // SAFETY: nobody knows the range yet, and the handle is released once; where nothing was mapped the driver says so.
            Err(_) => unsafe {
                let _ = sys::cuMemUnmap(at, size);
                let _ = sys::cuMemRelease(handle);
            },
        }
        allowed
    }

    fn unmap_last(&mut self) -> Result<(), DeviceError> {
        let Some(handle) = self.mapped.last().copied() else { return Ok(()) };
        let (start, end) = (self.end_of(self.mapped.len() - 1), self.end_of(self.mapped.len()));
        // SAFETY: the range is exactly one that was mapped, and its owner has waited for everything that uses it.
        let code = unsafe { sys::cuMemUnmap(self.at + start as u64, end - start) };
        check("cuMemUnmap", code.result())?;
        self.mapped.pop();
        // SAFETY: the handle is released once.
        check("cuMemRelease", unsafe { sys::cuMemRelease(handle) }.result())
    }
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
