//! The kernels' code for a device: compiled for it where NVRTC is found, else the text in the binary, which the driver compiles.
//!
//! The sources are in the binary too, so that a machine with a compiler gets code made for its architecture; it is kept on
//! disk under a hash of everything that it depends on, and looked at before it is used again. A machine with a driver alone
//! serves all the same.

use std::fmt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::element::Element;
use super::gpu::FoundGpu;
use super::nvrtc::{NoNvrtc, Nvrtc, NvrtcError, Output};

/// A translation unit of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Everything that computes in one type.
    Model(Element),
    /// Products of 8-bit weights with one type. On its own, because the driver compiles what is loaded and few models need both.
    Quantised(Element),
    /// Sampling and memory, which have no type.
    Step,
}

/// Where code comes from.
#[derive(Clone, Debug, Default)]
pub struct CodeOptions {
    /// Folders in which NVIDIA's libraries are looked for before the loader's.
    pub folders: Vec<PathBuf>,
    /// Where compiled code is kept.
    pub cache: Option<PathBuf>,
    /// Take the text in the binary even where there is a compiler.
    pub ptx_only: bool,
    /// Look for cuBLASLt, for products of long prompts.
    pub cublaslt: bool,
}

/// Where a unit's code came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Compiled for the device by an earlier start.
    Cache,
    /// Compiled for the device now.
    Nvrtc,
    /// The text in the binary, compiled by the driver.
    Ptx,
}

/// What code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) capability: (u32, u32),
    /// The newest CUDA version that the driver knows.
    pub(crate) driver: (u32, u32),
}

/// Code for a unit.
#[derive(Debug)]
pub(crate) struct Code {
    /// A CUBIN, or PTX that ends in a zero byte.
    pub(crate) image: Vec<u8>,
    pub(crate) origin: Origin,
    /// PTX, should the driver refuse the image.
    pub(crate) fallback: Option<Vec<u8>>,
    /// For the log.
    pub(crate) note: Option<String>,
}

/// Options of every compilation, beside the architecture.
pub const COMPILE_OPTIONS: [&str; 2] = ["--std=c++17", "-default-device"];

/// Bound of a unit's PTX, inflated.
const MAX_PTX: usize = 16 << 20;

/// The language's version that the text says it is in. A compiler writes its own, which drivers older than it refuse; 8.0 has
/// every instruction that the kernels use and is what drivers for CUDA 12.0 take.
const PTX_VERSION: &str = ".version 8.0";

/// How a CUBIN begins: an ELF file of 64 bits, and its machine at byte 18.
const ELF: &[u8] = b"\x7fELF\x02";
const ELF_MACHINE_CUDA: [u8; 2] = [190, 0];

macro_rules! text {
    ($name:literal) => {
        include_str!(concat!("kernels/", $name))
    };
}

const COMMON: &str = text!("common.cuh");
const MODEL: [&str; 7] = [
    text!("typed.cuh"),
    text!("model.cu"),
    text!("gemv.cu"),
    text!("tiles.cuh"),
    text!("gemm.cu"),
    text!("decode.cu"),
    text!("prefill.cu"),
];
const QUANTISED: [&str; 3] = [text!("typed.cuh"), text!("tiles.cuh"), text!("quantised.cu")];
const STEP: [&str; 3] = [text!("sample.cu"), text!("experts.cu"), text!("memory.cu")];

