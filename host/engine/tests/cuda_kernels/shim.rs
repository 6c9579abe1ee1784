//! A CUDA device that is a process on this machine: the kernels compiled as C++ with the shim beside this file.
//!
//! Compiled once per content of all sources and kept in cargo's folder for test files. Memory is addressed as on a device: an
//! address may point into an allocation. A fault ends the process, and its words are the error of the call that met it.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

macro_rules! kernel {
    ($name:literal) => {
        ($name, include_str!(concat!("../../src/backend/cuda/kernels/", $name)))
    };
}

type Source = (&'static str, &'static str);

const COMMON: Source = kernel!("common.cuh");
const TYPED: [Source; 7] = [
    kernel!("typed.cuh"),
    kernel!("model.cu"),
    kernel!("gemv.cu"),
    kernel!("tiles.cuh"),
    kernel!("gemm.cu"),
    kernel!("decode.cu"),
    kernel!("prefill.cu"),
];
const QUANTISED: [Source; 3] = [kernel!("typed.cuh"), kernel!("tiles.cuh"), kernel!("quantised.cu")];
const STEP: [Source; 3] = [kernel!("sample.cu"), kernel!("experts.cu"), kernel!("memory.cu")];
const SELFTEST: Source = ("selftest.cu", include_str!("shim/selftest.cu"));
const SHIM: Source = ("shim.h", include_str!("shim/shim.h"));
const RUNNER: Source = ("runner.cpp", include_str!("shim/runner.cpp"));

const OPTIONS: [&str; 8] = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fsanitize=address,alignment",
    "-fno-sanitize-recover=all",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];

/// An argument of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    U32(u32),
    U64(u64),
    F32(f32),
    /// 0 is null.
    Address(u64),
}

/// One launch.
#[derive(Clone, Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) kernel: &'a str,
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
    pub(crate) args: &'a [Arg],
    /// Of the order of blocks and threads.
    pub(crate) seed: u64,
    /// A barrier that does nothing, as the shim names it; empty for none.
    pub(crate) skip: &'a str,
}

/// The process.
#[derive(Debug)]
pub(crate) struct Shim {
    child: Child,
    requests: ChildStdin,
    answers: ChildStdout,
}

impl Shim {
    /// Compiles and starts one; `None`, and a line that says so, without a C++ compiler.
    pub(crate) fn start() -> Option<Self> {
        static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
        let program = PROGRAM.get_or_init(compiled).as_ref()?;
        let mut child = Command::new(program)
            // Allocations live as long as the process, and fibers are no leak.
            .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("what was compiled starts");
        let requests = child.stdin.take().expect("a pipe");
        let answers = child.stdout.take().expect("a pipe");
        Some(Self { child, requests, answers })
    }

    /// The address of so many bytes.
    pub(crate) fn allocate(&mut self, bytes: usize) -> u64 {
        let request = [&0u32.to_le_bytes()[..], &(bytes as u64).to_le_bytes()].concat();
        self.ask(&request).expect("memory for a test")
    }

    pub(crate) fn write(&mut self, to: u64, bytes: &[u8]) {
        let head = [&1u32.to_le_bytes()[..], &to.to_le_bytes(), &(bytes.len() as u64).to_le_bytes()].concat();
        self.requests.write_all(&head).expect("the process lives");
        self.ask(bytes).expect("a write inside an allocation");
    }

    pub(crate) fn read(&mut self, from: u64, to: &mut [u8]) {
        let request = [&2u32.to_le_bytes()[..], &from.to_le_bytes(), &(to.len() as u64).to_le_bytes()].concat();
        self.requests.write_all(&request).expect("the process lives");
        self.answers.read_exact(to).expect("a read inside an allocation");
    }

    /// Runs it to its end; the barriers that it met. After an error the process is gone.
    pub(crate) fn launch(&mut self, launch: &Launch<'_>) -> Result<Vec<String>, String> {
        let mut request = 3u32.to_le_bytes().to_vec();
        let text = |request: &mut Vec<u8>, text: &str| {
            request.extend((text.len() as u64).to_le_bytes());
            request.extend(text.as_bytes());
        };
        text(&mut request, launch.kernel);
        for number in launch.grid.iter().chain([&launch.block, &launch.shared]) {
            request.extend(number.to_le_bytes());
        }
        request.extend(launch.seed.to_le_bytes());
        text(&mut request, launch.skip);
        request.extend((launch.args.len() as u32).to_le_bytes());
        for arg in launch.args {
            let (kind, bits) = match *arg {
                Arg::U32(v) => (0u32, u64::from(v)),
                Arg::U64(v) => (1, v),
                Arg::F32(v) => (2, u64::from(v.to_bits())),
                Arg::Address(v) => (3, v),
            };
            request.extend(kind.to_le_bytes());
            request.extend(bits.to_le_bytes());
        }
        let sites = self.ask(&request)?;
        (0..sites).map(|_| self.site()).collect::<io::Result<_>>().map_err(|e| e.to_string())
    }

