//! The CUDA engine without a GPU: the launches of its steps, run by the same kernels compiled for the CPU.
//!
//! One random model, loaded by the CPU backend and by the CUDA engine on a device that is the kernels' shim, is given the same
//! plans: mixed prefill and decode, rules, edits, log-probabilities. In `f32` the two must choose the same tokens. What this
//! leaves open is the driver: contexts, graphs and copies need a GPU (`pointsman gpu-check`).
#![expect(clippy::unwrap_used, reason = "tests, and the functions they share")]

#[expect(dead_code, reason = "the tests of the CPU engine need more of it")]
#[path = "../engine/common.rs"]
mod common;
mod device;
mod library;
#[path = "../cuda_kernels/shim.rs"]
mod shim;
mod steps;
mod trials;
