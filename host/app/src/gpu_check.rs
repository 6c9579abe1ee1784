//! `pointsman gpu-check`: whether a GPU computes what the CPU does, how fast it decodes, and whether it gives memory back.
//!
//! One command for a machine that is at hand for minutes: it needs a driver and nothing else, says what it finds as it goes and
//! keeps the same as JSON. Figures stand beside the floor that a plain streaming read reaches in the same run. The models are
//! random: speed depends on shapes alone. It ends with a fault when a comparison fails or kernels are not compiled though NVRTC is
//! there, never because of a figure.

mod parity;
mod peers;
mod products;
mod report;
mod speed;

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::ValueEnum;
use pointsman_engine::cuda::{self, Bytes, CodeOptions, Element, FoundGpu, Gpu, NoGpu, Origin, Unit};
use serde_json::json;

use crate::cli::GpuCheckArgs;
use crate::clock::SystemClock;
use crate::devices;
use report::Report;

/// A part of the check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Section {
    /// Each kernel against a reference.
    Kernels,
    /// Steps of small random models against the CPU.
    Parity,
    /// Products of an 8B model by each kernel that can compute them.
    Products,
    /// Loading and unloading an 8B model.
    Memory,
    /// Decode steps of an 8B model, one by one and in batches.
    Ladder,
    /// The same steps by PyTorch, where there is one.
    Peers,
}

/// What kernels compute in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KernelType {
    /// Those of sampling and memory, which have no type.
    None,
    Bf16,
    F16,
    F32,
}

impl KernelType {
    fn element(self) -> Option<Element> {
        match self {
            Self::None => None,
            Self::Bf16 => Some(Element::Bf16),
            Self::F16 => Some(Element::F16),
            Self::F32 => Some(Element::F32),
        }
    }
}

struct Check<'a> {
    report: Report<'a>,
    clock: SystemClock,
    gpu: FoundGpu,
    code: CodeOptions,
    small: bool,
    types: Vec<KernelType>,
    /// Kernels to pass over.
    passed: Vec<String>,
    /// Whether a kernel is to start while the one before it ends, where it can.
    may_overlap: bool,
    /// Whether it does.
    overlaps: bool,
    /// The Python that has PyTorch.
    python: PathBuf,
    /// Nanoseconds for each part.
    budget: u64,
    /// When the part that runs now should come to its end.
    until: u64,
}

/// Runs the parts that are asked for.
///
/// # Errors
/// There is no such GPU ([`NoGpu`]), something could not be run, or a comparison failed.
pub(crate) fn run(args: &GpuCheckArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let gpu = find(args.gpu)?;
    let mut folders = args.cuda_lib_dir.clone();
    folders.extend(devices::usual_folders());
    let cache = args.cache.clone().or_else(|| own_folder(&std::env::temp_dir().join("pointsman-cubin")));
    let mut check = Check {
        report: Report::new(out, args.json.clone()),
        clock: SystemClock::start(),
        gpu,
        code: CodeOptions { folders, cache, ptx_only: args.ptx, cublaslt: true },
        small: args.small,
        types: if args.of.is_empty() { KernelType::value_variants().to_vec() } else { args.of.clone() },
        passed: args.skip.clone(),
        may_overlap: !args.no_overlap,
        overlaps: false,
        python: args.peers.clone().unwrap_or_else(|| PathBuf::from("python3")),
        budget: args.budget * 1_000_000_000,
        until: 0,
    };
    check.all(&args.only)?;
    match check.report.verdict()? {
        0 => Ok(()),
        faults => bail!("{faults} checks failed"),
    }
}

fn find(asked: u32) -> Result<FoundGpu, NoGpu> {
    let gpus = cuda::discover()?;
    let count = u32::try_from(gpus.len()).unwrap_or(u32::MAX);
    gpus.into_iter().find(|gpu| gpu.ordinal == asked).ok_or(NoGpu::NoSuch { asked, count })?.supported()
}

/// A folder that nobody else can write to; made where there is none. Others may make one first where all may write, and what
/// lies in it runs on the GPU.
fn own_folder(path: &Path) -> Option<PathBuf> {
    let _ = std::fs::DirBuilder::new().mode(0o700).create(path);
    let (found, own) = (std::fs::symlink_metadata(path).ok()?, std::fs::metadata("/proc/self").ok()?);
    let is_own = found.is_dir() && found.uid() == own.uid() && found.mode() & 0o022 == 0;
    is_own.then(|| path.to_owned())
}

