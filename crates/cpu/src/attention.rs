//! Attention in fixed point (ARCHITECTURE.md, rule 5): exact products within a tile of 64 keys, powers of two between
//! tiles, spans of four tiles summed apart, so that a span can be computed anywhere and the order stays written.

use std::ops::Range;

use model::{BLOCK, math};
use quant::fixed::{Activations, round_block, split};

use crate::cache::Tile;
use crate::isa::Task;
use crate::kernels::Kernels;
use crate::ops;

/// Keys to a span: a partial result of its own, in decode's splits and prefill's loop alike.
pub(crate) const SPAN: usize = 4 * BLOCK;

/// The largest head this engine takes (`Config` refuses more).
const MAX_HEAD: usize = 256;

/// The exponent of a tile without a key: finite, so that no difference of exponents is NaN.
const FLOOR: f32 = -1e30;

/// `256 log2(e) / sqrt(HD)`: turns an integer product (in units of 256) into a score in base 2.
fn score_scale(head_dim: usize) -> f32 {
    (256.0 * std::f64::consts::LOG2_E / (head_dim as f64).sqrt()) as f32
}

/// What some run of keys contributes to one query head: `sum = sum p`, `out = sum p v`, where `p = 2^(score - exponent)`.
#[derive(Clone, Copy)]
pub(crate) struct Partial {
    exponent: f32,
    sum: f32,
    /// `[HD]`, the rest unused.
    out: [f32; MAX_HEAD],
}

impl Partial {
    pub(crate) const EMPTY: Partial = Partial { exponent: FLOOR, sum: 0.0, out: [0.0; MAX_HEAD] };

    /// `self` then `next`. Exponents are integers, so both factors are exact powers of two (or zero) and each sum is
    /// rounded once.
    #[inline(always)]
    fn merge(&mut self, next: &Partial, head_dim: usize) {
        let top = if next.exponent > self.exponent { next.exponent } else { self.exponent };
        let (a, b) = (math::exp2(self.exponent - top), math::exp2(next.exponent - top));
        self.exponent = top;
        self.sum = self.sum.mul_add(a, next.sum * b);
        for (x, y) in self.out[..head_dim].iter_mut().zip(&next.out[..head_dim]) {
            *x = x.mul_add(a, y * b);
        }
    }
}

/// Merges the spans of a query head in order and writes the weighted mean of the values, `[HD]`.
pub(crate) struct Finish<'a, I> {
    pub(crate) spans: I,
    pub(crate) out: &'a mut [f32],
}

impl<'s, I: Iterator<Item = &'s Partial>> Task for Finish<'_, I> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        let mut total = Partial::EMPTY;
        self.spans.for_each(|span| total.merge(span, self.out.len()));
        let inverse = 1.0 / total.sum;
        for (out, x) in self.out.iter_mut().zip(&total.out) {
            *out = x * inverse;
        }
    }
}

/// One query head in fixed point.
pub(crate) struct Query {
    hi: [i8; MAX_HEAD],
    lo: [i8; MAX_HEAD],
    /// The row's scale times [`score_scale`].
    scale: f32,
}

/// Rounds one query head, `[HD]`, to fixed point.
pub(crate) struct RoundQuery<'a>(pub(crate) &'a [f32]);

impl Task for RoundQuery<'_> {
    type Out = Query;
    #[inline(always)]
    fn run<K: Kernels>(self) -> Query {
        let (mut hi, mut lo) = ([0; MAX_HEAD], [0; MAX_HEAD]);
        let scale = round_block(self.0, Activations::A16, |d, q| [hi[d], lo[d]] = split(q));
        Query { hi, lo, scale: scale * score_scale(self.0.len()) }
    }
}

/// The partial result of one span for the query heads that share a key/value head.
pub(crate) struct Span<'a, F> {
    /// `[group, HD]`.
    pub(crate) queries: &'a [Query],
    pub(crate) head_dim: usize,
    /// Key positions of this span that the query may see; they start at a multiple of [`SPAN`].
    pub(crate) keys: Range<usize>,
    /// The tile that holds a position.
    pub(crate) tile: F,
    /// One a query head.
    pub(crate) out: &'a mut [Partial],
}

impl<'c, F: Fn(usize) -> Tile<'c>> Task for Span<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        self.out.fill(Partial::EMPTY);
        for start in self.keys.clone().step_by(BLOCK) {
            let tile = (self.tile)(start);
            let keys = (self.keys.end - start).min(BLOCK);
            for (query, out) in self.queries.iter().zip(self.out.iter_mut()) {
                let next = attend_tile::<K>(query, &tile, keys, self.head_dim);
                out.merge(&next, self.head_dim);
            }
        }
    }
}

/// One query head against the first `keys` keys of a tile.
#[inline(always)]
fn attend_tile<K: Kernels>(query: &Query, tile: &Tile<'_>, keys: usize, head_dim: usize) -> Partial {
    let mut scores = [0f32; BLOCK];
    K::planes(tile.key_hi, tile.key_lo, &query.hi[..head_dim], &query.lo[..head_dim], &mut scores);
    let mut top = FLOOR;
    for (score, scale) in scores[..keys].iter_mut().zip(tile.key_scale) {
        *score *= query.scale * scale;
        top = if *score > top { *score } else { top };
    }
    let exponent = top.ceil();

    let (mut p, mut weighted) = ([0f32; BLOCK], [0f32; BLOCK]);
    for i in 0..keys {
        p[i] = math::exp2(scores[i] - exponent);
        weighted[i] = p[i] * tile.value_scale[i];
    }
    let (mut hi, mut lo) = ([0i8; BLOCK], [0i8; BLOCK]);
    let scale = round_block(&weighted, Activations::A16, |i, q| [hi[i], lo[i]] = split(q)) * 256.0;
    let mut partial = Partial { exponent, sum: ops::sum::<32>(&p), out: [0.0; MAX_HEAD] };
    K::planes(tile.value_hi, tile.value_lo, &hi, &lo, &mut partial.out[..head_dim]);
    partial.out[..head_dim].iter_mut().for_each(|v| *v *= scale);
    partial
}
