//! Which devices serve: what was asked for, and what is there.
//!
//! `cpu` is always there. A GPU is looked for when the program runs, because one binary serves machines with and without one;
//! what is missing is said in words, and only `auto` goes on without it.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use pointsman_engine::cuda::{self, CodeOptions, FoundGpu, NoGpu};
use pointsman_sched::ids::Micros;

use crate::config::EngineSection;

/// A device as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Every GPU, or the CPU where there is none.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by its number.
    Cuda(u32),
    /// None: nothing is computed, and a step takes this long.
    Null(Micros),
}

/// A device that serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The CPU, with this many cores.
    Cpu(usize),
    /// A GPU.
    Cuda(FoundGpu),
    /// Nothing computes; a step takes this long.
    Null(Micros),
}

/// Longest step that can be pretended: a second.
const MAX_NULL_STEP: Micros = 1_000_000;

/// Entries of `PATH` that are looked at, and folders of libraries that are kept; what comes after them is passed over.
const MAX_FOLDERS: usize = 64;

/// No such device.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no device: use auto, cpu, cuda:N or null[:MICROSECONDS]")]
pub(crate) struct BadDevice(String);

impl FromStr for Wanted {
    type Err = BadDevice;

    fn from_str(text: &str) -> Result<Self, BadDevice> {
        let (kind, number) = text.split_once(':').map_or((text, None), |(kind, number)| (kind, Some(number)));
        let wanted = match (kind, number) {
            ("auto", None) => Some(Self::Auto),
            ("cpu", None) => Some(Self::Cpu),
            ("cuda", Some(ordinal)) => ordinal.parse().ok().map(Self::Cuda),
            ("null", None) => Some(Self::Null(0)),
            ("null", Some(step)) => step.parse().ok().filter(|step| *step <= MAX_NULL_STEP).map(Self::Null),
            _ => None,
        };
        wanted.ok_or_else(|| BadDevice(text.to_owned()))
    }
}

impl Place {
    /// As in `cpu` or `cuda:0`.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Cpu(_) => "cpu".to_owned(),
            Self::Cuda(found) => format!("cuda:{}", found.ordinal),
            Self::Null(_) => "null".to_owned(),
        }
    }

    /// Number in columns and in the admin API: 0 for the CPU, N + 1 for `cuda:N`, the highest for `null`.
    pub(crate) fn index(&self) -> u32 {
        match self {
            Self::Cpu(_) => 0,
            Self::Cuda(found) => found.ordinal + 1,
            Self::Null(_) => u32::MAX,
        }
    }

    /// For a person.
    pub(crate) fn description(&self) -> String {
        match self {
            Self::Cpu(cores) => format!("CPU, {cores} cores"),
            Self::Cuda(found) => {
                let (major, minor) = found.info.capability;
                let memory = cuda::Bytes(found.total_bytes);
                format!("{}, {memory}, compute capability {major}.{minor}", found.info.name)
            }
            Self::Null(step) => format!("computes nothing, {step} us a step"),
        }
    }
}

/// The devices to serve on, each once, in the order in which they are asked for.
///
/// # Errors
/// A GPU was asked for by its number and is not there.
pub(crate) fn find(engine: &EngineSection) -> anyhow::Result<Vec<Place>> {
    places(engine, cuda::discover)
}

