//! The pure decision core: what the next step computes, as a deterministic, single-threaded state machine.
//!
//! No tensors, text, async, threads, clock or global randomness; time and seeds are arguments, so that a simulation can
//! replay any history. This crate also owns the seams of the host: [`admit::AdmitPolicy`], [`route::RoutePolicy`],
//! [`batch::BatchPolicy`], [`retention::RetentionPolicy`], [`sampler::SamplerWorker`], [`mask::TokenMask`],
//! [`execute::Executor`], [`request::TokenSink`], [`observe::Observer`]. A policy proposes; the scheduler alone checks what is feasible and enforces the budgets.
//!
//! Where to start reading: [`scheduler`] holds the crank and its invariants; what it decides with is [`blocks`] (who owns
//! which page of KV), [`prefix`] (which pages may be reused) and [`batch`] (what a policy may propose).
//!
//! Limits: 32-bit positions and block numbers, queues preallocated to [`config::Config`], one model per scheduler. Nothing
//! allocates in a steady step; arrivals and admissions may.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod admit;
pub mod batch;
pub mod blocks;
pub mod config;
pub mod draft;
pub mod execute;
mod hash;
pub mod ids;
mod kv;
pub mod mask;
pub mod observe;
pub mod predict;
pub mod prefix;
pub mod publish;
pub mod request;
pub mod retention;
pub mod route;
pub mod sampler;
pub mod scheduler;
mod sequence;
mod told;
mod waiting;
