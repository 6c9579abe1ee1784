//! The engine from outside: against candle, against itself in other batches, and against bad input.

mod common;
mod golden;
mod invariance;
mod loading;
mod oracle;
mod plans;
