//! What NVIDIA's monitoring library says of a GPU: memory, use, temperature and power. Each look asks the driver,
//! which may take its time or hang: look from a thread that nobody waits for.
//!
//! It comes with the driver and is a library of its own, so it may be missing where CUDA works (in a container, say): then
//! nothing is said. Not from CUDA itself: CUDA knows no temperature, and asking it for free memory from another thread
//! would have to touch the context that steps run in.
//!
//! A slice of a GPU (MIG) has the bus of the whole, and so NVML's handle is the whole's. What it says of memory is left out then, for
//! it would stand beside the total of the slice; temperature and power are the chip's in any case.
#![expect(unsafe_code, reason = "the monitor is a C library")]

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;

use libloading::{Library, Symbol};

use super::gpu;

/// The name under which the driver installs it.
const NAME: &str = "libnvidia-ml.so.1";

/// A GPU's monitor.
#[derive(Debug)]
pub struct GpuMonitor {
    library: Library,
    device: usize,
    /// What CUDA says of its memory.
    total_bytes: Option<u64>,
}

/// What a look showed; nothing where the device does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    /// Memory that no process holds; nothing where the library speaks of another device than CUDA.
    pub free_bytes: Option<u64>,
    /// Share of the last sampling period in which a kernel ran.
    pub utilization: Option<f64>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// What it draws.
    pub power_watts: Option<f64>,
}

type Handle = *mut c_void;
type InitFn = unsafe extern "C" fn() -> c_int;
type ByBusFn = unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int;
type MemoryFn = unsafe extern "C" fn(Handle, *mut [u64; 3]) -> c_int;
type RatesFn = unsafe extern "C" fn(Handle, *mut [c_uint; 2]) -> c_int;
type TemperatureFn = unsafe extern "C" fn(Handle, c_int, *mut c_uint) -> c_int;
type PowerFn = unsafe extern "C" fn(Handle, *mut c_uint) -> c_int;

/// NVML's number of the sensor on the chip.
const ON_CHIP: c_int = 0;

/// Most that totals of one device lie apart, in percent of CUDA's. NVML counts what the driver keeps to itself and CUDA does not, which
/// is a few hundred MiB; a slice has half of the whole or less.
const MOST_APART: u64 = 5;

impl GpuMonitor {
    /// The monitor of the GPU on this bus, as in `0000:01:00.0`; `None` without the library.
    #[must_use]
    pub fn open(bus_id: &str) -> Option<Self> {
        let monitor = Self::load(Path::new(NAME), bus_id)?;
        let found = gpu::discover().unwrap_or_default().into_iter().find(|gpu| gpu.bus_id == bus_id);
        Some(Self { total_bytes: found.map(|gpu| gpu.total_bytes), ..monitor })
    }

    fn load(path: &Path, bus_id: &str) -> Option<Self> {
        // SAFETY: loading runs the initialisers of NVIDIA's library, which the driver installs under this name.
        let library = unsafe { Library::new(path) }.ok()?;
        let mut monitor = Self { library, device: 0, total_bytes: None };
        let bus_id = CString::new(bus_id).ok()?;
        let mut device: Handle = std::ptr::null_mut();
        let found = {
            let init = monitor.symbol::<InitFn>("nvmlInit_v2")?;
            let by_bus = monitor.symbol::<ByBusFn>("nvmlDeviceGetHandleByPciBusId_v2")?;
            // SAFETY: the text lives through the call; the handle is written to a local.
            unsafe { init() == 0 && by_bus(bus_id.as_ptr(), &raw mut device) == 0 }
        };
        // Kept as a number: NVML takes handles from any thread.
        monitor.device = device.expose_provenance();
        found.then_some(monitor)
    }