impl Check<'_> {
    /// The parts in their order, whatever comes of one before.
    fn all(&mut self, only: &[Section]) -> anyhow::Result<()> {
        self.device()?;
        // From outside of models it sees their memory.
        let mut keeper = self.open(false)?;
        self.units(&mut keeper, only == [Section::Kernels])?;
        for section in Section::value_variants() {
            if !(only.is_empty() || only.contains(section)) {
                continue;
            }
            self.until = self.clock.nanos() + self.budget;
            let outcome = match section {
                Section::Kernels => self.kernels(),
                Section::Parity => self.parity(),
                Section::Products => self.products(),
                Section::Memory => self.memory(&mut keeper),
                Section::Ladder => self.ladder(),
                Section::Peers => self.peers(),
            };
            if matches!(section, Section::Ladder | Section::Peers) {
                self.report.table()?;
            }
            if let Err(error) = outcome {
                self.report.judge(
                    false,
                    &format!("{section:?}: {error:#}"),
                    json!({"section": format!("{section:?}")}),
                )?;
            }
        }
        Ok(())
    }

    fn is_late(&self) -> bool {
        self.clock.nanos() >= self.until
    }

    fn device(&mut self) -> anyhow::Result<()> {
        let FoundGpu { info, total_bytes, driver, ordinal, .. } = &self.gpu;
        let (major, minor) = info.capability;
        let words = format!(
            "cuda:{ordinal}: {}, {} multiprocessors, compute capability {major}.{minor}, {}, driver for CUDA {}.{}",
            info.name,
            info.n_sms,
            Bytes(*total_bytes),
            driver.0,
            driver.1
        );
        let json =
            json!({"device": info.name, "sms": info.n_sms, "total_bytes": total_bytes, "driver": [driver.0, driver.1]});
        self.report.say(&words, json)
    }

    /// Makes the code and says where it came from. Kernels alone need those of their types; all units are made, at once, where a run
    /// after this one finds them.
    fn units(&mut self, gpu: &mut Gpu, kernels_only: bool) -> anyhow::Result<()> {
        let start = self.clock.nanos();
        let is_asked = |unit: &Unit| match unit {
            Unit::Model(element) | Unit::Quantised(element) => {
                self.types.iter().any(|kind| kind.element() == Some(*element))
            }
            Unit::Step => self.types.contains(&KernelType::None),
        };
        // Steps need those without a type, whatever is asked for.
        let is_needed = |unit: &Unit| match (self.small, kernels_only) {
            (true, false) => is_asked(unit) || *unit == Unit::Step,
            (_, true) => is_asked(unit),
            (false, false) => true,
        };
        let units: Vec<Unit> = Unit::ALL.into_iter().filter(is_needed).collect();
        let (code, found) = (&self.code, &self.gpu);
        let is_kept = code.cache.is_some() && !self.small;
        std::thread::scope(|threads| {
            for unit in Unit::ALL.into_iter().filter(|unit| is_kept || units.contains(unit)) {
                threads.spawn(move || code.prepare(unit, found));
            }
        });
        let made = self.clock.nanos() - start;
        // One that is refused fails where it is used, and the others are compared all the same.
        for unit in units {
            if let Err(error) = gpu.load_unit(unit) {
                let name = unit.name();
                self.report.judge(false, &format!("unit {name}: {error}"), json!({"unit": name}))?;
            }
        }
        let loaded = self.clock.nanos() - start - made;
        let origins: Vec<(&str, Origin)> = gpu.origins().map(|(unit, origin)| (unit.name(), origin)).collect();
        let listed: Vec<String> = origins.iter().map(|(unit, origin)| format!("{unit} from {origin}")).collect();
        let is_compiled = origins.iter().all(|(_, origin)| *origin != Origin::Ptx);
        self.overlaps = self.may_overlap && is_compiled && cuda::Device::overlaps(&self.open(true)?);
        let words = format!(
            "kernels: {}; made in {:.1} s, loaded in {:.1} s",
            listed.join(", "),
            made as f64 * 1e-9,
            loaded as f64 * 1e-9
        );
        self.report.say(&words, json!({"kernels": listed, "made_ns": made, "loaded_ns": loaded}))?;
        cuda::Device::notes(gpu).iter().try_for_each(|note| self.report.say(note, json!({"note": note})))?;
        // Without a compiler that is how it is; with one, most of what is to be seen here would not be.
        if !is_compiled && !self.code.ptx_only && self.code.compiler(&self.gpu).is_ok() {
            let words = "NVRTC is there, and the kernels are from PTX all the same";
            self.report.judge(false, words, json!({"compiled": false}))?;
        }
        Ok(())
    }

    fn open(&self, overlap: bool) -> anyhow::Result<Gpu> {
        Ok(Gpu::open(self.gpu.clone(), self.code.clone(), overlap)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_that_others_may_write_to_keeps_no_code() {
        let folder = tempfile::tempdir().expect("a folder");
        let (own, open, linked) = (folder.path().join("own"), folder.path().join("open"), folder.path().join("linked"));
        std::fs::create_dir(&open).expect("made");
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).expect("set");
        std::os::unix::fs::symlink(&open, &linked).expect("linked");
        for (path, expect) in [(&own, true), (&own, true), (&open, false), (&linked, false)] {
            assert_eq!(own_folder(path).is_some(), expect, "{}", path.display());
        }
    }
}
