//! The Rust toolchain for guests: rustup's target where it is installed, else a distribution's compiler with std's sources.
//!
//! rustup's download server is not reachable everywhere, and without it there is no std for wasm32. Debian has a compiler
//! and the sources of the same version, out of which cargo builds std: about a minute once, then cached.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::bail;

use super::build::{run, which};
use super::project::Project;

const TARGET: &str = "wasm32-unknown-unknown";
/// Debian's compiler.
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";

/// Compiles the folder's crate; returns the core module.
///
/// # Errors
/// There is no toolchain for the target, or the crate does not compile.
pub(crate) fn build(project: &Project, out: &mut dyn Write) -> anyhow::Result<PathBuf> {
    if which("cargo").is_none() {
        bail!("`cargo` is not installed; https://rustup.rs says how, then run: rustup target add {TARGET}");
    }
    let target_dir = target_dir(project);
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "--target", TARGET, "--manifest-path"]);
    command.arg(project.folder.join("Cargo.toml")).arg("--target-dir").arg(&target_dir);
    if !has_target() {
        let Some(linker) = system_toolchain() else {
            bail!(
                "there is no standard library for {TARGET}; install it:\n  rustup target add {TARGET}\nor, on Debian without \
                 rustup's server:\n  apt-get install rustc-web rust-web-src lld"
            );
        };
        command.arg("-Zbuild-std=std,panic_abort");
        command.envs([("RUSTC", SYSTEM_RUSTC), ("RUSTC_BOOTSTRAP", "1")]);
        command.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker);
    }
    run(&mut command, out)?;
    let file = format!("{}.wasm", project.manifest.name.to_string().replace('-', "_"));
    Ok(target_dir.join(TARGET).join("release").join(file))
}

/// Where cargo puts what it makes.
#[expect(clippy::disallowed_methods, reason = "cargo's own variable, so that a cache can be shared")]
fn target_dir(project: &Project) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| project.folder.join("target"), PathBuf::from)
}

/// What a compiler prints, in one line.
fn ask(rustc: &str, arguments: &[&str]) -> Option<PathBuf> {
    let output = Command::new(rustc).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(text.trim()))
}

fn has_target() -> bool {
    let library = ask("rustc", &["--print", "target-libdir", "--target", TARGET]);
    library.is_some_and(|folder| holds(&folder, |name| name.starts_with("libstd-")))
}

/// A linker, if the distribution's compiler has std's sources.
fn system_toolchain() -> Option<PathBuf> {
    let library = ask(SYSTEM_RUSTC, &["--print", "sysroot"])?.join("lib/rustlib/src/rust/library");
    if !library.is_dir() {
        return None;
    }
    let rustup = ask("rustc", &["--print", "sysroot"]).and_then(|root| {
        let hosts = std::fs::read_dir(root.join("lib/rustlib")).ok()?;
        hosts.filter_map(Result::ok).map(|host| host.path().join("bin/rust-lld")).find(|linker| linker.is_file())
    });
    let versioned = || (14..=30).rev().find_map(|version| which(&format!("wasm-ld-{version}")));
    rustup.or_else(|| which("wasm-ld")).or_else(versioned)
}

fn holds(folder: &Path, wanted: impl Fn(&str) -> bool) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries.into_iter().any(|entry| entry.file_name().to_str().is_some_and(&wanted))
}
