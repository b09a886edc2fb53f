//! The stages, each a plain composition of the functions of the other files; what each reads and writes is declared
//! at [`model::Stage`]. Symbols as there.

use std::ops::Range;

use gguf::Tensor;
use model::{BLOCK, Buffer, Config, Fault, Ffn, FfnWeights, Moe, Weights};
use quant::fixed::Activations;
use rayon::prelude::*;

use crate::attention::{Finish, Partial, RoundQuery, SPAN, Span};
use crate::cache::Slot;
use crate::isa::{Isa, Task};
use crate::kernels::Kernels;
use crate::matmul::{Fill, Matrix, Operand, is_quantised, product};
use crate::{Cpu, ops};

/// The norms of a model as `f32`: small, and read by every row.
pub(crate) struct Norms {
    layers: Vec<LayerNorms>,
    output: Vec<f32>,
}

struct LayerNorms {
    attn: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    ffn: Vec<f32>,
}

impl Norms {
    pub(crate) fn new(weights: &Weights) -> Norms {
        let layer = |l: &model::LayerWeights| LayerNorms {
            attn: floats(&l.attn_norm),
            q: floats(&l.attn_q_norm),
            k: floats(&l.attn_k_norm),
            ffn: floats(&l.ffn_norm),
        };
        Norms { layers: weights.layers.iter().map(layer).collect(), output: floats(&weights.output_norm) }
    }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; tensor.row_len()];
    quant::dequantise_row(tensor.dtype, &tensor.data, &mut out);
    out
}

/// Memory that a stage works in and no other stage reads, kept to spare allocations.
#[derive(Default)]
pub(crate) struct Scratch {
    operand: Operand,
    /// What a projection adds to the residual stream, `[T, D]`; or the experts' outputs, `[T, K, D]`.
    delta: Vec<f32>,
    /// Dense feed-forward: `[T, F]`.
    hidden: Vec<f32>,
    /// `0..T`.
    all: Vec<u32>,
}

/// Weight rows of one task: enough to amortise the hand-over, few enough to share evenly; whole panels.
const CHUNK: usize = 64;

/// An output matrix whose columns are written by several threads.
struct Columns<'a> {
    at: *mut f32,
    rows: usize,
    stride: usize,
    _owner: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `put` writes only what its caller owns by contract: distinct columns for distinct tasks.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    fn new(out: &'a mut [f32], stride: usize) -> Columns<'a> {
        Columns { rows: out.len() / stride, at: out.as_mut_ptr(), stride, _owner: std::marker::PhantomData }
    }

    /// Copies `values` to row `row` from column `column` on.
    ///
    /// # Safety
    /// No other thread writes these columns of this row.
    unsafe fn put(&self, row: usize, column: usize, values: &[f32]) {
        assert!(row < self.rows && column + values.len() <= self.stride);
        // SAFETY: inside the slice by the assertion; exclusive by contract.
        unsafe {
            let at = self.at.add(row * self.stride + column);
            at.copy_from_nonoverlapping(values.as_ptr(), values.len());
        }
    }
}

struct Norm<'a, const W: usize>(&'a mut [f32], &'a [f32], f32);
impl<const W: usize> Task for Norm<'_, W> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        ops::rms_norm::<W>(self.0, self.1, self.2);
    }
}

/// Normalises and rotates the heads of one row.
struct Heads<'a> {
    heads: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
    table: &'a [[f32; 2]],
}
impl Task for Heads<'_> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        for head in self.heads.chunks_exact_mut(self.weight.len()) {
            ops::rms_norm::<32>(head, self.weight, self.eps);
            ops::rotate(head, self.table);
        }
    }
}

struct SwiGlu<'a>(&'a [f32], &'a [f32], &'a mut [f32]);
impl Task for SwiGlu<'_> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        ops::swiglu(self.0, self.1, self.2);
    }
}

struct Softmax<'a>(&'a mut [f32]);
impl Task for Softmax<'_> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        ops::softmax(self.0);
    }
}

/// Fills `operand` from `x` (`[T, K]`), in fixed point as well if one of `weights` needs it.
fn prepare(
    isa: Isa,
    operand: &mut Operand,
    x: &[f32],
    k: usize,
    weights: &[&Tensor],
    activations: Activations,
) {
    operand.k = k;
    operand.float.clear();
    operand.float.extend_from_slice(x);
    if weights.iter().any(|w| is_quantised(w.dtype)) {
        operand.fixed.reset(x.len() / k, k, activations);
        let rows: Vec<_> = operand.fixed.rows_mut().zip(x.chunks_exact(k)).collect();
        rows.into_par_iter().for_each(|(row, x)| isa.run(Fill(row, x)));
    }
}

