//! Sixteen lanes of `f32`: the vocabulary in which every CPU kernel is written, once, for all instruction sets.
//!
//! A kernel is generic over [`Simd`] and runs through [`Isa::run`], the only place that enters a `#[target_feature]`
//! function; kernels are `inline(always)`, so the compiler generates one whole copy of each per instruction set. An
//! [`Isa`] can only be made by asking the CPU, and is thereby the proof that its instructions exist. Why not write each
//! kernel three times, or leave it to the auto-vectoriser: the first triples the places where a rounding may differ, the
//! second cannot widen `f16` and may not be relied on.
//!
//! Every operation is exactly rounded (or integer), and lanes meet only in [`Simd::sum`], a fixed tree: the three
//! implementations give equal bits. `max` and `min` take their second operand where the first is not a number.

use half::{bf16, f16};

#[cfg_attr(not(target_arch = "x86_64"), path = "isa/no_amx.rs")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

pub(crate) use amx::{TileSums, Tiles};

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen activations, weights or positions.
pub(crate) type Lanes = [f32; LANES];

/// Rows of activations that a tile register takes.
pub(crate) const TILE_ROWS: usize = 16;

/// 32 values of one row of activations.
pub(crate) type Quads = [[i8; 4]; 8];

/// 64 values of one row of activations.
pub(crate) type Stretch = [[i8; 4]; 16];

/// 32 values of K for 32 columns: value `k` of column `c` is `[k / 4][4 * c + k % 4]`.
pub(crate) type WeightQuads = [[i8; 128]; 8];

/// Two bytes for each of 256 values of K for 32 columns, in the same order.
pub(crate) type Planes = [[[i8; 128]; 64]; 2];

/// Vectors from one panel of activations to the next: `[width / 16][stride(rows)][16]`. Odd, since with 64 rows every panel
/// would start at the same 4 KiB offset and a tile would fight over a few cache sets (measured: half the speed).
#[inline(always)]
pub(crate) fn stride(rows: usize) -> usize {
    if rows < 8 { rows } else { rows | 1 }
}

/// Four bytes as the instructions take them.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn word(bytes: [i8; 4]) -> i32 {
    i32::from_le_bytes(bytes.map(i8::cast_unsigned))
}

/// The same for two numbers of 16 bits.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pair([low, high]: [i16; 2]) -> i32 {
    i32::from(high) << 16 | i32::from(low.cast_unsigned())
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Amx(amx::Amx),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    Portable,
}

/// A computation that is compiled for each instruction set. `run` must be `inline(always)`, as must all that it calls.
pub(crate) trait Kernel {
    type Out;
    fn run<S: Simd>(self, simd: S) -> Self::Out;
}

/// Operations on sixteen `f32` lanes (`V`) and sixteen `i32` lanes (`I`).
pub(crate) trait Simd: Copy {
    type V: Copy;
    type I: Copy;

