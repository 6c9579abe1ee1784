//! Executes step plans: one decoder-transformer definition driven by a [`ModelSpec`], on a backend.
//!
//! Sees token ids and block ids, never requests, users or text; reads no clock and draws no randomness but from seeds that
//! the plan carries. Read in the order below: what a model is, where its weights come from, how tokens are chosen, and how
//! a backend computes. `unsafe` lives in the backends, but for the one line that maps a file of weights.
#![deny(missing_docs)]

pub mod backend;
mod layers;
mod load;
mod sampling;
mod spec;

pub use backend::cpu::{
    ComputePool, CpuEngine, Encoder, KvPlan, MemoryUse, Model, PoolError, Precision, Progress, UnknownPrecision,
    give_back_freed, keep_little_freed, lowest_priority,
};
pub use backend::{ConfigError, EngineConfig, cuda};
pub use load::{LoadError, Weights, gguf};
pub use spec::{
    Activation, EncoderSpec, Experts, FieldError, ModelSpec, Naming, Pooling, Rope, RopeScaling, SpecError, Window,
};
