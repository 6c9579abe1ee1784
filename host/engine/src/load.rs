//! Weights as files give them: safetensors from memory, a mapped file or a sharded folder, or one GGUF file.
//!
//! A tensor is asked for by its name in Hugging Face checkpoints; `names` has what it is called in a GGUF file. Names, shapes
//! and types are checked here, against what the model definition asks for, so that everything behind this module deals with
//! numbers only. Files are mapped, not read: packing touches each byte once, and nothing stays resident.

mod elements;
pub mod gguf;
mod names;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensorError, SafeTensors};

pub(crate) use self::elements::{Elements, Kind, scale_and_minimum};
use self::gguf::{Contents, GgufError, Value};
use crate::Precision;
use crate::backend::cpu::background::PIECE;
use crate::backend::cuda;

/// Tensors by name, in one file or several.
#[derive(Debug)]
pub struct Weights {
    files: Vec<Bytes>,
    tensors: HashMap<String, Stored>,
    /// What else the file says, where it is a GGUF file.
    gguf: Option<Gguf>,
}

#[derive(Debug)]
struct Gguf {
    contents: Contents,
    /// Whether its architecture norms the result of each half of a layer: some names depend on it.
    post_norms: bool,
}

enum Bytes {
    Borrowed(Cow<'static, [u8]>),
    Mapped(memmap2::Mmap),
}

#[derive(Debug)]
struct Stored {
    file: usize,
    /// The type, or what it is called where it is not supported.
    kind: Result<Kind, String>,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// Why weights cannot be used. The file or the configuration beside it is at fault; a retry does not help.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file system said no.
    #[error("cannot read {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder without weights.
    #[error(
        "{0} holds neither model.safetensors nor model.safetensors.index.json; pass a folder in Hugging Face format or a .gguf file"
    )]
    NoWeights(PathBuf),
    /// Not safetensors, or cut short.
    #[error("{file} is not a complete safetensors file: {source}; download it again")]
    Broken {
        /// Which file.
        file: String,
        /// What does not hold.
        source: SafeTensorError,
    },
    /// Not GGUF, or cut short.
    #[error("{file} is not a GGUF file that can be used: {source}")]
    Gguf {
        /// Which file.
        file: PathBuf,
        /// What does not hold.
        source: GgufError,
    },
    /// The list of shards cannot be read.
    #[error("{path} is not a safetensors index: {source}")]
    BadIndex {
        /// Which file.
        path: PathBuf,
        /// Where it breaks.
        source: serde_json::Error,
    },
    /// The list of shards names a file outside its folder.
    #[error("{path} names the shard {shard:?}, which is not a plain file name")]
    BadShard {
        /// Which file.
        path: PathBuf,
        /// The name.
        shard: String,
    },
    /// The configuration asks for a tensor that is not there.
    #[error("tensor {name} of shape {expected:?} is missing; the weights do not belong to this configuration")]
    Missing {
        /// Its name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor of another shape.
    #[error("tensor {name} has shape {found:?}, the configuration asks for {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor of a type that is not supported.
    #[error(
        "tensor {name} of shape {shape:?} is {found}; supported are F32, F16 and BF16, and in GGUF files Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K"
    )]
    Type {
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type in the file.
        found: String,
    },
    /// A tensor with an infinite or undefined value.
    #[error("tensor {name} holds a value that is not finite at element {element}")]
    NotFinite {
        /// Its name.
        name: String,
        /// Index of the first such value.
        element: usize,
    },
    /// A precision that the CPU has no kernels for.
    #[error(
        "the CPU does not compute with fp8 weights; take f16 or q8_0 there, or serve the model on a GPU (--device cuda:N)"
    )]
    NotOnCpu,
    /// Whoever wanted the model wants it no more.
    #[error("the load was stopped")]
    Stopped,
    /// candle could not quantise.
    #[error("quantising to Q8_0 failed: {0}")]
    Quantise(#[from] candle_core::Error),
}

