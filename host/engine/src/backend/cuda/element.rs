//! The type of weights, activations and pages on a device: one of three, chosen when a model is loaded.

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