    /// Whether there are registers for 24 accumulators of sixteen lanes.
    const WIDE: bool;
    /// Whether products of bytes are best gathered in 16 bits first: see [`dot4_short`](Self::dot4_short).
    const SHORT_SUMS: bool = false;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &Lanes) -> Self::V;
    fn load_f16(self, x: &[f16; LANES]) -> Self::V;
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V;
    fn store(self, v: Self::V, out: &mut Lanes);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even; for magnitudes below 2^31.
    fn round(self, v: Self::V) -> Self::V;
    /// The same as integers.
    fn round_int(self, v: Self::V) -> Self::I;
    /// 2^n for integral `n` in -126 ..= 127.
    fn pow2(self, n: Self::V) -> Self::V;
    /// Rounded as `round` does and narrowed, for magnitudes below 128.
    fn round_i8(self, v: Self::V) -> [i8; LANES];

    fn splat_int(self, x: i32) -> Self::I;
    fn load_int(self, x: &[i32; LANES]) -> Self::I;
    fn store_int(self, v: Self::I, out: &mut [i32; LANES]);
    /// What a sum of dot products begins with. `offset` is -128 times the sum of all activations that it will see: where
    /// the instruction wants unsigned weights they are made 128 too large, and this takes it back.
    fn dot_start(self, offset: i32) -> Self::I;
    /// Lane `j` gains the dot product of bytes `4j .. 4j + 4` of `w` with `x`, of which none is -128.
    fn dot4(self, acc: Self::I, w: &[i8; 64], x: [i8; 4]) -> Self::I;
    /// The same for weights of which none is negative, which need no [`dot_start`](Self::dot_start).
    fn dot4_unsigned(self, acc: Self::I, w: &[i8; 64], x: [i8; 4]) -> Self::I;
    /// As [`dot4_unsigned`](Self::dot4_unsigned), for sums on their way to [`add_short`](Self::add_short), which alone can read
    /// them: with [`SHORT_SUMS`](Self::SHORT_SUMS) a lane has two halves, neither of which may leave 16 bits.
    #[inline(always)]
    fn dot4_short(self, acc: Self::I, w: &[i8; 64], x: [i8; 4]) -> Self::I {
        self.dot4_unsigned(acc, w, x)
    }
    /// `acc + sums * scales` for what [`dot4_short`](Self::dot4_short) has summed up from zero, and scales of 16 bits.
    #[inline(always)]
    fn add_short(self, acc: Self::I, sums: Self::I, scales: &[i32; LANES]) -> Self::I {
        self.int_mul_add(acc, sums, scales)
    }
    /// Lane `j` gains the dot product of `w[2j]` and `w[2j + 1]` with `x`.
    fn dot2(self, acc: Self::I, w: &[i16; 32], x: [i16; 2]) -> Self::I;
    /// Products of four bytes of `w` each with a scale, 0 to 255: their lower and their upper bytes.
    #[inline(always)]
    fn scale_bytes(self, w: &[i8; 64], scales: &[i32; LANES], [lower, upper]: [&mut [i8; 64]; 2]) {
        for (i, w) in w.iter().enumerate() {
            let product = i32::from(*w) * scales[i / 4];
            (lower[i], upper[i]) = (product as i8, (product >> 8) as i8);
        }
    }
    /// Sums of sixteen bytes each.
    #[inline(always)]
    fn sum_bytes(self, x: &[i8; 64]) -> [i32; 4] {
        std::array::from_fn(|i| x[16 * i..][..16].iter().map(|x| i32::from(*x)).sum())
    }
    /// Bytes as numbers of 16 bits.
    fn widen_bytes(self, x: &[u8; 32], out: &mut [i16; 32]);
    /// `acc + a * b`, in 32 bits.
    fn int_mul_add(self, acc: Self::I, a: Self::I, b: &[i32; LANES]) -> Self::I;
    /// `high * 2^shift + low`, in 32 bits.
    fn shift_add(self, high: Self::I, low: Self::I, shift: u32) -> Self::I;
    /// To the nearest float, ties to even.
    fn int_to_f32(self, v: Self::I) -> Self::V;

    /// Asks for the cache line of `x`, to be in the second cache when it is read. A hint: reads nothing, so that any address
    /// will do.
    #[inline(always)]
    fn prefetch<T>(self, _x: *const T) {}

    /// The same for the nearest cache.
    #[inline(always)]
    fn prefetch_near<T>(self, _x: *const T) {}

    /// The same for the nearest cache, for a line that will be written.
    #[inline(always)]
    fn prefetch_write<T>(self, _x: *const T) {}

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// Sum of the lanes, as a fixed tree of halves; one that overrides it keeps the tree.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        self.fold(v, |a, b| a + b)
    }

    /// Largest lane.
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        self.fold(v, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn fold(self, v: Self::V, op: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] = op(lanes[i], lanes[i + half]);
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// A stored weight type that widens to `f32` in register, exactly.
pub(crate) trait Weight: Copy + Send + Sync + 'static {
    const ZERO: Self;
    fn widen<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V;
}

// === impl Isa ===

impl Isa {
    /// The fastest instruction set of this CPU.
    #[must_use]
    pub fn best() -> Self {
        Self::available()[0]
    }

    /// Every instruction set that this CPU has, fastest first. AVX-512 means F, BW, DQ, VL and VNNI together: a CPU
    /// without VNNI takes the AVX2 path. AMX means its 8-bit products beside that AVX-512.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = avx512::Avx512::detect();
            found.extend(avx512.and_then(amx::Amx::detect).map(|token| Self(Level::Amx(token))));
            found.extend(avx512.map(|token| Self(Level::Avx512(token))));
            found.extend(avx2::Avx2::detect().map(|token| Self(Level::Avx2(token))));
        }
        found.push(Self(Level::Portable));
        found
    }

    /// Its name, for logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx(_) => "amx-int8",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2-fma",
            Level::Portable => "portable",
        }
    }

    /// Runs a kernel compiled for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx(token) => token.lanes.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(token) => token.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(token) => token.run(kernel),
            Level::Portable => kernel.run(portable::Portable),
        }
    }

    /// Multiplies tiles for a while, where the CPU has them, and returns the multiply-adds.
    pub(crate) fn spin_tiles(self, rounds: usize) -> Option<u64> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx(token) => Some(token.spin(rounds)),
            _ => None,
        }
    }

    /// This thread's tiles for products of `height` rows over `depth` values of K, where the CPU has tiles.
    pub(crate) fn tiles(self, height: usize, depth: usize) -> Option<Tiles> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx(token) => Some(token.tiles(height, depth)),
            _ => None,
        }
    }
}

