//! The integer kernels, one implementation an instruction set. All of them are exact, so they need not agree on an
//! order: only on the integers.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod open;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use scalar::Scalar;

use gguf::Dtype;
use quant::SuperBlock;
use quant::fixed::FixedRow;

/// One block of 256 activations in fixed point. `LOW` in the kernels says whether the low plane exists; where it does
/// not, `lo` and `sum_lo` alias the high plane and are never read.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    pub(crate) hi: &'a [i8; 256],
    pub(crate) lo: &'a [i8; 256],
    pub(crate) sum_hi: &'a [i16; 16],
    pub(crate) sum_lo: &'a [i16; 16],
    pub(crate) scale: f32,
}

/// The integer sums of a super-block's product (ARCHITECTURE.md, rule 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Sums {
    /// Sum over the high plane of `scale * (code - bias) * hi`.
    pub(crate) hi: i32,
    /// The same over the low plane.
    pub(crate) lo: i32,
    /// Sum of `min * q`, both planes together.
    pub(crate) min: i32,
}

/// Pairs of small blocks that share their horizontal sums: the 32-bit lanes of a 256-bit vector.
pub(crate) const PAIRS: usize = 8;

/// What each instruction set must provide.
pub(crate) trait Kernels {
    /// Opens one super-block into integers.
    #[inline(always)]
    fn open(dtype: Dtype, block: &[u8], out: &mut SuperBlock) {
        quant::open_super(dtype, block, out);
    }

    /// The exact sums of one super-block with one activation block.
    fn super_dot<const LOW: bool>(w: &SuperBlock, x: Block<'_>) -> Sums;

    /// Adjoining weight rows against one activation row, where the set has a faster way than one
    /// [`Kernels::super_dot`] after the other; returns false, having done nothing, where it does not.
    #[inline(always)]
    fn super_stream<const LOW: bool>(
        _dtype: Dtype,
        _rows: &[u8],
        _x: &FixedRow<'_>,
        _out: &mut [f32],
    ) -> bool {
        false
    }

    /// Weight rows against several activation rows, likewise.
    fn super_panel<const LOW: bool>(_panel: &crate::matmul::Panel<'_>, _out: &mut [f32]) -> bool {
        false
    }

    /// The exact sums of pairs of small blocks: `sum_k codes[i][k] q[i][k]`.
    #[inline(always)]
    fn small_dots(codes: [&[i8; 32]; PAIRS], q: [&[i8; 32]; PAIRS]) -> [i32; PAIRS] {
        std::array::from_fn(|i| codes[i].iter().zip(q[i]).map(|(&c, &q)| i32::from(c) * i32::from(q)).sum())
    }

    /// `out[n] = 256 sum_j hi[j][n] b_hi[j] + sum_j (hi[j][n] b_lo[j] + lo[j][n] b_hi[j])`, in f32 from exact
    /// integers, for a tile stored as `[J / 4][N][4]` bytes biased by 128. Both products of attention have this form;
    /// the unit is 256, the product of the low planes being dropped (rule 5). `N` is a multiple of 32.
    fn planes(hi: &[u8], lo: &[u8], b_hi: &[i8], b_lo: &[i8], out: &mut [f32]);
}

/// Checks the shapes of [`Kernels::planes`], which the vector variants rely on for safety.
#[inline(always)]
fn check_planes(hi: &[u8], lo: &[u8], b_hi: &[i8], b_lo: &[i8], out: &[f32]) {
    assert!(b_hi.len() == b_lo.len() && b_hi.len().is_multiple_of(4) && out.len().is_multiple_of(32));
    assert!(hi.len() == lo.len() && hi.len() == b_hi.len() * out.len());
}

/// `256 h + l` in f32, rounded once after two exact conversions (attention) or three roundings (weights).
#[inline(always)]
pub(crate) fn join(h: i32, l: i32) -> f32 {
    256f32.mul_add(h as f32, l as f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, Task};
    use proptest::prelude::*;

    struct Dot<'a, const LOW: bool>(&'a SuperBlock, Block<'a>);
    impl<const LOW: bool> Task for Dot<'_, LOW> {
        type Out = Sums;
        #[inline(always)]
        fn run<K: Kernels>(self) -> Sums {
            K::super_dot::<LOW>(self.0, self.1)
        }
    }

