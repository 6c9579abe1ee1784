//! Turning a component into machine code: in a child process with limits, one at a time, with the result cached.
//!
//! Compiling what a stranger uploaded is a denial of service waiting to happen, and a running compilation cannot be
//! cancelled; a process can. The child is this same program ([`compile_child_main`]), so that it generates exactly what
//! the host loads. Machine code from the child and from the cache is executed: the cache directory belongs to the host
//! alone, its files carry a checksum against damage, and their names carry the digest of the component and a hash of
//! wasmtime's version and configuration.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex, PoisonError, mpsc};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, nice, setrlimit};
use sha2::{Digest as _, Sha256};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::config::{Compile, CompileCommand, CompileLimits};
use crate::engine;
use crate::upload::{Digest, shorten};

/// First word of the line by which parent and child agree on what follows.
const GREETING: &str = "pointsman-compile-1";
/// Longest such line.
const MAX_GREETING: u64 = 200;
/// Longest complaint of a child, in bytes.
const MAX_COMPLAINT: u64 = 64 << 10;
/// Wall-clock time that a child gets, in its limits of CPU time: it runs behind everybody else.
const WALL_PER_CPU: u32 = 4;
/// Wall-clock time in which a child that has closed its output ends.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// Bytes of the checksum at the head of a cached file.
const CHECKSUM: usize = 32;

/// Why a component was not compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// Another compilation is running and did not end in time; try again.
    #[error("another component is being compiled; try again in a few seconds (waited {waited:?})")]
    Busy {
        /// How long.
        waited: Duration,
    },
    /// Over the time limit; the child was killed.
    #[error(
        "the compilation took more than {limit:?} of CPU time, or {WALL_PER_CPU} times that, and was stopped; make the component smaller or raise the limit"
    )]
    Timeout {
        /// The limit.
        limit: Duration,
    },
    /// The compiler refused it: it does not validate, or it uses what this host has turned off.
    #[error("the component does not compile: {detail}")]
    Refused {
        /// In the compiler's words.
        detail: String,
    },
    /// The child died of its own limits.
    #[error(
        "the compilation was killed ({status}) within its limit of {memory_bytes} bytes of memory; make the component smaller or raise the limit"
    )]
    Killed {
        /// How it ended.
        status: ExitStatus,
        /// Its memory limit.
        memory_bytes: u64,
    },
    /// The result is over its size limit.
    #[error("the compiled component is larger than {limit} bytes")]
    OutputTooLarge {
        /// The limit.
        limit: usize,
    },
    /// The child cannot be started: the host's fault.
    #[error("cannot start the compile process {}: {source}", .program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Talking to the child failed: the host's fault.
    #[error("cannot talk to the compile process: {0}")]
    Io(#[source] io::Error),
}

/// Why the cache directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// It cannot be made or read.
    #[error("cannot use the component cache {}: {source}", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others could write to it.
    #[error("the component cache {} must be a directory that only this user can write to, because its contents are executed: chmod 700 it, or name another", .path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
    },
}

/// Compiles, one component at a time.
#[derive(Debug)]
pub(crate) struct Compiler {
    mode: Compile,
    cache: Option<Cache>,
    busy: Mutex<bool>,
    idle: Condvar,
}

/// Compiled components on disk.
#[derive(Debug)]
struct Cache {
    dir: PathBuf,
    entries: usize,
    /// Hash of wasmtime's version and configuration.
    compatibility: u64,
}

/// A component that is ready to be linked.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) component: Component,
    pub(crate) cached: bool,
}

// === impl Compiler ===

impl Compiler {
    pub(crate) fn new(
        engine: &Engine,
        mode: Compile,
        cache_dir: Option<&Path>,
        entries: usize,
    ) -> Result<Self, CacheError> {
        let cache = cache_dir.map(|dir| Cache::open(engine, dir, entries)).transpose()?;
        Ok(Self { mode, cache, busy: Mutex::new(false), idle: Condvar::new() })
    }

