//! The integer kernels as the rules state them: the truth that the vector variants are tested against, and what runs
//! on processors without them.

use quant::SuperBlock;

use super::{Block, Kernels, Sums, check_planes, join};

/// Any processor.
pub(crate) struct Scalar;

impl Kernels for Scalar {
    #[inline(always)]
    fn super_dot<const LOW: bool>(w: &SuperBlock, x: Block<'_>) -> Sums {
        let mut sums = Sums::default();
        for sub in 0..16 {
            let at = sub * 16..(sub + 1) * 16;
            let dot = |plane: &[i8; 256]| -> i32 {
                let pairs = w.codes[at.clone()].iter().zip(&plane[at.clone()]);
                pairs.map(|(&c, &q)| (i32::from(c) - i32::from(w.bias)) * i32::from(q)).sum()
            };
            let (scale, min) = (i32::from(w.scale[sub]), i32::from(w.min[sub]));
            sums.hi += scale * dot(x.hi);
            if LOW {
                sums.lo += scale * dot(x.lo);
                sums.min += min * (256 * i32::from(x.sum_hi[sub]) + i32::from(x.sum_lo[sub]));
            } else {
                sums.min += min * i32::from(x.sum_hi[sub]);
            }
        }
        sums
    }

    fn planes(hi: &[u8], lo: &[u8], b_hi: &[i8], b_lo: &[i8], out: &mut [f32]) {
        check_planes(hi, lo, b_hi, b_lo, out);
        let lanes = out.len();
        for (n, out) in out.iter_mut().enumerate() {
            let (mut high, mut mixed) = (0i32, 0i32);
            for (j, (&b_hi, &b_lo)) in b_hi.iter().zip(b_lo).enumerate() {
                let at = (j / 4 * lanes + n) * 4 + j % 4;
                let (a_hi, a_lo) = (i32::from(hi[at]) - 128, i32::from(lo[at]) - 128);
                high += a_hi * i32::from(b_hi);
                mixed += a_hi * i32::from(b_lo) + a_lo * i32::from(b_hi);
            }
            *out = join(high, mixed);
        }
    }
}