impl Unit {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Model(Element::F32),
        Self::Model(Element::F16),
        Self::Model(Element::Bf16),
        Self::Quantised(Element::F32),
        Self::Quantised(Element::F16),
        Self::Quantised(Element::Bf16),
        Self::Step,
    ];

    /// The unit of an entry point.
    pub(crate) fn of(entry: &str) -> Self {
        let rest = |element: Element| Some((element, entry.strip_suffix(element.name())?.strip_suffix('_')?));
        match Element::ALL.into_iter().find_map(rest) {
            Some((element, rest)) if rest.ends_with("_q8") || rest.ends_with("_fp8") => Self::Quantised(element),
            Some((element, _)) => Self::Model(element),
            None => Self::Step,
        }
    }

    /// As in file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Model(element) => element.name(),
            Self::Quantised(Element::F32) => "quantised-f32",
            Self::Quantised(Element::F16) => "quantised-f16",
            Self::Quantised(Element::Bf16) => "quantised-bf16",
            Self::Step => "step",
        }
    }

    /// Its CUDA C++ text, whole.
    #[must_use]
    pub fn source(self) -> String {
        let typed = |element: Element, files: &[&str]| {
            let number = match element {
                Element::F32 => 0,
                Element::F16 => 1,
                Element::Bf16 => 2,
            };
            format!("#define PM_T {number}\n{COMMON}{}", files.concat())
        };
        match self {
            Self::Model(element) => typed(element, &MODEL),
            Self::Quantised(element) => typed(element, &QUANTISED),
            Self::Step => format!("{COMMON}{}", STEP.concat()),
        }
    }

    /// SHA-256 of the text, in hexadecimal digits.
    #[must_use]
    pub fn source_hash(self) -> String {
        sha256(self.source().as_bytes())
    }

    /// The same as PTX for compute capability 8.0, which every later device takes. Its first line names the source's hash.
    #[must_use]
    pub fn ptx(self) -> Vec<u8> {
        let deflated = match self {
            Self::Model(Element::F32) => include_bytes!("kernels/ptx/f32.z").as_slice(),
            Self::Model(Element::F16) => include_bytes!("kernels/ptx/f16.z"),
            Self::Model(Element::Bf16) => include_bytes!("kernels/ptx/bf16.z"),
            Self::Quantised(Element::F32) => include_bytes!("kernels/ptx/quantised-f32.z"),
            Self::Quantised(Element::F16) => include_bytes!("kernels/ptx/quantised-f16.z"),
            Self::Quantised(Element::Bf16) => include_bytes!("kernels/ptx/quantised-bf16.z"),
            Self::Step => include_bytes!("kernels/ptx/step.z"),
        };
        // What is in the binary was inflated by a test; nothing is what the driver refuses by name.
        miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(deflated, MAX_PTX).unwrap_or_default()
    }

    /// PTX as `ptx` has it, from what a compiler made of the source.
    #[must_use]
    pub fn deflate(self, ptx: &str) -> Vec<u8> {
        // Comments name the compiler's build and nothing else; the pragma is a hint that older drivers do not know.
        let is_needed = |line: &&str| !(line.is_empty() || line.starts_with("//") || line.contains("used_bytes_mask"));
        let versioned = |line| if str::starts_with(line, ".version ") { PTX_VERSION } else { line };
        let lines = ptx.trim_end_matches('\0').lines().filter(is_needed).map(versioned);
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        let text = format!("// source sha256:{}\n{text}", self.source_hash());
        miniz_oxide::deflate::compress_to_vec_zlib(text.as_bytes(), 10)
    }
}

impl CodeOptions {
    /// The compiler, for a GPU and its driver.
    ///
    /// # Errors
    /// There is none that would do.
    pub fn compiler(&self, found: &FoundGpu) -> Result<Nvrtc, NoNvrtc> {
        self.compiler_for(Target { capability: found.info.capability, driver: found.driver })
    }

    fn compiler_for(&self, target: Target) -> Result<Nvrtc, NoNvrtc> {
        Nvrtc::find_for(&self.folders, target.driver.0, target.capability)
    }

    /// Makes a unit's code for this device ahead of time, so that it is in the cache when it is asked for. Several may be made at
    /// once.
    pub fn prepare(&self, unit: Unit, found: &FoundGpu) {
        drop(self.make(unit, Target { capability: found.info.capability, driver: found.driver }));
    }

    pub(crate) fn make(&self, unit: Unit, target: Target) -> Code {
        let ptx = || [unit.ptx(), vec![0]].concat();
        let text = |note: String| Code { image: ptx(), origin: Origin::Ptx, fallback: None, note: Some(note) };
        if self.ptx_only {
            return text("the kernels are taken from PTX, as asked: launches do not overlap".to_owned());
        }
        let compiler = match self.compiler_for(target) {
            Ok(compiler) => compiler,
            Err(none) => {
                return text(format!(
                    "{none}. The driver compiles the kernels from PTX for compute capability 8.0, and launches do not overlap"
                ));
            }
        };
        match self.compiled(&compiler, unit, target) {
            Ok(code) => Code { fallback: Some(ptx()), ..code },
            Err(error) => text(format!(
                "{} does not compile the kernels, the driver does, from PTX, and launches do not overlap: {error}",
                compiler.found()
            )),
        }
    }