fn places(
    engine: &EngineSection,
    discover: impl FnOnce() -> Result<Vec<FoundGpu>, NoGpu>,
) -> anyhow::Result<Vec<Place>> {
    let wanted: Vec<Wanted> = engine.devices.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let cpu = || Place::Cpu(std::thread::available_parallelism().map_or(1, usize::from));
    // A driver is loaded only where somebody asks for a GPU.
    let gpus = if wanted.iter().any(|device| matches!(device, Wanted::Auto | Wanted::Cuda(_))) {
        Some(discover())
    } else {
        None
    };
    let gpus = gpus.unwrap_or(Err(NoGpu::NoDevice));
    let mut places = Vec::new();
    for device in wanted {
        match (device, &gpus) {
            (Wanted::Cpu, _) => places.push(cpu()),
            (Wanted::Null(step), _) => places.push(Place::Null(step)),
            (Wanted::Auto, Ok(found)) => {
                let mut usable = usable(found).map(Place::Cuda).peekable();
                if usable.peek().is_none() {
                    tracing::warn!("no GPU that the kernels run on; serving on the CPU");
                    places.push(cpu());
                }
                places.extend(usable);
            }
            (Wanted::Auto, Err(why)) => {
                if why.is_usual() {
                    tracing::info!("no GPU: {why}; serving on the CPU");
                } else {
                    tracing::warn!("no GPU: {why}; serving on the CPU");
                }
                places.push(cpu());
            }
            (Wanted::Cuda(ordinal), Ok(found)) => {
                let count = u32::try_from(found.len()).unwrap_or(u32::MAX);
                let gpu = found.iter().find(|gpu| gpu.ordinal == ordinal).cloned();
                places.push(Place::Cuda(gpu.ok_or(NoGpu::NoSuch { asked: ordinal, count })?.supported()?));
            }
            (Wanted::Cuda(ordinal), Err(why)) => {
                bail!(
                    "--device cuda:{ordinal}: {why}. --device cpu serves without a GPU, --device auto on what there is"
                );
            }
        }
    }
    let mut kept: Vec<Place> = Vec::new();
    for place in places {
        if kept.iter().all(|other| other.index() != place.index()) {
            kept.push(place);
        }
    }
    if kept.is_empty() {
        bail!("engine.devices is empty: name at least one of auto, cpu and cuda:N");
    }
    Ok(kept)
}

/// Those of them that the kernels run on; the others are named in the log.
fn usable(found: &[FoundGpu]) -> impl Iterator<Item = FoundGpu> + '_ {
    let supported = |gpu: FoundGpu| gpu.supported().inspect_err(|why| tracing::warn!("not used: {why}")).ok();
    found.iter().cloned().filter_map(supported)
}

/// Where code for a GPU comes from: NVIDIA's compiler, if one of the usual folders has it, and what it made before.
pub(crate) fn code_options(engine: &EngineSection, data_dir: &Path) -> anyhow::Result<CodeOptions> {
    for folder in &engine.cuda_lib_dirs {
        std::fs::read_dir(folder).with_context(|| format!("engine.cuda_lib_dirs: {}", folder.display()))?;
    }
    let mut folders = engine.cuda_lib_dirs.clone();
    folders.extend(usual_folders());
    Ok(CodeOptions { folders, cache: Some(data_dir.join("cuda")), ptx_only: false, cublaslt: engine.cublaslt })
}

/// The toolkits' folders, and those of NVIDIA's packages for Python and Conda.
#[expect(clippy::disallowed_methods, reason = "where a toolkit or a virtual environment is, only the environment says")]
pub(crate) fn usual_folders() -> Vec<PathBuf> {
    library_folders(|name| std::env::var_os(name), Path::new("/usr"))
}

/// What was chosen comes first: the toolkit of the environment or `local/cuda`, then packages, then what else is installed.
fn library_folders(variable: impl Fn(&str) -> Option<OsString>, usr: &Path) -> Vec<PathBuf> {
    let named = |name: &str| variable(name).map(PathBuf::from);
    let (local, conda) = (usr.join("local"), named("CONDA_PREFIX"));
    let toolkits = [named("CUDA_HOME"), named("CUDA_PATH"), Some(local.join("cuda"))];
    let mut folders: Vec<PathBuf> = toolkits.into_iter().flatten().map(|toolkit| toolkit.join("lib64")).collect();
    let path = variable("PATH").unwrap_or_default();
    let pythons = std::env::split_paths(&path).take(MAX_FOLDERS).filter_map(|programs| python_prefix(&programs));
    let prefixes = [named("VIRTUAL_ENV"), conda.clone()].into_iter().flatten().chain(pythons);
    folders.extend(prefixes.chain([usr.to_owned(), local.clone()]).flat_map(|prefix| package_folders(&prefix)));
    folders.extend(conda.map(|prefix| prefix.join("lib")));
    // By name, the last first: mostly those of later versions.
    let others = subfolders_named(&local, "cuda").into_iter().rev();
    folders.extend(others.map(|toolkit| toolkit.join("lib64")));
    let mut known = HashSet::new();
    // Absolute ones alone: a library of the working folder is nobody's choice.
    folders.retain(|folder| folder.is_absolute() && folder.is_dir());
    folders.retain(|folder| folder.canonicalize().is_ok_and(|real| known.insert(real)));
    folders.truncate(MAX_FOLDERS);
    folders
}

