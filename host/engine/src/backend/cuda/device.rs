//! What the engine asks of a device: memory, copies, launches and graphs, in order on one stream.
//!
//! A trait, though there is one device in production, because the other one runs in every test: the same kernels compiled for
//! the CPU. Everything with a lifetime (allocations, pinned memory, graphs) belongs to the device and goes with it.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::element::Element;
use super::vram::VramFree;

/// A device's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As its driver names it.
    pub name: String,
    /// Multiprocessors.
    pub n_sms: u32,
    /// Compute capability.
    pub capability: (u32, u32),
}

/// What a device has for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRoom {
    /// Its memory.
    pub memory: VramFree,
    /// Multiprocessors.
    pub n_sms: u32,
    /// Whether it has a library of products.
    pub has_library: bool,
}

/// Host memory from which and into which a step is copied, of one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Tokens, positions, block tables.
    Inputs(Turn),
    /// Sampling rules and the lists that they point into.
    Rules(Turn),
    /// Sampled tokens and log-probabilities.
    Outputs(Turn),
}

/// Steps take turns, so that one is written while the one before it is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turn {
    /// Of a step that is begun while none is under way, and of every other one behind it.
    #[default]
    Odd,
    /// Of the others.
    Even,
}

/// Rows of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// How many.
    pub n: usize,
    /// Words of each.
    pub words: usize,
    /// Words from one to the next on the device.
    pub pitch: usize,
}

/// One kernel on one grid, with its arguments as the kernel wants them.
#[derive(Clone, Copy, Debug)]
pub struct DeviceLaunch<'a> {
    /// Number under which the kernel was loaded.
    pub kernel: usize,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory, in bytes.
    pub shared: u32,
    /// Addresses and constants.
    pub args: &'a [Value],
}

/// An argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// Of a buffer; 0 is none.
    Address(u64),
    /// A constant.
    U32(u32),
    /// A constant.
    U64(u64),
    /// A constant.
    F32(f32),
}

/// What a library does with the result of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmOutput {
    /// Stores it in the type of its inputs.
    Store,
    /// Adds it to what is there, in `f32`.
    AddToF32,
}

/// A product `y = x * w^T`: `x` of some rows by `k`, `w` of `n` by `k`, `y` of as many rows by `n`, all row-major and without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gemm {
    /// Type of `x` and `w`. Sums are in `f32`.
    pub element: Element,
    /// What is summed over.
    pub k: usize,
    /// Rows of the weight.
    pub n: usize,
    /// Where the result goes.
    pub output: GemmOutput,
}

/// An algorithm of a device's library for a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmId(pub usize);

/// Addresses of a product's matrices, and bytes that a library may write beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmAddresses {
    /// The weight.
    pub w: u64,
    /// What it is multiplied by.
    pub x: u64,
    /// The result.
    pub y: u64,
    /// Aligned to 256 bytes.
    pub workspace: u64,
    /// Of these, so many.
    pub workspace_bytes: u64,
}

/// A captured sequence of launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphId(pub usize);

/// A fault of a device or its driver.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No memory is left. Nothing else is lost.
    #[error("out of device memory: {}, {free} free; serve a smaller model, or lower engine.gpu_kv_mib", wanted(*asked))]
    OutOfMemory {
        /// What was asked for; 0 where the driver needs memory of its own.
        asked: u64,
        /// What there was.
        free: u64,
    },
    /// The driver refused something. Whether a retry can help depends on `code`.
    #[error("{call} failed: {code} ({text})")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its error.
        code: Arc<str>,
        /// The same in words.
        text: Arc<str>,
    },
    /// The context is gone, and with it everything on the device. The process must be started again.
    #[error(
        "the device is lost: {call} failed with {code} ({text}); restart the host, and look at the kernel log for Xid lines"
    )]
    Lost {
        /// The driver's function that said so first.
        call: &'static str,
        /// Its error.
        code: Arc<str>,
        /// The same in words.
        text: Arc<str>,
    },
    /// NVIDIA's library refused a product, which was not computed.
    #[error("cuBLASLt: {call} failed with {code} ({text})")]
    Library {
        /// The library's function.
        call: &'static str,
        /// Its status.
        code: i32,
        /// The same in words.
        text: &'static str,
    },
    /// A kernel is not in the code that was loaded: a fault of the build.
    #[error("the kernels that were loaded lack {entry}; rebuild them")]
    NoKernel {
        /// Its entry point.
        entry: String,
    },
}

fn wanted(asked: u64) -> String {
    match asked {
        0 => "the driver needs some of its own".to_owned(),
        bytes => format!("{bytes} bytes asked for"),
    }
}

