//! An NVIDIA GPU behind the [`Device`] trait, through CUDA's driver API, which is looked for at run time.
//!
//! cudarc's thin layer and not its safe one: the safe one allocates through a pool and follows every buffer with events,
//! which cannot be captured, and knows no launch that may overlap the end of the one before. Here one thread at a time owns a
//! context, a stream and everything on it; memory is a few allocations that live as long as the device, and a [`pool`](super::pool).
#![expect(unsafe_code, reason = "the driver API is a C interface")]

use std::ffi::{CStr, CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{DriverError, result, sys};

use super::code::{CodeOptions, Origin, Target, Unit};
use super::cublaslt::{CublasLt, LtPlan};
use super::device::{
    Device, DeviceError, DeviceInfo, DeviceLaunch, Gemm, GemmAddresses, GemmId, GraphId, Lane, Rows, Turn,
};
use super::pool::Pool;
use super::vram::VramFree;

/// Dynamic shared memory beyond this must be asked for.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

/// Most arguments of a kernel.
const MAX_ARGS: usize = 24;

/// The oldest compute capability that the kernels run on.
const OLDEST: (u32, u32) = (8, 0);

/// The oldest driver that takes the PTX, by the CUDA that it knows.
const OLDEST_DRIVER: (u32, u32) = (12, 0);

/// The oldest driver whose graphs keep that a launch may start before the one before it has ended.
const OVERLAP_IN_GRAPHS: (u32, u32) = (12, 3);

/// Most bytes of what the driver says about code that it refuses.
const JIT_LOG_BYTES: usize = 8 << 10;

/// A GPU that answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundGpu {
    /// Its number: the N of `cuda:N`.
    pub ordinal: u32,
    /// What it is.
    pub info: DeviceInfo,
    /// Its memory.
    pub total_bytes: u64,
    /// As in `0000:01:00.0`.
    pub bus_id: String,
    /// The newest CUDA version that the driver knows.
    pub driver: (u32, u32),
}

/// Why there is no GPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGpu {
    /// No driver on this machine, or not where the loader looks.
    #[error("no NVIDIA driver is installed: libcuda is not in the loader's path")]
    NoDriver,
    /// The driver does not start.
    #[error("the NVIDIA driver does not start: {0}")]
    Driver(DeviceError),
    /// The driver sees nothing.
    #[error("the NVIDIA driver sees no device; is one hidden by CUDA_VISIBLE_DEVICES?")]
    NoDevice,
    /// A driver from before the kernels.
    #[error("the NVIDIA driver is of CUDA {}.{}, and the kernels need one of 12.0 or later; update it", version.0, version.1)]
    OldDriver {
        /// The newest CUDA that it knows.
        version: (u32, u32),
    },
    /// Older than the kernels.
    #[error(
        "cuda:{ordinal} ({name}) has compute capability {}.{}, and the kernels need 8.0 (Ampere) or later",
        capability.0,
        capability.1
    )]
    TooOld {
        /// Its number.
        ordinal: u32,
        /// As the driver names it.
        name: String,
        /// What it has.
        capability: (u32, u32),
    },
    /// Not the one that was asked for.
    #[error("there is no cuda:{asked}; the driver sees {count} devices, from cuda:0")]
    NoSuch {
        /// Its number.
        asked: u32,
        /// How many there are.
        count: u32,
    },
}

/// A GPU with a context, a stream, and everything that was allocated there.
#[derive(Debug)]
pub struct Gpu {
    found: FoundGpu,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    code: CodeOptions,
    modules: Vec<(Unit, sys::CUmodule, Origin)>,
    /// By number.
    functions: Vec<Option<sys::CUfunction>>,
    allocations: Vec<sys::CUdeviceptr>,
    pool: Option<Pool>,
    lanes: [Pinned; Lane::COUNT],
    graphs: Vec<sys::CUgraphExec>,
    library: Option<CublasLt>,
    gemm_plans: Vec<LtPlan>,
    /// Around what is timed.
    events: Vec<sys::CUevent>,
    /// Where a turn ends, by turn.
    marks: Vec<sys::CUevent>,
    /// Lets a kernel start while the one before it ends. Never with code from PTX: that is for compute capability 8.0, which has
    /// no instruction to wait for the kernel before.
    overlap: bool,
    notes: Vec<String>,
}

/// Pinned host memory.
#[derive(Debug)]
struct Pinned {
    at: *mut u32,
    words: usize,
}

// SAFETY: every handle here (context, stream, module, function, graph, memory) belongs to the driver, which takes it from any
// thread that has made the context its own; `enter` does that before a step. `Gpu` is not `Sync`: one thread at a time uses it.
unsafe impl Send for Gpu {}

