//! The kernels as NVIDIA's compiler sees them: all compile for three generations of devices, and none runs out of registers.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::shim::{skip, units};

/// Ampere, Hopper, Blackwell.
const GENERATIONS: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

/// The compiler's report; `None` where there is no compiler.
fn compile(generation: &str, source: &str) -> Option<Result<String, String>> {
    let mut python = Command::new("python3")
        .args(["-c", include_str!("nvrtc.py"), generation])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    // One that ends early has no compiler, which its exit code says.
    let _ = python.stdin.take().map(|mut stdin| stdin.write_all(source.as_bytes()));
    let output = python.wait_with_output().ok()?;
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.code() {
        Some(0) => Some(Ok(report)),
        Some(2) => None,
        _ => Some(Err(report + &String::from_utf8_lossy(&output.stderr))),
    }
}

/// Functions that keep registers in memory, by the assembler's report.
fn spills(report: &str) -> Vec<String> {
    let mut function = "";
    let mut found = Vec::new();
    for line in report.lines() {
        if let Some((_, name)) = line.split_once("Compiling entry function ").or(line.split_once("properties for ")) {
            function = name;
        }
        if line.contains("spill") && !line.contains(" 0 bytes spill stores, 0 bytes spill loads") {
            found.push(format!("{function}: {}", line.trim()));
        }
    }
    found
}

#[test]
fn kernels_compile_for_three_generations_and_spill_nothing() {
    let mut faults = Vec::new();
    for (generation, unit) in
        GENERATIONS.iter().flat_map(|generation| units().into_iter().map(move |(.., unit)| (generation, unit)))
    {
        let Some(compiled) = compile(generation, &unit) else {
            let why = "no libnvrtc.so, so the CUDA kernels are not compiled (pip install nvidia-cuda-nvrtc-cu12)";
            return skip("nvrtc", why);
        };
        match compiled {
            Ok(report) => {
                let n_reported = report.matches("Compiling entry function").count();
                assert!(n_reported >= 7, "the assembler reports on every kernel: {report}");
                faults.extend(spills(&report).into_iter().map(|spill| format!("{generation} {spill}")));
            }
            Err(report) => faults.push(format!("{generation}: {report}")),
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn a_spill_is_seen_in_a_report() {
    let report = "ptxas info    : Compiling entry function 'gemm_f16' for 'sm_80'\n\
                  ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                  ptxas info    : Compiling entry function 'gemm_m32_f16' for 'sm_80'\n\
                  ptxas         .     8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n";
    let spills = spills(report);
    assert!(spills.len() == 1 && spills[0].starts_with("'gemm_m32_f16'"), "{spills:?}");
}
