//! Six-bit sub-block scales packed into twelve bytes: the two arrangements, of Q4_K and Q5_K, and of Q3_K.
//!
//! Both split each number: the part that fits goes first, the high bits fill what is left over.

/// Unpacks the scales and minima of Q4_K and Q5_K, eight of each, 0 to 63.
///
/// Numbers 4 to 7 are split: their low nibbles share bytes 8..12, and their two high bits sit above the six of
/// number `j - 4`. Forgetting those two bits is the classic fault here: it shows only where a scale exceeds 15.
///
/// ```text
/// byte       7 6 | 5 4 | 3 2 1 0
/// 0..4       S S | s s   s s s s      s = scale j            S = bits 5,4 of scale j + 4
/// 4..8       M M | m m   m m m m      m = min j              M = bits 5,4 of min j + 4
/// 8..12      n n   n n | t t t t      t = bits 3..0 of scale j + 4, n = bits 3..0 of min j + 4
/// ```
#[inline(always)]
pub(super) fn read_scales_mins(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scale, mut min) = ([0; 8], [0; 8]);
    for j in 0..4 {
        let (s, m, nibbles) = (packed[j], packed[4 + j], packed[8 + j]);
        scale[j] = s & 63;
        min[j] = m & 63;
        scale[4 + j] = (nibbles & 15) | ((s >> 6) << 4);
        min[4 + j] = (nibbles >> 4) | ((m >> 6) << 4);
    }
    (scale, min)
}

/// The inverse of [`read_scales_mins`]; takes the low six bits of each number.
pub(super) fn write_scales_mins(scale: &[u8; 8], min: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = (scale[j] & 63) | ((scale[4 + j] >> 4) << 6);
        packed[4 + j] = (min[j] & 63) | ((min[4 + j] >> 4) << 6);
        packed[8 + j] = (scale[4 + j] & 15) | (min[4 + j] << 4);
    }
    packed
}

/// Unpacks the sixteen scales of Q3_K, stored with a bias of 32: -32 to 31.
///
/// ```text
/// byte       7 6 5 4 | 3 2 1 0
/// 0..8       bits 3..0 of scale j + 8 | bits 3..0 of scale j
/// 8..12      bits 5,4 of scales j + 12, j + 8, j + 4, j       (two bits each, the first highest)
/// ```
#[inline(always)]
pub(super) fn read_signed(packed: &[u8; 12]) -> [i8; 16] {
    let mut scale = [0; 16];
    for (j, scale) in scale.iter_mut().enumerate() {
        let low = (packed[j % 8] >> (j / 8 * 4)) & 15;
        let high = (packed[8 + j % 4] >> (j / 4 * 2)) & 3;
        *scale = (low | (high << 4)) as i8 - 32;
    }
    scale
}

/// The inverse of [`read_signed`]; `scale` lies in -32..=31.
pub(super) fn write_signed(scale: &[i8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (j, scale) in scale.iter().enumerate() {
        let biased = (scale + 32) as u8;
        packed[j % 8] |= (biased & 15) << (j / 8 * 4);
        packed[8 + j % 4] |= ((biased >> 4) & 3) << (j / 4 * 2);
    }
    packed
}