// === impl NoGpu ===

impl NoGpu {
    /// Whether a machine without a GPU looks like this, so that there is nothing to repair.
    #[must_use]
    pub fn is_usual(&self) -> bool {
        matches!(self, Self::NoDriver | Self::NoDevice)
    }
}

// === impl FoundGpu ===

impl FoundGpu {
    /// Itself, if the kernels run on it.
    ///
    /// # Errors
    /// It or its driver is too old, in words for the operator.
    pub fn supported(self) -> Result<Self, NoGpu> {
        if self.driver < OLDEST_DRIVER {
            return Err(NoGpu::OldDriver { version: self.driver });
        }
        match self.info.capability {
            capability if capability >= OLDEST => Ok(self),
            capability => Err(NoGpu::TooOld { ordinal: self.ordinal, name: self.info.name, capability }),
        }
    }
}

// === finding ===

/// The GPUs of this machine.
///
/// # Errors
/// There is none, in words for the operator.
pub fn discover() -> Result<Vec<FoundGpu>, NoGpu> {
    // SAFETY: asks the loader for libcuda, whose initialisers are NVIDIA's.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoGpu::NoDriver);
    }
    result::init().map_err(|error| match error.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => NoGpu::NoDevice,
        _ => NoGpu::Driver(start_fault("cuInit", error)),
    })?;
    let count = result::device::get_count().map_err(|error| NoGpu::Driver(start_fault("cuDeviceGetCount", error)))?;
    if count == 0 {
        return Err(NoGpu::NoDevice);
    }
    // One that does not answer hides no other.
    let (found, silent): (Vec<_>, Vec<_>) = (0..count).map(describe).partition(Result::is_ok);
    match silent.into_iter().find_map(Result::err) {
        Some(fault) if found.is_empty() => Err(NoGpu::Driver(fault)),
        _ => Ok(found.into_iter().flatten().collect()),
    }
}

fn describe(ordinal: i32) -> Result<FoundGpu, DeviceError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let device = check_start("cuDeviceGet", result::device::get(ordinal))?;
    let attribute = |which| {
        // SAFETY: the device is one that the driver has just named.
        let value = unsafe { result::device::get_attribute(device, which) };
        check_start("cuDeviceGetAttribute", value).map(|n| u32::try_from(n).unwrap_or(0))
    };
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let bus = attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
    let slot = attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
    let domain = attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
    let mut version = 0;
    // SAFETY: the version is written to a local.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    check_start("cuDriverGetVersion", code.result())?;
    let version = u32::try_from(version).unwrap_or(0);
    // SAFETY: as above.
    let total = check_start("cuDeviceTotalMem", unsafe { result::device::total_mem(device) })?;
    Ok(FoundGpu {
        ordinal: u32::try_from(ordinal).unwrap_or(0),
        info: DeviceInfo {
            name: check_start("cuDeviceGetName", result::device::get_name(device))?,
            n_sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            capability,
        },
        total_bytes: total as u64,
        bus_id: format!("{domain:04x}:{bus:02x}:{slot:02x}.0"),
        driver: (version / 1_000, version % 1_000 / 10),
    })
}

// === faults ===

pub(super) fn check<T>(call: &'static str, result: Result<T, DriverError>) -> Result<T, DeviceError> {
    result.map_err(|error| fault(call, error))
}

fn fault(call: &'static str, error: DriverError) -> DeviceError {
    if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return out_of_memory(0);
    }
    let (code, text) = words_of(error);
    if is_lost(error.0) { DeviceError::Lost { call, code, text } } else { DeviceError::Driver { call, code, text } }
}

fn out_of_memory(asked: u64) -> DeviceError {
    DeviceError::OutOfMemory { asked, free: result::mem_get_info().map_or(0, |(free, _)| free as u64) }
}

/// The same of what asked for so many bytes.
fn asking<T>(asked: u64, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
    result.map_err(|error| match error {
        DeviceError::OutOfMemory { free, .. } => DeviceError::OutOfMemory { asked, free },
        other => other,
    })
}

/// Of a call from before anything was computed, when there is no device yet that could be lost.
fn check_start<T>(call: &'static str, result: Result<T, DriverError>) -> Result<T, DeviceError> {
    result.map_err(|error| start_fault(call, error))
}

fn start_fault(call: &'static str, error: DriverError) -> DeviceError {
    let repairable = remedy(error.0).map(|remedy| repairable(call, words_of(error), remedy));
    repairable.unwrap_or_else(|| fault(call, error))
}

fn repairable(call: &'static str, (code, text): (Arc<str>, Arc<str>), remedy: &str) -> DeviceError {
    DeviceError::Driver { call, code, text: format!("{text}; {remedy}").into() }
}

