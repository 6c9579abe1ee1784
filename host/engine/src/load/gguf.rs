//! The container of a GGUF file: its metadata and where its tensors lie, checked before anything is read or allocated.
//!
//! Nothing is copied: a value is a range of the mapped file, so that a file costs no more memory than it has keys and tensors.
//! Why not candle's reader: an alignment of 0 makes it divide by zero, each element of an array costs it 32 bytes
//! whatever its type, and a tensor of a type that it does not know hides the name of that tensor. The tests compare with it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use super::elements::Kind;

/// Keys that a file may have.
const MAX_KEYS: u64 = 1 << 14;
/// Tensors that a file may have.
const MAX_TENSORS: u64 = 1 << 17;
/// Bytes of a key or of a tensor's name.
const MAX_NAME: u64 = 512;
/// The least and the most that data may be aligned to.
const ALIGNMENTS: Range<u64> = 8..(1 << 16) + 1;

/// Why a file is not a GGUF file that can be used. Whoever made it is at fault; a retry does not help.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// It begins otherwise.
    #[error("it does not begin with GGUF")]
    Magic,
    /// A layout that is not known.
    #[error("it is of version {0}; supported are 2 and 3, little-endian")]
    Version(u32),
    /// The file ends too early.
    #[error("it ends within {what}: {needed} bytes are needed at byte {at} of {len}; download it again")]
    Cut {
        /// What was being read.
        what: String,
        /// Where.
        at: usize,
        /// How much of it.
        needed: u64,
        /// Bytes of the file.
        len: usize,
    },
    /// A number beyond every real file.
    #[error("it claims {what} of {found}; at most {most} are supported")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// The number.
        found: u64,
        /// The bound.
        most: u64,
    },
    /// A name that is not text.
    #[error("{what} is not UTF-8")]
    Text {
        /// Which.
        what: String,
    },
    /// A value of a type that is not known, or a list of lists.
    #[error("the value of {key} is of type {kind}, which is not known there")]
    ValueType {
        /// Its key.
        key: String,
        /// The number of the type.
        kind: u32,
    },
    /// An alignment that no file has.
    #[error("general.alignment is not a power of two from 8 to 65536")]
    Alignment,
    /// Two of one name.
    #[error("{what} is there twice")]
    Twice {
        /// Which.
        what: String,
    },
    /// A tensor whose sizes do not fit.
    #[error("tensor {name} of sizes {sizes:?}: {expected}")]
    Sizes {
        /// Its name.
        name: String,
        /// Its sizes, the innermost first, as the file has them.
        sizes: Vec<u64>,
        /// What they must be.
        expected: &'static str,
    },
    /// A tensor beyond the end.
    #[error("tensor {name} lies at bytes {start} to {end} of a file of {len}; download it again")]
    Beyond {
        /// Its name.
        name: String,
        /// Its first byte.
        start: u64,
        /// The byte after it.
        end: u64,
        /// Bytes of the file.
        len: usize,
    },
}