    fn site(&mut self) -> io::Result<String> {
        let mut site = vec![0; self.number()? as usize];
        self.answers.read_exact(&mut site)?;
        Ok(String::from_utf8_lossy(&site).into_owned())
    }

    fn number(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.answers.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Sends a request; the number that its answer begins with, or what the process said before it ended.
    fn ask(&mut self, request: &[u8]) -> Result<u64, String> {
        let sent = self.requests.write_all(request).and_then(|()| self.requests.flush());
        sent.and_then(|()| self.number()).map_err(|_| {
            let mut said = String::new();
            if let Some(stderr) = &mut self.child.stderr {
                let _ = stderr.read_to_string(&mut said);
            }
            said
        })
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a tool is required: `POINTSMAN_REQUIRE=a,b`.
#[expect(clippy::disallowed_methods, reason = "the one switch of the test suite")]
pub(crate) fn required(tool: &str) -> bool {
    std::env::var("POINTSMAN_REQUIRE").unwrap_or_default().split(',').any(|t| t == tool)
}

/// Says that a test is skipped for want of a tool; where the tool is required, that is a failure.
pub(crate) fn skip(tool: &str, why: &str) {
    assert!(!required(tool), "{tool} is required here: {why}");
    #[expect(clippy::print_stderr, reason = "a skip must be seen")]
    {
        eprintln!("skipped: {why}");
    }
}

/// A file's text, which knows its name and lines.
pub(crate) fn lined((name, text): &Source) -> String {
    format!("#line 1 \"{name}\"\n{text}")
}

/// The translation units as a device's compiler gets them, each with a name for a namespace and what its entry points end in.
pub(crate) fn units() -> Vec<(String, &'static str, String)> {
    let text = |files: &[Source]| lined(&COMMON) + &files.iter().map(lined).collect::<String>();
    let typed = [("f32", "_f32"), ("f16", "_f16"), ("bf16", "_bf16")].into_iter().enumerate();
    let typed = typed.flat_map(|(number, (name, suffix))| {
        [(name.to_owned(), text(&TYPED)), (format!("{name}_quantised"), text(&QUANTISED))]
            .map(|(name, text)| (name, suffix, format!("#define PM_T {number}\n{text}")))
    });
    typed.chain([("step".to_owned(), "", text(&STEP))]).collect()
}

/// All of the program's text.
pub(crate) fn program() -> String {
    let mut program = lined(&SHIM).replacen("#pragma once\n", "", 1);
    for (name, suffix, unit) in units() {
        program +=
            &format!("\n#define SUFFIX \"{suffix}\"\nnamespace {name} {{\n{unit}}}\n#undef SUFFIX\n#undef PM_T\n");
    }
    program + "#define SUFFIX \"\"\nnamespace selftest {\n" + &lined(&SELFTEST) + "}\n" + &lined(&RUNNER)
}

/// The compiled program.
fn compiled() -> Option<PathBuf> {
    built("cuda-shim", &program(), &OPTIONS)
}

/// What the C++ compiler makes of a text; `None`, and a line that says so, where there is none.
pub(crate) fn built(stem: &str, text: &str, options: &[&str]) -> Option<PathBuf> {
    let mut hash = DefaultHasher::new();
    (text, options).hash(&mut hash);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = folder.join(format!("{stem}-{:016x}", hash.finish()));
    if path.exists() {
        return Some(path);
    }
    // Under a name of its own until it is whole: another test target may compile the same.
    let own = folder.join(format!("{stem}-{}", std::process::id()));
    let source = own.with_extension("cpp");
    fs::write(&source, text).expect("cargo's folder for test files is writable");
    let output = match Command::new("c++").args(options).arg("-o").arg(&own).arg(&source).output() {
        Ok(output) => output,
        Err(error) => {
            skip("c++", &format!("no C++ compiler, so the CUDA kernels are not run on the CPU: {error}"));
            return None;
        }
    };
    assert!(output.status.success(), "the kernels do not compile: {}", String::from_utf8_lossy(&output.stderr));
    fs::remove_file(&source).and_then(|()| fs::rename(&own, &path)).expect("cargo's folder for test files is writable");
    Some(path)
}
