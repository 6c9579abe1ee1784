//! Sixteen lanes in one 512-bit register.
#![expect(unsafe_code, reason = "vector instructions; the token proves that the CPU has them")]

use std::arch::asm;
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, LANES, Lanes, Simd, pair, word};

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI, FMA and F16C. Made by [`Avx512::detect`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Avx512(());

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: the token proves that the features of `enter` are present.
        unsafe { enter(self, kernel) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
fn enter<K: Kernel>(token: Avx512, kernel: K) -> K::Out {
    kernel.run(token)
}

/// Wraps one expression of intrinsics that touch no memory.
macro_rules! registers {
    ($e:expr) => {
        // SAFETY: the token in `self` proves that the CPU has the instructions, and they touch registers only.
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    type I = __m512i;

    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        registers!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, x: &Lanes) -> __m512 {
        // SAFETY: the token proves the instruction; `x` is 64 readable bytes, and the load asks for no alignment.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> __m512 {
        // SAFETY: the token proves the instructions; `x` is 32 readable bytes, and the load asks for no alignment.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> __m512 {
        // SAFETY: the token proves the instructions; `x` is 32 readable bytes, and the load asks for no alignment.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut Lanes) {
        // SAFETY: the token proves the instruction; `out` is 64 writable bytes, and the store asks for no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        registers!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        registers!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        registers!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        registers!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        registers!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        registers!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        registers!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        registers!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }

    #[inline(always)]
    fn round_int(self, v: __m512) -> __m512i {
        registers!(_mm512_cvtps_epi32(v))
    }

    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        registers!({
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        })
    }

    #[inline(always)]
    fn round_i8(self, v: __m512) -> [i8; LANES] {
        let mut out = [0; LANES];
        // SAFETY: the token proves the instructions; `out` is 16 writable bytes, and the store asks for no alignment.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) };
        out
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> __m512i {
        registers!(_mm512_set1_epi32(x))
    }

    #[inline(always)]
    fn load_int(self, x: &[i32; LANES]) -> __m512i {
        // SAFETY: the token proves the instruction; `x` is 64 readable bytes, and the load asks for no alignment.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_int(self, v: __m512i, out: &mut [i32; LANES]) {
        // SAFETY: the token proves the instruction; `out` is 64 writable bytes, and the store asks for no alignment.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), v) }
    }

    #[inline(always)]
    fn dot_start(self, offset: i32) -> __m512i {
        registers!(_mm512_set1_epi32(offset))
    }

    /// The instruction takes unsigned weights: with the sign bit flipped they are 128 too large.
    #[inline(always)]
    fn dot4(self, acc: __m512i, w: &[i8; 64], x: [i8; 4]) -> __m512i {
        // SAFETY: the token proves the instructions; `w` is 64 readable bytes, and the load asks for no alignment.
        unsafe {
            let w = _mm512_xor_si512(_mm512_loadu_si512(w.as_ptr().cast()), _mm512_set1_epi8(-128));
            _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(word(x)))
        }
    }

    #[inline(always)]
    fn dot4_unsigned(self, acc: __m512i, w: &[i8; 64], x: [i8; 4]) -> __m512i {
        // SAFETY: the token proves the instructions; `w` is 64 readable bytes, and the load asks for no alignment.
        unsafe { _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(w.as_ptr().cast()), _mm512_set1_epi32(word(x))) }
    }

    #[inline(always)]
    fn dot2(self, acc: __m512i, w: &[i16; 32], x: [i16; 2]) -> __m512i {
        // SAFETY: the token proves the instructions; `w` is 64 readable bytes, and the load asks for no alignment.
        unsafe { _mm512_dpwssd_epi32(acc, _mm512_loadu_si512(w.as_ptr().cast()), _mm512_set1_epi32(pair(x))) }
    }

    #[inline(always)]
    fn scale_bytes(self, w: &[i8; 64], scales: &[i32; LANES], out: [&mut [i8; 64]; 2]) {
        // SAFETY: the token proves the instructions; `w` is 64 readable bytes, both of `out` are 64 writable ones, and no access
        // asks for alignment.
        unsafe {
            let w = _mm512_loadu_si512(w.as_ptr().cast());
            // For the first and the third of four bytes, and for the others.
            let even = self.load_int(scales);
            let even = _mm512_or_si512(even, _mm512_slli_epi32::<16>(even));
            let odd = _mm512_slli_epi32::<8>(even);
            let (even, odd) = (_mm512_maddubs_epi16(even, w), _mm512_maddubs_epi16(odd, w));
            // The bytes of each pair change places where they belong to the other's.
            let swapped = _mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
            let swapped = _mm512_broadcast_i32x4(swapped);
            let lower = _mm512_mask_shuffle_epi8(even, 0xaaaa_aaaa_aaaa_aaaa, odd, swapped);
            let upper = _mm512_mask_shuffle_epi8(odd, 0x5555_5555_5555_5555, even, swapped);
            _mm512_storeu_si512(out[0].as_mut_ptr().cast(), lower);
            _mm512_storeu_si512(out[1].as_mut_ptr().cast(), upper);
        }
    }

    /// The instruction takes unsigned bytes: with the sign bit flipped they are 128 too large.
    #[inline(always)]
    fn sum_bytes(self, x: &[i8; 64]) -> [i32; 4] {
        let mut sums = [0; 4];
        // SAFETY: the token proves the instructions; `x` is 64 readable bytes and `sums` 16 writable ones, and neither access
        // asks for alignment.
        unsafe {
            let x = _mm512_xor_si512(_mm512_loadu_si512(x.as_ptr().cast()), _mm512_set1_epi8(-128));
            let eights = _mm512_cvtepi64_epi32(_mm512_sad_epu8(x, _mm512_setzero_si512()));
            let sixteens = _mm_hadd_epi32(_mm256_castsi256_si128(eights), _mm256_extracti128_si256::<1>(eights));
            _mm_storeu_si128(sums.as_mut_ptr().cast(), _mm_sub_epi32(sixteens, _mm_set1_epi32(16 * 128)));
        }
        sums
    }

    #[inline(always)]
    fn widen_bytes(self, x: &[u8; 32], out: &mut [i16; 32]) {
        // SAFETY: the token proves the instructions; `x` is 32 readable bytes and `out` 64 writable ones, and neither access asks
        // for alignment.
        unsafe {
            let words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), words);
        }
    }

    #[inline(always)]
    fn int_mul_add(self, acc: __m512i, a: __m512i, b: &[i32; LANES]) -> __m512i {
        registers!(_mm512_add_epi32(acc, _mm512_mullo_epi32(a, self.load_int(b))))
    }

    #[inline(always)]
    fn shift_add(self, high: __m512i, low: __m512i, shift: u32) -> __m512i {
        registers!(_mm512_add_epi32(_mm512_sll_epi32(high, _mm_cvtsi32_si128(shift.cast_signed())), low))
    }

    #[inline(always)]
    fn int_to_f32(self, v: __m512i) -> __m512 {
        registers!(_mm512_cvtepi32_ps(v))
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

    #[inline(always)]
    fn prefetch_write<T>(self, x: *const T) {
        // SAFETY: every CPU with AVX-512 has the instruction; it changes no memory and faults on no address. There is no
        // intrinsic that emits it.
        unsafe { asm!("prefetchw [{}]", in(reg) x, options(nostack, preserves_flags, readonly)) }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        registers!({
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        })
    }

    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        registers!({
            let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        })
    }
}
