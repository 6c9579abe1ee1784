//! The kernels' code for a device: compiled for it where NVRTC is found, else the text in the binary, which the driver compiles.
//!
//! The sources are in the binary too, so that a machine with a compiler gets code made for its architecture; it is kept on
//! disk under a hash of everything that it depends on. A machine with a driver alone serves all the same.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::element::Element;
use super::nvrtc::{Nvrtc, Output};

/// A translation unit of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Everything that computes in one type.
    Model(Element),
    /// Sampling and memory, which have no type.
    Step,
}

/// Where code comes from.
#[derive(Clone, Debug, Default)]
pub struct CodeOptions {
    /// Folders in which NVRTC is looked for before the loader's.
    pub folders: Vec<PathBuf>,
    /// Where compiled code is kept.
    pub cache: Option<PathBuf>,
}

/// Code for a unit.
#[derive(Debug)]
pub(crate) struct Code {
    /// A CUBIN, or PTX that ends in a zero byte.
    pub(crate) image: Vec<u8>,
    /// PTX, should the driver refuse the image.
    pub(crate) fallback: Option<Vec<u8>>,
    /// For the log.
    pub(crate) note: Option<String>,
}

/// Options of every compilation, beside the architecture.
pub const COMPILE_OPTIONS: [&str; 2] = ["--std=c++17", "-default-device"];

/// Bound of a unit's PTX, inflated.
const MAX_PTX: usize = 16 << 20;

macro_rules! text {
    ($name:literal) => {
        include_str!(concat!("kernels/", $name))
    };
}

const COMMON: &str = text!("common.cuh");
const MODEL: [&str; 6] = [
    text!("typed.cuh"),
    text!("model.cu"),
    text!("gemv.cu"),
    text!("gemm.cu"),
    text!("decode.cu"),
    text!("prefill.cu"),
];
const STEP: [&str; 2] = [text!("sample.cu"), text!("memory.cu")];

impl Unit {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::Model(Element::F32), Self::Model(Element::F16), Self::Model(Element::Bf16), Self::Step];

    /// The unit of an entry point.
    pub(crate) fn of(entry: &str) -> Self {
        let typed = |element: &Element| entry.strip_suffix(element.name()).is_some_and(|rest| rest.ends_with('_'));
        Element::ALL.into_iter().find(typed).map_or(Self::Step, Self::Model)
    }

    /// As in file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Model(element) => element.name(),
            Self::Step => "step",
        }
    }

    /// Its CUDA C++ text, whole.
    #[must_use]
    pub fn source(self) -> String {
        match self {
            Self::Model(element) => {
                let number = match element {
                    Element::F32 => 0,
                    Element::F16 => 1,
                    Element::Bf16 => 2,
                };
                format!("#define PM_T {number}\n{COMMON}{}", MODEL.concat())
            }
            Self::Step => format!("{COMMON}{}", STEP.concat()),
        }
    }

    /// SHA-256 of the text, in hexadecimal digits.
    #[must_use]
    pub fn source_hash(self) -> String {
        sha256(&self.source())
    }

    /// The same as PTX for compute capability 8.0, which every later device takes. Its first line names the source's hash.
    #[must_use]
    pub fn ptx(self) -> Vec<u8> {
        let deflated = match self {
            Self::Model(Element::F32) => include_bytes!("kernels/ptx/f32.z").as_slice(),
            Self::Model(Element::F16) => include_bytes!("kernels/ptx/f16.z"),
            Self::Model(Element::Bf16) => include_bytes!("kernels/ptx/bf16.z"),
            Self::Step => include_bytes!("kernels/ptx/step.z"),
        };
        // What is in the binary was inflated by a test; nothing is what the driver refuses by name.
        miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(deflated, MAX_PTX).unwrap_or_default()
    }

    /// PTX as `ptx` has it, from what a compiler made of the source.
    #[must_use]
    pub fn deflate(self, ptx: &str) -> Vec<u8> {
        // Comments name the compiler's build and nothing else.
        let lines = ptx.trim_end_matches('\0').lines().filter(|line| !line.is_empty() && !line.starts_with("//"));
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        let text = format!("// source sha256:{}\n{text}", self.source_hash());
        miniz_oxide::deflate::compress_to_vec_zlib(text.as_bytes(), 10)
    }
}

impl CodeOptions {
    pub(crate) fn make(&self, unit: Unit, capability: (u32, u32)) -> Code {
        let ptx = || [unit.ptx(), vec![0]].concat();
        let Some(compiler) = Nvrtc::find(&self.folders) else {
            let note = "NVRTC was not found: the driver compiles the kernels from PTX for compute capability 8.0, which lets \
                        launches overlap on no device; --cuda-lib-dir names a folder with libnvrtc.so";
            return Code { image: ptx(), fallback: None, note: Some(note.to_owned()) };
        };
        match self.compiled(&compiler, unit, capability) {
            Ok(image) => Code { image, fallback: Some(ptx()), note: None },
            Err(error) => {
                let found = compiler.found();
                let note = format!("{found} does not compile the kernels, the driver does, from PTX: {error}");
                Code { image: ptx(), fallback: None, note: Some(note) }
            }
        }
    }

    /// From the cache, or from the compiler and into the cache.
    fn compiled(
        &self,
        compiler: &Nvrtc,
        unit: Unit,
        (major, minor): (u32, u32),
    ) -> Result<Vec<u8>, super::nvrtc::NvrtcError> {
        let source = unit.source();
        let arch = format!("--gpu-architecture=sm_{major}{minor}");
        let version = compiler.version();
        let key = format!("{arch} {COMPILE_OPTIONS:?} {version:?}\n{source}");
        let file = format!("{}-{}.cubin", unit.name(), sha256(&key));
        let path = self.cache.as_ref().map(|folder| folder.join(file));
        if let Some(cached) = path.as_ref().and_then(|path| std::fs::read(path).ok()) {
            return Ok(cached);
        }
        let options: Vec<&str> = [arch.as_str()].into_iter().chain(COMPILE_OPTIONS).collect();
        let (image, _) = compiler.compile(&source, &options, Output::Cubin)?;
        // A cache that cannot be written costs the next start a few seconds and nothing else.
        let _ = path.map(|path| keep(&path, &image));
        Ok(image)
    }
}

fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_point_names_its_unit() {
        for (entry, expect) in [
            ("gemv_b1_f32", Unit::Model(Element::F32)),
            ("decode_attention_d64_bf16", Unit::Model(Element::Bf16)),
            ("gemm_m16_f16", Unit::Model(Element::F16)),
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