    /// The compiled form of `component`, whose uploaded bytes have `digest`: from the cache, else freshly compiled.
    pub(crate) fn compile(&self, engine: &Engine, digest: &Digest, component: &[u8]) -> Result<Compiled, CompileError> {
        if let Some(component) = self.cache.as_ref().and_then(|cache| cache.load(engine, digest)) {
            return Ok(Compiled { component, cached: true });
        }
        let turn = self.wait_for_turn()?;
        let code = match &self.mode {
            Compile::Child { command, limits } => compile_in_child(command, *limits, component)?,
            Compile::InProcess => engine.precompile_component(component).map_err(|error| refused(&error))?,
        };
        drop(turn);
        let loaded = load(engine, &code).map_err(|error| refused(&error))?;
        if let Some(cache) = &self.cache {
            cache.store(digest, &code);
        }
        Ok(Compiled { component: loaded, cached: false })
    }

    fn wait_for_turn(&self) -> Result<Turn<'_>, CompileError> {
        let queue = match &self.mode {
            Compile::Child { limits, .. } => limits.queue,
            Compile::InProcess => CompileLimits::default().queue,
        };
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.idle.wait_timeout_while(busy, queue, |busy| *busy);
        let (mut busy, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() && *busy {
            return Err(CompileError::Busy { waited: queue });
        }
        *busy = true;
        Ok(Turn(self))
    }
}

/// The right to compile; the next one in the queue gets it when this is dropped.
struct Turn<'a>(&'a Compiler);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.busy.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.idle.notify_one();
    }
}

fn refused(error: &wasmtime::Error) -> CompileError {
    CompileError::Refused { detail: shorten(&format!("{error:#}")) }
}

/// Loads machine code that this host or its own compile child made.
#[expect(unsafe_code, reason = "executing what was compiled is the point; see SAFETY for who made it")]
fn load(engine: &Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: `code` is the output of `Engine::precompile_component`, made by this process, by its compile child, or
    // earlier by either of them: files come from a directory that only this user can write to and match their checksum.
    // wasmtime itself refuses code of another version or configuration.
    unsafe { Component::deserialize(engine, code) }
}

// === impl Cache ===

impl Cache {
    fn open(engine: &Engine, dir: &Path, entries: usize) -> Result<Self, CacheError> {
        let io = |source| CacheError::Io { path: dir.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        let metadata = fs::symlink_metadata(dir).map_err(io)?;
        let ours = metadata.uid() == rustix::process::geteuid().as_raw();
        if !metadata.is_dir() || !ours || metadata.permissions().mode() & 0o022 != 0 {
            return Err(CacheError::NotPrivate { path: dir.to_owned() });
        }
        let mut hasher = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        Ok(Self { dir: dir.to_owned(), entries: entries.max(1), compatibility: hasher.finish() })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(format!("{}-{:016x}.cwasm", digest.hex(), self.compatibility))
    }

    /// A cached component; damaged files are removed and count as absent.
    fn load(&self, engine: &Engine, digest: &Digest) -> Option<Component> {
        let path = self.path(digest);
        let bytes = fs::read(&path).ok()?;
        let intact = bytes.split_at_checked(CHECKSUM).filter(|(sum, code)| Sha256::digest(code)[..] == **sum);
        let loaded = intact.and_then(|(_, code)| load(engine, code).ok());
        if loaded.is_none() {
            tracing::warn!(path = %path.display(), "a cached component is damaged; compiling it again");
            let _ = fs::remove_file(&path);
        }
        loaded
    }

    /// Keeps compiled code. A full disk is not the upload's fault: the component works without its cache entry.
    fn store(&self, digest: &Digest, code: &[u8]) {
        let path = self.path(digest);
        let written = tempfile::NamedTempFile::new_in(&self.dir).and_then(|mut file| {
            file.write_all(&Sha256::digest(code))?;
            file.write_all(code)?;
            file.as_file().sync_data()?;
            file.persist(&path).map_err(|error| error.error)?;
            self.evict()
        });
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "cannot keep a compiled component");
        }
    }

    /// Removes the oldest files beyond the bound.
    fn evict(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.path().extension().is_some_and(|extension| extension == "cwasm") {
                files.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        files.sort();
        let excess = files.len().saturating_sub(self.entries);
        files.iter().take(excess).try_for_each(|(_, path)| fs::remove_file(path))
    }
}

