//! Arrays that begin at a cache line, so that no vector of sixteen lanes lies across two.
//!
//! The allocator aligns large blocks to sixteen bytes past a page: every vector load of weights, keys and values would
//! touch two lines. A padded `Vec` and an offset need no unsafe code; an over-aligned element type would need a cast.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;

/// A fixed number of `[T; N]`, the first at a cache line.
pub(super) struct Aligned<T, const N: usize> {
    /// Never grows, so that its address stays.
    data: Vec<T>,
    offset: usize,
    len: usize,
}

impl<T: Copy, const N: usize> Aligned<T, N> {
    /// `n` arrays full of `value`.
    pub(super) fn filled(value: T, n: usize) -> Self {
        let padding = LINE / size_of::<T>();
        let data = vec![value; n * N + padding];
        let offset = data.as_ptr().align_offset(LINE).min(padding);
        Self { data, offset, len: n * N }
    }

    /// None yet, and room for `n`.
    pub(super) fn with_room(value: T, n: usize) -> Self {
        let padding = LINE / size_of::<T>();
        let mut data: Vec<T> = Vec::with_capacity(n * N + padding);
        let offset = data.as_ptr().align_offset(LINE).min(padding);
        data.resize(offset, value);
        Self { data, offset, len: 0 }
    }

    /// As many more as that, full of `value`; within the room there is.
    pub(super) fn push(&mut self, value: T, n: usize) {
        assert!(n * N <= self.data.capacity() - self.data.len(), "it would move");
        self.data.resize(self.data.len() + n * N, value);
        self.len += n * N;
    }
}

impl<T, const N: usize> Deref for Aligned<T, N> {
    type Target = [[T; N]];

    #[inline(always)]
    fn deref(&self) -> &[[T; N]] {
        self.data[self.offset..][..self.len].as_chunks().0
    }
}

impl<T, const N: usize> DerefMut for Aligned<T, N> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [[T; N]] {
        self.data[self.offset..][..self.len].as_chunks_mut().0
    }
}

/// The arrays alone: where they lie in memory is no part of what they are.
impl<T: fmt::Debug, const N: usize> fmt::Debug for Aligned<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_begin_at_a_cache_line() {
        for n in [0, 1, 3, 1_000, 100_000] {
            let mut array = Aligned::<f32, 16>::filled(0.5, n);
            assert_eq!(array.len(), n);
            assert!(array.as_ptr().cast::<f32>().align_offset(LINE) == 0);
            if let Some(last) = array.last_mut() {
                last[15] = 1.0;
            }
            assert!(array.as_flattened().iter().rev().skip(1).all(|&x| x == 0.5));
            let mut grown = Aligned::<f32, 16>::with_room(0.0, n + 2);
            grown.push(0.5, n);
            grown.push(1.5, 2);
            assert!(grown.as_ptr().cast::<f32>().align_offset(LINE) == 0);
            assert_eq!((grown.len(), grown[n + 1][15]), (n + 2, 1.5));
            assert!(grown[..n].as_flattened().iter().all(|&x| x == 0.5));
        }
    }
}