    fn symbol<T>(&self, name: &str) -> Option<Symbol<'_, T>> {
        // SAFETY: the type stands beside each use and is that of NVML's C interface, which keeps what it has published.
        unsafe { self.library.get(name) }.ok()
    }

    fn device(&self) -> Handle {
        std::ptr::with_exposed_provenance_mut(self.device)
    }

    /// What it shows now.
    #[must_use]
    pub fn look(&self) -> Seen {
        Seen {
            free_bytes: self.memory().filter(|[total, ..]| self.is_of_device(*total)).map(|[_total, free, _used]| free),
            utilization: self.rates().map(|[compute, _memory]| f64::from(compute) / 100.0),
            temperature: self.temperature(),
            power_watts: self.milliwatts().map(|milliwatts| f64::from(milliwatts) / 1_000.0),
        }
    }

    /// Whether NVML's total is about CUDA's.
    fn is_of_device(&self, total: u64) -> bool {
        let apart = |known: u64| u128::from(known.abs_diff(total)) * 100;
        self.total_bytes.is_some_and(|known| apart(known) <= u128::from(known) * u128::from(MOST_APART))
    }

    fn memory(&self) -> Option<[u64; 3]> {
        let ask = self.symbol::<MemoryFn>("nvmlDeviceGetMemoryInfo")?;
        let mut sizes = [0; 3];
        // SAFETY: the handle is this library's; `nvmlMemory_t` is three 64-bit numbers: total, free, used.
        (unsafe { ask(self.device(), &raw mut sizes) } == 0).then_some(sizes)
    }

    fn rates(&self) -> Option<[c_uint; 2]> {
        let ask = self.symbol::<RatesFn>("nvmlDeviceGetUtilizationRates")?;
        let mut rates = [0; 2];
        // SAFETY: the handle is this library's; `nvmlUtilization_t` is two numbers in percent: compute, memory.
        (unsafe { ask(self.device(), &raw mut rates) } == 0).then_some(rates)
    }

    fn temperature(&self) -> Option<u32> {
        let ask = self.symbol::<TemperatureFn>("nvmlDeviceGetTemperature")?;
        let mut degrees = 0;
        // SAFETY: the handle is this library's; the number is written to a local.
        (unsafe { ask(self.device(), ON_CHIP, &raw mut degrees) } == 0).then_some(degrees)
    }

    fn milliwatts(&self) -> Option<u32> {
        let ask = self.symbol::<PowerFn>("nvmlDeviceGetPowerUsage")?;
        let mut milliwatts = 0;
        // SAFETY: the handle is this library's; the number is written to a local.
        (unsafe { ask(self.device(), &raw mut milliwatts) } == 0).then_some(milliwatts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::search::stand_in;

    /// A GPU of 80,000 bytes, of which 50,000 are free.
    const TEXT: &str = r#"
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **handle) { *handle = (void *)bus; return bus[0] != '0'; }
int nvmlDeviceGetMemoryInfo(void *, unsigned long long *to) { to[0] = 80000, to[1] = 50000, to[2] = 30000; return 0; }
int nvmlDeviceGetUtilizationRates(void *, unsigned *to) { to[0] = 25, to[1] = 0; return 0; }
int nvmlDeviceGetTemperature(void *, int, unsigned *to) { *to = 41; return 0; }
int nvmlDeviceGetPowerUsage(void *, unsigned *to) { *to = 300000; return 0; }
}
"#;

    #[test]
    fn memory_of_another_device_than_cudas_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NAME);
        if !stand_in(&path, TEXT) {
            return;
        }
        let mut monitor = GpuMonitor::load(&path, "0000:01:00.0").unwrap();
        let all =
            Seen { free_bytes: Some(50_000), utilization: Some(0.25), temperature: Some(41), power_watts: Some(300.0) };
        for (total_bytes, free_bytes) in [
            (Some(80_000), Some(50_000)),
            // What CUDA has of a whole one, and the edges.
            (Some(79_500), Some(50_000)),
            (Some(76_191), Some(50_000)),
            (Some(76_190), None),
            (Some(84_210), Some(50_000)),
            (Some(84_211), None),
            // Slices.
            (Some(40_000), None),
            (Some(9_900), None),
            (Some(0), None),
            (None, None),
        ] {
            monitor.total_bytes = total_bytes;
            assert_eq!(monitor.look(), Seen { free_bytes, ..all }, "{total_bytes:?}");
        }
    }
}
