//! Weights as files give them: safetensors from memory, a mapped file, or a sharded folder.
//!
//! Names, shapes and types are checked here, against what the model definition asks for, so that everything behind this
//! module deals with numbers only. Files are mapped, not read: packing touches each byte once, and nothing stays resident.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use crate::backend::cuda;

/// Tensors by name, in one file or several.
#[derive(Debug)]
pub struct Weights {
    files: Vec<Bytes>,
    tensors: HashMap<String, Stored>,
}

enum Bytes {
    Borrowed(Cow<'static, [u8]>),
    Mapped(memmap2::Mmap),
}

#[derive(Debug)]
struct Stored {
    file: usize,
    dtype: Dtype,
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
        "{0} holds neither model.safetensors nor model.safetensors.index.json; pass a folder in Hugging Face format"
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
    #[error("tensor {name} of shape {expected:?} is missing; the weights do not belong to this config.json")]
    Missing {
        /// Its name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor of another shape.
    #[error("tensor {name} has shape {found:?}, config.json asks for {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor of a type that is not supported.
    #[error("tensor {name} of shape {shape:?} is {found:?}; supported are F32, F16 and BF16")]
    Type {
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type in the file.
        found: Dtype,
    },
    /// A tensor with an infinite or undefined value.
    #[error("tensor {name} holds a value that is not finite at element {element}")]
    NotFinite {
        /// Its name.
        name: String,
        /// Index of the first such value.
        element: usize,
    },
    /// candle could not quantise.
    #[error("quantising to Q8_0 failed: {0}")]
    Quantise(#[from] candle_core::Error),
}

/// The values of one tensor, in file order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elements<'a> {
    F32(&'a [[u8; 4]]),
    F16(&'a [[u8; 2]]),
    Bf16(&'a [[u8; 2]]),
}

/// 32 values as GGML has them: `quant * scale`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Q8Values {
    pub(crate) scale: f16,
    pub(crate) quants: [i8; 32],
}

// === impl Weights ===

impl Weights {
    /// Weights in memory, such as an embedded file.
    ///
    /// # Errors
    /// The bytes are not a complete safetensors file.
    pub fn from_bytes(bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self, LoadError> {
        let mut weights = Self { files: Vec::new(), tensors: HashMap::new() };
        weights.add(Bytes::Borrowed(bytes.into()), "the embedded model")?;
        Ok(weights)
    }

    /// Weights on disk: a `.safetensors` file, or a folder with `model.safetensors` or its sharded index.
    ///
    /// # Errors
    /// A file is missing, unreadable or incomplete.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let mut weights = Self { files: Vec::new(), tensors: HashMap::new() };
        for file in files_of(path)? {
            let mapped = map(&file).map_err(|source| LoadError::Io { path: file.clone(), source })?;
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
            let stored = Stored { file, dtype: info.dtype, shape: info.shape.clone(), range };
            self.tensors.insert(tensor, stored);
        }
        self.files.push(bytes);
        Ok(())
    }

    /// A tensor that must exist with this shape, in a supported type.
    pub(crate) fn get(&self, name: &str, expected: &[usize]) -> Result<Elements<'_>, LoadError> {
        let Some(stored) = self.tensors.get(name) else {
            return Err(LoadError::Missing { name: name.to_owned(), expected: expected.to_vec() });
        };
        if stored.shape != expected {
            let (expected, found) = (expected.to_vec(), stored.shape.clone());
            return Err(LoadError::Shape { name: name.to_owned(), expected, found });
        }
        let bytes = &self.files[stored.file].as_slice()[stored.range.clone()];
        let elements = match stored.dtype {
            Dtype::F32 => Elements::F32(bytes.as_chunks().0),
            Dtype::F16 => Elements::F16(bytes.as_chunks().0),
            Dtype::BF16 => Elements::Bf16(bytes.as_chunks().0),
            found => return Err(LoadError::Type { name: name.to_owned(), shape: stored.shape.clone(), found }),
        };
        match (0..elements.len()).find(|&i| !elements.f32(i).is_finite()) {
            Some(element) => Err(LoadError::NotFinite { name: name.to_owned(), element }),
            None => Ok(elements),
        }
    }
}

impl Weights {
    /// The type in which a model of this kind is stored: that of its embedding. `None` where there is none that is supported.
    #[must_use]
    pub fn stored(&self) -> Option<cuda::Element> {
        match self.tensors.get("model.embed_tokens.weight")?.dtype {
            Dtype::F32 => Some(cuda::Element::F32),
            Dtype::F16 => Some(cuda::Element::F16),
            Dtype::BF16 => Some(cuda::Element::Bf16),
            _ => None,
        }
    }
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

// === impl Elements ===

impl Elements<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) | Self::Bf16(x) => x.len(),
        }
    }

    pub(crate) fn f32(&self, i: usize) -> f32 {
        match self {
            Self::F32(x) => f32::from_le_bytes(x[i]),
            Self::F16(x) => f16::from_le_bytes(x[i]).to_f32(),
            Self::Bf16(x) => bf16::from_le_bytes(x[i]).to_f32(),
        }
    }

    /// The value as `f16`; exact for a tensor of that type.
    pub(crate) fn f16(&self, i: usize) -> f16 {
        match self {
            Self::F16(x) => f16::from_le_bytes(x[i]),
            Self::F32(_) | Self::Bf16(_) => f16::from_f32(self.f32(i)),
        }
    }

    /// The value as `bf16`; exact for a tensor of that type.
    pub(crate) fn bf16(&self, i: usize) -> bf16 {
        match self {
            Self::Bf16(x) => bf16::from_le_bytes(x[i]),
            Self::F32(_) | Self::F16(_) => bf16::from_f32(self.f32(i)),
        }
    }

    /// The first `n` values, and the rest.
    pub(crate) fn split_at(self, n: usize) -> (Self, Self) {
        match self {
            Self::F32(x) => (Self::F32(&x[..n]), Self::F32(&x[n..])),
            Self::F16(x) => (Self::F16(&x[..n]), Self::F16(&x[n..])),
            Self::Bf16(x) => (Self::Bf16(&x[..n]), Self::Bf16(&x[n..])),
        }
    }

    pub(crate) fn to_f32(self) -> Vec<f32> {
        (0..self.len()).map(|i| self.f32(i)).collect()
    }
}

/// Quantises rows of width `k` (a multiple of 32) with candle's GGML Q8_0.
pub(crate) fn quantise_q8_0(elements: &Elements<'_>, k: usize) -> Result<Vec<Q8Values>, LoadError> {
    let tensor = Tensor::from_vec(elements.to_f32(), (elements.len() / k, k), &Device::Cpu)?;
    let quantised = QTensor::quantize(&tensor, GgmlDType::Q8_0)?;
    let bytes = quantised.data()?;
    let (blocks, _) = bytes.as_chunks::<34>();
    let read = |block: &[u8; 34]| Q8Values {
        scale: f16::from_le_bytes([block[0], block[1]]),
        quants: std::array::from_fn(|i| block[2 + i].cast_signed()),
    };
    Ok(blocks.iter().map(read).collect())
}