    /// From the cache, or from the compiler and into the cache; with a note where it cannot be kept.
    fn compiled(&self, compiler: &Nvrtc, unit: Unit, target: Target) -> Result<Code, NvrtcError> {
        let source = unit.source();
        let (major, minor) = target.capability;
        let arch = format!("--gpu-architecture=sm_{major}{minor}");
        let made = format!("{arch} {COMPILE_OPTIONS:?} NVRTC {:?} driver {:?}", compiler.version(), target.driver);
        let label = format!("{made} source {}", sha256(source.as_bytes()));
        let file = format!("{}-{}.cubin", unit.name(), sha256(label.as_bytes()));
        let path = self.cache.as_ref().map(|folder| folder.join(file));
        if let Some(image) =
            path.as_ref().and_then(|path| std::fs::read(path).ok()).and_then(|kept| opened(kept, &label))
        {
            return Ok(Code { image, origin: Origin::Cache, fallback: None, note: None });
        }
        let options: Vec<&str> = [arch.as_str()].into_iter().chain(COMPILE_OPTIONS).collect();
        let (image, _) = compiler.compile(&source, &options, Output::Cubin)?;
        // That costs the next start a few seconds and nothing else.
        let unkept = path.and_then(|path| Some((keep(&path, &sealed(&image, &label)).err()?, path)));
        let note = unkept.map(|(error, path)| {
            format!("compiled kernels cannot be kept in {}, so each load compiles them: {error}", path.display())
        });
        Ok(Code { image, origin: Origin::Nvrtc, fallback: None, note })
    }
}

/// A CUBIN as it is kept: a line that says what it was made of and for, with its hash, and then its bytes.
fn sealed(image: &[u8], label: &str) -> Vec<u8> {
    [seal(image, label).as_bytes(), image].concat()
}

fn seal(image: &[u8], label: &str) -> String {
    format!("pointsman cubin {label} image {}\n", sha256(image))
}

