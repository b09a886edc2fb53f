//! Bit planes: how a block stores a field of fewer than eight bits for each weight.
//!
//! Bytes come in runs of `RUN`. Byte `l` of a run holds `8 / WIDTH` fields, and field `s` of it belongs to weight
//! `s * RUN + l` of the run's weights, so that one mask and one shift of a whole vector yield `RUN` consecutive
//! weights:
//!
//! ```text
//!            bit 7        ...          bit 0
//! WIDTH = 2  [ 3*RUN+l | 2*RUN+l | RUN+l | l ]     byte l of the run, for l in 0..RUN
//! ```

/// Stores the fields of `bytes` in `codes`: replaces them for `shift` 0, else adds at bit `shift` of each.
///
/// Inlined, like all that opens a block, into callers that are compiled for wider vectors than this crate.
#[inline(always)]
pub(super) fn read<const WIDTH: usize, const RUN: usize>(bytes: &[u8], shift: usize, codes: &mut [u8]) {
    debug_assert_eq!(bytes.len() * 8 / WIDTH, codes.len());
    let mask = (1u8 << WIDTH) - 1;
    let (runs, []) = bytes.as_chunks::<RUN>() else { panic!("bytes are no whole number of runs") };
    for (run, weights) in runs.iter().zip(codes.chunks_exact_mut(RUN * 8 / WIDTH)) {
        for (s, plane) in weights.as_chunks_mut::<RUN>().0.iter_mut().enumerate() {
            for (code, byte) in plane.iter_mut().zip(run) {
                let field = (byte >> (s * WIDTH)) & mask;
                *code = if shift == 0 { field } else { *code | field << shift };
            }
        }
    }
}

/// Stores `WIDTH` bits of each code, from bit `shift` up, in `bytes`. The inverse of [`read`].
pub(super) fn write<const WIDTH: usize, const RUN: usize>(codes: &[u8], shift: usize, bytes: &mut [u8]) {
    debug_assert_eq!(bytes.len() * 8 / WIDTH, codes.len());
    let mask = (1u8 << WIDTH) - 1;
    bytes.fill(0);
    for (weights, run) in codes.chunks_exact(RUN * 8 / WIDTH).zip(bytes.chunks_exact_mut(RUN)) {
        for (s, plane) in weights.chunks_exact(RUN).enumerate() {
            for (byte, code) in run.iter_mut().zip(plane) {
                *byte |= ((code >> shift) & mask) << (s * WIDTH);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads one byte set in an otherwise empty field and lists the `(weight, code)` that it makes.
    fn check<const WIDTH: usize, const RUN: usize>(len: usize, at: usize, byte: u8, want: &[(usize, u8)]) {
        let mut bytes = vec![0; len];
        bytes[at] = byte;
        let mut codes = vec![0; len * 8 / WIDTH];
        read::<WIDTH, RUN>(&bytes, 0, &mut codes);
        let got: Vec<_> = codes.iter().copied().enumerate().filter(|&(_, code)| code != 0).collect();
        assert_eq!(got, want, "{WIDTH} bits, runs of {RUN}, byte {at}");
        let mut back = vec![0xAA; len];
        write::<WIDTH, RUN>(&codes, 0, &mut back);
        assert_eq!(back, bytes, "{WIDTH} bits, runs of {RUN}, byte {at}, written back");
    }

    #[test]
    fn a_byte_holds_weights_a_run_apart() {
        check::<4, 16>(16, 3, 0x52, &[(3, 2), (19, 5)]);
        check::<4, 32>(128, 33, 0xF1, &[(65, 1), (97, 15)]);
        check::<4, 64>(128, 64, 0x9C, &[(128, 12), (192, 9)]);
        check::<2, 32>(64, 32, 0b11_10_01_00, &[(160, 1), (192, 2), (224, 3)]);
        check::<1, 32>(32, 31, 0b1000_0010, &[(63, 1), (255, 1)]);
    }
}