/// Memory, copies, launches and graphs. Calls other than `upload`, `download`, `wait`, `reach` and `allocate` may return before they are
/// done; they are done in the order in which they were made.
pub trait Device: Send + Debug {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// What is worth a line in the log: where its code came from, what is missing and costs speed.
    fn notes(&self) -> &[String] {
        &[]
    }

    /// What it has and what is free.
    ///
    /// # Errors
    /// The driver's.
    fn memory(&mut self) -> Result<VramFree, DeviceError>;

    /// Makes the device the calling thread's. Called before a step, because a model is loaded by another thread than steps.
    ///
    /// # Errors
    /// The driver's.
    fn enter(&mut self) -> Result<(), DeviceError>;

    /// Finds the kernels with these entry points; launches name them by number.
    ///
    /// # Errors
    /// One does not exist.
    fn load(&mut self, entries: &[(usize, String)]) -> Result<(), DeviceError>;

    /// Zeroed memory, aligned to 256 bytes, until the device is dropped. Every address that a launch is given lies in it.
    ///
    /// # Errors
    /// There is not enough.
    fn allocate(&mut self, bytes: u64) -> Result<u64, DeviceError>;

    /// The same, once, of memory whose end can be [given back](Self::resize_pool) where the device can do that.
    ///
    /// # Errors
    /// There is not enough.
    fn allocate_pool(&mut self, bytes: u64) -> Result<u64, DeviceError> {
        self.allocate(bytes)
    }

    /// Keeps the pool's first so many bytes, and gives the rest back, or takes memory for so many again, of those that it was allocated
    /// with, and no piece of it beyond `most`. The bytes that it has now: up to a piece more than asked for, or fewer where the
    /// driver gives no more. `None` where it keeps its size. Waits for everything.
    ///
    /// # Errors
    /// The driver's; it has what it had.
    fn resize_pool(&mut self, _bytes: u64, _most: u64) -> Result<Option<u64>, DeviceError> {
        Ok(None)
    }

    /// Bytes of the pool that are given back and taken at once.
    fn pool_piece(&self) -> u64 {
        1
    }

    /// Host memory of a lane, in words; once per lane.
    ///
    /// # Errors
    /// There is not enough.
    fn allocate_lane(&mut self, lane: Lane, words: usize) -> Result<(), DeviceError>;

    /// The host memory of a lane. Not to be touched between a copy and the next `wait`, or `reach` of its turn.
    fn lane(&mut self, lane: Lane) -> &mut [u32];

    /// Copies from any host memory; done on return.
    ///
    /// # Errors
    /// The driver's.
    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Copies words to any host memory; done on return.
    ///
    /// # Errors
    /// The driver's.
    fn download(&mut self, from: u64, words: &mut [u32]) -> Result<(), DeviceError>;

    /// Copies the first words of a lane to the device.
    ///
    /// # Errors
    /// The driver's.
    fn send(&mut self, lane: Lane, to: u64, words: usize) -> Result<(), DeviceError>;

    /// Copies rows of words that lie side by side in a lane, from word `from` on, to rows on the device that lie a pitch apart.
    ///
    /// # Errors
    /// The driver's.
    fn send_rows(&mut self, lane: Lane, from: usize, to: u64, rows: Rows) -> Result<(), DeviceError>;

    /// Copies words from the device into a lane.
    ///
    /// # Errors
    /// The driver's.
    fn receive(&mut self, lane: Lane, from: u64, words: usize) -> Result<(), DeviceError>;