/// Where the Python of a folder of programs has its packages. The program itself may be a link, which is not followed: that of a
/// virtual environment leads to the Python that it was made with, which knows nothing of its packages.
fn python_prefix(programs: &Path) -> Option<PathBuf> {
    let is_there = programs.join("python3").is_file();
    programs.parent().filter(|_| is_there).map(Path::to_owned)
}

/// The folders of libraries in NVIDIA's packages.
fn package_folders(prefix: &Path) -> Vec<PathBuf> {
    let versions = subfolders_named(&prefix.join("lib"), "python3").into_iter();
    let kinds = versions.flat_map(|python| ["site-packages", "dist-packages"].map(|kind| python.join(kind)));
    kinds.flat_map(|kind| subfolders_named(&kind.join("nvidia"), "")).map(|package| package.join("lib")).collect()
}

/// Those whose names begin so, in the order of their names; none where the folder cannot be read.
fn subfolders_named(folder: &Path, start: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let entries = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(ordinal: u32) -> FoundGpu {
        FoundGpu {
            ordinal,
            info: cuda::DeviceInfo { name: "a GPU".to_owned(), n_sms: 132, capability: (9, 0) },
            total_bytes: 80 << 30,
            bus_id: "0000:01:00.0".to_owned(),
            driver: (12, 8),
        }
    }

    fn old(ordinal: u32) -> FoundGpu {
        FoundGpu { info: cuda::DeviceInfo { capability: (7, 5), ..gpu(ordinal).info }, ..gpu(ordinal) }
    }

    #[test]
    fn devices_are_taken_as_asked_or_refused_in_words() {
        let two = || Ok(vec![gpu(0), gpu(1)]);
        let none = || Err(NoGpu::NoDriver);
        let an_old = || Ok(vec![old(0), gpu(1)]);
        let only_old = || Ok(vec![old(0)]);
        type Found = fn() -> Result<Vec<FoundGpu>, NoGpu>;
        type Expect = Result<&'static [u32], &'static str>;
        let cases: [(&[&str], Found, Expect); 15] = [
            (&["cpu"], none, Ok(&[0])),
            (&["auto"], none, Ok(&[0])),
            (&["auto"], two, Ok(&[1, 2])),
            (&["cuda:1", "cpu"], two, Ok(&[2, 0])),
            (&["auto", "cpu", "cuda:0"], two, Ok(&[1, 2, 0])),
            (&["auto", "cpu"], none, Ok(&[0])),
            (&["auto"], an_old, Ok(&[2])),
            (&["auto"], only_old, Ok(&[0])),
            (&["cuda:0"], an_old, Err("cuda:0 (a GPU) has compute capability 7.5")),
            (&["cuda:0"], none, Err("libcuda is not in the loader's path. --device cpu serves without a GPU")),
            (&["cuda:2"], two, Err("there is no cuda:2; the driver sees 2 devices")),
            (&["cpu", "null:250", "null"], none, Ok(&[0, u32::MAX])),
            (&["gpu"], two, Err("`gpu` is no device: use auto, cpu, cuda:N or null[:MICROSECONDS]")),
            (&["null:1000001"], two, Err("`null:1000001` is no device")),
            (&[], two, Err("engine.devices is empty")),
        ];
        for (devices, found, expect) in cases {
            let section =
                EngineSection { devices: devices.iter().map(|&d| d.to_owned()).collect(), ..EngineSection::default() };
            match (places(&section, found), expect) {
                (Ok(places), Ok(expect)) => {
                    assert_eq!(places.iter().map(Place::index).collect::<Vec<_>>(), expect, "{devices:?}");
                }
                (Err(error), Err(expect)) => assert!(error.to_string().contains(expect), "{error}"),
                (found, expect) => panic!("{devices:?}: {found:?}, {expect:?}"),
            }
        }
        assert_eq!((Place::Cuda(gpu(1)).name(), Place::Cpu(2).description()), ("cuda:1".into(), "CPU, 2 cores".into()));
    }

    #[test]
    fn libraries_are_looked_for_in_toolkits_and_in_the_packages_of_each_python() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        let make = |path: &str| std::fs::create_dir_all(root.join(path)).expect("made");
        let link = |to: &str, at: &str| std::os::unix::fs::symlink(root.join(to), root.join(at)).expect("linked");
        for path in [
            "usr/bin",
            "usr/local/cuda-12.4/lib64",
            "usr/local/cuda-12.8/lib64",
            "usr/local/cuda-13.0/lib64",
            "usr/local/cudnn/lib64",
            "usr/lib/python3/dist-packages/nvidia/cublas/lib",
            "usr/lib/python2/site-packages/nvidia/cublas/lib",
            "usr/local/lib/python3.12/dist-packages/nvidia/cuda_nvrtc/lib",
            "venv/bin",
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib",
            "venv/lib/python3.12/site-packages/nvidia/cu13/include",
            "conda/bin",
            "conda/lib/python3.11/site-packages/nvidia/cublas/lib",
            "none/bin",
            "none/lib/python3.11/site-packages/nvidia/cublas/lib",
            "home/lib64",
        ] {
            make(path);
        }
        link("usr/local/cuda-12.4", "usr/local/cuda");
        link("usr/bin", "bin");
        link("usr/lib", "lib");
        for python in ["usr/bin/python3", "conda/bin/python3"] {
            std::fs::write(root.join(python), "").expect("written");
        }
        link("usr/bin/python3", "venv/bin/python3");
        let here = std::env::current_dir().expect("a folder");
        let up = "../".repeat(here.components().count() - 1);
        let relative = |part: &str| OsString::from(format!("{up}{}", root.join(part).display()).replace("//", "/"));
        let path = |parts: &[&str]| std::env::join_paths(parts.iter().map(|part| root.join(part))).expect("a path");
        let usual = [
            "usr/local/cuda/lib64",
            "usr/lib/python3/dist-packages/nvidia/cublas/lib",
            "usr/local/lib/python3.12/dist-packages/nvidia/cuda_nvrtc/lib",
            "usr/local/cuda-13.0/lib64",
            "usr/local/cuda-12.8/lib64",
        ];
        let (venv, conda) = (
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib",
            "conda/lib/python3.11/site-packages/nvidia/cublas/lib",
        );
        let (first, rest) = usual.split_at(1);
        let with = |more: &[&'static str]| [first, more, rest].concat();
        for (variables, expect) in [
            (vec![], usual.to_vec()),
            (vec![("CUDA_HOME", path(&["home"]))], [&["home/lib64"], &usual[..]].concat()),
            (vec![("CUDA_PATH", path(&["usr/local/cuda-13.0"]))], [&usual[3..4], &usual[..3], &usual[4..]].concat()),
            (vec![("CUDA_HOME", "".into()), ("VIRTUAL_ENV", relative("venv"))], usual.to_vec()),
            (vec![("VIRTUAL_ENV", path(&["venv"]))], with(&[venv])),
            (vec![("PATH", path(&["none/bin", "venv/bin", "conda/bin", "usr/bin", "bin"]))], with(&[venv, conda])),
            (vec![("PATH", path(&["venv/bin/", "conda/bin"])), ("VIRTUAL_ENV", path(&["venv"]))], with(&[venv, conda])),
            (
                vec![("PATH", path(&["venv/bin"])), ("CONDA_PREFIX", path(&["conda"]))],
                [first, &[conda, venv], &rest[..2], &["conda/lib"], &rest[2..]].concat(),
            ),
        ] {
            let variable =
                |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
            let found = library_folders(variable, &root.join("usr"));
            let expect: Vec<PathBuf> = expect.into_iter().map(|path| root.join(path)).collect();
            assert_eq!(found, expect, "{variables:?}");
        }
    }

    #[test]
    fn further_folders_are_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        for version in 0..=MAX_FOLDERS {
            std::fs::create_dir_all(folder.path().join(format!("local/cuda-{version}/lib64"))).expect("made");
        }
        assert_eq!(library_folders(|_| None, folder.path()).len(), MAX_FOLDERS);
    }

    #[test]
    fn a_driver_is_not_loaded_for_the_cpu() {
        let never = || -> Result<Vec<FoundGpu>, NoGpu> { panic!("nobody asked for a GPU") };
        assert_eq!(places(&EngineSection::default(), never).expect("the CPU is there").len(), 1);
    }
}