/// An error's name and what the driver says of it; its number where the driver, a stub say, does not know it.
pub(super) fn words_of(error: DriverError) -> (Arc<str>, Arc<str>) {
    let words = |text: Result<&CStr, DriverError>| -> Arc<str> {
        text.map_or_else(|_| format!("error {}", error.0 as u32).into(), |text| text.to_string_lossy().into())
    };
    (words(error.error_name()), words(error.error_string()))
}

/// What to repair on the machine where the driver does not start or gives no device; nothing for faults that are none of those.
fn remedy(code: sys::CUresult) -> Option<&'static str> {
    use sys::CUresult as E;
    match code {
        E::CUDA_ERROR_STUB_LIBRARY => Some(
            "a toolkit's stub was loaded for libcuda: take its `stubs` folder out of the library path, or put the folder of the \
            driver's own libcuda before it",
        ),
        E::CUDA_ERROR_DEVICE_UNAVAILABLE => Some(
            "another process has the GPU in exclusive compute mode: end that one, or change the mode, which `nvidia-smi -q -d \
            COMPUTE` shows",
        ),
        E::CUDA_ERROR_SYSTEM_NOT_READY => Some(
            "the device is not ready: a machine with NVSwitch needs nvidia-fabricmanager, of the driver's version; start it",
        ),
        E::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => Some(
            "libcuda and the kernel module are of different versions: restart the machine after an update of the driver, or take a \
            `compat` libcuda out of the library path",
        ),
        E::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => Some(
            "the libcuda for forward compatibility does not support this GPU: take its `compat` folder out of the library path",
        ),
        E::CUDA_ERROR_UNKNOWN => Some(
            "often /dev/nvidia-uvm is missing: give it to the container, or make it with `nvidia-modprobe -u -c 0`; where it is \
            there, look at the kernel log for lines of NVRM and Xid",
        ),
        _ => None,
    }
}

/// Refuses a copy beyond a lane, as the driver would if it knew where that ends: a fault of this program.
fn within(call: &'static str, words: usize, lane: usize) -> Result<(), DeviceError> {
    if words <= lane {
        return Ok(());
    }
    let text = format!("{words} words of a lane of {lane}").into();
    Err(DeviceError::Driver { call, code: "CUDA_ERROR_INVALID_VALUE".into(), text })
}

/// Whether the driver answers nothing but the same error for this context from now on, or nothing at all.
fn is_lost(code: sys::CUresult) -> bool {
    use sys::CUresult as E;
    matches!(
        code,
        E::CUDA_ERROR_ILLEGAL_ADDRESS
            | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | E::CUDA_ERROR_MISALIGNED_ADDRESS
            | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | E::CUDA_ERROR_INVALID_PC
            | E::CUDA_ERROR_HARDWARE_STACK_ERROR
            | E::CUDA_ERROR_LAUNCH_FAILED
            | E::CUDA_ERROR_LAUNCH_TIMEOUT
            | E::CUDA_ERROR_ASSERT
            | E::CUDA_ERROR_ECC_UNCORRECTABLE
            | E::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | E::CUDA_ERROR_INVALID_CONTEXT
            | E::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | E::CUDA_ERROR_DEINITIALIZED
            | E::CUDA_ERROR_DEVICE_UNAVAILABLE
            | E::CUDA_ERROR_EXTERNAL_DEVICE
            | E::CUDA_ERROR_CONTAINED
            | E::CUDA_ERROR_TENSOR_MEMORY_LEAK
            | E::CUDA_ERROR_SYSTEM_NOT_READY
            | E::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
            | E::CUDA_ERROR_MPS_CONNECTION_FAILED
            | E::CUDA_ERROR_MPS_RPC_FAILURE
            | E::CUDA_ERROR_MPS_CLIENT_TERMINATED
            | E::CUDA_ERROR_UNKNOWN
    )
}

