//! The kernels as NVIDIA's compiler sees them: all compile for three generations of devices, none runs out of registers, and those that
//! read a weight have asked for it before they wait for the kernel before them, and for what comes next before they use what came.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::shim::{skip, units};

/// Ampere, Hopper, Blackwell.
const GENERATIONS: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

/// How lines on the order of an entry point's instructions begin.
const AHEAD: &str = "loads before the wait: ";
const BETWEEN: &str = "loads between turns: ";

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

/// Loads of a thread before it waits, by how the names of entry points begin and end: what a product asks of its weight ahead (eight
/// reads, or all stages but the last) with its scales, and the counts and lists of attention. The first that fits counts.
const READ_AHEAD: [(&str, &str, usize); 13] = [
    ("gemm_f32", "", 0),
    ("gemm_q8_f32", "", 0),
    ("gemm_fp8_f32", "", 0),
    ("gemm_m64_q8", "", 19),
    ("gemm_m64", "", 13),
    ("gemm_m128_q8", "", 7),
    ("gemm_m128_fp8", "", 5),
    ("gemm_q8", "", 7),
    ("gemm_fp8", "", 5),
    ("gemm_m128", "", 9),
    ("decode_attention", "16", 4),
    ("gem", "_q8_f32,_q8_f16,_q8_bf16", 17),
    ("gem", "", 9),
];

/// The same for what is under way whenever the loop of a product of few rows begins anew: eight reads, some of which FP8 on Blackwell asks
/// for a little later.
const READ_ON: [(&str, &str, usize); 9] = [
    ("gemv", "_f32", 0),
    ("gemv_b1_fp8", "", 5),
    ("gemv_b2_fp8", "", 5),
    ("gemv", "", 8),
    ("gemm_m8", "", 8),
    ("gemm_m16", "", 8),
    ("gemm_m32", "", 8),
    ("experts_m8_fp8", "", 7),
    ("experts_m8", "", 8),
];

/// Entry points that have asked for less than they hold ahead, by what the assembler made of them: when they wait for the kernel before
/// them, or between the turns of a loop.
fn hesitant(report: &str) -> Vec<String> {
    let fits = |name: &str, (start, ends, _): &(&str, &str, usize)| {
        name.starts_with(start) && ends.split(',').any(|end| name.ends_with(end))
    };
    let late = |line: &str| {
        let table = [(AHEAD, &READ_AHEAD[..]), (BETWEEN, &READ_ON)];
        let (rest, least) = table.into_iter().find_map(|(head, least)| Some((line.strip_prefix(head)?, least)))?;
        let (n, name) = rest.split_once(' ')?;
        let least = least.iter().find(|row| fits(name, row)).map_or(0, |row| row.2);
        n.parse::<usize>().is_ok_and(|n| n < least).then(|| line.to_owned())
    };
    report.lines().filter_map(late).collect()
}

#[test]
fn kernels_compile_for_three_generations_spill_nothing_and_read_ahead() {
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
                // Ampere has no wait.
                let n_waits = report.lines().filter(|line| line.starts_with(AHEAD)).count();
                assert_eq!(n_waits, if *generation == "sm_80" { 0 } else { n_reported }, "{generation}: {report}");
                let n_loops = report.lines().filter(|line| line.starts_with(BETWEEN)).count();
                assert!(n_loops >= 2, "loops that read are seen: {generation}: {report}");
                faults.extend(
                    spills(&report).into_iter().chain(hesitant(&report)).map(|fault| format!("{generation} {fault}")),
                );
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

#[test]
fn a_late_load_is_seen_in_a_report() {
    let report = "loads before the wait: 9 gemv_b1_bf16\n\
                  loads before the wait: 4 gemv_b2_bf16\n\
                  loads before the wait: 0 embed_bf16\n\
                  loads before the wait: 0 gemm_f32\n\
                  loads before the wait: 12 gemm_m64_f16\n\
                  loads before the wait: 9 gemm_m16_q8_bf16\n\
                  loads between turns: 4 gemv_b1_bf16\n\
                  loads between turns: 8 gemm_m8_bf16\n\
                  loads between turns: 5 gemv_b1_fp8_bf16\n\
                  loads between turns: 4 gemv_b1_f32\n";
    let expect = [
        "before the wait: 4 gemv_b2_bf16",
        "before the wait: 12 gemm_m64_f16",
        "before the wait: 9 gemm_m16_q8_bf16",
        "between turns: 4 gemv_b1_bf16",
    ];
    assert_eq!(hesitant(report), expect.map(|fault| format!("loads {fault}")));
}