// === impl Weight ===

impl Weight for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V {
        simd.load(x)
    }
}

impl Weight for f16 {
    const ZERO: Self = Self::ZERO;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V {
        simd.load_f16(x)
    }
}

impl Weight for bf16 {
    const ZERO: Self = Self::ZERO;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, x: &[Self; LANES]) -> S::V {
        simd.load_bf16(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation on a spread of values; the bits are compared between instruction sets.
    struct Everything<'a> {
        a: &'a Lanes,
        b: &'a Lanes,
        halves: &'a [f16; LANES],
        brains: &'a [bf16; LANES],
        bytes: &'a [i8; 64],
        unsigned: &'a [i8; 64],
        words: &'a [i16; 32],
        ints: &'a [i32; LANES],
    }

    impl Kernel for Everything<'_> {
        type Out = Vec<u32>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<u32> {
            let (a, b) = (s.load(self.a), s.load(self.b));
            let n = s.round(s.min(s.max(a, s.splat(-126.0)), s.splat(127.0)));
            // The sum is -3.
            let dots = s.dot4(s.dot_start(3 * 128), self.bytes, [127, -127, 3, -6]);
            let unsigned = s.dot4_unsigned(s.splat_int(-77), self.unsigned, [-127, 127, 5, -1]);
            let words = s.dot2(dots, self.words, [-4_064, 31]);
            let products = s.int_mul_add(words, dots, self.ints);
            let gathered = s.dot4_short(s.splat_int(0), self.unsigned, [-127, 127, 127, -1]);
            let mut wide = [0; 32];
            let [mut lower, mut upper] = [[0; 64]; 2];
            s.scale_bytes(self.bytes, &self.ints.map(|x| x & 255), [&mut lower, &mut upper]);
            s.widen_bytes(&self.unsigned.map(i8::cast_unsigned).as_chunks().0[1], &mut wide);
            let vectors = [
                s.int_to_f32(words),
                s.int_to_f32(products),
                s.int_to_f32(s.add_short(words, gathered, self.ints)),
                s.int_to_f32(s.shift_add(dots, words, 7)),
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.fma(a, b, a),
                s.max(a, b),
                s.min(a, b),
                s.round(a),
                s.pow2(n),
                s.load_f16(self.halves),
                s.load_bf16(self.brains),
                s.int_to_f32(dots),
                s.int_to_f32(unsigned),
            ];
            let mut bits = vec![s.sum(a).to_bits(), s.max_lane(a).to_bits()];
            for v in vectors {
                let mut lanes = [0.0; LANES];
                s.store(v, &mut lanes);
                bits.extend(lanes.map(f32::to_bits));
            }
            let mut ints = [0; LANES];
            s.store_int(s.round_int(a), &mut ints);
            bits.extend(ints.map(i32::cast_unsigned));
            bits.extend([lower, upper].as_flattened().iter().map(|x| u32::from(x.cast_unsigned())));
            bits.extend(s.sum_bytes(self.bytes).map(i32::cast_unsigned));
            bits.extend(wide.map(|x| u32::from(x.cast_unsigned())));
            bits.extend(
                s.round_i8(s.min(s.max(a, s.splat(-127.0)), s.splat(127.0))).map(|q| u32::from(q.cast_unsigned())),
            );
            bits
        }
    }

    #[test]
    fn all_instruction_sets_agree_to_the_bit() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for round in 0..200 {
            let mut value = || (next() as f32 / 8_388_608.0 - 1.0) * 10f32.powi(round % 5 - 1);
            let (a, b): (Lanes, Lanes) = (std::array::from_fn(|_| value()), std::array::from_fn(|_| value()));
            let halves =
                std::array::from_fn(
                    |i| if i == 3 { f16::from_bits(1 + next() as u16 % 900) } else { f16::from_f32(a[i]) },
                );
            let brains = a.map(bf16::from_f32);
            let bytes = std::array::from_fn(|_| (i32::try_from(next() % 255).unwrap() - 127) as i8);
            let unsigned = std::array::from_fn(|_| (next() % 128) as i8);
            let words = std::array::from_fn(|_| (next() % 256) as i16 - 128);
            let ints = std::array::from_fn(|_| i32::try_from(next() % 256).unwrap() - 128);
            let run = |isa: Isa| {
                let (halves, brains, bytes, unsigned) = (&halves, &brains, &bytes, &unsigned);
                isa.run(Everything { a: &a, b: &b, halves, brains, bytes, unsigned, words: &words, ints: &ints })
            };
            let expect = run(Isa(Level::Portable));
            for isa in Isa::available() {
                assert_eq!(run(isa), expect, "{}", isa.name());
            }
        }
    }
}
