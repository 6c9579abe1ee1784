//! Where step plans are computed. Each backend packs a model its own way and keeps its `unsafe` to itself.

mod config;
pub mod cpu;
pub mod cuda;

pub use config::{ConfigError, EngineConfig};
