//! The code that talks to NVIDIA's driver, without one: a library with the driver's name and functions, whose device is the shim.
//!
//! What `cuda_engine` leaves open: contexts, streams, copies that are late, graphs, modules, attributes, and that everything is given
//! back. The library (`driver.cpp`) does nothing before it must and refuses what a driver refuses. The
//! loader's path is read when a process starts, so the test starts itself again.
#![expect(clippy::unwrap_used, reason = "tests, and the functions they share")]

mod library;
#[expect(dead_code, reason = "the tests of kernels need more of it")]
#[path = "../cuda_kernels/shim.rs"]
mod shim;

use std::process::Command;

use pointsman_engine::ComputePool;
use pointsman_engine::cuda::cases::{self, CaseRunner, Placement};
use pointsman_engine::cuda::{
    self, CodeOptions, Device, DeviceError, FoundGpu, Gemm, GemmOutput, Gpu, Lane, NoNvrtc, Nvrtc, Origin, ParityCase,
    Rows, Turn, Unit,
};

/// The device's name in the library.
const NAME: &str = "the shim";

/// What the other process says at its end.
const DONE: &str = "everything came back";

#[test]
fn the_backend_works_on_a_driver_that_is_late() {
    let Some(folder) = library::folder() else { return };
    let own = std::env::current_exe().unwrap();
    let output = Command::new(own)
        .args(["--exact", "in_the_other_process", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains(DONE) && !said.contains("something is left"), "{said}");
}

#[test]
fn a_compiler_that_is_newer_than_the_driver_is_named() {
    let Some(folder) = library::late_compiler() else { return };
    // As if the driver were older than any, whatever else this machine has.
    let none = Nvrtc::find(std::slice::from_ref(&folder), 0).err();
    let found = folder.join("libnvrtc.so").display().to_string();
    assert_eq!(none, Some(NoNvrtc::TooNew { found, version: (99, 1), newest: 0 }));
    let told = none.unwrap().to_string();
    assert!(told.contains("is of CUDA 99.1, and the driver takes no code of CUDA 1 or later"), "{told}");
    assert_eq!(Nvrtc::find(&[folder], 99).unwrap().version(), (99, 1));
}

/// Does nothing unless the driver is the library, which it is in the process that the test above starts.
#[test]
fn in_the_other_process() {
    let found = cuda::discover().unwrap_or_default();
    let Some(found) = found.into_iter().find(|gpu| gpu.info.name == NAME) else { return };
    let free = |gpu: &mut Gpu| gpu.memory().unwrap().free;
    let mut keeper = open(&found);
    let before = free(&mut keeper);
    kernels(&found);
    pools(&found);
    resized(&found);
    steps(&found);
    products(&found);
    refusals(&found);
    assert_eq!(free(&mut keeper), before);
    say_done();
}

#[expect(clippy::print_stderr, reason = "read by the process that started this one")]
fn say_done() {
    eprintln!("{DONE}");
}

/// Products that the library has been asked for, in the process that has it.
#[expect(unsafe_code, reason = "the library's own count of them")]
fn multiplied() -> u64 {
    // SAFETY: the file is the one made above, where it is already loaded, and its function takes nothing.
    unsafe {
        let library = libloading::Library::new("libcublasLt.so.13").unwrap();
        let count = library.get::<unsafe extern "C" fn() -> u64>(b"shim_multiplied\0").unwrap();
        count()
    }
}

fn open(found: &FoundGpu) -> Gpu {
    let code = CodeOptions { ptx_only: true, cublaslt: true, ..CodeOptions::default() };
    Gpu::open(found.clone().supported().unwrap(), code, true).unwrap()
}

/// Single kernels, with and without shared memory that must be asked for.
fn kernels(found: &FoundGpu) {
    let mut gpu = open(found);
    assert!(gpu.overlaps(), "compute capability 9.0");
    gpu.load_unit(Unit::Step).unwrap();
    assert_eq!(gpu.origins().collect::<Vec<_>>(), [(Unit::Step, Origin::Ptx)]);
    assert!(!gpu.overlaps(), "code from PTX does not wait for the kernel before");
    let largest = cases::products::cases(cuda::Element::Bf16).into_iter().filter(|case| case.call.shared > 0).take(1);
    let mut runner = CaseRunner::new(&mut gpu, Placement::Fenced).unwrap();
    for case in cases::memory::cases().into_iter().chain(largest) {
        runner.run(&case).unwrap();
    }
}

/// Memory that goes and comes back while its addresses stay.
fn pools(found: &FoundGpu) {
    const MIB: u64 = 1 << 20;
    let mut gpu = open(found);
    assert_eq!(gpu.resize_pool(MIB, MIB).unwrap(), None, "there is none yet");
    let before = gpu.memory().unwrap().free;
    let at = gpu.allocate_pool(16 * MIB).unwrap();
    let held = |gpu: &mut Gpu| before - gpu.memory().unwrap().free;
    assert_eq!(held(&mut gpu), 16 * MIB);
    let mut words = [1; 4];
    gpu.download(at + 16 * MIB - 16, &mut words).unwrap();
    assert_eq!(words, [0; 4]);
    gpu.upload(at, &[7; 16]).unwrap();
    gpu.upload(at + 16 * MIB - 16, &[7; 16]).unwrap();
    // In chunks of a quarter of one.
    assert_eq!(gpu.resize_pool(5 * MIB + 1, 0).unwrap(), Some(5 * MIB + MIB / 4));
    assert_eq!(held(&mut gpu), 5 * MIB + MIB / 4);
    let taken = gpu.memory().unwrap().free - 3 * MIB;
    gpu.allocate(taken).unwrap();
    assert_eq!(gpu.pool_piece(), MIB / 4);
    assert_eq!(gpu.resize_pool(16 * MIB, 7 * MIB - 1).unwrap(), Some(7 * MIB - MIB / 4), "as far as it may");
    assert_eq!(gpu.resize_pool(16 * MIB, u64::MAX).unwrap(), Some(8 * MIB + MIB / 4), "as far as there is memory");
    assert_eq!(gpu.resize_pool(99 * MIB, u64::MAX).unwrap(), Some(8 * MIB + MIB / 4));
    for (place, expect) in [(at, 0x0707_0707), (at + 8 * MIB, 0)] {
        gpu.download(place, &mut words).unwrap();
        assert_eq!(words, [expect; 4]);
    }
    let refused = open(found).allocate_pool(16 * MIB);
    assert!(matches!(refused, Err(DeviceError::OutOfMemory { .. })), "{refused:?}");
}

/// Steps of a model, through graphs and one by one.
fn steps(found: &FoundGpu) {
    let pool = ComputePool::start(1).unwrap();
    let [with_graphs, without, ahead] =
        [ParityCase::all().remove(2), ParityCase::eager().remove(0), ParityCase::ahead().remove(0)];
    for mut case in [with_graphs, without, ahead] {
        case.prompts.truncate(3);
        case.rows = vec![1, 2, 3, 3];
        let parity = case.run(Box::new(open(found)), &pool).unwrap();
        assert!(parity.is_good(), "{parity}");
    }
}

/// A model whose pool shrinks and grows between its steps, which are graphs all the while.
fn resized(found: &FoundGpu) {
    let pool = ComputePool::start(1).unwrap();
    // Several of the pieces that are mapped at once here.
    let case = ParityCase { prompts: vec![3, 100], rows: vec![1, 2], ..ParityCase::resized().remove(1) };
    let parity = case.run(Box::new(open(found)), &pool).unwrap();
    assert!(parity.is_good() && parity.steps > 3, "{parity}");
}

/// Prompts whose products a library computes.
fn products(found: &FoundGpu) {
    let pool = ComputePool::start(1).unwrap();
    let run = |case: &ParityCase, rows: &[usize]| {
        let before = multiplied();
        let case = ParityCase { rows: rows.to_vec(), prompts: vec![41; 3], step_tokens: 128, ..case.clone() };
        let parity = case.run(Box::new(open(found)), &pool).unwrap();
        assert!(parity.is_good(), "{parity}");
        multiplied() - before
    };
    for case in ParityCase::by_library().into_iter().take(3) {
        // Four products of two layers, in one step of three prompts: what a load alone tries is the same.
        assert_eq!(run(&case, &[3]), run(&case, &[1]) + 8);
    }
    let mut gpu = open(found);
    gpu.enter().unwrap();
    let gemm = Gemm { element: cuda::Element::Bf16, k: 64, n: 32, output: GemmOutput::AddToF32 };
    assert_eq!(gpu.gemms(&gemm, 100, 1 << 20).unwrap().len(), 2, "the third cannot be taken");
    assert!(gpu.notes().is_empty(), "{:?}", gpu.notes());
    gpu.start_timer().unwrap();
    assert_eq!(gpu.stop_timer().unwrap(), 0.001, "the event itself");
}

/// Faults that leave the device usable, and one that says it is lost.
fn refusals(found: &FoundGpu) {
    let mut gpu = open(found);
    let refused = gpu.allocate(1 << 40);
    assert!(matches!(refused, Err(DeviceError::OutOfMemory { asked, .. }) if asked == 1 << 40), "{refused:?}");
    let refused = gpu.load(&[(0, "no_such_kernel".to_owned())]);
    assert!(matches!(refused, Err(DeviceError::NoKernel { .. })), "{refused:?}");
    let at = gpu.allocate(64).unwrap();
    gpu.upload(at, &[7; 64]).unwrap();
    let mut words = [0; 16];
    gpu.download(at, &mut words).unwrap();
    assert_eq!(words, [0x0707_0707; 16]);
    let (inputs, outputs) = (Lane::Inputs(Turn::Odd), Lane::Outputs(Turn::Even));
    gpu.allocate_lane(inputs, 4).unwrap();
    gpu.allocate_lane(outputs, 4).unwrap();
    for beyond in [
        gpu.receive(outputs, at, 5),
        gpu.send(inputs, at, 5),
        gpu.send_rows(inputs, 1, at, Rows { n: 2, words: 2, pitch: 4 }),
    ] {
        let told = beyond.unwrap_err().to_string();
        assert!(told.contains("5 words of a lane of 4"), "{told}");
    }
    let lost = gpu.upload(at, &[7; 65]).unwrap_err();
    assert!(lost.is_lost() && lost.to_string().contains("restart the host"), "{lost}");
}
