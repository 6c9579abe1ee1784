//! One hash function, for placement: equal on every host, in every instance and version of the SDK.

/// Mixes two numbers into evenly spread bits; a change of either bit changes half of them. For rendezvous hashing: mix what
/// is to be placed with each `replica.key`, and the largest wins. The finalizer of SplitMix64 (Steele, Lea and Flood, 2014),
/// twice. Not for secrets: whoever knows both numbers knows the result.
#[must_use]
#[inline]
pub fn mix(label: u64, key: u64) -> u64 {
    finish(finish(label) ^ key)
}

#[inline]
fn finish(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_fixed_for_ever_and_bits_flip() {
        // The first output of SplitMix64 with seed 0.
        assert_eq!(finish(0), 0xe220_a839_7b1d_cdaf);
        for bit in 0..64 {
            let (a, b) = ((mix(1 << bit, 7) ^ mix(0, 7)).count_ones(), (mix(7, 1 << bit) ^ mix(7, 0)).count_ones());
            assert!((16..=48).contains(&a) && (16..=48).contains(&b), "{bit}: {a} {b}");
        }
    }
}
