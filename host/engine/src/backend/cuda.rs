//! The CUDA backend: always built, and used where a driver and a device are found when the program runs.
//!
//! Read in this order: what fits (`vram`, `layout`), what is launched (`bucket`, `launch`, `splits`, `step`), who runs it (`tune`, `engine`), and
//! on what (`device`, `gpu`, `pool`, `code`, `nvrtc`, `cublaslt`). All but the last five is plain arithmetic and is tested without a GPU: the engine
//! runs the same launches through the kernels compiled for the CPU and must choose the CPU backend's tokens.
//!
//! In three layers, as CUDA bindings usually are: cudarc's raw calls, its checked results, and the safe `Gpu` here.

mod bucket;
pub mod cases;
mod check;
mod code;
mod cublaslt;
mod device;
mod element;
mod engine;
mod gpu;
mod launch;
mod layout;
mod monitor;
mod nvrtc;
mod pool;
mod search;
mod splits;
mod step;
mod trial;
mod tune;
mod vram;
mod weights;

pub use bucket::{Buckets, StepShape};
pub use check::{Flip, Parity, ParityCase, ParityError, put_on_grid};
pub use code::{COMPILE_OPTIONS, CodeOptions, Origin, Unit};
pub use device::{
    Device, DeviceError, DeviceInfo, DeviceLaunch, DeviceRoom, Gemm, GemmAddresses, GemmId, GemmOutput, GraphId, Lane,
    Rows, Turn, Value,
};
pub use element::{Element, Form};
pub use engine::{CudaEngine, CudaError, CudaOptions, plan_memory};
pub use gpu::{FoundGpu, Gpu, NoGpu, discover};
pub use monitor::{GpuMonitor, Seen};
pub use nvrtc::{NoNvrtc, Nvrtc, NvrtcError, Output};
pub use trial::{Shape, Trial, Way, ways, weight_bytes};
pub use tune::{GemmChoice, LibraryUse};
pub use vram::{Advice, Bytes, Footprint, KvWish, PoolShare, VramError, VramFree, VramPlan, VramUse};
pub use weights::Source;