    /// Launches a kernel. While a capture is on, it is recorded instead.
    ///
    /// # Errors
    /// The driver's.
    fn launch(&mut self, launch: &DeviceLaunch<'_>) -> Result<(), DeviceError>;

    /// Whether it has a library of products.
    fn has_library(&self) -> bool {
        false
    }

    /// What a model has to share.
    ///
    /// # Errors
    /// The driver's.
    fn room(&mut self) -> Result<DeviceRoom, DeviceError> {
        Ok(DeviceRoom { memory: self.memory()?, n_sms: self.info().n_sms, has_library: self.has_library() })
    }

    /// A library's algorithms for a product of up to so many rows, the likeliest first; each needs at most so many bytes of
    /// workspace. None where the device has no library.
    ///
    /// # Errors
    /// The library's.
    fn gemms(&mut self, _gemm: &Gemm, _rows: usize, _workspace_bytes: u64) -> Result<Vec<GemmId>, DeviceError> {
        Ok(Vec::new())
    }

    /// Computes a product of exactly so many rows by one of these algorithms. Never while a capture is on.
    ///
    /// # Errors
    /// The library's.
    fn multiply(&mut self, id: GemmId, _rows: usize, _at: GemmAddresses) -> Result<(), DeviceError> {
        Err(DeviceError::NoKernel { entry: format!("product {}", id.0) })
    }

    /// From here on the device looks at its clock.
    ///
    /// # Errors
    /// The driver's.
    fn start_timer(&mut self) -> Result<(), DeviceError>;

    /// Waits for everything, and tells the seconds that what was launched since `start_timer` took on the device.
    ///
    /// # Errors
    /// The driver's, and a fault of anything before.
    fn stop_timer(&mut self) -> Result<f64, DeviceError>;

    /// Whether launches can be captured.
    fn captures(&self) -> bool;

    /// Whether a kernel may start while the one before it ends.
    fn overlaps(&self) -> bool {
        false
    }

    /// Gives up a recording that failed, and launches that start before the one before them has ended; whether there were
    /// such, so that it may work now.
    fn stop_overlap(&mut self, _why: &DeviceError) -> bool {
        false
    }

    /// Starts recording launches.
    ///
    /// # Errors
    /// The driver's.
    fn begin_capture(&mut self) -> Result<(), DeviceError>;

    /// Ends it.
    ///
    /// # Errors
    /// The driver's; something in between cannot be captured.
    fn end_capture(&mut self) -> Result<GraphId, DeviceError>;

    /// Runs what was recorded.
    ///
    /// # Errors
    /// The driver's.
    fn replay(&mut self, graph: GraphId) -> Result<(), DeviceError>;

    /// Ends a turn: what comes later is of another one.
    ///
    /// # Errors
    /// The driver's.
    fn mark(&mut self, turn: Turn) -> Result<(), DeviceError>;

    /// Waits for everything up to the last end of a turn, and for nothing later.
    ///
    /// # Errors
    /// A fault of anything before.
    fn reach(&mut self, turn: Turn) -> Result<(), DeviceError>;

    /// Waits for everything.
    ///
    /// # Errors
    /// A fault of anything before.
    fn wait(&mut self) -> Result<(), DeviceError>;
}

/// Held by who records launches, and by who waits for all that a context does, as a library does when it goes: the driver refuses
/// such a wait while anybody records, and ends the recording.
pub(super) fn in_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Blocks that fill memory with a word.
const FILL_BLOCKS: u32 = 256;

/// Fills memory with a word, of which the bits of a mask are as good as random, by `fill_words`, which was loaded under a number.
pub(super) fn fill(
    device: &mut dyn Device,
    kernel: usize,
    (to, bytes): (u64, u64),
    [word, mask]: [u32; 2],
) -> Result<(), DeviceError> {
    let args = [Value::Address(to), Value::U64(bytes / 4), Value::U32(word), Value::U32(mask)];
    device.launch(&DeviceLaunch { kernel, grid: [FILL_BLOCKS, 1, 1], block: 256, shared: 0, args: &args })?;
    device.wait()
}

/// Entry points that were loaded one by one, by number.
#[derive(Debug, Default)]
pub(super) struct Entries(Vec<String>);

impl Entries {
    /// The number of one, which is loaded where it has not been.
    pub(super) fn number_of(&mut self, device: &mut dyn Device, entry: &str) -> Result<usize, DeviceError> {
        if let Some(number) = self.0.iter().position(|loaded| loaded == entry) {
            return Ok(number);
        }
        let number = self.0.len();
        device.load(&[(number, entry.to_owned())])?;
        self.0.push(entry.to_owned());
        Ok(number)
    }
}

impl Lane {
    /// How many there are.
    pub const COUNT: usize = 6;

    /// A number below [`COUNT`](Self::COUNT).
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Inputs(turn) => turn as usize,
            Self::Rules(turn) => 2 + turn as usize,
            Self::Outputs(turn) => 4 + turn as usize,
        }
    }

    /// Whose it is.
    #[must_use]
    pub fn turn(self) -> Turn {
        let (Self::Inputs(turn) | Self::Rules(turn) | Self::Outputs(turn)) = self;
        turn
    }
}

impl Turn {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Odd, Self::Even];

    /// The one after it.
    #[must_use]
    pub fn next(self) -> Self {
        match self {
            Self::Odd => Self::Even,
            Self::Even => Self::Odd,
        }
    }
}

impl Value {
    /// Its bits; those of a narrow one are the low ones, which come first in memory.
    #[must_use]
    pub fn bits(self) -> u64 {
        match self {
            Self::Address(n) | Self::U64(n) => n,
            Self::U32(n) => n.into(),
            Self::F32(x) => x.to_bits().into(),
        }
    }
}

impl DeviceError {
    /// Whether the device is gone for this process.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}