/// Normalises the rows of `operand.float` before they are used.
fn normed(isa: Isa, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = x.to_vec();
    out.par_chunks_exact_mut(weight.len()).for_each(|row| isa.run(Norm::<256>(row, weight, eps)));
    out
}

/// `out[t] = w x[t]` for every pair of matrix and output; all row chunks of all matrices share the threads.
fn project(isa: Isa, x: &Operand, picks: &[u32], pairs: &mut [(Matrix<'_>, &mut [f32])]) {
    let outs: Vec<_> = pairs.iter_mut().map(|(w, out)| (*w, Columns::new(out, w.rows))).collect();
    let tasks: Vec<_> =
        outs.iter().flat_map(|(w, out)| chunks(w.rows).map(move |rows| (w, out, rows))).collect();
    tasks.into_par_iter().for_each_init(Vec::new, |tile, (w, out, rows)| {
        let n = rows.len();
        tile.resize(picks.len() * n, 0.0);
        product(isa, *w, rows.clone(), x, picks, tile);
        for (t, values) in tile.chunks_exact(n).enumerate() {
            // SAFETY: tasks of one matrix have disjoint ranges of rows, which are its output's columns.
            unsafe { out.put(t, rows.start, values) };
        }
    });
}

fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(CHUNK).map(move |start| start..(start + CHUNK).min(rows))
}

fn add(x: &mut [f32], delta: &[f32]) {
    x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
}

/// The (row, rank) pairs that chose each expert, experts ascending: `pair = t * K + rank`.
fn by_expert(moe: &Moe, experts: &[u32]) -> Vec<(usize, Vec<u32>)> {
    let mut groups = vec![Vec::new(); moe.experts];
    for (pair, &e) in experts.iter().enumerate() {
        groups[e as usize].push(pair as u32);
    }
    groups.into_iter().enumerate().filter(|(_, pairs)| !pairs.is_empty()).collect()
}

impl Cpu {
    /// Sizes the named buffers for the current step.
    pub(crate) fn size_buffers(&mut self) {
        let config = &self.model.config;
        let (t, r) = (self.step.rows.len(), self.step.logits.len());
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let b = &mut self.buffers;
        b.x.resize(t * config.hidden, 0.0);
        b.q.resize(t * q, 0.0);
        b.k.resize(t * kv, 0.0);
        b.v.resize(t * kv, 0.0);
        b.attn.resize(t * q, 0.0);
        b.logits.resize(r * config.vocab, 0.0);
        if let Ffn::Moe(moe) = config.ffn {
            b.normed.resize(t * config.hidden, 0.0);
            b.router_logits.resize(t * moe.experts, 0.0);
            b.experts.resize(t * moe.used, 0);
            b.expert_weights.resize(t * moe.used, 0.0);
            b.hidden.resize(t * moe.used * moe.width, 0.0);
        }
        b.cached_layer = None;
        b.inside = b.inside.is_some().then(crate::Inside::default);
        self.scratch.all = (0..t as u32).collect();
    }

    pub(crate) fn embed(&mut self) {
        let (table, d) = (Matrix::new(&self.model.weights.token_embd), self.model.config.hidden);
        let rows = self.buffers.x.chunks_exact_mut(d);
        for (row, x) in self.step.rows.iter().zip(rows) {
            quant::dequantise_row(table.dtype, table.row(row.token as usize), x);
        }
    }

    pub(crate) fn qkv(&mut self, layer: usize) {
        let Cpu { model, isa, pool, buffers: b, scratch, norms, activations, .. } = self;
        let (w, Config { hidden, rms_eps, .. }) = (&model.weights.layers[layer], model.config);
        pool.install(|| {
            let x = normed(*isa, &b.x, &norms.layers[layer].attn, rms_eps);
            let weights = [&w.attn_q, &w.attn_k, &w.attn_v];
            prepare(*isa, &mut scratch.operand, &x, hidden, &weights, *activations);
            let [q, k, v] = weights.map(Matrix::new);
            let mut pairs = [(q, &mut b.q[..]), (k, &mut b.k), (v, &mut b.v)];
            project(*isa, &scratch.operand, &scratch.all, &mut pairs);
        });
    }

    pub(crate) fn rope_store(&mut self, layer: usize) {
        let Cpu { model, isa, pool, buffers: b, norms, rope, step, cache, .. } = self;
        let Config { heads, kv_heads, head_dim, rms_eps: eps, .. } = model.config;
        let norms = &norms.layers[layer];
        let keys = &mut b.k.clone();
        pool.install(|| {
            let q = b.q.par_chunks_exact_mut(heads * head_dim);
            let k = keys.par_chunks_exact_mut(kv_heads * head_dim);
            (q, k, &step.rows).into_par_iter().for_each(|(q, k, row)| {
                let table = rope.at(row.position as usize);
                isa.run(Heads { heads: q, weight: &norms.q, eps, table });
                isa.run(Heads { heads: k, weight: &norms.k, eps, table });
            });
        });
        let rows = keys.chunks_exact(head_dim).zip(b.v.chunks_exact(head_dim));
        for (i, (key, value)) in rows.enumerate() {
            cache.store(slot(step, layer, i / kv_heads, i % kv_heads), key, value);
        }
        b.cached_layer = Some(layer);
    }

    /// The step's rows of the cache as stored by the last `rope_store`, `[T, KH, HD]` of keys and of values.
    pub(crate) fn cached_rows(&self, buffer: Buffer) -> Result<(Vec<f32>, Vec<f32>), Fault> {
        let Some(layer) = self.buffers.cached_layer else {
            return Err(Fault::Buffer { buffer, why: "nothing has been stored in this step".into() });
        };
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for t in 0..self.step.rows.len() {
            for head in 0..self.model.config.kv_heads {
                let (k, v) = self.cache.load(slot(&self.step, layer, t, head));
                keys.extend(k);
                values.extend(v);
            }
        }
        Ok((keys, values))
    }

    pub(crate) fn attend(&mut self, layer: usize) {
        let Cpu { model, isa, pool, buffers: b, step, cache, .. } = self;
        let Config { heads, kv_heads, head_dim, .. } = model.config;
        let group = heads / kv_heads;
        // A unit is a row and a key/value head; its spans are summed in order whichever threads computed them.
        let unit = |u: usize, out: &mut [f32]| {
            let (t, head) = (u / kv_heads, u % kv_heads);
            let row = step.rows[t];
            let table = &step.tables[row.sequence as usize];
            let q = &b.q[u * group * head_dim..][..group * head_dim];
            let queries: Vec<_> = q.chunks_exact(head_dim).map(|q| isa.run(RoundQuery(q))).collect();
            let end = row.position as usize + 1;
            let tile =
                |p: usize| cache.tile(Slot { layer, block: table[p / BLOCK] as usize, head, index: 0 });
            // `[spans, group]`
            let mut spans = vec![Partial::EMPTY; end.div_ceil(SPAN) * group];
            let span = |(i, out): (usize, &mut [Partial])| {
                let keys = i * SPAN..((i + 1) * SPAN).min(end);
                isa.run(Span { queries: &queries, head_dim, keys, tile, out });
            };
            if step.rows.len() == 1 {
                spans.par_chunks_exact_mut(group).enumerate().for_each(span);
            } else {
                spans.chunks_exact_mut(group).enumerate().for_each(span);
            }
            for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
                isa.run(Finish { spans: spans.iter().skip(g).step_by(group), out });
            }
        };
        let attn = &mut b.attn;
        pool.install(|| {
            attn.par_chunks_exact_mut(group * head_dim).enumerate().for_each(|(u, out)| unit(u, out));
        });
    }

    pub(crate) fn attn_out(&mut self, layer: usize) {
        let w = self.model.weights.layers[layer].attn_output.clone();
        let k = self.model.config.heads * self.model.config.head_dim;
        let attn = std::mem::take(&mut self.buffers.attn);
        self.add_projection(&attn, k, &w);
        self.buffers.attn = attn;
    }

    /// `x[t] += w input[t]`.
    fn add_projection(&mut self, input: &[f32], k: usize, w: &Tensor) {
        let Cpu { isa, pool, buffers: b, scratch, activations, .. } = self;
        pool.install(|| {
            prepare(*isa, &mut scratch.operand, input, k, &[w], *activations);
            scratch.delta.resize(b.x.len(), 0.0);
            project(*isa, &scratch.operand, &scratch.all, &mut [(Matrix::new(w), &mut scratch.delta)]);
            add(&mut b.x, &scratch.delta);
        });
    }

    fn moe(&self, layer: usize) -> (Moe, [Tensor; 4]) {
        let (Ffn::Moe(moe), FfnWeights::Moe { gate_inp, gate, up, down }) =
            (self.model.config.ffn, &self.model.weights.layers[layer].ffn)
        else {
            unreachable!("`run` refuses the stages of a mixture of experts for a dense model")
        };
        (moe, [gate_inp, gate, up, down].map(Tensor::clone))
    }

    pub(crate) fn route(&mut self, layer: usize) {
        let (moe, [router, ..]) = self.moe(layer);
        let Cpu { model, isa, pool, buffers: b, scratch, norms, activations, .. } = self;
        let Config { hidden, rms_eps, .. } = model.config;
        pool.install(|| {
            b.normed = normed(*isa, &b.x, &norms.layers[layer].ffn, rms_eps);
            prepare(*isa, &mut scratch.operand, &b.normed, hidden, &[&router], *activations);
            project(
                *isa,
                &scratch.operand,
                &scratch.all,
                &mut [(Matrix::new(&router), &mut b.router_logits)],
            );
            let ids = b.experts.par_chunks_exact_mut(moe.used);
            let weights = b.expert_weights.par_chunks_exact_mut(moe.used);
            let logits = b.router_logits.par_chunks_exact(moe.experts);
            (ids, weights, logits).into_par_iter().for_each(|(ids, weights, logits)| {
                let mut probabilities = logits.to_vec();
                isa.run(Softmax(&mut probabilities));
                ops::choose(&probabilities, moe.renormalise, moe.scale, ids, weights);
            });
        });
    }

    pub(crate) fn experts_up(&mut self, layer: usize) {
        let (moe, [_, gate, up, _]) = self.moe(layer);
        let Cpu { model, isa, pool, buffers: b, scratch, activations, .. } = self;
        let (used, isa) = (moe.used, *isa);
        pool.install(|| {
            prepare(isa, &mut scratch.operand, &b.normed, model.config.hidden, &[&gate, &up], *activations);
            let x = &scratch.operand;
            let pairs = b.experts.len() * moe.width;
            let hidden = Columns::new(&mut b.hidden, moe.width);
            let kept = b.inside.as_mut().map(|inside| {
                [&mut inside.gate, &mut inside.up].map(|kept| {
                    kept.resize(pairs, 0.0);
                    Columns::new(kept, moe.width)
                })
            });
            let groups = by_expert(&moe, &b.experts);
            let tasks: Vec<_> =
                groups.iter().flat_map(|g| chunks(moe.width).map(move |rows| (g, rows))).collect();
            tasks.into_par_iter().for_each_init(Vec::new, |tile: &mut Vec<f32>, ((e, pairs), rows)| {
                let picks: Vec<u32> = pairs.iter().map(|&p| p / used as u32).collect();
                let n = rows.len();
                tile.resize(2 * picks.len() * n + n, 0.0);
                let (tile, out) = tile.split_at_mut(2 * picks.len() * n);
                let (g, u) = tile.split_at_mut(picks.len() * n);
                product(isa, Matrix::expert(&gate, *e), rows.clone(), x, &picks, g);
                product(isa, Matrix::expert(&up, *e), rows.clone(), x, &picks, u);
                for ((g, u), &pair) in g.chunks_exact(n).zip(u.chunks_exact(n)).zip(pairs) {
                    isa.run(SwiGlu(g, u, out));
                    // SAFETY: a pair belongs to one expert, and tasks of one expert have disjoint ranges of rows.
                    unsafe { hidden.put(pair as usize, rows.start, out) };
                    for (kept, values) in kept.iter().flatten().zip([g, u]) {
                        // SAFETY: likewise.
                        unsafe { kept.put(pair as usize, rows.start, values) };
                    }
                }
            });
        });
    }

    pub(crate) fn experts_down(&mut self, layer: usize) {
        let (moe, [.., down]) = self.moe(layer);
        let Cpu { model, isa, pool, buffers: b, scratch, activations, .. } = self;
        let (d, isa) = (model.config.hidden, *isa);
        pool.install(|| {
            prepare(isa, &mut scratch.operand, &b.hidden, moe.width, &[&down], *activations);
            let x = &scratch.operand;
            scratch.delta.resize(b.experts.len() * d, 0.0);
            let outputs = Columns::new(&mut scratch.delta, d);
            let groups = by_expert(&moe, &b.experts);
            let tasks: Vec<_> = groups.iter().flat_map(|g| chunks(d).map(move |rows| (g, rows))).collect();
            tasks.into_par_iter().for_each_init(Vec::new, |tile: &mut Vec<f32>, ((e, pairs), rows)| {
                let n = rows.len();
                tile.resize(pairs.len() * n, 0.0);
                product(isa, Matrix::expert(&down, *e), rows.clone(), x, pairs, tile);
                for (values, &pair) in tile.chunks_exact(n).zip(pairs) {
                    // SAFETY: a pair belongs to one expert, and tasks of one expert have disjoint ranges of rows.
                    unsafe { outputs.put(pair as usize, rows.start, values) };
                }
            });
            let x = b.x.par_chunks_exact_mut(d);
            let outputs = scratch.delta.par_chunks_exact(moe.used * d);
            let weights = b.expert_weights.par_chunks_exact(moe.used);
            (x, outputs, weights).into_par_iter().for_each(|(x, outputs, weights)| {
                isa.run(Combine { x, outputs, weights });
            });
            if let Some(inside) = &mut b.inside {
                inside.down.clone_from(&scratch.delta);
            }
        });
    }

    pub(crate) fn ffn(&mut self, layer: usize) {
        let model = self.model.clone();
        let FfnWeights::Dense { gate, up, down } = &model.weights.layers[layer].ffn else {
            unreachable!("`run` refuses `ffn` for a mixture of experts")
        };
        let width = gate.rows();
        let mut hidden = std::mem::take(&mut self.scratch.hidden);
        hidden.resize(self.step.rows.len() * width, 0.0);
        let Cpu { isa, pool, buffers: b, scratch, norms, activations, .. } = self;
        let isa = *isa;
        pool.install(|| {
            let x = normed(isa, &b.x, &norms.layers[layer].ffn, model.config.rms_eps);
            prepare(isa, &mut scratch.operand, &x, model.config.hidden, &[gate, up], *activations);
            let mut ups = vec![0.0; hidden.len()];
            let mut gates = vec![0.0; hidden.len()];
            let mut pairs = [(Matrix::new(gate), &mut gates[..]), (Matrix::new(up), &mut ups[..])];
            project(isa, &scratch.operand, &scratch.all, &mut pairs);
            (hidden.par_chunks_exact_mut(width), gates.par_chunks_exact(width), ups.par_chunks_exact(width))
                .into_par_iter()
                .for_each(|(out, g, u)| isa.run(SwiGlu(g, u, out)));
            if let Some(inside) = &mut b.inside {
                (inside.gate, inside.up) = (gates, ups);
                inside.hidden.clone_from(&hidden);
            }
        });
        self.add_projection(&hidden, width, down);
        if let Some(inside) = &mut self.buffers.inside {
            inside.down.clone_from(&self.scratch.delta);
        }
        self.scratch.hidden = hidden;
    }

    pub(crate) fn head(&mut self) {
        let Cpu { model, isa, pool, buffers: b, scratch, norms, activations, step, .. } = self;
        let (w, Config { hidden, rms_eps, .. }) = (&model.weights.output, model.config);
        let wanted: Vec<f32> =
            step.logits.iter().flat_map(|&t| &b.x[t as usize * hidden..][..hidden]).copied().collect();
        pool.install(|| {
            let x = normed(*isa, &wanted, &norms.output, rms_eps);
            prepare(*isa, &mut scratch.operand, &x, hidden, &[w], *activations);
            project(
                *isa,
                &scratch.operand,
                &scratch.all[..step.logits.len()],
                &mut [(Matrix::new(w), &mut b.logits[..])],
            );
        });
    }
}

/// Adds the weighted outputs of a row's experts, in rank order, to the residual stream.
struct Combine<'a> {
    /// `[D]`.
    x: &'a mut [f32],
    /// `[K, D]`.
    outputs: &'a [f32],
    /// `[K]`.
    weights: &'a [f32],
}

impl Task for Combine<'_> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        let d = self.x.len();
        for (i, x) in self.x.iter_mut().enumerate() {
            let mut sum = 0f32;
            for (rank, weight) in self.weights.iter().enumerate() {
                sum = weight.mul_add(self.outputs[rank * d + i], sum);
            }
            *x += sum;
        }
    }
}

fn slot(step: &model::Step, layer: usize, t: usize, head: usize) -> Slot {
    let row = step.rows[t];
    let position = row.position as usize;
    let block = step.tables[row.sequence as usize][position / BLOCK] as usize;
    Slot { layer, block, head, index: position % BLOCK }
}