// === impl Weights ===

impl Weights {
    /// Weights in memory, such as an embedded file.
    ///
    /// # Errors
    /// The bytes are not a complete safetensors file.
    pub fn from_bytes(bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self, LoadError> {
        let mut weights = Self { files: Vec::new(), tensors: HashMap::new(), gguf: None };
        weights.add(Bytes::Borrowed(bytes.into()), "the embedded model")?;
        Ok(weights)
    }

    /// Weights on disk: a `.gguf` file, a `.safetensors` file, or a folder with `model.safetensors` or its sharded index.
    ///
    /// # Errors
    /// A file is missing, unreadable or incomplete.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let mut weights = Self { files: Vec::new(), tensors: HashMap::new(), gguf: None };
        for file in files_of(path)? {
            let mapped = map(&file).map_err(|source| LoadError::Io { path: file.clone(), source })?;
            if is_gguf(&file) {
                weights.add_gguf(mapped, file)?;
                continue;
            }
            weights.add(Bytes::Mapped(mapped), &file.display().to_string())?;
        }
        Ok(weights)
    }

    fn add(&mut self, bytes: Bytes, name: &str) -> Result<(), LoadError> {
        let broken = |source| LoadError::Broken { file: name.to_owned(), source };
        let file = self.files.len();
        let data = bytes.as_slice();
        let (header, metadata) = SafeTensors::read_metadata(data).map_err(broken)?;
        if header + 8 + metadata.data_len() != data.len() {
            return Err(broken(SafeTensorError::MetadataIncompleteBuffer));
        }
        for (tensor, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let range = header + 8 + start..header + 8 + end;
            let kind = match info.dtype {
                Dtype::F32 => Ok(Kind::F32),
                Dtype::F16 => Ok(Kind::F16),
                Dtype::BF16 => Ok(Kind::Bf16),
                other => Err(format!("{other:?}")),
            };
            self.tensors.insert(tensor, Stored { file, kind, shape: info.shape.clone(), range });
        }
        self.files.push(bytes);
        Ok(())
    }

    fn add_gguf(&mut self, mapped: memmap2::Mmap, file: PathBuf) -> Result<(), LoadError> {
        let mut contents = Contents::read(&mapped).map_err(|source| LoadError::Gguf { file, source })?;
        for place in std::mem::take(&mut contents.tensors) {
            let kind = place.kind.map_err(gguf::type_name);
            let stored = Stored { file: self.files.len(), kind, shape: place.shape, range: place.range };
            self.tensors.insert(place.name, stored);
        }
        let architecture = contents.get(&mapped, "general.architecture");
        let post_norms = matches!(architecture, Some(Value::Text(name)) if name.starts_with("gemma"));
        self.files.push(Bytes::Mapped(mapped));
        self.gguf = Some(Gguf { contents, post_norms });
        Ok(())
    }

