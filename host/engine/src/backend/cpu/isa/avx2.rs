//! Sixteen lanes in two 256-bit registers.
#![expect(unsafe_code, reason = "vector instructions; the token proves that the CPU has them")]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, LANES, Lanes, Simd, pair, word};

/// Proof that the CPU has AVX2, FMA and F16C. Made by [`Avx2::detect`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: the token proves that the features of `enter` are present.
        unsafe { enter(self, kernel) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter<K: Kernel>(token: Avx2, kernel: K) -> K::Out {
    kernel.run(token)
}

type Pair = [__m256; 2];

/// Applies an intrinsic that touches no memory to both halves.
macro_rules! both {
    ($f:path; $($x:expr),*) => {
        // SAFETY: the token in `self` proves that the CPU has the instruction, and it touches registers only.
        unsafe { [$f($($x[0]),*), $f($($x[1]),*)] }
    };
}

impl Simd for Avx2 {
    type V = Pair;
    type I = [__m256i; 2];

    const WIDE: bool = false;
    const SHORT_SUMS: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: the token proves the instruction, which touches registers only.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(self, x: &Lanes) -> Pair {
        // SAFETY: the token proves the instructions; both loads lie in the 64 bytes of `x` and ask for no alignment.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Pair {
        // SAFETY: the token proves the instructions; both loads lie in the 32 bytes of `x` and ask for no alignment.
        unsafe {
            let (low, high) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(8).cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Pair {
        // SAFETY: the token proves the instructions; both loads lie in the 32 bytes of `x` and ask for no alignment.
        unsafe {
            let (low, high) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(8).cast()));
            let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(low));
            let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }

    #[inline(always)]
    fn store(self, v: Pair, out: &mut Lanes) {
        // SAFETY: the token proves the instructions; both stores lie in the 64 bytes of `out` and ask for no alignment.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_add_ps; a, b)
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_sub_ps; a, b)
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_mul_ps; a, b)
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_div_ps; a, b)
    }

    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        both!(_mm256_fmadd_ps; a, b, c)
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_max_ps; a, b)
    }

    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_min_ps; a, b)
    }

    #[inline(always)]
    fn round(self, v: Pair) -> Pair {
        both!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>; v)
    }

    #[inline(always)]
    fn round_int(self, v: [__m256; 2]) -> [__m256i; 2] {
        // SAFETY: the token proves the instruction, which touches registers only.
        unsafe { [_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])] }
    }

    #[inline(always)]
    fn pow2(self, n: Pair) -> Pair {
        // SAFETY: the token proves the instructions, which touch registers only.
        unsafe {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n[0]), bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n[1]), bias));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }

    #[inline(always)]
    fn round_i8(self, v: Pair) -> [i8; LANES] {
        let mut words = [0i32; LANES];
        // SAFETY: the token proves the instructions; both stores lie in the 64 bytes of `words` and ask for no alignment.
        unsafe {
            _mm256_storeu_si256(words.as_mut_ptr().cast(), _mm256_cvtps_epi32(v[0]));
            _mm256_storeu_si256(words.as_mut_ptr().add(8).cast(), _mm256_cvtps_epi32(v[1]));
        }
        words.map(|word| word as i8)
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> [__m256i; 2] {
        // SAFETY: the token proves the instruction, which touches registers only.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    fn load_int(self, x: &[i32; LANES]) -> [__m256i; 2] {
        // SAFETY: the token proves the instructions; both loads lie in the 64 bytes of `x` and ask for no alignment.
        unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(8).cast())] }
    }

    #[inline(always)]
    fn store_int(self, v: [__m256i; 2], out: &mut [i32; LANES]) {
        // SAFETY: the token proves the instruction; both stores lie in the 64 bytes of `out` and ask for no alignment.
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), v[0]);
            _mm256_storeu_si256(out.as_mut_ptr().add(8).cast(), v[1]);
        }
    }

    #[inline(always)]
    fn dot_start(self, _offset: i32) -> [__m256i; 2] {
        // SAFETY: the token proves the instruction, which touches registers only.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    /// Multiplies magnitudes of the weights with activations that take over their signs: the pairwise 16-bit sums stay
    /// below 2 * 127 * 127, so that `maddubs` does not saturate.
    #[inline(always)]
    fn dot4(self, acc: [__m256i; 2], w: &[i8; 64], x: [i8; 4]) -> [__m256i; 2] {
        // SAFETY: the token proves the instructions; both loads lie in the 64 bytes of `w` and ask for no alignment.
        unsafe {
            let (x, ones) = (_mm256_set1_epi32(word(x)), _mm256_set1_epi16(1));
            let (low, high) = (_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w.as_ptr().add(32).cast()));
            let low = _mm256_maddubs_epi16(_mm256_abs_epi8(low), _mm256_sign_epi8(x, low));
            let high = _mm256_maddubs_epi16(_mm256_abs_epi8(high), _mm256_sign_epi8(x, high));
            let (low, high) = (_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
            [_mm256_add_epi32(acc[0], low), _mm256_add_epi32(acc[1], high)]
        }
    }

    /// As weights are at most 127, `maddubs` does not saturate.
    #[inline(always)]
    fn dot4_unsigned(self, acc: [__m256i; 2], w: &[i8; 64], x: [i8; 4]) -> [__m256i; 2] {
        // SAFETY: the token proves the instructions; both loads lie in the 64 bytes of `w` and ask for no alignment.
        unsafe {
            let (x, ones) = (_mm256_set1_epi32(word(x)), _mm256_set1_epi16(1));
            let (low, high) = (_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w.as_ptr().add(32).cast()));
            let (low, high) = (_mm256_maddubs_epi16(low, x), _mm256_maddubs_epi16(high, x));
            let (low, high) = (_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
            [_mm256_add_epi32(acc[0], low), _mm256_add_epi32(acc[1], high)]
        }
    }

    #[inline(always)]
    fn dot4_short(self, acc: [__m256i; 2], w: &[i8; 64], x: [i8; 4]) -> [__m256i; 2] {
        // SAFETY: the token proves the instructions; both loads lie in the 64 bytes of `w` and ask for no alignment.
        unsafe {
            let x = _mm256_set1_epi32(word(x));
            let (low, high) = (_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w.as_ptr().add(32).cast()));
            let (low, high) = (_mm256_maddubs_epi16(low, x), _mm256_maddubs_epi16(high, x));
            [_mm256_add_epi16(acc[0], low), _mm256_add_epi16(acc[1], high)]
        }
    }

    #[inline(always)]
    fn add_short(self, acc: [__m256i; 2], sums: [__m256i; 2], scales: &[i32; LANES]) -> [__m256i; 2] {
        let scales = self.load_int(scales);
        // A scale for each half of the sum.
        let upper = both!(_mm256_slli_epi32::<16>; scales);
        let scales = both!(_mm256_blend_epi16::<0b1010_1010>; scales, upper);
        let products = both!(_mm256_madd_epi16; sums, scales);
        both!(_mm256_add_epi32; acc, products)
    }

    #[inline(always)]
    fn dot2(self, acc: [__m256i; 2], w: &[i16; 32], x: [i16; 2]) -> [__m256i; 2] {
        // SAFETY: the token proves the instructions; both loads lie in the 64 bytes of `w` and ask for no alignment.
        unsafe {
            let x = _mm256_set1_epi32(pair(x));
            let (low, high) = (_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w.as_ptr().add(16).cast()));
            let (low, high) = (_mm256_madd_epi16(low, x), _mm256_madd_epi16(high, x));
            [_mm256_add_epi32(acc[0], low), _mm256_add_epi32(acc[1], high)]
        }
    }

    #[inline(always)]
    fn widen_bytes(self, x: &[u8; 32], out: &mut [i16; 32]) {
        // SAFETY: the token proves the instructions; both loads lie in the 32 bytes of `x`, both stores in the 64 of `out`, and
        // none asks for alignment.
        unsafe {
            let (low, high) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(16).cast()));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_cvtepu8_epi16(low));
            _mm256_storeu_si256(out.as_mut_ptr().add(16).cast(), _mm256_cvtepu8_epi16(high));
        }
    }

    #[inline(always)]
    fn int_mul_add(self, acc: [__m256i; 2], a: [__m256i; 2], b: &[i32; LANES]) -> [__m256i; 2] {
        let b = self.load_int(b);
        let products = both!(_mm256_mullo_epi32; a, b);
        both!(_mm256_add_epi32; acc, products)
    }

    #[inline(always)]
    fn shift_add(self, high: [__m256i; 2], low: [__m256i; 2], shift: u32) -> [__m256i; 2] {
        // SAFETY: the token proves the instruction, which touches registers only.
        let counts = unsafe { [_mm_cvtsi32_si128(shift.cast_signed()); 2] };
        let high = both!(_mm256_sll_epi32; high, counts);
        both!(_mm256_add_epi32; high, low)
    }

    #[inline(always)]
    fn int_to_f32(self, v: [__m256i; 2]) -> Pair {
        both!(_mm256_cvtepi32_ps; v)
    }

    #[inline(always)]
    fn prefetch<T>(self, x: *const T) {
        // SAFETY: every x86-64 CPU has the instruction; it reads no memory and faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.cast()) }
    }

    #[inline(always)]
    fn prefetch_near<T>(self, x: *const T) {
        // SAFETY: every x86-64 CPU has the instruction; it reads no memory and faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(x.cast()) }
    }
}
