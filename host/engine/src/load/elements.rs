//! The values of one tensor as its file has them: plain numbers, or blocks of quantised ones.
//!
//! Every type reads back value by value, exactly: that is the reference for whoever packs blocks without widening them, and the
//! way for whoever has no kernel for a type. Why not candle's blocks: their fields are private, and a packer needs them.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};

use crate::backend::cpu::background::PIECE;

/// How the values of a tensor are stored.
///
/// A block of a quantised type holds [`values`](Self::values) of them along K in [`bytes`](Self::bytes), laid out as GGML does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    F32,
    F16,
    Bf16,
    /// `d`, 16 bytes of nibbles, low ones first: `d * (q - 8)`.
    Q4_0,
    /// `d`, `m`, nibbles as before: `d * q + m`.
    Q4_1,
    /// `d`, 32 high bits, nibbles: `d * (q - 16)`.
    Q5_0,
    /// `d`, `m`, 32 high bits, nibbles: `d * q + m`.
    Q5_1,
    /// `d`, 32 signed bytes: `d * q`.
    Q8_0,
    /// `d`, `dmin`, 12 bytes with eight 6-bit scales and eight 6-bit minima, nibbles: `d * scale * q - dmin * min` for each 32.
    Q4K,
    /// As `Q4K` with 32 bytes of high bits before the nibbles.
    Q5K,
    /// 128 bytes of low nibbles, 64 bytes of high pairs of bits, sixteen signed scales, `d`: `d * scale * (q - 32)` for each 16.
    Q6K,
}

/// The values of one tensor, in file order.
#[derive(Clone, Debug)]
pub(crate) struct Elements<'a> {
    pub(crate) kind: Kind,
    bytes: Cow<'a, [u8]>,
}

// === impl Kind ===

impl Kind {
    /// Values in a block.
    pub(crate) fn values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// As in names of variants.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }
}

// === impl Elements ===

impl<'a> Elements<'a> {
    /// Whole blocks; a rest is left out.
    pub(crate) fn new(kind: Kind, bytes: &'a [u8]) -> Self {
        Self { kind, bytes: Cow::Borrowed(bytes) }
    }

