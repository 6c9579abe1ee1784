//! Which devices serve: what was asked for, and what is there.
//!
//! `cpu` is always there. A GPU is looked for when the program runs, because one binary serves machines with and without one;
//! what is missing is said in words, and only `auto` goes on without it.

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
                    tracing::info!("no GPU that the kernels run on; serving on the CPU");
                    places.push(cpu());
                }
                places.extend(usable);
            }
            (Wanted::Auto, Err(why)) => {
                tracing::info!("no GPU: {why}; serving on the CPU");
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

/// The toolkit's folder, and those of NVIDIA's Python packages.
#[expect(clippy::disallowed_methods, reason = "where a toolkit or a virtual environment is, only the environment says")]
pub(crate) fn usual_folders() -> Vec<PathBuf> {
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let toolkits = toolkits.chain([PathBuf::from("/usr/local/cuda")]);
    let mut folders: Vec<PathBuf> = toolkits.map(|toolkit| toolkit.join("lib64")).collect();
    let pythons = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter();
    for prefix in pythons.chain(["/usr", "/usr/local"].map(PathBuf::from)) {
        let versions = subfolders(&prefix.join("lib"));
        for python in versions.iter().filter(|path| path.to_string_lossy().contains("/python3")) {
            let packages = ["site-packages", "dist-packages"].map(|kind| python.join(kind).join("nvidia"));
            let libraries = packages.iter().flat_map(|folder| subfolders(folder)).map(|package| package.join("lib"));
            folders.extend(libraries);
        }
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

/// In the order of their names; none where the folder cannot be read.
fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
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
    fn a_driver_is_not_loaded_for_the_cpu() {
        let never = || -> Result<Vec<FoundGpu>, NoGpu> { panic!("nobody asked for a GPU") };
        assert_eq!(places(&EngineSection::default(), never).expect("the CPU is there").len(), 1);
    }
}