/// Gives code to the driver, which says in words what is wrong with it.
///
/// # Safety
/// The image is a whole CUBIN, or a text that ends in a zero byte.
unsafe fn load_module(image: &[u8]) -> Result<sys::CUmodule, DeviceError> {
    use sys::CUjit_option_enum as JitOption;
    let (mut module, mut log) = (std::ptr::null_mut(), vec![0u8; JIT_LOG_BYTES]);
    let mut options = [JitOption::CU_JIT_ERROR_LOG_BUFFER, JitOption::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(log.len())];
    // SAFETY: the image is as the caller says and outlives the call, which copies it, and so do the options; the second value is
    // the length of the first one's buffer.
    let code = unsafe {
        let n_options = options.len() as u32;
        sys::cuModuleLoadDataEx(
            &raw mut module,
            image.as_ptr().cast(),
            n_options,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let log = CStr::from_bytes_until_nul(&log).map_or(String::new(), |log| log.to_string_lossy().trim().to_owned());
    match (check("cuModuleLoadDataEx", code.result()), log.as_str()) {
        (Err(DeviceError::Driver { call, code, text }), log) if !log.is_empty() => {
            Err(DeviceError::Driver { call, code, text: format!("{text}: {log}").into() })
        }
        (result, _) => result.map(|()| module),
    }
}

/// Keeps a GPU's context until the process ends: libraries have state in it that they do not make anew, and a model that comes when
/// the last one has gone need not wait for another.
fn keep_context(device: sys::CUdevice) {
    static KEPT: Mutex<Vec<sys::CUdevice>> = Mutex::new(Vec::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the device is one that the driver has named. This use of its context is never given back.
    if !kept.contains(&device) && unsafe { result::primary_ctx::retain(device) }.is_ok() {
        kept.push(device);
    }
}

// === impl Gpu ===

impl Gpu {
    /// Takes a GPU: a context and a stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn open(found: FoundGpu, code: CodeOptions, overlap: bool) -> Result<Self, DeviceError> {
        let device = check_start("cuDeviceGet", result::device::get(i32::try_from(found.ordinal).unwrap_or(i32::MAX)))?;
        // SAFETY: the device is one that the driver has named; the context is given back on drop.
        let context = check_start("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        keep_context(device);
        let lane = || Pinned { at: std::ptr::NonNull::dangling().as_ptr(), words: 0 };
        let overlap = overlap && found.info.capability.0 >= 9 && found.driver >= OVERLAP_IN_GRAPHS;
        let mut gpu = Self {
            found,
            device,
            context,
            stream: std::ptr::null_mut(),
            code,
            modules: Vec::new(),
            functions: Vec::new(),
            allocations: Vec::new(),
            pool: None,
            lanes: std::array::from_fn(|_| lane()),
            graphs: Vec::new(),
            library: None,
            gemm_plans: Vec::new(),
            events: Vec::new(),
            marks: Vec::new(),
            overlap,
            notes: Vec::new(),
        };
        gpu.enter()?;
        gpu.stream = check("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        for _ in Turn::ALL {
            let made = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            gpu.marks.push(check("cuEventCreate", made)?);
        }
        if gpu.code.cublaslt {
            gpu.find_library();
        }
        Ok(gpu)
    }

    /// What it is.
    #[must_use]
    pub fn found(&self) -> &FoundGpu {
        &self.found
    }

    /// The code that was loaded, and where it came from.
    pub fn origins(&self) -> impl Iterator<Item = (Unit, Origin)> + '_ {
        self.modules.iter().map(|&(unit, _, origin)| (unit, origin))
    }

    /// Loads a unit's code, which is done when a kernel of it is asked for: so that it is known where it came from.
    ///
    /// # Errors
    /// The driver's.
    pub fn load_unit(&mut self, unit: Unit) -> Result<(), DeviceError> {
        self.module(unit).map(drop)
    }

    fn module(&mut self, unit: Unit) -> Result<sys::CUmodule, DeviceError> {
        if let Some((_, module, _)) = self.modules.iter().find(|(loaded, ..)| *loaded == unit) {
            return Ok(*module);
        }
        let code = self.code.make(unit, Target { capability: self.found.info.capability, driver: self.found.driver });
        // The same of each unit.
        self.notes.extend(code.note.filter(|note| !self.notes.contains(note)));
        let mut origin = code.origin;
        // SAFETY: the image is a CUBIN or a text that ends in a zero byte, and outlives the call, which copies it.
        let mut loaded = unsafe { load_module(&code.image) };
        if let (Err(why), Some(ptx)) = (&loaded, &code.fallback) {
            self.notes.push(format!("the driver refuses the compiled kernels, so it compiles them from PTX: {why}"));
            // SAFETY: as above.
            loaded = unsafe { load_module(ptx) };
            origin = Origin::Ptx;
        }
        let module = loaded?;
        self.overlap &= origin != Origin::Ptx;
        self.modules.push((unit, module, origin));
        Ok(module)
    }

    /// Takes NVIDIA's library of products, where there is one. Before memory is divided: it takes some of its own.
    fn find_library(&mut self) {
        match CublasLt::find(&self.code.folders, self.found.driver.0) {
            Ok(library) => self.library = Some(library),
            Err(why) => self.notes.push(format!("long prompts may take longer: {why}")),
        }
    }

    /// Makes memory zero: a number that is none would spoil sums even where it counts for nothing.
    fn clear(&mut self, at: u64, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's `at` has so many bytes.
        check("cuMemsetD8Async", unsafe { result::memset_d8_async(at, 0, bytes, self.stream) })?;
        self.wait()
    }

    fn events(&mut self) -> Result<[sys::CUevent; 2], DeviceError> {
        let make = || check("cuEventCreate", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT));
        while self.events.len() < 2 {
            self.events.push(make()?);
        }
        Ok([self.events[0], self.events[1]])
    }

    fn launch_config(&self, launch: &DeviceLaunch<'_>, attribute: &mut sys::CUlaunchAttribute) -> sys::CUlaunchConfig {
        let [x, y, z] = launch.grid;
        sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream,
            attrs: attribute,
            numAttrs: u32::from(self.overlap),
        }
    }
}

