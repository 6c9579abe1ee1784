//! The engine from outside: against candle, against itself in other batches, and against bad input.
#![expect(clippy::unwrap_used, reason = "tests, and the functions they share")]

mod common;
mod convert;
mod drafts;
mod encoders;
mod families;
mod gguf;
mod gguf_file;
mod golden;
mod invariance;
mod loading;
mod oracle;
mod plans;
mod scores;
