//! The CPU backend: the reference for every other, and always built.
//!
//! Batch invariance is its promise: the key, value and logit bits of a token are a function of its sequence alone, not of
//! the chunk it was computed in, of the rows beside it, of the number of threads, or of the instruction set.

mod aligned;
mod attention;
pub(crate) mod background;
mod block_dots;
mod block_tiles;
mod blocks;
mod dots;
mod encoder;
mod engine;
mod experts;
mod gemm;
mod heap;
mod isa;
mod kv;
mod limits;
mod math;
mod matrix;
mod model;
mod norm;
mod pool;
mod quant;
mod rows;
mod scaled_supers;
pub(crate) mod softmax;
mod super_dots;
mod super_tiles;
mod supers;

pub use background::lowest_priority;
pub use encoder::Encoder;
pub use engine::{CpuEngine, MemoryUse};
pub use heap::{give_back_freed, keep_little_freed};
pub use isa::Isa;
pub(crate) use isa::{LANES, Lanes};
pub use kv::KvPlan;
pub use model::{Model, Precision, Progress, UnknownPrecision};
pub use pool::{ComputePool, PoolError};