impl Device for Gpu {
    fn info(&self) -> &DeviceInfo {
        &self.found.info
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn memory(&mut self) -> Result<VramFree, DeviceError> {
        let (free, total) = check("cuMemGetInfo", result::mem_get_info())?;
        Ok(VramFree { total: total as u64, free: free as u64 })
    }

    fn enter(&mut self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained until drop.
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }

    fn load(&mut self, entries: &[(usize, String)]) -> Result<(), DeviceError> {
        for (number, entry) in entries {
            let module = self.module(Unit::of(entry))?;
            let name = CString::new(entry.as_str()).map_err(|_| DeviceError::NoKernel { entry: entry.clone() })?;
            // SAFETY: the module stays loaded until drop.
            let function = unsafe { result::module::get_function(module, name) };
            let function = function.map_err(|error| match error.0 {
                sys::CUresult::CUDA_ERROR_NOT_FOUND => DeviceError::NoKernel { entry: entry.clone() },
                _ => fault("cuModuleGetFunction", error),
            })?;
            self.functions.resize(self.functions.len().max(number + 1), None);
            self.functions[*number] = Some(function);
        }
        Ok(())
    }

    fn allocate(&mut self, bytes: u64) -> Result<u64, DeviceError> {
        let size = (bytes as usize).max(1);
        // Not from a pool: what is freed goes back to the driver at once.
        // SAFETY: the memory is recorded below and freed on drop.
        let at = asking(bytes, check("cuMemAlloc", unsafe { result::malloc_sync(size) }))?;
        self.allocations.push(at);
        self.clear(at, size)?;
        Ok(at)
    }

    fn allocate_pool(&mut self, bytes: u64) -> Result<u64, DeviceError> {
        let mapped = Pool::reserve(self.device, bytes).and_then(|mut pool| match pool.resize(bytes, u64::MAX) {
            Ok(()) => Ok(pool),
            Err(why) => {
                pool.free();
                Err(why)
            }
        });
        match asking(bytes, mapped) {
            Ok(pool) => {
                let at = pool.at();
                self.pool = Some(pool);
                self.clear(at, bytes as usize)?;
                Ok(at)
            }
            Err(why @ (DeviceError::Lost { .. } | DeviceError::OutOfMemory { .. })) => Err(why),
            Err(why) => {
                self.notes.push(format!("the KV pool keeps its size, for its memory cannot be mapped: {why}"));
                self.allocate(bytes)
            }
        }
    }

    fn resize_pool(&mut self, bytes: u64, most: u64) -> Result<Option<u64>, DeviceError> {
        self.wait()?;
        let Some(pool) = &mut self.pool else { return Ok(None) };
        let (before, fresh) = (pool.bytes(), pool.at() + pool.bytes());
        match pool.resize(bytes, most) {
            // It has what it got.
            Ok(()) | Err(DeviceError::OutOfMemory { .. }) => {}
            Err(fault) => return Err(fault),
        }
        let now = pool.bytes();
        if now > before {
            self.clear(fresh, (now - before) as usize)?;
        }
        Ok(Some(now))
    }

    fn pool_piece(&self) -> u64 {
        self.pool.as_ref().map_or(1, Pool::chunk)
    }

    fn allocate_lane(&mut self, lane: Lane, words: usize) -> Result<(), DeviceError> {
        // SAFETY: recorded below and freed on drop; zeroed before anybody reads it.
        let at = unsafe { result::malloc_host(words.max(1) * 4, 0) }.map_err(|error| {
            // The host's memory, of which the driver says the same as of the device's.
            let (code, text) = words_of(error);
            DeviceError::Driver { call: "cuMemHostAlloc", code, text }
        })?;
        let at = at.cast::<u32>();
        // SAFETY: the allocation has that many words and nobody else knows it yet.
        unsafe { std::ptr::write_bytes(at, 0, words) };
        self.lanes[lane.index()].free();
        self.lanes[lane.index()] = Pinned { at, words };
        Ok(())
    }

    fn lane(&mut self, lane: Lane) -> &mut [u32] {
        let Pinned { at, words } = self.lanes[lane.index()];
        // SAFETY: the lane owns `words` initialised words at `at` (none at a dangling address) until drop, and is borrowed
        // through `&mut self`. The device may read or write it between a copy and the next `wait` or `reach`, when the trait forbids use.
        unsafe { std::slice::from_raw_parts_mut(at, words) }
    }

    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        if bytes.is_empty() {
            return Ok(());
        }
        // On this stream, which waits for no other: models that serve share the context, and their steps are not waited for.
        // SAFETY: the caller's buffer at `to` holds that many bytes: both come from one table of sizes; they outlive the wait.
        check("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(to, bytes, self.stream) })?;
        self.wait()
    }

    fn download(&mut self, from: u64, words: &mut [u32]) -> Result<(), DeviceError> {
        self.wait()?;
        // SAFETY: as in `upload`.
        check("cuMemcpyDtoH", unsafe { result::memcpy_dtoh_sync(words, from) })
    }

    fn send(&mut self, lane: Lane, to: u64, words: usize) -> Result<(), DeviceError> {
        let Pinned { at, words: all } = self.lanes[lane.index()];
        within("cuMemcpyHtoDAsync", words, all)?;
        // SAFETY: within the lane, which is pinned and not touched before it is done; the buffer at `to` is as long.
        let copied = unsafe {
            let from = std::slice::from_raw_parts(at, words);
            result::memcpy_htod_async(to, from, self.stream)
        };
        check("cuMemcpyHtoDAsync", copied)
    }

    fn send_rows(&mut self, lane: Lane, from: usize, to: u64, rows: Rows) -> Result<(), DeviceError> {
        let Rows { n, words, pitch } = rows;
        let Pinned { at, words: all } = self.lanes[lane.index()];
        if n == 0 || words == 0 {
            return Ok(());
        }
        within("cuMemcpy2DAsync", from + n * words, all)?;
        // SAFETY: within the lane.
        let rows = unsafe { at.add(from) };
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: rows.cast_const().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: 4 * words,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: 4 * pitch,
            WidthInBytes: 4 * words,
            Height: n,
        };
        // SAFETY: the rows lie within the lane, which is pinned and not touched before it is done; the buffer at `to` has as
        // many of that pitch.
        check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.stream) }.result())
    }

    fn receive(&mut self, lane: Lane, from: u64, words: usize) -> Result<(), DeviceError> {
        let stream = self.stream;
        let lane = self.lane(lane);
        within("cuMemcpyDtoHAsync", words, lane.len())?;
        // SAFETY: within the lane, which is pinned and not touched before it is done.
        check("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(&mut lane[..words], from, stream) })
    }

    fn launch(&mut self, launch: &DeviceLaunch<'_>) -> Result<(), DeviceError> {
        let function = self.functions.get(launch.kernel).copied().flatten();
        let function = function.ok_or_else(|| DeviceError::NoKernel { entry: format!("number {}", launch.kernel) })?;
        let mut args = [0u64; MAX_ARGS];
        args.iter_mut().zip(launch.args).for_each(|(to, arg)| *to = arg.bits());
        let mut pointers: [*mut c_void; MAX_ARGS] = std::array::from_fn(|i| (&raw mut args[i]).cast());
        // SAFETY: an attribute is plain data, for which zeros are valid.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = self.launch_config(launch, &mut attribute);
        if launch.shared > SHARED_WITHOUT_ASKING {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(launch.shared).unwrap_or(i32::MAX);
            // SAFETY: the function belongs to a loaded module.
            let set = unsafe { result::function::set_function_attribute(function, which, bytes) };
            check("cuFuncSetAttribute", set)?;
        }
        // SAFETY: the function is of a loaded module. The kernel reads as many arguments as it declares, each at most eight
        // bytes, from the copies above, during the call; the addresses among them are of buffers that live as long as the
        // device, with the sizes that the launch plan was made from.
        let code = unsafe { sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        check("cuLaunchKernelEx", code.result())
    }

    fn has_library(&self) -> bool {
        self.library.is_some()
    }

    fn gemms(&mut self, gemm: &Gemm, rows: usize, workspace_bytes: u64) -> Result<Vec<GemmId>, DeviceError> {
        let Some(library) = &self.library else { return Ok(Vec::new()) };
        let first = self.gemm_plans.len();
        self.gemm_plans.extend(library.plans(gemm, rows, workspace_bytes)?);
        Ok((first..self.gemm_plans.len()).map(GemmId).collect())
    }

    fn multiply(&mut self, id: GemmId, rows: usize, at: GemmAddresses) -> Result<(), DeviceError> {
        let (Some(library), Some(plan)) = (&self.library, self.gemm_plans.get(id.0)) else {
            return Err(DeviceError::NoKernel { entry: format!("product {}", id.0) });
        };
        // SAFETY: the stream is ours, and its context this thread's since `enter`. The addresses are of buffers that live as long as
        // the device; they come from the launch plan, as the sizes do for which the algorithm was asked.
        unsafe { library.multiply(plan, rows, at, self.stream.cast()) }
    }

    fn start_timer(&mut self) -> Result<(), DeviceError> {
        let [start, _] = self.events()?;
        // SAFETY: the event and the stream are ours.
        check("cuEventRecord", unsafe { result::event::record(start, self.stream) })
    }

    fn stop_timer(&mut self) -> Result<f64, DeviceError> {
        let [start, end] = self.events()?;
        // SAFETY: as in `start_timer`.
        check("cuEventRecord", unsafe { result::event::record(end, self.stream) })?;
        self.wait()?;
        // SAFETY: both were recorded, and the stream has come past them.
        let milliseconds = check("cuEventElapsedTime", unsafe { result::event::elapsed(start, end) })?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    fn captures(&self) -> bool {
        true
    }

    fn overlaps(&self) -> bool {
        self.overlap
    }

    fn stop_overlap(&mut self, why: &DeviceError) -> bool {
        // What was recorded goes; outside a capture the driver refuses, and nothing is lost.
        // SAFETY: the stream is ours; the graph, if there is one, was recorded just now and is used nowhere else.
        unsafe {
            if let Ok(graph) = result::stream::end_capture(self.stream)
                && !graph.is_null()
            {
                let _ = result::graph::destroy(graph);
            }
        }
        if self.overlap {
            self.notes.push(format!("launches that overlap could not be recorded, so further ones do not: {why}"));
        }
        std::mem::take(&mut self.overlap)
    }

    fn begin_capture(&mut self) -> Result<(), DeviceError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours and idle.
        check("cuStreamBeginCapture", unsafe { result::stream::begin_capture(self.stream, mode) })
    }

    fn end_capture(&mut self) -> Result<GraphId, DeviceError> {
        // SAFETY: a capture was begun on this stream.
        let graph = check("cuStreamEndCapture", unsafe { result::stream::end_capture(self.stream) })?;
        // SAFETY: the graph is the one that was just captured; it is not needed once it is instantiated.
        let (made, destroyed) = unsafe {
            let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            (made, result::graph::destroy(graph))
        };
        let made = check("cuGraphInstantiate", made)?;
        self.graphs.push(made);
        check("cuGraphDestroy", destroyed)?;
        // SAFETY: both are alive. Uploading now keeps it out of the first replay.
        check("cuGraphUpload", unsafe { result::graph::upload(made, self.stream) })?;
        self.wait()?;
        Ok(GraphId(self.graphs.len() - 1))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), DeviceError> {
        // SAFETY: graphs are destroyed on drop only.
        check("cuGraphLaunch", unsafe { result::graph::launch(self.graphs[graph.0], self.stream) })
    }

    fn mark(&mut self, turn: Turn) -> Result<(), DeviceError> {
        // SAFETY: the event and the stream are ours.
        check("cuEventRecord", unsafe { result::event::record(self.marks[turn as usize], self.stream) })
    }

    fn reach(&mut self, turn: Turn) -> Result<(), DeviceError> {
        // SAFETY: the event is ours.
        check("cuEventSynchronize", unsafe { result::event::synchronize(self.marks[turn as usize]) })
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        // SAFETY: the stream is ours.
        check("cuStreamSynchronize", unsafe { result::stream::synchronize(self.stream) })
    }
}

impl Pinned {
    fn free(&mut self) {
        if self.words > 0 {
            // SAFETY: it came from `malloc_host`, and `words` says that it has not been freed.
            let _ = unsafe { result::free_host(self.at.cast()) };
            self.words = 0;
        }
    }
}

impl Drop for Gpu {
    /// Gives everything back. Errors are passed over: on a lost device each of these calls fails, and the process ends soon.
    fn drop(&mut self) {
        let (plans, library) = (std::mem::take(&mut self.gemm_plans), self.library.take());
        if self.enter().is_err() {
            // They belong to a context that is gone; mapped memory belongs to none.
            std::mem::forget((plans, library));
            self.pool.take().into_iter().for_each(Pool::free);
            return;
        }
        match self.wait() {
            Err(fault) if fault.is_lost() => std::mem::forget((plans, library)),
            _ => drop((plans, library)),
        }
        // SAFETY: the stream is idle, so nothing uses what is freed; each handle is freed once, and in the order in which one
        // may need another.
        unsafe {
            for graph in self.graphs.drain(..) {
                let _ = result::graph::exec_destroy(graph);
            }
            for event in self.events.drain(..).chain(self.marks.drain(..)) {
                let _ = result::event::destroy(event);
            }
            for (_, module, _) in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            for at in self.allocations.drain(..) {
                let _ = result::free_sync(at);
            }
            self.pool.take().into_iter().for_each(Pool::free);
            self.lanes.iter_mut().for_each(Pinned::free);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_lost_after_faults_that_stay() {
        use sys::CUresult as E;
        for (code, expect) in [
            (E::CUDA_ERROR_OUT_OF_MEMORY, false),
            (E::CUDA_ERROR_INVALID_VALUE, false),
            (E::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, false),
            (E::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, false),
            (E::CUDA_ERROR_ILLEGAL_ADDRESS, true),
            (E::CUDA_ERROR_INVALID_CONTEXT, true),
            (E::CUDA_ERROR_MPS_CLIENT_TERMINATED, true),
            (E::CUDA_ERROR_EXTERNAL_DEVICE, true),
            (E::CUDA_ERROR_UNKNOWN, true),
        ] {
            assert_eq!(is_lost(code), expect, "{code:?}");
        }
    }

    #[test]
    fn a_driver_that_does_not_start_is_told_with_its_remedy() {
        use sys::CUresult as E;
        for (code, expect) in [
            (E::CUDA_ERROR_STUB_LIBRARY, Some("`stubs` folder")),
            (E::CUDA_ERROR_DEVICE_UNAVAILABLE, Some("`nvidia-smi -q -d COMPUTE`")),
            (E::CUDA_ERROR_SYSTEM_NOT_READY, Some("nvidia-fabricmanager, of the driver's version")),
            (E::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, Some("restart the machine after an update of the driver")),
            (E::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, Some("take its `compat` folder out of the library path")),
            (E::CUDA_ERROR_UNKNOWN, Some("/dev/nvidia-uvm is missing")),
            // Told as before: the second of them as a device that is lost.
            (E::CUDA_ERROR_OUT_OF_MEMORY, None),
            (E::CUDA_ERROR_ECC_UNCORRECTABLE, None),
        ] {
            let told = remedy(code).map(|remedy| repairable("cuInit", ("NAME".into(), "what it is".into()), remedy));
            assert!(!told.as_ref().is_some_and(DeviceError::is_lost), "{code:?}: {told:?}");
            let told = told.map(|told| NoGpu::Driver(told).to_string());
            let begins = "the NVIDIA driver does not start: cuInit failed: NAME (what it is; ";
            match (&told, expect) {
                (Some(told), Some(words)) => assert!(told.starts_with(begins) && told.contains(words), "{told}"),
                (told, expect) => assert_eq!(told.as_deref(), expect, "{code:?}"),
            }
        }
    }

    #[test]
    fn only_a_machine_without_a_gpu_has_nothing_to_repair() {
        let fault = repairable("cuInit", ("NAME".into(), "what it is".into()), "repair it");
        let (version, capability) = ((11, 8), (7, 5));
        for (why, expect) in [
            (NoGpu::NoDriver, true),
            (NoGpu::NoDevice, true),
            (NoGpu::Driver(fault), false),
            (NoGpu::OldDriver { version }, false),
            (NoGpu::TooOld { ordinal: 0, name: "a GPU".to_owned(), capability }, false),
            (NoGpu::NoSuch { asked: 1, count: 1 }, false),
        ] {
            assert_eq!(why.is_usual(), expect, "{why}");
        }
    }

    #[test]
    fn devices_older_than_the_kernels_are_refused_by_name() {
        let too_old = "cuda:3 (a GPU) has compute capability 7.5, and the kernels need 8.0 (Ampere) or later";
        let old_driver = "the NVIDIA driver is of CUDA 11.8, and the kernels need one of 12.0 or later; update it";
        for (capability, driver, refused) in [
            ((7, 5), (12, 8), Some(too_old)),
            ((8, 0), (11, 8), Some(old_driver)),
            ((8, 0), (12, 0), None),
            ((8, 9), (12, 8), None),
            ((12, 0), (13, 0), None),
        ] {
            let info = DeviceInfo { name: "a GPU".to_owned(), n_sms: 40, capability };
            let bus_id = "0000:01:00.0".to_owned();
            let found = FoundGpu { ordinal: 3, info, total_bytes: 1, bus_id, driver };
            let error = found.supported().err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), refused, "{capability:?}, {driver:?}");
        }
    }
}
