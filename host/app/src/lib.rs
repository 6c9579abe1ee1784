//! The composition root: configuration, command line, threads, wiring, signals. Decisions live in the crates below it.
//!
//! A library with a thin binary, so that the end-to-end tests can build the same `main` beside themselves.
#![forbid(unsafe_code)]

mod aliases;
mod anomaly;
mod apply;
mod bench;
mod builtin;
mod causes;
mod cli;
mod client;
mod clock;
mod config;
mod deploy;
mod device_commands;
mod devices;
mod doctor;
mod draft_models;
mod driver;
mod encoders;
mod engine;
mod explain;
mod files;
mod gpu_check;
pub mod host;
mod keys;
mod loading;
mod models;
mod monitor;
mod null;
mod observer;
mod oci;
mod output;
mod pace;
mod plugin;
mod recorded;
mod reference;
mod rollouts;
mod roster;
mod serve;
mod shelf;
mod store;
mod tapped;
mod tls;
mod trust;
mod upstreams;

use std::process::ExitCode;

use clap::Parser;
use pointsman_engine::cuda::NoGpu;

use crate::cli::{Cli, Command};
use crate::output::Output;

pub use plugin::inputs;

/// Runs the command line: exit code 0 is good, 1 a fault that was named, 2 wrong usage, 3 a check of a GPU where there is none,
/// 141 output that nobody reads.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let is_check = matches!(cli.command, Some(Command::GpuCheck(_)));
    let mut out = Output::default();
    let outcome = match cli.command {
        None => serve::serve(&cli.serve),
        Some(Command::Serve(args)) => serve::serve(&args),
        Some(Command::Policy(command)) => client::run(command, &mut out),
        Some(Command::Alias(command)) => client::alias(command, &mut out),
        Some(Command::Model(command)) => loading::run(command, &mut out),
        Some(Command::Key(command)) => keys::run(command, &mut out),
        Some(Command::Cache(command)) => client::cache(command, &mut out),
        Some(Command::Device(command)) => device_commands::run(command, &mut out),
        Some(Command::Plugin(command)) => plugin::run(command, &mut out),
        Some(Command::Doctor(args)) => doctor::run(&args, &mut out),
        Some(Command::Apply(args)) => apply::run(&args, &mut out),
        Some(Command::Bench(args)) => bench::run(&args, &mut out),
        Some(Command::GpuCheck(args)) => gpu_check::run(&args, &mut out),
        Some(Command::Compile) => return ExitCode::from(pointsman_policy::compile_child_main()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if out.is_closed() => ExitCode::from(output::CLOSED),
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the fault that ends the program")]
            {
                eprintln!("pointsman: {}", causes::told(error.chain()));
            }
            // A check that had nothing to check has not failed.
            ExitCode::from(if is_check && error.is::<NoGpu>() { 3 } else { 1 })
        }
    }
}
