//! The pure decision core: what the next step computes, as a deterministic, single-threaded state machine.
//!
//! No tensors, text, async, threads, clock or global randomness; time and seeds are arguments, so that a simulation can
//! replay any history. This crate also owns the seams of the host: [`route::RoutePolicy`], [`batch::BatchPolicy`],
//! [`execute::Executor`], [`request::TokenSink`]. A policy proposes; the scheduler alone checks what is feasible and
//! enforces the budgets.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod batch;
pub mod execute;
pub mod ids;
pub mod publish;
pub mod request;
pub mod route;
