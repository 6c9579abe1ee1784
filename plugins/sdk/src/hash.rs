//! Placement by hash, and labels: equal on every host, in every instance and version of the SDK.

/// Mixes two numbers into evenly spread bits; a change of either bit changes half of them. For rendezvous hashing: mix what
/// is to be placed with each `replica.key`, and the largest wins. The finalizer of SplitMix64 (Steele, Lea and Flood, 2014),
/// twice. Not for secrets: whoever knows both numbers knows the result.
#[must_use]
#[inline]
pub fn mix(label: u64, key: u64) -> u64 {
    finish(finish(label) ^ key)
}

/// Weighted rendezvous: among replicas, the one with the smallest answer takes `label`, and each takes its weight's share of
/// all labels. A replica that comes or goes moves only its own labels, and a weight that changes moves only the difference.
/// Weight 0 never wins.
///
/// Each replica runs a race at the speed of its weight: `-ln(u) / weight`, `u` its hash as a number between 0 and 1
/// (Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", SPAA 2005). The bits of a positive float sort like the
/// float, so the answer is an integer.
#[must_use]
#[inline]
pub fn place(label: u64, key: u64, weight: u32) -> u64 {
    place_before(label, key, weight, u64::MAX).unwrap_or(u64::MAX)
}

/// The same, where it is less than `limit`: for the best few of many, most of whom cost no logarithm.
#[must_use]
#[inline]
pub fn place_before(label: u64, key: u64, weight: u32, limit: u64) -> Option<u64> {
    if weight == 0 {
        return None;
    }
    // 52 bits and a half: exact, and neither 0 nor 1 can come out.
    let hash = (mix(label, key) >> 12) as f64 + 0.5;
    // -ln(u) is at least 1 - u. The largest limit is no number as a float, and then nothing is ruled out here.
    if 1.0 - hash / SCALE >= f64::from_bits(limit) * f64::from(weight) {
        return None;
    }
    let place = (minus_ln(hash, 52) / f64::from(weight)).to_bits();
    (place < limit).then_some(place)
}

/// 2^52.
const SCALE: f64 = (1_u64 << 52) as f64;

/// `-ln(x / 2^scale)` for an x between 0.5 and 2^scale, to within 1e-7 of the result. The logarithm of the standard library
/// is exact to the last bit, and took twice the rest of a decision.
#[inline]
fn minus_ln(x: f64, scale: i32) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    const ONE: u64 = 1023 << 52;
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits(bits & MANTISSA | ONE);
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    // ln(m) = 2 atanh(s), of which four terms are left after |s| <= 0.172.
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let ln_m = 2.0 * s * (1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0))));
    f64::from(scale - exponent) * std::f64::consts::LN_2 - ln_m
}

/// What a column `replica.label.<name>` holds where a replica has no such label.
pub const NO_LABEL: u64 = u64::MAX;

/// What a column `replica.label.<name>` holds where the label is this text: the same on every host. FNV-1a (Fowler, Noll and
/// Vo, 1991).
#[must_use]
pub fn label(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What a layout of a policy is called between all policies.
pub(crate) fn schema(policy: &str, layout: u32) -> u32 {
    mix(label(policy), layout.into()) as u32
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
    fn the_logarithm_is_near_enough_everywhere() {
        let top = SCALE;
        let random = (0..10_000).map(|i| (mix(i, 1) >> 12) as f64 + 0.5);
        let edges = [0.5, 1.5, top / 2.0, top * 0.707, top * 0.708, top - 100_000.5, top - 1.5, top - 0.5];
        for x in random.chain(edges) {
            let (near, exact) = (minus_ln(x, 52), -(x / top).ln());
            assert!(near > 0.0 && (near - exact).abs() <= exact * 1e-7 + 1e-16, "{x}: {near} {exact}");
        }
    }

    #[test]
    fn shares_are_those_of_the_weights() {
        let weights = [1_000, 0, 2_000, 5_000];
        let mut hits = [0_i32; 4];
        for label in 0..80_000 {
            let places = [0, 1, 2, 3].map(|i| place(label, i as u64, weights[i]));
            let winner = (0..4).min_by_key(|&i| places[i]);
            for (i, limit) in [(0, places[2]), (2, places[0]), (3, places[3]), (3, places[3].saturating_add(1))] {
                let expect = (places[i] < limit).then_some(places[i]);
                assert_eq!(
                    place_before(label, i as u64, weights[i], limit),
                    expect,
                    "the bound rules out nothing else"
                );
            }
            hits[winner.expect("four")] += 1;
        }
        for (n, expect) in hits.into_iter().zip([10_000, 0, 20_000, 50_000]) {
            // Three standard deviations of the largest share are 420.
            assert!((n - expect).abs() <= 420, "{hits:?}");
        }
        assert!(hits[1] == 0);
    }

    #[test]
    fn values_are_fixed_for_ever_and_bits_flip() {
        assert_eq!(label("demo:f16@cpu"), 0x0809_e4f0_90b1_09c7, "as the host has it");
        // The first output of SplitMix64 with seed 0.
        assert_eq!(finish(0), 0xe220_a839_7b1d_cdaf);
        for bit in 0..64 {
            let (a, b) = ((mix(1 << bit, 7) ^ mix(0, 7)).count_ones(), (mix(7, 1 << bit) ^ mix(7, 0)).count_ones());
            assert!((16..=48).contains(&a) && (16..=48).contains(&b), "{bit}: {a} {b}");
        }
    }
}
