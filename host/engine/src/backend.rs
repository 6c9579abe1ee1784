//! Where step plans are computed. Each backend packs a model its own way and keeps its `unsafe` to itself.

pub mod cpu;
