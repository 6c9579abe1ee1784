//! What a machine can do at most: plain reads, and 8-bit products in registers alone. For a benchmark, which has the clock,
//! to divide by.

use super::isa::{Isa, Kernel, LANES, Lanes, Simd};
use super::pool::ComputePool;

/// Independent sums: more than the instructions need to be busy.
const CHAINS: usize = 12;

impl ComputePool {
    /// Reads all of `data` once, on all threads, and returns its sum.
    #[must_use]
    pub fn read(&self, data: &[[f32; 16]]) -> f32 {
        let mut sums = vec![0.0; self.n_threads()];
        let share = data.len().div_ceil(sums.len());
        self.run(usize::MAX, || {
            self.split(usize::MAX, &mut sums, 1, |first, sums| {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let begin = data.len().min((first + i) * share);
                    *sum = self.isa().run(Read(&data[begin..data.len().min(begin + share)]));
                }
            });
        });
        sums.iter().sum()
    }

    /// Multiplies and adds bytes in registers for a while on all threads, and returns how often.
    #[must_use]
    pub fn multiply(&self, rounds: usize) -> u64 {
        let mut counts = vec![0; self.n_threads()];
        self.run(usize::MAX, || {
            self.split(usize::MAX, &mut counts, 1, |_, counts| {
                counts.fill(multiply(self.isa(), rounds));
            });
        });
        counts.iter().sum()
    }
}

/// The products of one thread.
fn multiply(isa: Isa, rounds: usize) -> u64 {
    isa.spin_tiles(rounds).unwrap_or_else(|| {
        // The sum is used, so that it is computed.
        std::hint::black_box(isa.run(Multiply { rounds, w: &[3; 64] }));
        (rounds * CHAINS * 4 * LANES) as u64
    })
}

struct Read<'a>(&'a [Lanes]);

struct Multiply<'a> {
    rounds: usize,
    w: &'a [i8; 64],
}

impl Kernel for Read<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.zero(); CHAINS];
        for lanes in self.0.chunks_exact(CHAINS) {
            for (sum, lanes) in sums.iter_mut().zip(lanes) {
                s.prefetch(std::ptr::from_ref(lanes).wrapping_add(128));
                *sum = s.add(*sum, s.load(lanes));
            }
        }
        sums.map(|sum| s.sum(sum)).iter().sum()
    }
}

impl Kernel for Multiply<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.dot_start(0); CHAINS];
        for round in 0..self.rounds {
            let x = [round as i8 & 1; 4];
            for sum in &mut sums {
                *sum = s.dot4(*sum, self.w, x);
            }
        }
        sums.map(|sum| s.sum(s.int_to_f32(sum))).iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_read_and_counted_on_every_level() {
        let data = vec![[1.0; LANES]; 5 * 2 * CHAINS];
        for isa in Isa::available() {
            for n_threads in [1, 2] {
                let pool = ComputePool::with_isa(n_threads, isa).unwrap();
                assert_eq!(pool.read(&data), (data.len() * LANES) as f32);
                assert_eq!(pool.multiply(10) % (10 * n_threads as u64), 0);
                assert!(pool.multiply(10) > 0);
            }
        }
    }
}