    pub(crate) fn owned(kind: Kind, bytes: Vec<u8>) -> Elements<'static> {
        Elements { kind, bytes: Cow::Owned(bytes) }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() / self.kind.bytes() * self.kind.values()
    }

    pub(crate) fn n_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The blocks, where `N` is the bytes of one.
    pub(crate) fn blocks<const N: usize>(&self) -> &[[u8; N]] {
        debug_assert_eq!(N, self.kind.bytes());
        self.bytes.as_chunks().0
    }

    pub(crate) fn f32(&self, i: usize) -> f32 {
        let (size, values) = (self.kind.bytes(), self.kind.values());
        let block = &self.bytes[i / values * size..][..size];
        self.kind.value(block, i % values)
    }

    /// The value as `f16`; exact for a tensor of that type.
    pub(crate) fn f16(&self, i: usize) -> f16 {
        match self.kind {
            Kind::F16 => f16::from_le_bytes(self.blocks()[i]),
            _ => f16::from_f32(self.f32(i)),
        }
    }

    /// The value as `bf16`; exact for a tensor of that type.
    pub(crate) fn bf16(&self, i: usize) -> bf16 {
        match self.kind {
            Kind::Bf16 => bf16::from_le_bytes(self.blocks()[i]),
            _ => bf16::from_f32(self.f32(i)),
        }
    }

    pub(crate) fn to_f32(&self) -> Vec<f32> {
        (0..self.len()).map(|i| self.f32(i)).collect()
    }

    /// The same values as plain numbers, which can be cut and moved one by one; those that are plain already stay.
    pub(crate) fn widened(self) -> Self {
        match self.kind.values() {
            1 => self,
            _ => Self::owned(Kind::F32, self.to_f32().into_iter().flat_map(f32::to_le_bytes).collect()),
        }
    }

    /// The first `n` values, and the rest; a block stays whole.
    pub(crate) fn split_at(self, n: usize) -> (Self, Self) {
        let (kind, at) = (self.kind, n / self.kind.values() * self.kind.bytes());
        let (first, rest) = match self.bytes {
            Cow::Borrowed(bytes) => (Cow::Borrowed(&bytes[..at]), Cow::Borrowed(&bytes[at..])),
            Cow::Owned(mut bytes) => {
                let rest = bytes.split_off(at);
                (Cow::Owned(bytes), Cow::Owned(rest))
            }
        };
        (Self { kind, bytes: first }, Self { kind, bytes: rest })
    }

    /// Some of the values; the range begins and ends with a block.
    pub(crate) fn slice(&self, range: Range<usize>) -> Elements<'_> {
        let at = |i: usize| i / self.kind.values() * self.kind.bytes();
        Elements::new(self.kind, &self.bytes[at(range.start)..at(range.end)])
    }

    /// In pieces of `n` values.
    pub(crate) fn chunks(self, n: usize) -> Vec<Self> {
        let (mut chunks, mut rest) = (Vec::new(), self);
        while rest.len() > n {
            let (first, others) = rest.split_at(n);
            chunks.push(first);
            rest = others;
        }
        chunks.push(rest);
        chunks
    }

    /// The same with rows of `k` values in another order: row `i` of the result is row `from(i)`.
    pub(crate) fn reordered(&self, k: usize, from: impl Fn(usize) -> usize) -> Elements<'static> {
        let width = k / self.kind.values() * self.kind.bytes();
        let mut bytes = Vec::with_capacity(self.bytes.len());
        (0..self.len() / k).for_each(|row| bytes.extend(&self.bytes[from(row) * width..][..width]));
        Elements::owned(self.kind, bytes)
    }

    /// The first value that is infinite or undefined. Of a quantised block, its scales tell.
    pub(crate) fn not_finite(&self) -> Option<usize> {
        let values = self.kind.values();
        let block = |block: &[u8]| match self.kind {
            Kind::F32 | Kind::F16 | Kind::Bf16 => self.kind.value(block, 0).is_finite(),
            Kind::Q4_0 | Kind::Q5_0 | Kind::Q8_0 => half_at(block, 0).is_finite(),
            Kind::Q4_1 | Kind::Q5_1 | Kind::Q4K | Kind::Q5K => {
                half_at(block, 0).is_finite() && half_at(block, 2).is_finite()
            }
            Kind::Q6K => half_at(block, 208).is_finite(),
        };
        let (size, n_blocks) = (self.kind.bytes(), PIECE / values);
        self.bytes.chunks(n_blocks * size).enumerate().find_map(|(n, piece)| {
            std::thread::yield_now();
            let at = piece.chunks_exact(size).position(|bytes| !block(bytes))?;
            Some((n * n_blocks + at) * values)
        })
    }
}

// === values of blocks ===

impl Kind {
    /// Value `i` of a block: at most one rounding, which every order of these products shares.
    fn value(self, block: &[u8], i: usize) -> f32 {
        let nibble = |at: usize, i: usize| f32::from(block[at + i % 16] >> (i / 16 * 4) & 15);
        let fifth = |at: usize| f32::from((block[at + i / 8] >> (i % 8) & 1) << 4);
        match self {
            Self::F32 => f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            Self::F16 => half_at(block, 0),
            Self::Bf16 => bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Self::Q4_0 => (nibble(2, i) - 8.0) * half_at(block, 0),
            Self::Q4_1 => nibble(4, i) * half_at(block, 0) + half_at(block, 2),
            Self::Q5_0 => (nibble(6, i) + fifth(2) - 16.0) * half_at(block, 0),
            Self::Q5_1 => (nibble(8, i) + fifth(4)) * half_at(block, 0) + half_at(block, 2),
            Self::Q8_0 => f32::from(block[2 + i].cast_signed()) * half_at(block, 0),
            Self::Q4K => with_minimum(block, i, 0.0, &block[16..]),
            Self::Q5K => {
                let fifth = f32::from((block[16 + i % 32] >> (i / 32) & 1) << 4);
                with_minimum(block, i, fifth, &block[48..])
            }
            Self::Q6K => {
                let (half, part, at) = (i / 128, i % 128 / 32, i % 32);
                let low = block[64 * half + 32 * (part % 2) + at] >> (part / 2 * 4) & 15;
                let high = block[128 + 32 * half + at] >> (2 * part) & 3;
                let scale = f32::from(block[192 + i / 16].cast_signed());
                half_at(block, 208) * scale * (f32::from(low | high << 4) - 32.0)
            }
        }
    }
}

