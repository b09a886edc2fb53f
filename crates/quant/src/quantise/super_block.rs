//! Super-blocks: a line for each sub-block, all lines on one grid of integer scales and minima, and that grid's two
//! float steps.
//!
//! 1. Each sub-block gets its own best line (`fit`).
//! 2. The largest scale and minimum set the steps `d` and `dmin`, rounded to f16 as they are stored.
//! 3. Each sub-block takes the best pair of integers near its line, judged by the error with the codes that result.
//! 4. With the integers and codes fixed the best `d` and `dmin` are again a least-squares problem; from its answer
//!    step 3 is done again, as long as the error falls.

use super::fit::{self, Codes, Line, rint, sum};
use super::unit::Unit;
use crate::block::{SuperBlock, close_super};
use gguf::Dtype;

/// Rounds of step 4. Nearly all of the gain is in the first.
const ROUNDS: usize = 2;

/// The integers that a type can store.
#[derive(Clone, Copy)]
struct Grid {
    codes: Codes,
    /// Smallest and largest scale.
    scale: (f32, f32),
    /// Largest minimum; 0 where the type has none.
    min: f32,
}

impl Grid {
    /// Codes `0..=hi` with minima; scales and minima `0..=most`.
    fn affine(hi: f32, most: f32) -> Grid {
        Grid { codes: Codes { lo: 0.0, hi }, scale: (0.0, most), min: most }
    }

    /// Codes `-half..half`; scales `-most..most`.
    fn symmetric(half: f32, most: f32) -> Grid {
        Grid { codes: Codes { lo: -half, hi: half - 1.0 }, scale: (-most, most - 1.0), min: 0.0 }
    }

    /// Step 1: the best line for one sub-block, integers aside.
    fn fit<const N: usize>(&self, x: &[f32; N], w: &[f32; N]) -> Line {
        if self.min > 0.0 {
            fit::affine(self.codes.hi, false, x, w)
        } else {
            fit::symmetric(-self.codes.lo, x, w)
        }
    }

    /// Step 2: `d` and `dmin` such that the largest scale and minimum become the largest integers.
    fn steps(&self, lines: &[Line]) -> (f32, f32) {
        let scale =
            lines.iter().fold(0.0f32, |most, line| if line.s.abs() > most.abs() { line.s } else { most });
        let min = lines.iter().fold(0.0f32, |most, line| most.max(line.m));
        if self.min > 0.0 { (scale / self.scale.1, min / self.min) } else { (scale / self.scale.0, 0.0) }
    }
}

/// Quantises 256 values into one block of Q2_K to Q6_K.
pub(super) fn quantise(dtype: Dtype, x: &[f32; 256], block: &mut [u8]) {
    let open = match dtype {
        Dtype::Q2K => open::<16>(Grid::affine(3.0, 15.0), x),
        Dtype::Q3K => open::<16>(Grid::symmetric(4.0, 32.0), x),
        Dtype::Q4K => open::<32>(Grid::affine(15.0, 63.0), x),
        Dtype::Q5K => open::<32>(Grid::affine(31.0, 63.0), x),
        Dtype::Q6K => open::<16>(Grid::symmetric(32.0, 128.0), x),
        _ => unreachable!("{dtype} has no super-blocks"),
    };
    close_super(dtype, &open, block);
}

/// The super-block that fits `x` best, with sub-blocks of `N`.
fn open<const N: usize>(grid: Grid, x: &[f32; 256]) -> SuperBlock {
    let mut open = SuperBlock { bias: -grid.codes.lo as u8, ..SuperBlock::default() };
    open.codes.fill(open.bias);
    let Some(unit) = Unit::of(x) else { return open };
    let x = unit.divide(x);
    let x = x.as_chunks::<N>().0;
    let mut w = [0.0; 256];
    let w = w.as_chunks_mut::<N>().0;
    for (w, x) in w.iter_mut().zip(x) {
        *w = fit::weights(x);
    }
    let best = Problem { grid, unit, x, w }.solve();
    for (i, (x, codes)) in x.iter().zip(open.codes.as_chunks_mut::<N>().0).enumerate() {
        *codes = best.line(i).codes(grid.codes, x).map(|code| (code - grid.codes.lo) as u8);
        for j in i * N / 16..(i + 1) * N / 16 {
            open.scale[j] = best.scale[i] as i8;
            open.min[j] = best.min[i] as u8;
        }
    }
    open.d = unit.f16(best.d);
    open.dmin = unit.f16(best.dmin);
    open
}

