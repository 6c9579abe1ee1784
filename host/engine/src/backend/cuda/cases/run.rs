//! Cases on a device: buffers in, a launch, buffers out.
//!
//! All buffers of a case lie in one stretch of memory with a fence around each, which nobody may write; so do the inputs. With an
//! allocation for each buffer instead, NVIDIA's memory checker sees reads beyond them, too, at the price of many
//! allocations that stay until the device goes.

use super::{Call, Case, Given, POISON};
use crate::backend::cuda::device::{Device, DeviceError, DeviceLaunch, Entries, Value};

/// Bytes between buffers, and what they are aligned to.
const FENCE: usize = 256;

/// The stretch of memory: more than the largest case needs.
const STRETCH: usize = 256 << 20;

/// Where the buffers of a case lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In one stretch, with fences.
    Fenced,
    /// Each in an allocation of its own.
    Apart,
}

/// Runs cases on a device.
#[derive(Debug)]
pub struct CaseRunner<'a> {
    device: &'a mut dyn Device,
    /// The stretch, where there is one.
    stretch: Option<u64>,
    entries: Entries,
}

/// Why a case failed.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// The device did.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernel computes something else.
    #[error("{0}")]
    Wrong(String),
    /// A fault of the case.
    #[error("its buffers have {bytes} bytes; there is room for {STRETCH}")]
    TooLarge {
        /// Of all of its buffers, with fences.
        bytes: usize,
    },
}

/// A buffer in the image of a case's memory.
#[derive(Debug)]
struct Placed {
    at: usize,
    len: usize,
    is_out: bool,
}

// === impl CaseRunner ===

impl<'a> CaseRunner<'a> {
    /// On this device, which the calling thread has made its own.
    ///
    /// # Errors
    /// There is no memory for the buffers.
    pub fn new(device: &'a mut dyn Device, placement: Placement) -> Result<Self, DeviceError> {
        let stretch = match placement {
            Placement::Fenced => Some(device.allocate(STRETCH as u64)?),
            Placement::Apart => None,
        };
        Ok(Self { device, stretch, entries: Entries::default() })
    }

    /// Runs one.
    ///
    /// # Errors
    /// The device failed, or the kernel is wrong.
    pub fn run(&mut self, case: &Case) -> Result<(), CaseError> {
        let kernel = self.entries.number_of(self.device, &case.call.kernel)?;
        let outs = match self.stretch {
            Some(stretch) => self.fenced(&case.call, kernel, stretch)?,
            None => self.apart(&case.call, kernel)?,
        };
        (case.check)(&outs).map_err(CaseError::Wrong)
    }

    fn fenced(&mut self, call: &Call, kernel: usize, stretch: u64) -> Result<Vec<Vec<u8>>, CaseError> {
        let (image, placed) = image_of(call);
        if image.len() > STRETCH {
            return Err(CaseError::TooLarge { bytes: image.len() });
        }
        self.device.upload(stretch, &image)?;
        let addresses: Vec<u64> = placed.iter().map(|buffer| stretch + buffer.at as u64).collect();
        self.launch(call, kernel, &addresses)?;
        let found = self.download(stretch, image.len())?;
        let outs: Vec<&Placed> = placed.iter().filter(|buffer| buffer.is_out).collect();
        let is_out = |at: usize| outs.iter().any(|buffer| (buffer.at..buffer.at + buffer.len).contains(&at));
        // Few bytes differ outside of outputs, or none, so each is looked up.
        let mut differ = (0..image.len()).filter(|&at| image[at] != found[at]);
        if let Some(at) = differ.find(|&at| !is_out(at)) {
            let nearest = placed.iter().rposition(|buffer| buffer.at <= at);
            return Err(CaseError::Wrong(format!(
                "byte {at} is written, which is of no output; before it: {nearest:?}"
            )));
        }
        Ok(outs.iter().map(|buffer| found[buffer.at..buffer.at + buffer.len].to_vec()).collect())
    }

    fn apart(&mut self, call: &Call, kernel: usize) -> Result<Vec<Vec<u8>>, CaseError> {
        let (mut addresses, mut outs) = (Vec::new(), Vec::new());
        for given in &call.args {
            let Some((bytes, is_out)) = buffer_of(given) else { continue };
            let address = self.device.allocate(bytes.len().next_multiple_of(4) as u64)?;
            self.device.upload(address, bytes)?;
            addresses.push(address);
            if is_out {
                outs.push((address, bytes.len()));
            }
        }
        self.launch(call, kernel, &addresses)?;
        Ok(outs.into_iter().map(|(at, len)| self.download(at, len)).collect::<Result<_, _>>()?)
    }

    fn launch(&mut self, call: &Call, kernel: usize, addresses: &[u64]) -> Result<(), DeviceError> {
        let mut addresses = addresses.iter().copied();
        let mut next = || Value::Address(addresses.next().unwrap_or(0));
        let args: Vec<Value> = call
            .args
            .iter()
            .map(|given| match *given {
                Given::U32(n) => Value::U32(n),
                Given::U64(n) => Value::U64(n),
                Given::F32(x) => Value::F32(x),
                Given::Null => Value::Address(0),
                Given::In(_) | Given::Out(_) => next(),
            })
            .collect();
        let Call { grid, block, shared, .. } = *call;
        self.device.launch(&DeviceLaunch { kernel, grid, block, shared, args: &args })?;
        self.device.wait()
    }

    fn download(&mut self, from: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let mut words = vec![0; len.div_ceil(4)];
        self.device.download(from, &mut words)?;
        let mut bytes = super::words_to_bytes(&words);
        bytes.truncate(len);
        Ok(bytes)
    }
}

fn buffer_of(given: &Given) -> Option<(&[u8], bool)> {
    match given {
        Given::In(bytes) => Some((bytes, false)),
        Given::Out(bytes) => Some((bytes, true)),
        Given::U32(_) | Given::U64(_) | Given::F32(_) | Given::Null => None,
    }
}

/// The memory of a call, and where in it its buffers lie.
fn image_of(call: &Call) -> (Vec<u8>, Vec<Placed>) {
    let (mut image, mut placed) = (vec![POISON; FENCE], Vec::new());
    for (bytes, is_out) in call.args.iter().filter_map(buffer_of) {
        placed.push(Placed { at: image.len(), len: bytes.len(), is_out });
        image.extend(bytes);
        image.resize(image.len().next_multiple_of(FENCE) + FENCE, POISON);
    }
    (image, placed)
}