/// A value of `Q4K` or `Q5K`: nibbles of 32 values beside those of the next 32, a scale and a minimum for each 32.
fn with_minimum(block: &[u8], i: usize, fifth: f32, nibbles: &[u8]) -> f32 {
    let part = i / 32;
    let q = f32::from(nibbles[part / 2 * 32 + i % 32] >> (part % 2 * 4) & 15) + fifth;
    let [scale, minimum] = scale_and_minimum(&block[4..16], part).map(f32::from);
    half_at(block, 0) * scale * q - half_at(block, 2) * minimum
}

/// Scale and minimum `part` of eight, six bits each: the first four plainly, of the others the two high bits in the first four.
pub(crate) fn scale_and_minimum(packed: &[u8], part: usize) -> [u8; 2] {
    match part {
        0..4 => [packed[part] & 63, packed[part + 4] & 63],
        _ => [packed[part + 4] & 15 | packed[part - 4] >> 6 << 4, packed[part + 4] >> 4 | packed[part] >> 6 << 4],
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    use super::*;

    /// Numbers of all sizes around zero; test data only.
    fn numbers(n: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        (0..n).map(|i| next() * (i / 100 + 1) as f32).collect()
    }

    #[test]
    fn every_type_reads_as_candle_reads_it() {
        const TYPES: [(Kind, GgmlDType); 11] = [
            (Kind::F32, GgmlDType::F32),
            (Kind::F16, GgmlDType::F16),
            (Kind::Bf16, GgmlDType::BF16),
            (Kind::Q4_0, GgmlDType::Q4_0),
            (Kind::Q4_1, GgmlDType::Q4_1),
            (Kind::Q5_0, GgmlDType::Q5_0),
            (Kind::Q5_1, GgmlDType::Q5_1),
            (Kind::Q8_0, GgmlDType::Q8_0),
            (Kind::Q4K, GgmlDType::Q4K),
            (Kind::Q5K, GgmlDType::Q5K),
            (Kind::Q6K, GgmlDType::Q6K),
        ];
        let tensor = Tensor::from_vec(numbers(4 * 512), (4, 512), &Device::Cpu).unwrap();
        for (kind, dtype) in TYPES {
            assert_eq!((kind.values(), kind.bytes()), (dtype.block_size(), dtype.type_size()), "{kind:?}");
            let quantised = QTensor::quantize(&tensor, dtype).unwrap();
            let bytes = quantised.data().unwrap();
            let found = Elements::new(kind, &bytes);
            let expect: Vec<f32> =
                quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found.to_f32()), bits(&expect), "{kind:?}");
            assert_eq!(found.not_finite(), None, "{kind:?}");
            // Rows keep their values when they move.
            let turned = found.reordered(512, |row| 3 - row).to_f32();
            assert_eq!(bits(&turned[512..1024]), bits(&expect[1024..1536]), "{kind:?}");
            let (first, rest) = found.split_at(512);
            assert_eq!((first.len(), rest.len()), (512, 3 * 512));
            assert_eq!(bits(&rest.to_f32()), bits(&expect[512..]), "{kind:?}");
            // Single values move once they are plain.
            let moved = rest.widened().reordered(1, |i| (i + 1) % (3 * 512)).to_f32();
            assert_eq!((moved.len(), bits(&moved)[..7].to_vec()), (3 * 512, bits(&expect[513..520])), "{kind:?}");
        }
    }

    #[test]
    fn a_scale_that_is_not_finite_is_found() {
        for (kind, at) in [(Kind::Q4_0, 0), (Kind::Q5_1, 2), (Kind::Q8_0, 0), (Kind::Q4K, 2), (Kind::Q6K, 208)] {
            let mut bytes = vec![0; 3 * kind.bytes()];
            bytes[2 * kind.bytes() + at..][..2].copy_from_slice(&f16::NAN.to_le_bytes());
            assert_eq!(Elements::new(kind, &bytes).not_finite(), Some(2 * kind.values()), "{kind:?}");
        }
    }
}