    /// A value of a GGUF file's metadata.
    #[must_use]
    pub fn metadata(&self, key: &str) -> Option<Value<'_>> {
        self.gguf.as_ref()?.contents.get(self.files[0].as_slice(), key)
    }

    /// What a tensor is called in the files at hand.
    fn name_of<'n>(&self, name: &'n str) -> Cow<'n, str> {
        match &self.gguf {
            Some(gguf) => names::in_gguf(name, gguf.post_norms).into(),
            None => name.into(),
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(&*self.name_of(name)).map(|stored| &*stored.shape)
    }

    /// A tensor that must exist with this shape, in a supported type.
    pub(crate) fn get(&self, name: &str, expected: &[usize]) -> Result<Elements<'_>, LoadError> {
        let name = self.name_of(name).into_owned();
        let Some(stored) = self.tensors.get(&name) else {
            return Err(LoadError::Missing { name, expected: expected.to_vec() });
        };
        if stored.shape != expected {
            return Err(LoadError::Shape { name, expected: expected.to_vec(), found: stored.shape.clone() });
        }
        let bytes = &self.files[stored.file].as_slice()[stored.range.clone()];
        let kind = stored.kind.clone();
        let kind = kind.map_err(|found| LoadError::Type { name: name.clone(), shape: stored.shape.clone(), found })?;
        let elements = Elements::new(kind, bytes);
        match elements.not_finite() {
            Some(element) => Err(LoadError::NotFinite { name, element }),
            None => Ok(elements),
        }
    }

    /// The type of most values, as in `q4_k`.
    #[must_use]
    pub fn predominant(&self) -> &'static str {
        let mut bytes = BTreeMap::<Kind, usize>::new();
        for stored in self.tensors.values() {
            if let Ok(kind) = stored.kind {
                *bytes.entry(kind).or_default() += stored.range.len() / kind.bytes() * kind.values();
            }
        }
        bytes.into_iter().max_by_key(|(_, values)| *values).map_or("unknown", |(kind, _)| kind.name())
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|stored| stored.range.len() as u64).sum()
    }

    /// Bytes that they come to once a CPU has packed them.
    #[must_use]
    pub fn packed_bytes(&self, precision: Precision) -> u64 {
        let packed = |stored: &Stored| {
            let Ok(kind) = stored.kind else { return 0 };
            let n_values = stored.range.len() / kind.bytes() * kind.values();
            let kept = match (precision, kind) {
                // A vector stays what it is, and does not count.
                (Precision::Q8_0, _) if stored.shape.len() > 1 => Kind::Q8_0,
                // No kernel has these blocks.
                (_, Kind::Q4_1 | Kind::Q5_0 | Kind::Q5_1) => Kind::F32,
                _ => kind,
            };
            (n_values / kept.values() * kept.bytes()) as u64
        };
        self.tensors.values().map(packed).sum()
    }

    /// The type in which a model of this kind is stored: that of its embedding. `None` where a device has no such type.
    #[must_use]
    pub fn stored(&self) -> Option<cuda::Element> {
        match self.tensors.get(&*self.name_of("model.embed_tokens.weight"))?.kind {
            Ok(Kind::F32) => Some(cuda::Element::F32),
            Ok(Kind::F16) => Some(cuda::Element::F16),
            Ok(Kind::Bf16) => Some(cuda::Element::Bf16),
            _ => None,
        }
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The files behind a path, each once.
fn files_of(path: &Path) -> Result<Vec<PathBuf>, LoadError> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
    if single.exists() {
        return Ok(vec![single]);
    }
    if !index.exists() {
        return Err(LoadError::NoWeights(path.to_owned()));
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(&index).map_err(|source| LoadError::Io { path: index.clone(), source })?;
    let parsed: Index =
        serde_json::from_slice(&text).map_err(|source| LoadError::BadIndex { path: index.clone(), source })?;
    let mut shards: Vec<String> = parsed.weight_map.into_values().collect();
    shards.sort_unstable();
    shards.dedup();
    if let Some(shard) =
        shards.iter().find(|shard| Path::new(shard).file_name().is_none_or(|name| name != shard.as_str()))
    {
        return Err(LoadError::BadShard { path: index, shard: shard.clone() });
    }
    Ok(shards.into_iter().map(|shard| path.join(shard)).collect())
}

#[expect(unsafe_code, reason = "mapping a file of weights; the one known exception outside the backends")]
fn map(path: &Path) -> std::io::Result<memmap2::Mmap> {
    // A pipe would be waited for, and for ever.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    let file = std::fs::File::open(path)?;
    // SAFETY: the mapping is read-only and private to `Weights`, which is dropped once the model is packed. Another process
    // that truncates the file meanwhile can kill this one: weights must not be edited in place while they are loaded.
    unsafe { memmap2::Mmap::map(&file) }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Mapped(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.as_slice().len())
    }
}