// === the parent's side of the child ===

fn compile_in_child(
    command: &CompileCommand,
    limits: CompileLimits,
    component: &[u8],
) -> Result<Vec<u8>, CompileError> {
    let mut child = Command::new(&command.program)
        .args(&command.args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| CompileError::Start { program: command.program.clone(), source })?;
    let talked = talk(&mut child, limits, component);
    // Whatever happened, the child ends here. It has closed its output or it is too late: nothing it does matters.
    if talked.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(CompileError::Io)?;
    let (code, complaint) = talked?;
    match status.code() {
        Some(0) => Ok(code),
        Some(_) => Err(CompileError::Refused { detail: shorten(&String::from_utf8_lossy(&complaint)) }),
        None if status.signal() == Some(Signal::XCPU.as_raw()) => Err(CompileError::Timeout { limit: limits.time }),
        None => Err(CompileError::Killed { status, memory_bytes: limits.memory_bytes }),
    }
}

/// Sends the component and collects code and complaints, each pipe on a thread of its own: a child that writes before it
/// has read everything must not dead-lock with a parent that does the same.
fn talk(child: &mut Child, limits: CompileLimits, component: &[u8]) -> Result<(Vec<u8>, Vec<u8>), CompileError> {
    let missing = || CompileError::Io(io::Error::other("a pipe is missing"));
    let mut stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let stderr = child.stderr.take().ok_or_else(missing)?;
    let cpu_seconds = limits.time.as_millis().div_ceil(1_000).max(1);
    let greeting = format!("{GREETING} {} {} {cpu_seconds}\n", component.len(), limits.memory_bytes);
    let component = component.to_vec();
    let patience = limits.time * WALL_PER_CPU;
    let (done, finished) = mpsc::channel();
    let output_limit = limits.max_output_bytes as u64;
    let start = |name: &str, work: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new().name(name.into()).spawn(work).map(drop).map_err(CompileError::Io)
    };
    start(
        "compile-in",
        Box::new(move || {
            // A child that dies early closes the pipe; its exit status tells more than this error would.
            let _ = stdin.write_all(greeting.as_bytes()).and_then(|()| stdin.write_all(&component));
        }),
    )?;
    let (complain, complaints) = mpsc::channel();
    start("compile-err", Box::new(move || drop(complain.send(read_up_to(stderr, MAX_COMPLAINT)))))?;
    start("compile-out", Box::new(move || drop(done.send(read_up_to(stdout, output_limit + 1)))))?;
    let late = |_| CompileError::Timeout { limit: limits.time };
    let code = finished.recv_timeout(patience).map_err(late)?.map_err(CompileError::Io)?;
    if code.len() > limits.max_output_bytes {
        return Err(CompileError::OutputTooLarge { limit: limits.max_output_bytes });
    }
    let complaint = complaints.recv_timeout(LAST_WORDS).map_err(late)?.map_err(CompileError::Io)?;
    Ok((code, complaint))
}

