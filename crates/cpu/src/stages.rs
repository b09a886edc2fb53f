//! The stages, each a plain composition of the functions of the other files; what each reads and writes is declared
//! at [`model::Stage`]. Symbols as there.

use gguf::Tensor;
use model::{BLOCK, Buffer, Config, Fault, Ffn, FfnWeights, Weights};
use rayon::prelude::*;

use crate::attention::{Finish, Partial, RoundQuery, SPAN, Span};
use crate::cache::Slot;
use crate::isa::{Isa, Task};
use crate::kernels::Kernels;
use crate::matmul::{Matrix, Operand};
use crate::{Cpu, ops};
use project::{prepare, project};

mod experts;
mod project;

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

/// The rows of `x` (`[T, D]`) normalised with `weight` (`[D]`), rule 3.
fn normed(isa: Isa, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = x.to_vec();
    out.par_chunks_exact_mut(weight.len()).for_each(|row| isa.run(Norm::<256>(row, weight, eps)));
    out
}

fn add(x: &mut [f32], delta: &[f32]) {
    x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
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

fn slot(step: &model::Step, layer: usize, t: usize, head: usize) -> Slot {
    let row = step.rows[t];
    let position = row.position as usize;
    let block = step.tables[row.sequence as usize][position / BLOCK] as usize;
    Slot { layer, block, head, index: position % BLOCK }
}
