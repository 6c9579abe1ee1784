//! The type of activations and pages on a device, and how its matrices are kept: chosen when a model is loaded.

use crate::backend::cpu::Precision;
use crate::load::Elements;

/// A number as the kernels store it; sums are `f32` in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32 bits: for comparing with the CPU, not for speed.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits, the exponent of `f32`.
    Bf16,
}

/// A type, and how matrices are kept beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Of activations, pages, norms and biases; of matrices, too, with [`Precision::F16`].
    pub element: Element,
    /// Of matrices.
    pub precision: Precision,
}

impl Form {
    /// In names of kernels, where matrices have 8 bits.
    pub(crate) fn suffix(self) -> Option<&'static str> {
        match self.precision {
            Precision::F16 => None,
            Precision::Q8_0 => Some("q8"),
            Precision::Fp8 => Some("fp8"),
        }
    }

    /// Bytes of a matrix's numbers.
    pub(crate) fn numbers_bytes(self, rows: usize, k: usize) -> u64 {
        let size = match self.precision {
            Precision::F16 => self.element.bytes(),
            Precision::Q8_0 | Precision::Fp8 => 1,
        };
        (rows * k * size) as u64
    }

    /// Bytes of the scales that follow them.
    pub(crate) fn scales_bytes(self, rows: usize, k: usize) -> u64 {
        match self.precision {
            Precision::F16 => 0,
            Precision::Q8_0 => (rows * (k / 32) * 2) as u64,
            Precision::Fp8 => (rows * 4) as u64,
        }
    }
}

impl From<Element> for Form {
    fn from(element: Element) -> Self {
        Self { element, precision: Precision::F16 }
    }
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.precision {
            Precision::F16 => self.element.fmt(f),
            precision => write!(f, "{} with {}", precision.name(), self.element),
        }
    }
}

impl Element {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// As in names of variants and kernels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Appends the values of a tensor in this type, rounded to nearest where it is narrower.
    pub(crate) fn append(self, elements: &Elements<'_>, range: std::ops::Range<usize>, to: &mut Vec<u8>) {
        match self {
            Self::F32 => range.for_each(|i| to.extend(elements.f32(i).to_le_bytes())),
            Self::F16 => range.for_each(|i| to.extend(elements.f16(i).to_le_bytes())),
            Self::Bf16 => range.for_each(|i| to.extend(elements.bf16(i).to_le_bytes())),
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
