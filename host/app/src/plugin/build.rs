//! `pointsman plugin build`: finds a language's tools, runs them where one can see them, and checks what they made.
//!
//! It adds nothing to what the tools do but the right flags and the last step: the result is a component that imports
//! nothing but the package. A tool that is missing is named with the command that installs it; nothing is installed here.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::check::check;
use super::project::{Lang, Project};
use super::rust;
use crate::cli::TrialArgs;

/// Builds a plugin folder and checks the result.
///
/// # Errors
/// A tool is missing or fails, or the result is no policy.
pub(crate) fn build(folder: &Path, with: &TrialArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let project = Project::open(folder)?;
    let module = match project.manifest.lang {
        Lang::Rust => rust::build(&project, out)?,
        Lang::Js => js(&project, out)?,
        Lang::Python => python(&project, out)?,
        Lang::C => c(&project, out)?,
    };
    let wasm = project.wasm();
    let bytes = std::fs::read(&module).with_context(|| format!("the build left no {}", module.display()))?;
    let component = pointsman_policy::encode(&bytes).with_context(|| format!("{} is refused", module.display()))?;
    std::fs::write(&wasm, component).with_context(|| format!("cannot write {}", wasm.display()))?;
    writeln!(out, "{}", wasm.display())?;
    check(&wasm, with, out)
}

fn js(project: &Project, out: &mut dyn Write) -> anyhow::Result<PathBuf> {
    let tool = find(project, &["node_modules/.bin/componentize-qjs"], "componentize-qjs")?;
    let wasm = project.wasm();
    let mut command = Command::new(tool);
    command.args(["--sync", "--stub-wasi", "--world", project.manifest.kind.world()]);
    command.arg("--wit").arg(project.folder.join("wit"));
    command.arg("--js").arg(project.folder.join("policy.js")).arg("--output").arg(&wasm);
    run(&mut command, out)?;
    Ok(wasm)
}

fn python(project: &Project, out: &mut dyn Write) -> anyhow::Result<PathBuf> {
    let tool = find(project, &[".venv/bin/componentize-py"], "componentize-py")?;
    let wasm = project.wasm();
    let mut command = Command::new(tool);
    command.arg("--wit-path").arg(project.folder.join("wit")).args(["--world", project.manifest.kind.world()]);
    command.args(["componentize", "--stub-wasi", "policy", "--python-path"]).arg(&project.folder);
    command.arg("--output").arg(&wasm);
    run(&mut command, out)?;
    Ok(wasm)
}

fn c(project: &Project, out: &mut dyn Write) -> anyhow::Result<PathBuf> {
    let tool = find(project, &[".venv/bin/python-zig"], "python-zig").or_else(|missing| which("zig").ok_or(missing))?;
    let bindings = c_bindings(project)?;
    let module = bindings.join("policy.core.wasm");
    let stem = project.manifest.kind.world().replace('-', "_");
    let mut command = Command::new(tool);
    // With WASI as the target there is a C library; what a policy uses of it needs no system.
    command.args(["cc", "-target", "wasm32-wasi", "-mexec-model=reactor", "-O2", "-Wl,--strip-debug", "-Wall", "-I"]);
    command.arg(&bindings).arg("-o").arg(&module).arg(project.folder.join("policy.c"));
    command.arg(bindings.join(format!("{stem}.c"))).arg(bindings.join(format!("{stem}_component_type.o")));
    run(&mut command, out)?;
    Ok(module)
}

/// Writes what a C policy includes and links, out of the folder's own package; returns where.
///
/// # Errors
/// The package does not parse, or the files cannot be written.
pub(crate) fn c_bindings(project: &Project) -> anyhow::Result<PathBuf> {
    let wit = project.folder.join("wit");
    let mut resolve = wit_parser::Resolve::default();
    let (package, _) = resolve.push_dir(&wit).with_context(|| format!("{} does not parse", wit.display()))?;
    let world = resolve.select_world(&[package], Some(project.manifest.kind.world()))?;
    let mut files = wit_bindgen_core::Files::default();
    wit_bindgen_c::Opts::default().build().generate(&mut resolve, world, &mut files)?;
    let folder = project.folder.join("bindings");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot write {}", folder.display()))?;
    for (name, contents) in files.iter() {
        let path = folder.join(name);
        std::fs::write(&path, contents).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(folder)
}

/// A tool: the folder's own, else one on the path.
fn find(project: &Project, own: &[&str], name: &str) -> anyhow::Result<PathBuf> {
    let own = own.iter().map(|path| project.folder.join(path)).find(|path| path.is_file());
    match own.or_else(|| which(name)) {
        Some(tool) => Ok(tool),
        None => {
            let install = project.manifest.lang.install(&project.folder).unwrap_or_default();
            bail!("`{name}` is not installed, in {} or on the path; install it:\n  {install}", project.folder.display())
        }
    }
}

/// The first program of that name on the path.
#[expect(clippy::disallowed_methods, reason = "finding a tool as a shell would")]
pub(crate) fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// Shows a command, then runs it with its output passed through.
///
/// # Errors
/// It cannot be started, or says that it failed.
pub(crate) fn run(command: &mut Command, out: &mut dyn Write) -> anyhow::Result<()> {
    let words: Vec<OsString> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(ToOwned::to_owned).collect();
    let shown: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    writeln!(out, "> {}", shown.join(" "))?;
    out.flush()?;
    let status = command.status().with_context(|| format!("cannot start {}", shown[0]))?;
    if !status.success() {
        bail!("{} failed ({status}); its own words are above", shown[0]);
    }
    Ok(())
}
