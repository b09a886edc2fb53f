//! The stages of a mixture of experts: `route`, `experts_up`, `experts_down`.

use gguf::Tensor;
use model::{Config, Ffn, FfnWeights, Moe};
use rayon::prelude::*;

use super::project::{Columns, chunks, prepare, project};
use super::{SwiGlu, normed};
use crate::isa::Task;
use crate::kernels::Kernels;
use crate::matmul::{Matrix, product};
use crate::{Cpu, ops};

struct Softmax<'a>(&'a mut [f32]);
impl Task for Softmax<'_> {
    type Out = ();
    #[inline(always)]
    fn run<K: Kernels>(self) {
        ops::softmax(self.0);
    }
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