/// A value of the metadata, borrowed from the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// A whole number, of any width.
    Whole(i128),
    /// A number with a fraction, of any width.
    Real(f64),
    /// Yes or no.
    Flag(bool),
    /// Text; what is not UTF-8 in it is replaced.
    Text(Cow<'a, str>),
    /// Several values of one type.
    List(List<'a>),
}

/// A list of the metadata. Elements are read when they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List<'a> {
    kind: ValueKind,
    len: usize,
    bytes: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ValueKind {
    Unsigned(u8),
    Signed(u8),
    Real(u8),
    Flag,
    Text,
}

/// Where the values and the tensors of a file lie.
#[derive(Debug)]
pub(super) struct Contents {
    values: BTreeMap<String, Place>,
    pub(super) tensors: Vec<TensorPlace>,
}

#[derive(Debug)]
struct Place {
    kind: ValueKind,
    /// Elements, for a list.
    list: Option<usize>,
    range: Range<usize>,
}

#[derive(Debug)]
pub(super) struct TensorPlace {
    pub(super) name: String,
    /// The type, or its number where it is not supported.
    pub(super) kind: Result<Kind, u32>,
    /// The outermost size first.
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

// === impl Contents ===

impl Contents {
    pub(super) fn read(data: &[u8]) -> Result<Self, GgufError> {
        let mut reader = Reader { data, at: 0 };
        if reader.take(4, || "its first bytes".into()).ok() != Some(b"GGUF") {
            return Err(GgufError::Magic);
        }
        let version = reader.u32(|| "its version".into())?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version(version));
        }
        let n_tensors = reader.count("tensors", MAX_TENSORS)?;
        let n_keys = reader.count("keys", MAX_KEYS)?;
        let mut values = BTreeMap::new();
        for i in 0..n_keys {
            let key = reader.name(|| format!("key {i}"))?;
            let place = reader.value(&key)?;
            if values.insert(key.clone(), place).is_some() {
                return Err(GgufError::Twice { what: format!("key {key}") });
            }
        }
        let mut contents = Self { values, tensors: Vec::new() };
        let mut heads = BTreeMap::new();
        for i in 0..n_tensors {
            let name = reader.name(|| format!("the name of tensor {i}"))?;
            let head = reader.head(&name)?;
            if heads.insert(name.clone(), head).is_some() {
                return Err(GgufError::Twice { what: format!("tensor {name}") });
            }
        }
        let alignment = contents.alignment(data)?;
        let start = (reader.at as u64).next_multiple_of(alignment);
        let place = |(name, head): (String, Head)| head.place(name, start, data.len());
        contents.tensors = heads.into_iter().map(place).collect::<Result<_, _>>()?;
        Ok(contents)
    }

    fn alignment(&self, data: &[u8]) -> Result<u64, GgufError> {
        match self.get(data, "general.alignment") {
            None => Ok(32),
            Some(Value::Whole(found)) => {
                let found = u64::try_from(found).ok().filter(|n| n.is_power_of_two() && ALIGNMENTS.contains(n));
                found.ok_or(GgufError::Alignment)
            }
            Some(_) => Err(GgufError::Alignment),
        }
    }

    /// The value of a key.
    pub(super) fn get<'a>(&self, data: &'a [u8], key: &str) -> Option<Value<'a>> {
        let Place { kind, list, range } = self.values.get(key)?;
        let bytes = &data[range.clone()];
        match *list {
            Some(len) => Some(Value::List(List { kind: *kind, len, bytes })),
            None => kind.split(bytes).map(|(value, _)| value),
        }
    }
}

/// What stands about a tensor before the data.
struct Head {
    sizes: Vec<u64>,
    kind: Result<Kind, u32>,
    offset: u64,
}

impl Head {
    fn place(self, name: String, start: u64, len: usize) -> Result<TensorPlace, GgufError> {
        let Self { sizes, kind, offset } = self;
        let wrong = |expected| GgufError::Sizes { name: name.clone(), sizes: sizes.clone(), expected };
        let n = sizes.iter().try_fold(1u64, |n, &size| n.checked_mul(size)).filter(|&n| n > 0 && n <= 1 << 48);
        let n = n.ok_or_else(|| wrong("their product must be from 1 to 2^48"))?;
        let bytes = match kind {
            Ok(kind) if !sizes.first().is_none_or(|&k| k.is_multiple_of(kind.values() as u64)) => {
                return Err(wrong("the first must be a multiple of the values in a block of its type"));
            }
            Ok(kind) => n / kind.values() as u64 * kind.bytes() as u64,
            // Its size is not known; it is refused when somebody asks for it.
            Err(_) => 0,
        };
        let start = start.saturating_add(offset);
        let end = start.saturating_add(bytes);
        if end > len as u64 {
            return Err(GgufError::Beyond { name, start, end, len });
        }
        let shape = sizes.iter().rev().map(|&size| size as usize).collect();
        Ok(TensorPlace { name, kind, shape, range: start as usize..end as usize })
    }
}

// === impl Reader ===

