//! The one mixing function of this crate and the map hasher made from it.
//!
//! Not `RandomState`: its seed is global randomness, and the scheduler must replay the same way in every process. Not a
//! dependency: it is three lines. It is not secret, so nothing here may trust equal hashes (see [`crate::prefix`]).

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// A map from small integers (ids, hashes), the same in every run.
pub(crate) type IntMap<K, V> = HashMap<K, V, BuildHasherDefault<IntHasher>>;
/// A set of small integers, the same in every run.
pub(crate) type IntSet<K> = HashSet<K, BuildHasherDefault<IntHasher>>;

/// A bijection on 64 bits in which every input bit reaches every output bit (the finalizer of `SplitMix64`).
pub(crate) const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Hashes keys that are one integer.
#[derive(Debug, Default)]
pub(crate) struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = mix(self.0 ^ word);
    }
}