fn read_up_to(from: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

// === the child ===

/// The whole of a compile child: limits itself, reads a component from standard input as [`Compile::Child`] sends it, and
/// writes machine code to standard output, or a complaint to standard error. Returns the exit code. Call it before
/// anything else in the process has started threads or written to standard output.
#[must_use]
pub fn compile_child_main() -> u8 {
    let outcome = compile_child(&mut io::stdin().lock());
    let written = match &outcome {
        Ok(code) => io::stdout().lock().write_all(code),
        Err(complaint) => io::stderr().lock().write_all(complaint.as_bytes()),
    };
    u8::from(outcome.is_err() || written.is_err())
}

fn compile_child(input: &mut impl BufRead) -> Result<Vec<u8>, String> {
    let (length, memory_bytes, cpu_seconds) = read_greeting(input)?;
    limit_self(memory_bytes, cpu_seconds).map_err(|error| format!("cannot limit the compile process: {error}"))?;
    let component = read_up_to(input, length).map_err(|error| format!("cannot read the component: {error}"))?;
    if component.len() as u64 != length {
        return Err(format!("the component ends after {} of {length} bytes", component.len()));
    }
    let engine = engine::compiler().map_err(|error| format!("{error:#}"))?;
    engine.precompile_component(&component).map_err(|error| format!("{error:#}"))
}

fn read_greeting(input: &mut impl BufRead) -> Result<(u64, u64, u64), String> {
    let mut line = Vec::new();
    let read = input.take(MAX_GREETING).read_until(b'\n', &mut line);
    read.map_err(|error| format!("cannot read the greeting: {error}"))?;
    let line = String::from_utf8_lossy(line.trim_ascii_end());
    let words: Vec<&str> = line.split(' ').collect();
    let number = |word: &str| word.parse().map_err(|_| format!("`{word}` is not a number"));
    match words[..] {
        [GREETING, length, memory, cpu] => Ok((number(length)?, number(memory)?, number(cpu)?)),
        _ => Err("this process compiles components for its parent and is not started by hand".to_owned()),
    }
}

fn limit_self(memory_bytes: u64, cpu_seconds: u64) -> io::Result<()> {
    let limit = |resource, value| setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) });
    limit(Resource::As, memory_bytes)?;
    // The first limit ends it with a signal of its own, which the parent knows; the second with that of everything else.
    setrlimit(Resource::Cpu, Rlimit { current: Some(cpu_seconds), maximum: Some(cpu_seconds + 1) })?;
    limit(Resource::Core, 0)?;
    nice(19)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine() -> Engine {
        engine::compiler().expect("an engine")
    }

    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    #[test]
    fn the_cache_keeps_checks_and_evicts() {
        let engine = engine();
        let dir = tempfile::tempdir().expect("a directory");
        let at = dir.path().join("cache");
        let compiler = Compiler::new(&engine, Compile::InProcess, Some(&at), 2).expect("a private directory");
        let digest = Digest::of(EMPTY);
        let cached = |digest: &Digest| compiler.compile(&engine, digest, EMPTY).map(|c| c.cached).expect("it compiles");
        assert!(!cached(&digest));
        assert!(cached(&digest));
        let file = compiler.cache.as_ref().expect("a cache").path(&digest);
        assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, 0o600);
        let mut bytes = fs::read(&file).expect("a file");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&file, &bytes).expect("ours");
        assert!(!cached(&digest), "a damaged file is compiled again");
        assert!(cached(&digest));
        for other in [b"1", b"2", b"3"] {
            cached(&Digest::of(other));
        }
        assert_eq!(fs::read_dir(&at).expect("a directory").count(), 2);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("ours");
        let refused = Compiler::new(&engine(), Compile::InProcess, Some(dir.path()), 2);
        assert!(matches!(refused, Err(CacheError::NotPrivate { .. })), "{refused:?}");
    }

    #[test]
    fn greetings_are_read_to_the_line_and_not_beyond() {
        for (input, expect) in [
            ("pointsman-compile-1 3 4 5\nabc", Ok((3, 4, 5))),
            ("pointsman-compile-1 3 4\n", Err("started by hand")),
            ("pointsman-compile-1 x 4 5\n", Err("`x` is not a number")),
            ("", Err("started by hand")),
        ] {
            let mut bytes = input.as_bytes();
            match (read_greeting(&mut bytes), expect) {
                (Ok(read), Ok(expected)) => assert_eq!((read, bytes), (expected, &b"abc"[..])),
                (Err(error), Err(part)) => assert!(error.contains(part), "{error}"),
                other => panic!("{input:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn garbage_is_refused_with_the_compilers_words() {
        let compiler = Compiler::new(&engine(), Compile::InProcess, None, 1).expect("no directory");
        let error = compiler.compile(&engine(), &Digest::of(b"x"), b"\0asm\x0d\0\x01\0\xff").expect_err("garbage");
        assert!(matches!(error, CompileError::Refused { .. }), "{error}");
    }
}