/// Reads forward, never beyond the end.
struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: u64, what: impl Fn() -> String) -> Result<&'a [u8], GgufError> {
        let rest = &self.data[self.at..];
        let cut = || GgufError::Cut { what: what(), at: self.at, needed: n, len: self.data.len() };
        let taken = usize::try_from(n).ok().and_then(|n| rest.get(..n)).ok_or_else(cut)?;
        self.at += taken.len();
        Ok(taken)
    }

    fn u32(&mut self, what: impl Fn() -> String) -> Result<u32, GgufError> {
        Ok(self.take(4, what)?.iter().rev().fold(0, |n, &byte| n << 8 | u32::from(byte)))
    }

    fn u64(&mut self, what: impl Fn() -> String) -> Result<u64, GgufError> {
        Ok(self.take(8, what)?.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    fn count(&mut self, what: &'static str, most: u64) -> Result<u64, GgufError> {
        let found = self.u64(|| format!("the number of {what}"))?;
        if found > most { Err(GgufError::TooMuch { what, found, most }) } else { Ok(found) }
    }

    fn name(&mut self, what: impl Fn() -> String) -> Result<String, GgufError> {
        let found = self.u64(&what)?;
        if found > MAX_NAME {
            return Err(GgufError::TooMuch { what: "bytes of a name", found, most: MAX_NAME });
        }
        let bytes = self.take(found, &what)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| GgufError::Text { what: what() })
    }

    /// Walks over a value: every length in it is checked here, so that reading it later cannot fail.
    fn value(&mut self, key: &str) -> Result<Place, GgufError> {
        let what = || format!("the value of {key}");
        let mut number = self.u32(what)?;
        let list = number == 9;
        let mut len = 1;
        if list {
            number = self.u32(what)?;
            len = self.u64(what)?;
        }
        let unknown = || GgufError::ValueType { key: key.to_owned(), kind: number };
        let kind = ValueKind::of(number).ok_or_else(unknown)?;
        let start = self.at;
        match kind.width() {
            Some(width) => {
                self.take(len.saturating_mul(u64::from(width)), what)?;
            }
            None => {
                for _ in 0..len {
                    let bytes = self.u64(what)?;
                    self.take(bytes, what)?;
                }
            }
        }
        Ok(Place { kind, list: list.then_some(len as usize), range: start..self.at })
    }

    fn head(&mut self, name: &str) -> Result<Head, GgufError> {
        let what = || format!("what it says about tensor {name}");
        let n_sizes = self.u32(what)?;
        if n_sizes > 4 {
            return Err(GgufError::TooMuch { what: "sizes of a tensor", found: n_sizes.into(), most: 4 });
        }
        let sizes = (0..n_sizes).map(|_| self.u64(what)).collect::<Result<_, _>>()?;
        let number = self.u32(what)?;
        Ok(Head { sizes, kind: kind_of(number).ok_or(number), offset: self.u64(what)? })
    }
}

/// The types of tensors, by their numbers in GGML.
fn kind_of(number: u32) -> Option<Kind> {
    Some(match number {
        0 => Kind::F32,
        1 => Kind::F16,
        2 => Kind::Q4_0,
        3 => Kind::Q4_1,
        6 => Kind::Q5_0,
        7 => Kind::Q5_1,
        8 => Kind::Q8_0,
        12 => Kind::Q4K,
        13 => Kind::Q5K,
        14 => Kind::Q6K,
        30 => Kind::Bf16,
        _ => return None,
    })
}

/// What a type that is not supported is called.
pub(super) fn type_name(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24..=27 => "a whole number",
        28 => "F64",
        29 => "IQ1_M",
        39 => "MXFP4",
        _ => return format!("GGML type {number}"),
    };
    name.to_owned()
}

// === impl ValueKind ===

impl ValueKind {
    fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Unsigned(1),
            1 => Self::Signed(1),
            2 => Self::Unsigned(2),
            3 => Self::Signed(2),
            4 => Self::Unsigned(4),
            5 => Self::Signed(4),
            6 => Self::Real(4),
            7 => Self::Flag,
            8 => Self::Text,
            10 => Self::Unsigned(8),
            11 => Self::Signed(8),
            12 => Self::Real(8),
            _ => return None,
        })
    }

    /// Bytes of a value; text brings its own length.
    fn width(self) -> Option<u8> {
        match self {
            Self::Unsigned(width) | Self::Signed(width) | Self::Real(width) => Some(width),
            Self::Flag => Some(1),
            Self::Text => None,
        }
    }

    /// The first value, and the bytes after it. `None` at the end.
    fn split(self, bytes: &[u8]) -> Option<(Value<'_>, &[u8])> {
        let whole = |bytes: &[u8]| bytes.iter().rev().fold(0i128, |n, &byte| n << 8 | i128::from(byte));
        let width = match self.width() {
            Some(width) => usize::from(width),
            None => {
                let (len, rest) = bytes.split_at_checked(8)?;
                let (text, rest) = rest.split_at_checked(whole(len) as usize)?;
                return Some((Value::Text(String::from_utf8_lossy(text)), rest));
            }
        };
        let (value, rest) = bytes.split_at_checked(width)?;
        let number = whole(value);
        let value = match self {
            Self::Signed(width) if number >> (8 * width - 1) == 1 => Value::Whole(number - (1 << (8 * width))),
            Self::Real(4) => Value::Real(f32::from_bits(number as u32).into()),
            Self::Real(_) => Value::Real(f64::from_bits(number as u64)),
            Self::Flag => Value::Flag(number != 0),
            Self::Unsigned(_) | Self::Signed(_) | Self::Text => Value::Whole(number),
        };
        Some((value, rest))
    }
}

// === impl List ===

impl<'a> List<'a> {
    /// How many elements there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let Self { kind, mut bytes, .. } = *self;
        std::iter::from_fn(move || {
            let (value, rest) = kind.split(bytes)?;
            bytes = rest;
            Some(value)
        })
    }
}