/// All lines of a super-block on one grid, in units: of sub-block `j`, `s = d * scale[j]` and `m = dmin * min[j]`.
#[derive(Clone, Copy)]
struct Choice {
    d: f32,
    dmin: f32,
    /// Integers, as f32; one for each sub-block, the rest 0.
    scale: [f32; 16],
    /// As `scale`.
    min: [f32; 16],
    /// Weighted squared error of the whole super-block.
    error: f32,
}

impl Choice {
    fn line(&self, j: usize) -> Line {
        Line { s: self.d * self.scale[j], m: self.dmin * self.min[j] }
    }
}

/// A super-block to be fitted: its values in units, and how much the error of each counts.
struct Problem<'a, const N: usize> {
    grid: Grid,
    unit: Unit,
    x: &'a [[f32; N]],
    w: &'a [[f32; N]],
}

impl<const N: usize> Problem<'_, N> {
    fn solve(&self) -> Choice {
        let lines: [Line; 16] = std::array::from_fn(|j| match self.x.get(j) {
            Some(x) => self.grid.fit(x, &self.w[j]),
            None => Line { s: 0.0, m: 0.0 },
        });
        let mut best = self.integers(self.grid.steps(&lines), &lines);
        for _ in 0..ROUNDS {
            let next = self.integers(self.steps(&best), &std::array::from_fn(|j| best.line(j)));
            if next.error >= best.error {
                break;
            }
            best = next;
        }
        best
    }

    /// Step 3: for each sub-block the best of the integers at and beside those nearest to its line.
    fn integers(&self, (d, dmin): (f32, f32), lines: &[Line; 16]) -> Choice {
        let (d, dmin) = (self.unit.step(d), self.unit.step(dmin));
        let mut choice = Choice { d, dmin, scale: [0.0; 16], min: [0.0; 16], error: 0.0 };
        for (j, (x, w)) in self.x.iter().zip(self.w).enumerate() {
            let mut best = f32::INFINITY;
            for scale in beside(lines[j].s, d, self.grid.scale) {
                for min in beside(lines[j].m, dmin, (0.0, self.grid.min)) {
                    let error = Line { s: d * scale, m: dmin * min }.error(self.grid.codes, x, w);
                    if error < best {
                        best = error;
                        (choice.scale[j], choice.min[j]) = (scale, min);
                    }
                }
            }
            choice.error += best;
        }
        choice
    }

    /// Step 4: the best `d` and `dmin` for the integers and codes of `choice`.
    ///
    /// With `a = scale * code` and `b = -min` a value is `d a + dmin b`, so these are the normal equations of two
    /// unknowns, or of one where the type or the super-block has no minima.
    fn steps(&self, choice: &Choice) -> (f32, f32) {
        let (mut aa, mut ab, mut bb, mut xa, mut xb) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (j, (x, w)) in self.x.iter().zip(self.w).enumerate() {
            let c = choice.line(j).codes(self.grid.codes, x);
            let (scale, b) = (choice.scale[j], -choice.min[j]);
            aa += scale * scale * sum::<N>(|i| w[i] * c[i] * c[i]);
            ab += scale * b * sum::<N>(|i| w[i] * c[i]);
            bb += b * b * sum::<N>(|i| w[i]);
            xa += scale * sum::<N>(|i| w[i] * x[i] * c[i]);
            xb += b * sum::<N>(|i| w[i] * x[i]);
        }
        let determinant = aa * bb - ab * ab;
        if determinant > 0.0 {
            ((xa * bb - xb * ab) / determinant, (xb * aa - xa * ab) / determinant)
        } else if aa > 0.0 {
            (xa / aa, choice.dmin)
        } else {
            (choice.d, choice.dmin)
        }
    }
}

/// The integers nearest to `value / step` and one either side, within the range, both ends included.
fn beside(value: f32, step: f32, (lo, hi): (f32, f32)) -> impl Iterator<Item = f32> {
    let nearest = if step == 0.0 { 0.0 } else { rint((value / step).max(lo).min(hi)) };
    [nearest, nearest - 1.0, nearest + 1.0].into_iter().filter(move |&integer| lo <= integer && integer <= hi)
}
