//! Products of 8-bit tiles (Intel AMX), by inline assembly: the intrinsics are not stable.
//!
//! Everything else at this level is AVX-512's. Tile registers are state of a thread that only this module touches: the
//! compiler uses none, so what one block of assembly leaves in them is nobody's input.
#![expect(unsafe_code, reason = "tile instructions; the token proves that the CPU and the kernel allow them")]

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::cell::Cell;
use std::marker::PhantomData;

use super::avx512::Avx512;
use super::{Planes, Quads, Stretch, TILE_ROWS, WeightQuads};

/// Proof that the CPU has AMX-INT8 and AVX-512, and that the kernel lets this process use tiles. Made by [`Amx::detect`]
/// only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Amx {
    pub(super) lanes: Avx512,
}

/// The tiles of this thread, set up for products of so many rows and so much of K.
#[derive(Debug)]
pub(crate) struct Tiles {
    height: usize,
    depth: usize,
    /// Tiles belong to a thread.
    not_send: PhantomData<*const ()>,
}

/// 16 rows by 16 columns of sums.
pub(crate) type TileSums = [[i32; 16]; TILE_ROWS];

thread_local! {
    /// Whether a [`Tiles`] of this thread lives: a second would change the shapes under the first.
    static IN_USE: Cell<bool> = const { Cell::new(false) };
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

// === impl Amx ===

impl Amx {
    pub(super) fn detect(lanes: Avx512) -> Option<Self> {
        const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8 {
            return None;
        }
        tiles_allowed().then_some(Self { lanes })
    }

    /// Sets up this thread's tiles for products of `height` rows (1 to 16) over `depth` values of K (32 or 64), until the
    /// value is dropped.
    pub(super) fn tiles(self, height: usize, depth: usize) -> Tiles {
        assert!((1..=TILE_ROWS).contains(&height) && [32, 64].contains(&depth), "no shape of a tile");
        assert!(!IN_USE.replace(true), "the tiles of this thread are in use");
        // Four of sums; of the others, one or two of activations.
        let (sums, x, w) = ((64, height as u8), (depth as u16, height as u8), (64, (depth / 4) as u8));
        let second = if depth == 32 { x } else { w };
        self.configure([sums, sums, sums, sums, x, second, w, w]);
        Tiles { height, depth, not_send: PhantomData }
    }
}

impl Amx {
    /// Gives each tile its bytes of a row and its rows.
    fn configure(self, shapes: [(u16, u8); 8]) {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (tile, (row_bytes, rows)) in shapes.into_iter().enumerate() {
            (config.row_bytes[tile], config.rows[tile]) = (row_bytes, rows);
        }
        // SAFETY: the token proves the instruction; it reads the 64 bytes of `config`, a valid palette-1 layout.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags)) };
    }

    /// Multiplies whole tiles of zeros, and returns the multiply-adds.
    pub(super) fn spin(self, rounds: usize) -> u64 {
        let tiles = self.tiles(TILE_ROWS, 32);
        self.configure([(64, 16); 8]);
        for _ in 0..rounds {
            // SAFETY: tiles are set up on this thread, whole; registers only.
            unsafe {
                asm!(
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm5, tmm6",
                    "tdpbssd tmm2, tmm4, tmm7",
                    "tdpbssd tmm3, tmm5, tmm7",
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    options(nostack, nomem, preserves_flags),
                );
            }
        }
        drop(tiles);
        (rounds * 4 * TILE_ROWS * 16 * 64) as u64
    }
}

/// Asks the kernel for the right to use tile data (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`); it is the
/// process's from then on.
#[cfg(target_os = "linux")]
fn tiles_allowed() -> bool {
    const ARCH_PRCTL: i64 = 158;
    let status: i64;
    // SAFETY: the call takes two numbers and touches no memory of ours; `rcx` and `r11` are what `syscall` overwrites.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") 0x1023,
            in("rsi") 18,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn tiles_allowed() -> bool {
    false
}

// === impl Tiles ===

impl Tiles {
    #[inline(always)]
    fn check(&self, rows: usize, depth: usize) {
        assert!(rows >= self.height && depth == self.depth, "not the shape of the tiles");
    }

    /// Products over 32 values of K: the rows of one group by both halves of a panel.
    #[inline(always)]
    pub(crate) fn one(&self, x: &[Quads], w: &WeightQuads, out: &mut [TileSums; 2]) {
        self.check(x.len(), 32);
        // SAFETY: the tiles are for rows of 32 bytes, which lie behind each other, as many as the tiles have.
        unsafe { self.product(x.as_ptr().cast(), size_of::<Quads>(), w, out) }
    }

    /// The same with the first or the second half of 64 values of each row.
    #[inline(always)]
    pub(crate) fn half(&self, x: &[Stretch], half: usize, w: &WeightQuads, out: &mut [TileSums; 2]) {
        self.check(x.len(), 32);
        // SAFETY: the tiles are for rows of 32 bytes, of which a stretch has two; there are as many stretches as the tiles have rows.
        unsafe {
            self.product(x.as_ptr().cast::<u8>().add(half % 2 * size_of::<Quads>()), size_of::<Stretch>(), w, out)
        }
    }

    /// # Safety
    /// From `x` on, `height` rows of 32 readable bytes begin every `x_step` bytes, and the tiles are set up for 32 values of K.
    #[inline(always)]
    unsafe fn product(&self, x: *const u8, x_step: usize, w: &WeightQuads, out: &mut [TileSums; 2]) {
        // SAFETY: tiles are set up on this thread (`self` cannot leave it) for `height` rows of 32 bytes, which `x` has; a
        // tile of weights reads 64 bytes of each of the 8 rows of `w`; `out` has 16 rows of 64 bytes for each tile.
        unsafe {
            asm!(
                "tileloadd tmm4, [{x} + {x_step}]",
                "tileloadd tmm6, [{w} + {w_step}]",
                "tilezero tmm0",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {w_step} + 64]",
                "tilezero tmm1",
                "tdpbssd tmm1, tmm4, tmm7",
                "tilestored [{out} + {out_step}], tmm0",
                "tilestored [{out} + {out_step} + 1024], tmm1",
                x = in(reg) x,
                x_step = in(reg) x_step,
                w = in(reg) w.as_ptr(),
                w_step = in(reg) size_of::<WeightQuads>() / 8,
                out = in(reg) out.as_mut_ptr(),
                out_step = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
    }

    /// The same for two groups, so that weights are loaded once for both.
    #[inline(always)]
    pub(crate) fn two(&self, x: [&[Quads]; 2], w: &WeightQuads, out: &mut [[TileSums; 2]; 2]) {
        x.iter().for_each(|x| self.check(x.len(), 32));
        // SAFETY: as in `one`, for two groups of rows and four tiles of sums.
        unsafe {
            asm!(
                "tileloadd tmm4, [{x0} + {x_step}]",
                "tileloadd tmm6, [{w} + {w_step}]",
                "tilezero tmm0",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{x1} + {x_step}]",
                "tilezero tmm2",
                "tdpbssd tmm2, tmm5, tmm6",
                "tileloadd tmm7, [{w} + {w_step} + 64]",
                "tilezero tmm1",
                "tdpbssd tmm1, tmm4, tmm7",
                "tilezero tmm3",
                "tdpbssd tmm3, tmm5, tmm7",
                "tilestored [{out} + {out_step}], tmm0",
                "tilestored [{out} + {out_step} + 2048], tmm2",
                "tilestored [{out} + {out_step} + 1024], tmm1",
                "tilestored [{out} + {out_step} + 3072], tmm3",
                x0 = in(reg) x[0].as_ptr(),
                x1 = in(reg) x[1].as_ptr(),
                x_step = in(reg) size_of::<Quads>(),
                w = in(reg) w.as_ptr(),
                w_step = in(reg) size_of::<WeightQuads>() / 8,
                out = in(reg) out.as_mut_ptr(),
                out_step = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
    }

    /// Products over 256 values of K with both bytes of the weights: the rows of one group, given 64 values of all of them
    /// after the other, by both halves of a panel. `out` is by byte and half.
    #[inline(always)]
    pub(crate) fn planes(&self, x: &[Stretch], w: &Planes, out: &mut [[TileSums; 2]; 2]) {
        self.check(x.len() / 4, 64);
        // SAFETY: tiles are set up on this thread for `height` rows of 64 bytes, which `x` has four times; a tile of weights
        // reads 64 bytes of 16 rows of a plane, four times behind each other in its 64 rows; the second plane begins 8,192
        // bytes behind the first; `out` has 16 rows of 64 bytes for each tile. The pointers move four times and are read
        // before each.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{x} + {x_step}]",
                "tileloadd tmm5, [{w} + {w_step}]",
                "tdpbsud tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{w} + {w_step} + 64]",
                "tdpbsud tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {w_step} + 8192]",
                "tdpbssd tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{w} + {w_step} + 8256]",
                "tdpbssd tmm3, tmm4, tmm5",
                "add {x}, {x_all}",
                "add {w}, 2048",
                "dec {n}",
                "jnz 2b",
                "tilestored [{out} + {x_step}], tmm0",
                "tilestored [{out} + {x_step} + 1024], tmm1",
                "tilestored [{out} + {x_step} + 2048], tmm2",
                "tilestored [{out} + {x_step} + 3072], tmm3",
                x = inout(reg) x.as_ptr() => _,
                x_step = in(reg) size_of::<Stretch>(),
                x_all = in(reg) self.height * size_of::<Stretch>(),
                w = inout(reg) w.as_ptr() => _,
                w_step = in(reg) size_of::<Planes>() / 128,
                n = inout(reg) 4usize => _,
                out = in(reg) out.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `self` proves the instruction; nothing reads the tiles afterwards. Released, they cost a thread switch
        // nothing.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
        IN_USE.set(false);
    }
}