/// Quantises rows of width `k` (a multiple of 32) with candle's GGML Q8_0.
pub(crate) fn quantise_q8_0(elements: &Elements<'_>, k: usize) -> Result<Elements<'static>, LoadError> {
    let rows_at_once = (PIECE / k).max(1) * k;
    let mut bytes = Vec::with_capacity(elements.len() / Kind::Q8_0.values() * Kind::Q8_0.bytes());
    for first in (0..elements.len()).step_by(rows_at_once) {
        let piece = elements.slice(first..(first + rows_at_once).min(elements.len())).to_f32();
        let tensor = Tensor::from_vec(piece, ((elements.len() - first).min(rows_at_once) / k, k), &Device::Cpu)?;
        bytes.extend_from_slice(&QTensor::quantize(&tensor, GgmlDType::Q8_0)?.data()?);
        std::thread::yield_now();
    }
    Ok(Elements::owned(Kind::Q8_0, bytes))
}

/// Numbers of a row as e4m3 floats, to be multiplied by `scale`; the largest of them becomes 448, the largest there is.
#[derive(Clone, Debug)]
pub(crate) struct Fp8Row {
    pub(crate) scale: f32,
    pub(crate) codes: Vec<u8>,
}

/// Quantises rows of width `k` to e4m3, to nearest, ties to even.
pub(crate) fn quantise_fp8(elements: &Elements<'_>, k: usize) -> Vec<Fp8Row> {
    let row = |first: usize| {
        let values = || (first..first + k).map(|i| elements.f32(i));
        let largest = values().fold(0.0f32, |max, x| max.max(x.abs()));
        // A row of zeros, or one so small that its scale would be zero.
        let scale = if largest / 448.0 > 0.0 { largest / 448.0 } else { 1.0 };
        Fp8Row { scale, codes: values().map(|x| e4m3(x / scale)).collect() }
    };
    (0..elements.len()).step_by(k).map(row).collect()
}

/// Sign, four bits of exponent, three of fraction; numbers beyond the largest become it.
fn e4m3(x: f32) -> u8 {
    let size = x.abs().min(448.0);
    // The exponent of the number, or of the smallest with an implicit one; a step is an eighth of its power of two.
    let exponent = (i32::from((size.to_bits() >> 23) as u8) - 127).max(-6);
    let steps = (size * 2f32.powi(3 - exponent)).round_ties_even() as u8;
    // A carry out of the fraction moves on into the exponent.
    let code = ((exponent + 6) as u8) * 8 + steps;
    code | if x.is_sign_negative() { 0x80 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of a code, by the definition of the format.
    fn number(code: u8) -> f32 {
        let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
        let size = if exponent == 0 { fraction / 64.0 } else { (1.0 + fraction) * 2f32.powi(exponent - 7) };
        if code & 0x80 == 0 { size } else { -size }
    }

    #[test]
    fn numbers_become_the_nearest_e4m3() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(e4m3(number(code)), code);
        }
        // Half-way between two, the even one; beyond the end, the last.
        for (x, expect) in [
            (1.0625, 0x38),
            (1.1875, 0x3a),
            (-1.0626, 0xb9),
            (465.0, 0x7e),
            (0.00097, 0),
            (0.00098, 1),
            (0.96876, 0x38),
        ] {
            assert_eq!(e4m3(x), expect, "{x}");
        }
    }

    #[test]
    fn a_row_takes_the_whole_range() {
        let values = [0.5f32, -7.0, 0.0, 3.5, 0.0, 0.0, 0.0, 0.0].map(f32::to_le_bytes);
        let rows = quantise_fp8(&Elements::new(Kind::F32, values.as_flattened()), 4);
        assert_eq!((rows[0].scale, &rows[0].codes[..]), (7.0 / 448.0, &[0x60, 0xfe, 0, 0x76][..]));
        assert_eq!((rows[1].scale, &rows[1].codes[..]), (1.0, &[0; 4][..]));
    }
}
