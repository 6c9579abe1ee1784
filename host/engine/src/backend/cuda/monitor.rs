//! What NVIDIA's monitoring library says of a GPU: memory, use, temperature and power. Asked when somebody looks.
//!
//! It comes with the driver and is a library of its own, so it may be missing where CUDA works (in a container, say): then
//! nothing is said. Not from CUDA itself: CUDA knows no temperature, and asking it for free memory from another thread
//! would have to touch the context that steps run in.
#![expect(unsafe_code, reason = "the monitor is a C library")]

use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use libloading::{Library, Symbol};

/// The name under which the driver installs it.
const NAME: &str = "libnvidia-ml.so.1";

/// A GPU's monitor.
#[derive(Debug)]
pub struct GpuMonitor {
    library: Library,
    device: usize,
}

/// What a look showed; nothing where the device does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    /// Memory that no process holds.
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

impl GpuMonitor {
    /// The monitor of the GPU on this bus, as in `0000:01:00.0`; `None` without the library.
    #[must_use]
    pub fn open(bus_id: &str) -> Option<Self> {
        // SAFETY: loading runs the initialisers of NVIDIA's library, which the driver installs under this name.
        let library = unsafe { Library::new(NAME) }.ok()?;
        let mut monitor = Self { library, device: 0 };
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
            free_bytes: self.memory().map(|[_total, free, _used]| free),
            utilization: self.rates().map(|[compute, _memory]| f64::from(compute) / 100.0),
            temperature: self.temperature(),
            power_watts: self.milliwatts().map(|milliwatts| f64::from(milliwatts) / 1_000.0),
        }
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
