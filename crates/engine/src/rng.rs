//! Random numbers that depend on a key and a counter alone: Philox4x32-10. Knows nothing of tokens.
//!
//! A generator without state is what lets a request's text depend on its seed and positions only, never on the
//! batch it shares or on how often it was asked. Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers:
//! as easy as 1, 2, 3", SC 2011.

/// Multipliers and key increments of Philox4x32, from the paper.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The block of four random words that `key` and `counter` select.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..ROUNDS {
        let (low0, high0) = MULTIPLIERS[0].carrying_mul(c0, 0);
        let (low1, high1) = MULTIPLIERS[1].carrying_mul(c2, 0);
        (c0, c1, c2, c3) = (high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0);
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// 64 uniform random bits for the token at `position` (counted from 0, the prompt included) of a sequence sampled
/// with `seed`.
///
/// Key and counter take the low word first; words 2 and 3 of the counter are 0, free for other draws at the same
/// position. The result is the block's words 0 (low) and 1 (high).
pub fn bits_at(seed: u64, position: u64) -> u64 {
    let words = |x: u64| [x as u32, (x >> 32) as u32]; // truncation splits the number into its words
    let [p0, p1] = words(position);
    let [w0, w1, ..] = philox4x32([p0, p1, 0, 0], words(seed));
    u64::from(w0) | u64::from(w1) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `philox4x32 10` in the `kat_vectors` of the authors' Random123.
    #[test]
    fn known_answers() {
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox4x32(counter, key), want);
        }
    }

    #[test]
    fn every_bit_of_seed_and_position_counts() {
        let base = bits_at(7, 9);
        assert_eq!(bits_at(0, 0), 0xe169_c58d_6627_e8d5, "words low first");
        for bit in 0..64 {
            assert_ne!(bits_at(7 ^ 1 << bit, 9), base);
            assert_ne!(bits_at(7, 9 ^ 1 << bit), base);
        }
    }
}
