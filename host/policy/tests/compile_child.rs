//! Compiling in a child process. Has its own main because the child is this very program, started again: the test harness
//! would write to the standard output on which the machine code travels.
#![expect(clippy::print_stdout, reason = "it is its own test harness")]

mod support;

use std::process::ExitCode;
use std::time::Duration;

use pointsman_policy::{
    Compile, CompileCommand, CompileError, CompileLimits, Runtime, RuntimeConfig, Slot, UploadError, compile_child_main,
};
use pointsman_sched::route::{Choice, RoutePolicy};
use support::{Bench, prebuilt, replicas, request};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("__compile") => ExitCode::from(compile_child_main()),
        Some("__linger") => {
            // Never reads, never answers: what a compilation without end looks like from outside.
            loop {
                std::thread::park();
            }
        }
        Some("__expire") => {
            let this = rustix::process::getpid();
            rustix::process::kill_process(this, rustix::process::Signal::XCPU).expect("a signal to itself");
            ExitCode::SUCCESS
        }
        Some("--list") => ExitCode::SUCCESS,
        _ => {
            for (name, test) in TESTS {
                test();
                println!("test {name} ... ok");
            }
            ExitCode::SUCCESS
        }
    }
}

const TESTS: &[(&str, fn())] = &[
    ("a_child_compiles_what_the_host_runs", a_child_compiles_what_the_host_runs),
    ("a_child_that_does_not_answer_is_killed", a_child_that_does_not_answer_is_killed),
    ("a_child_over_its_cpu_time_took_too_long", a_child_over_its_cpu_time_took_too_long),
    ("a_child_without_memory_dies_alone", a_child_without_memory_dies_alone),
    ("the_output_is_bounded", the_output_is_bounded),
    ("a_program_that_does_not_exist_is_the_hosts_fault", a_program_that_does_not_exist_is_the_hosts_fault),
    ("one_compilation_at_a_time", one_compilation_at_a_time),
];

fn child(config: &mut RuntimeConfig, argument: &str, limits: CompileLimits) {
    let program = std::env::current_exe().expect("a program");
    config.compile = Compile::Child { command: CompileCommand { program, args: vec![argument.into()] }, limits };
}

fn compile_error(runtime: &Runtime) -> CompileError {
    match runtime.admit(&prebuilt("route-least-loaded")) {
        Err(UploadError::Compile(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn a_child_compiles_what_the_host_runs() {
    let bench = Bench::with(|config| child(config, "__compile", CompileLimits::default()));
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded");
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    assert_eq!(slot.route(1, &request(1), &replicas(4, 2)).choice, Choice::Pick(2));
}

fn a_child_that_does_not_answer_is_killed() {
    let limits = CompileLimits { time: Duration::from_millis(50), ..CompileLimits::default() };
    let bench = Bench::with(|config| child(config, "__linger", limits));
    assert!(matches!(compile_error(&bench.runtime), CompileError::Timeout { .. }));
}

fn a_child_over_its_cpu_time_took_too_long() {
    let bench = Bench::with(|config| child(config, "__expire", CompileLimits::default()));
    assert!(matches!(compile_error(&bench.runtime), CompileError::Timeout { .. }));
}

fn a_child_without_memory_dies_alone() {
    let limits = CompileLimits { memory_bytes: 4 << 20, ..CompileLimits::default() };
    let bench = Bench::with(|config| child(config, "__compile", limits));
    let error = compile_error(&bench.runtime);
    assert!(matches!(error, CompileError::Killed { .. } | CompileError::Refused { .. }), "{error}");
}

fn the_output_is_bounded() {
    let limits = CompileLimits { max_output_bytes: 1_000, ..CompileLimits::default() };
    let bench = Bench::with(|config| child(config, "__compile", limits));
    assert!(matches!(compile_error(&bench.runtime), CompileError::OutputTooLarge { limit: 1_000 }));
}

fn a_program_that_does_not_exist_is_the_hosts_fault() {
    let command = CompileCommand { program: "/nonexistent/compiler".into(), args: Vec::new() };
    let bench = Bench::with(|config| config.compile = Compile::Child { command, limits: CompileLimits::default() });
    let error = UploadError::from(compile_error(&bench.runtime));
    assert!(error.is_host_fault() && error.to_string().contains("/nonexistent/compiler"), "{error}");
}

fn one_compilation_at_a_time() {
    let limits =
        CompileLimits { time: Duration::from_millis(100), queue: Duration::from_millis(1), ..CompileLimits::default() };
    let bench = Bench::with(|config| child(config, "__linger", limits));
    let n_busy = || {
        let outcomes: Vec<CompileError> = std::thread::scope(|scope| {
            let uploads: Vec<_> = (0..2).map(|_| scope.spawn(|| compile_error(&bench.runtime))).collect();
            uploads.into_iter().map(|upload| upload.join().expect("no panic")).collect()
        });
        let n_busy = outcomes.iter().filter(|error| matches!(error, CompileError::Busy { .. })).count();
        assert!(n_busy <= 1, "{outcomes:?}");
        n_busy
    };
    // One whose thread is put aside may come when the other is over.
    assert!((0..20).any(|_| n_busy() == 1), "both compiled at once");
}