    struct SmallDots<'a>([&'a [i8; 32]; PAIRS], [&'a [i8; 32]; PAIRS]);
    impl Task for SmallDots<'_> {
        type Out = [i32; PAIRS];
        #[inline(always)]
        fn run<K: Kernels>(self) -> [i32; PAIRS] {
            K::small_dots(self.0, self.1)
        }
    }

    fn check_small(codes: &[[i8; 32]; PAIRS], q: &[[i8; 32]; PAIRS]) {
        let task = || SmallDots(codes.each_ref(), q.each_ref());
        let want = Isa::available()[0].run(task());
        for isa in Isa::available() {
            assert_eq!(isa.run(task()), want, "{}", isa.name());
        }
    }

    struct Planes<'a>(&'a [u8], &'a [u8], &'a [i8], &'a [i8], &'a mut [f32]);
    impl Task for Planes<'_> {
        type Out = ();
        #[inline(always)]
        fn run<K: Kernels>(self) {
            K::planes(self.0, self.1, self.2, self.3, self.4);
        }
    }

    /// A cheap generator for bulk bytes; proptest supplies the seed.
    fn bytes(seed: u64, n: usize) -> Vec<u8> {
        let mut s = seed | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 32) as u8
        };
        (0..n).map(|_| next()).collect()
    }

    fn check_dot(seed: u64, code_bits: u32, bias: u8, extreme: Option<i8>) {
        let b = bytes(seed, 1024);
        let plane =
            |from: usize| -> [i8; 256] { std::array::from_fn(|i| extreme.unwrap_or(b[from + i] as i8)) };
        let (hi, lo) = (plane(0), plane(256));
        let sums = |p: &[i8; 256]| -> [i16; 16] {
            std::array::from_fn(|s| p[s * 16..][..16].iter().map(|&v| i16::from(v)).sum())
        };
        let w = SuperBlock {
            codes: std::array::from_fn(|i| {
                if extreme.is_some() {
                    (1u16 << code_bits) as u8 - 1
                } else {
                    b[512 + i] & ((1u16 << code_bits) as u8 - 1)
                }
            }),
            scale: std::array::from_fn(|i| if extreme.is_some() { -128 } else { b[768 + i] as i8 }),
            min: std::array::from_fn(|i| if bias == 0 { b[800 + i] & 63 } else { 0 }),
            bias,
            d: 1.0,
            dmin: 1.0,
        };
        let x = Block { hi: &hi, lo: &lo, sum_hi: &sums(&hi), sum_lo: &sums(&lo), scale: 1.0 };
        let want = Isa::available()[0].run(Dot::<true>(&w, x));
        let want8 = Isa::available()[0].run(Dot::<false>(&w, x));
        assert_eq!((want8.hi, want8.lo), (want.hi, 0));
        for isa in Isa::available() {
            assert_eq!(isa.run(Dot::<true>(&w, x)), want, "{}", isa.name());
            assert_eq!(isa.run(Dot::<false>(&w, x)), want8, "{}", isa.name());
        }
    }

    proptest! {
        #[test]
        fn super_dot_is_the_same_integer_everywhere(seed: u64, which in 0usize..4) {
            let (bits, bias) = [(4, 0), (5, 0), (6, 32), (3, 4)][which];
            check_dot(seed, bits, bias, None);
        }

        #[test]
        fn small_dots_are_the_same_integers_everywhere(seed: u64) {
            let b = bytes(seed, 512);
            let blocks = |from: usize| std::array::from_fn(|i| std::array::from_fn(|k| b[from + i * 32 + k] as i8));
            check_small(&blocks(0), &blocks(256));
        }

        #[test]
        fn planes_are_the_same_bits_everywhere(seed: u64, groups in 1usize..17, lanes in 1usize..9) {
            let (j, n) = (groups * 4, lanes * 32);
            let b = bytes(seed, 2 * j * n + 2 * j);
            let (hi, rest) = b.split_at(j * n);
            let (lo, rest) = rest.split_at(j * n);
            let b: Vec<i8> = rest.iter().map(|&v| v as i8).collect();
            let mut want = vec![0.0; n];
            Isa::available()[0].run(Planes(hi, lo, &b[..j], &b[j..], &mut want));
            for isa in Isa::available() {
                let mut got = vec![f32::NAN; n];
                isa.run(Planes(hi, lo, &b[..j], &b[j..], &mut got));
                prop_assert_eq!(&got, &want, "{}", isa.name());
            }
        }
    }

    struct Open<'a>(Dtype, &'a [u8], &'a mut SuperBlock);
    impl Task for Open<'_> {
        type Out = ();
        #[inline(always)]
        fn run<K: Kernels>(self) {
            K::open(self.0, self.1, self.2);
        }
    }

    #[test]
    fn every_block_opens_to_the_same_integers() {
        for dtype in [Dtype::Q2K, Dtype::Q3K, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K] {
            for seed in 0..64 {
                let block = bytes(seed * 77 + 1, dtype.block_bytes());
                let mut want = SuperBlock::default();
                quant::open_super(dtype, &block, &mut want);
                for isa in Isa::available() {
                    // Leftovers of another block must not show.
                    let mut got =
                        SuperBlock { codes: [255; 256], scale: [99; 16], min: [99; 16], bias: 9, ..want };
                    isa.run(Open(dtype, &block, &mut got));
                    let bits =
                        |b: &SuperBlock| (b.codes, b.scale, b.min, b.bias, b.d.to_bits(), b.dmin.to_bits());
                    assert_eq!(bits(&got), bits(&want), "{dtype} {}", isa.name());
                }
            }
        }
    }

    #[test]
    fn the_largest_integers_do_not_overflow() {
        for (bits, bias) in [(4, 0), (5, 0), (6, 32)] {
            check_dot(7, bits, bias, Some(-128));
            check_dot(7, bits, bias, Some(127));
        }
        for (code, q) in [(-128, -128), (-128, 127), (127, 127)] {
            check_small(&[[code; 32]; PAIRS], &[[q; 32]; PAIRS]);
        }
    }
}