/// The CUBIN of a kept file; nothing where it was cut, changed, or made for something else. The driver would refuse most
/// of these by itself, but not all.
fn opened(mut kept: Vec<u8>, label: &str) -> Option<Vec<u8>> {
    let end = kept.iter().position(|&byte| byte == b'\n')? + 1;
    let image = kept.split_off(end);
    let is_cubin = image.starts_with(ELF) && image.get(18..20) == Some(&ELF_MACHINE_CUDA[..]);
    (is_cubin && kept == seal(&image, label).as_bytes()).then_some(image)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes aside and renames, so that no half file is ever read.
fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let aside = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&aside, bytes)?;
    std::fs::rename(&aside, path)
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cache => "the cache of compiled code",
            Self::Nvrtc => "NVRTC",
            Self::Ptx => "PTX",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of the names of instructions that PTX 8.0 has for compute capability 8.0: operations, then types and the rest. What
    /// is not here may be newer; look it up before it is added.
    const KNOWN: &str = "abs add and atom bar bfe bfi bfind bra brev call clz copysign cp cvt cvta div dp4a ex2 exit fma fns ld \
        ldmatrix lg2 mad match max membar min mma mov movmatrix mul NaN neg not or popc prmt rcp red redux rem ret rsqrt sad selp set setp shf shfl shl \
        shr slct sqrt st sub tanh trap vote xor \
        b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f16 f16x2 bf16 bf16x2 f32 f64 pred v2 v4 \
        rn rz rm rp rni rzi rmi rpi sat ftz approx full hi lo wide cc l r wrap clamp uni sync async aligned \
        eq ne lt le gt ge ltu leu gtu geu equ neu num nan ltu and or xor inc dec exch cas \
        shiftamt global shared local param const to nc cg ca cs volatile relaxed acquire release acq_rel warp cta gl gpu sys L1 L2 no_allocate \
        bfly idx up down ballot any all red arrive commit_group wait_group wait_all \
        m8n8 x1 x2 x4 trans row col m16n8k8 m16n8k16 m16n8k32 satfinite relu";

    /// Names of the instructions of a text, without predicates and operands.
    fn instructions(text: &str) -> impl Iterator<Item = &str> {
        let statements = text.lines().map(str::trim).filter(|line| line.ends_with(';') && !line.starts_with('.'));
        statements.filter_map(|line| line.split_whitespace().find(|word| !word.starts_with(['@', '{', '}'])))
    }

    #[test]
    fn the_ptx_is_what_a_driver_for_cuda_12_0_takes() {
        let known: Vec<&str> = KNOWN.split_whitespace().collect();
        for unit in Unit::ALL {
            let text = String::from_utf8(unit.ptx()).expect("text");
            let head: Vec<&str> = text.lines().take(4).skip(1).collect();
            assert_eq!(
                head,
                [PTX_VERSION, ".target sm_80", ".address_size 64"],
                "{}: run `just kernels-ptx`",
                unit.name()
            );
            assert!(!text.contains("used_bytes_mask"), "{}: a pragma that older drivers do not know", unit.name());
            let named = instructions(&text).filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
            let mut n_named = 0;
            for name in named {
                n_named += 1;
                // `ld.global.nc.L1::no_allocate` has two names for one place; the operands of a call are no instructions.
                let name = name.trim_end_matches([';', ',']);
                let unknown = name.replace("::", ".").split('.').find(|part| !known.contains(part)).map(str::to_owned);
                let is_operand = name.starts_with("param") || name.starts_with("retval");
                assert!(is_operand || unknown.is_none(), "{}: {name} may be newer than 8.0", unit.name());
            }
            assert!(n_named > 500, "{}: {n_named} instructions are seen", unit.name());
        }
        let newer =
            "\t@%p1 fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4;\n\tld.global.v8.b32 {%r1}, [%rd1];\n$L__BB0_1:\n\tret;\n";
        assert_eq!(instructions(newer).collect::<Vec<_>>(), ["fma.rn.f32x2", "ld.global.v8.b32", "ret;"]);
        assert!(["f32x2", "v8"].iter().all(|part| !known.contains(part)));
    }

    #[test]
    fn what_was_kept_is_used_when_it_is_whole_and_for_this_device() {
        let mut image = [ELF, &[0; 40]].concat();
        image[18..20].copy_from_slice(&ELF_MACHINE_CUDA);
        let kept = sealed(&image, "sm_90 source 1");
        let changed = |at: usize| {
            let mut bytes = kept.clone();
            bytes[at] ^= 1;
            bytes
        };
        let foreign = sealed(&[ELF, &[0; 40]].concat(), "sm_90 source 1");
        for (kept, label, expect) in [
            (kept.clone(), "sm_90 source 1", Some(&image)),
            (kept.clone(), "sm_80 source 1", None),
            (kept.clone(), "sm_90 source 2", None),
            (kept[..kept.len() - 1].to_vec(), "sm_90 source 1", None),
            (changed(0), "sm_90 source 1", None),
            (changed(kept.len() - 1), "sm_90 source 1", None),
            (foreign, "sm_90 source 1", None),
            (image.clone(), "sm_90 source 1", None),
            (Vec::new(), "sm_90 source 1", None),
        ] {
            assert_eq!(opened(kept, label).as_ref(), expect, "{label}");
        }
    }

    #[test]
    fn text_is_taken_where_it_is_asked_for() {
        let options = CodeOptions { ptx_only: true, ..CodeOptions::default() };
        let code = options.make(Unit::Step, Target { capability: (9, 0), driver: (13, 0) });
        assert_eq!((code.origin, code.image.last(), code.fallback), (Origin::Ptx, Some(&0), None));
        assert!(code.note.is_some_and(|note| note.contains("as asked")));
    }

    #[test]
    fn an_entry_point_names_its_unit() {
        for (entry, expect) in [
            ("gemv_b1_f32", Unit::Model(Element::F32)),
            ("decode_attention_d64_bf16", Unit::Model(Element::Bf16)),
            ("gemm_m16_f16", Unit::Model(Element::F16)),
            ("gemm_m16_q8_f16", Unit::Quantised(Element::F16)),
            ("embed_fp8_bf16", Unit::Quantised(Element::Bf16)),
            ("argmax_parts", Unit::Step),
        ] {
            assert_eq!(Unit::of(entry), expect, "{entry}");
        }
    }

    #[test]
    fn the_ptx_was_made_from_the_sources() {
        for unit in Unit::ALL {
            let text = String::from_utf8(unit.ptx()).expect("text");
            let first = text.lines().next().unwrap_or_default();
            let expect = format!("// source sha256:{}", unit.source_hash());
            assert_eq!(first, expect, "{}: run `just kernels-ptx`", unit.name());
        }
    }
}
