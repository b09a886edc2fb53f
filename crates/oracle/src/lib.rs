//! The oracle: the network in f64, with weights dequantised and nothing rounded in between.
//!
//! Answers one question: is the engine's arithmetic good enough? So it is plain text without a trick, a thread or a
//! vector, and shares nothing with the other backends but the configuration, `dequantise_row` and the order of the
//! stages. Slow.

use std::collections::BTreeMap;
use std::sync::Arc;

use gguf::Tensor;
use model::rope::Rope;
use model::{
    BLOCK, Backend, Buffer, Config, Fault, Ffn, FfnWeights, LayerWeights, Model, Moe, Site, Stage, Step,
};

/// A model in f64.
pub struct Oracle {
    model: Arc<Model>,
    max_rows: usize,
    kv_blocks: usize,
    step: Step,
    buffers: BTreeMap<Buffer, Vec<f64>>,
    /// `(layer, KV block, slot)` to the key and value rows of all heads, `[KH, HD]` each.
    cache: BTreeMap<(usize, u32, usize), [Vec<f64>; 2]>,
    logits: Vec<f32>,
}

impl Oracle {
    /// Takes up a model; steps may have up to `max_rows` rows and use `kv_blocks` KV blocks.
    pub fn new(model: Arc<Model>, max_rows: usize, kv_blocks: usize) -> Oracle {
        Oracle {
            model,
            max_rows,
            kv_blocks,
            step: Step::default(),
            buffers: BTreeMap::new(),
            cache: BTreeMap::new(),
            logits: Vec::new(),
        }
    }

    fn buffer(&self, buffer: Buffer) -> &[f64] {
        self.buffers.get(&buffer).map_or(&[], Vec::as_slice)
    }

    fn set(&mut self, buffer: Buffer, values: Vec<f64>) {
        self.buffers.insert(buffer, values);
    }

    fn add_to_x(&mut self, delta: &[f64]) {
        let x = self.buffers.entry(Buffer::X).or_default();
        x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
    }

    fn config(&self) -> &Config {
        &self.model.config
    }

    fn layer(&self, layer: usize) -> LayerWeights {
        self.model.weights.layers[layer].clone()
    }

    fn moe(&self, layer: usize) -> (Moe, [Tensor; 4]) {
        match (self.config().ffn, self.layer(layer).ffn) {
            (Ffn::Moe(moe), FfnWeights::Moe { gate_inp, gate, up, down }) => {
                (moe, [gate_inp, gate, up, down])
            }
            _ => unreachable!("`run` refuses the stages of a mixture of experts for a dense model"),
        }
    }
}

/// Row `n` of a tensor whose leading dimensions are flattened.
fn row(w: &Tensor, n: usize) -> Vec<f64> {
    let mut out = vec![0f32; w.row_len()];
    let size = w.row_bytes();
    quant::dequantise_row(w.dtype, &w.data[n * size..][..size], &mut out);
    out.into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `[T, K]` times rows `first..first + n` of `w`, giving `[T, n]`.
fn product(w: &Tensor, first: usize, n: usize, x: &[f64]) -> Vec<f64> {
    let t = x.len() / w.row_len();
    let mut out = vec![0.0; t * n];
    for i in 0..n {
        let weights = row(w, first + i);
        for (t, x) in x.chunks_exact(w.row_len()).enumerate() {
            out[t * n + i] = dot(&weights, x);
        }
    }
    out
}

/// Normalises rows of the weight's length.
fn rms_norm(x: &[f64], weight: &Tensor, eps: f32) -> Vec<f64> {
    let weight = row(weight, 0);
    let scale = |x: &[f64]| 1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
    x.chunks_exact(weight.len())
        .flat_map(|x| x.iter().zip(&weight).map(move |(v, w)| v * scale(x) * w))
        .collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| silu(*g) * u).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|v| (v - max).exp()).collect();
    let total: f64 = e.iter().sum();
    e.into_iter().map(|v| v / total).collect()
}

/// Rotates heads of `head_dim`, half-split.
fn rotate(x: &mut [f64], head_dim: usize, rope: &Rope, position: u32) {
    let (frequencies, magnitude) = (rope.frequencies(head_dim), rope.magnitude());
    for head in x.chunks_exact_mut(head_dim) {
        let (a, b) = head.split_at_mut(head_dim / 2);
        for ((a, b), f) in a.iter_mut().zip(b).zip(&frequencies) {
            let (sin, cos) = (f64::from(position) * f).sin_cos();
            (*a, *b) = ((*a * cos - *b * sin) * magnitude, (*b * cos + *a * sin) * magnitude);
        }
    }
}

impl Oracle {
    fn embed(&mut self) {
        let table = &self.model.weights.token_embd;
        let x = self.step.rows.iter().flat_map(|r| row(table, r.token as usize)).collect();
        self.set(Buffer::X, x);
    }

    fn qkv(&mut self, layer: usize) {
        let w = self.layer(layer);
        let x = rms_norm(self.buffer(Buffer::X), &w.attn_norm, self.config().rms_eps);
        for (buffer, w) in [(Buffer::Q, &w.attn_q), (Buffer::K, &w.attn_k), (Buffer::V, &w.attn_v)] {
            self.set(buffer, product(w, 0, w.rows(), &x));
        }
    }

    fn rope_store(&mut self, layer: usize) {
        let (w, config) = (self.layer(layer), *self.config());
        let mut q = rms_norm(self.buffer(Buffer::Q), &w.attn_q_norm, config.rms_eps);
        let mut k = rms_norm(self.buffer(Buffer::K), &w.attn_k_norm, config.rms_eps);
        let v = self.buffer(Buffer::V).to_vec();
        let (q_row, kv_row) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        for (t, r) in self.step.rows.iter().enumerate() {
            rotate(&mut q[t * q_row..][..q_row], config.head_dim, &config.rope, r.position);
            let key = &mut k[t * kv_row..][..kv_row];
            rotate(key, config.head_dim, &config.rope, r.position);
            let block = self.step.tables[r.sequence as usize][r.position as usize / BLOCK];
            let rows = [key.to_vec(), v[t * kv_row..][..kv_row].to_vec()];
            self.cache.insert((layer, block, r.position as usize % BLOCK), rows);
        }
        self.set(Buffer::Q, q);
        self.set(Buffer::CacheK, k);
        self.set(Buffer::CacheV, v);
    }

    fn attend(&mut self, layer: usize) {
        let Config { heads, kv_heads, head_dim: hd, .. } = *self.config();
        let mut out = Vec::new();
        for (t, r) in self.step.rows.iter().enumerate() {
            let table = &self.step.tables[r.sequence as usize];
            let at = |p: usize| &self.cache[&(layer, table[p / BLOCK], p % BLOCK)];
            for h in 0..heads {
                let q = &self.buffer(Buffer::Q)[(t * heads + h) * hd..][..hd];
                let kv = h / (heads / kv_heads) * hd;
                let keys = 0..=r.position as usize;
                let scores: Vec<_> =
                    keys.map(|p| dot(q, &at(p)[0][kv..][..hd]) / (hd as f64).sqrt()).collect();
                let mut head = vec![0.0; hd];
                for (p, weight) in softmax(&scores).into_iter().enumerate() {
                    head.iter_mut().zip(&at(p)[1][kv..]).for_each(|(o, v)| *o += weight * v);
                }
                out.extend(head);
            }
        }
        self.set(Buffer::Attn, out);
    }

    fn attn_out(&mut self, layer: usize) {
        let w = self.layer(layer).attn_output;
        let delta = product(&w, 0, w.rows(), self.buffer(Buffer::Attn));
        self.add_to_x(&delta);
    }

    fn route(&mut self, layer: usize) {
        let (moe, [router, ..]) = self.moe(layer);
        let x = rms_norm(self.buffer(Buffer::X), &self.layer(layer).ffn_norm, self.config().rms_eps);
        let logits = product(&router, 0, moe.experts, &x);
        let (mut experts, mut weights) = (Vec::new(), Vec::new());
        for logits in logits.chunks_exact(moe.experts) {
            let p = softmax(logits);
            let mut order: Vec<usize> = (0..moe.experts).collect();
            // A stable sort keeps the lower index first among equals.
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
            order.truncate(moe.used);
            let total: f64 = if moe.renormalise { order.iter().map(|&e| p[e]).sum() } else { 1.0 };
            experts.extend(order.iter().map(|&e| e as f64));
            weights.extend(order.iter().map(|&e| p[e] / total * f64::from(moe.scale)));
        }
        self.set(Buffer::Normed, x);
        self.set(Buffer::RouterLogits, logits);
        self.set(Buffer::Experts, experts);
        self.set(Buffer::ExpertWeights, weights);
    }

    fn experts_up(&mut self, layer: usize) {
        let (moe, [_, gate, up, _]) = self.moe(layer);
        let d = self.config().hidden;
        let (mut gates, mut ups, mut hidden) = (Vec::new(), Vec::new(), Vec::new());
        for (pair, &e) in self.buffer(Buffer::Experts).iter().enumerate() {
            let x = &self.buffer(Buffer::Normed)[pair / moe.used * d..][..d];
            let first = e as usize * moe.width;
            let (g, u) = (product(&gate, first, moe.width, x), product(&up, first, moe.width, x));
            hidden.extend(swiglu(&g, &u));
            gates.extend(g);
            ups.extend(u);
        }
        self.set(Buffer::Gate, gates);
        self.set(Buffer::Up, ups);
        self.set(Buffer::Hidden, hidden);
    }

    fn experts_down(&mut self, layer: usize) {
        let (moe, [.., down]) = self.moe(layer);
        let d = self.config().hidden;
        let (mut delta, mut down_rows) = (vec![0.0; self.buffer(Buffer::X).len()], Vec::new());
        let chosen = self.buffer(Buffer::Experts).iter().zip(self.buffer(Buffer::ExpertWeights));
        for (pair, (&e, weight)) in chosen.enumerate() {
            let hidden = &self.buffer(Buffer::Hidden)[pair * moe.width..][..moe.width];
            let y = product(&down, e as usize * d, d, hidden);
            delta[pair / moe.used * d..][..d].iter_mut().zip(&y).for_each(|(o, y)| *o += weight * y);
            down_rows.extend(y);
        }
        self.set(Buffer::Down, down_rows);
        self.add_to_x(&delta);
    }

    fn ffn(&mut self, layer: usize) {
        let w = self.layer(layer);
        let FfnWeights::Dense { gate, up, down } = &w.ffn else {
            unreachable!("`run` refuses `ffn` for a mixture of experts")
        };
        let x = rms_norm(self.buffer(Buffer::X), &w.ffn_norm, self.config().rms_eps);
        let (g, u) = (product(gate, 0, gate.rows(), &x), product(up, 0, up.rows(), &x));
        let hidden = swiglu(&g, &u);
        let delta = product(down, 0, down.rows(), &hidden);
        self.add_to_x(&delta);
        for (buffer, values) in
            [(Buffer::Gate, g), (Buffer::Up, u), (Buffer::Hidden, hidden), (Buffer::Down, delta)]
        {
            self.set(buffer, values);
        }
    }

    fn head(&mut self) {
        let (d, w) = (self.config().hidden, &self.model.weights);
        let x = self.buffer(Buffer::X);
        let wanted: Vec<f64> =
            self.step.logits.iter().flat_map(|&t| &x[t as usize * d..][..d]).copied().collect();
        let x = rms_norm(&wanted, &w.output_norm, self.config().rms_eps);
        let logits = product(&w.output, 0, w.output.rows(), &x);
        self.logits = logits.iter().map(|&v| v as f32).collect();
        self.set(Buffer::Logits, logits);
    }
}

impl Backend for Oracle {
    fn model(&self) -> &Model {
        &self.model
    }

    fn max_rows(&self) -> usize {
        self.max_rows
    }

    fn context(&self) -> usize {
        self.kv_blocks * BLOCK
    }

    fn kv_blocks(&self) -> usize {
        self.kv_blocks
    }

    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        step.check(self.config())?;
        let rows = step.rows.len();
        if rows > self.max_rows {
            return Err(Fault::Capacity { what: "a step", got: rows, limit: self.max_rows });
        }
        self.step = step.clone();
        self.buffers.clear();
        Ok(())
    }

    fn run(&mut self, site: Site) -> Result<(), Fault> {
        let dense = matches!(self.config().ffn, Ffn::Dense { .. });
        match (site.stage, site.layer) {
            (Stage::Embed, None) => self.embed(),
            (Stage::Head, None) => self.head(),
            (_, Some(layer)) if layer >= self.config().layers => return Err(Fault::NoSuchStage { site }),
            (Stage::Qkv, Some(layer)) => self.qkv(layer),
            (Stage::RopeStore, Some(layer)) => self.rope_store(layer),
            (Stage::Attend, Some(layer)) => self.attend(layer),
            (Stage::AttnOut, Some(layer)) => self.attn_out(layer),
            (Stage::FeedForward, Some(layer)) if dense => self.ffn(layer),
            (Stage::Route, Some(layer)) if !dense => self.route(layer),
            (Stage::ExpertsUp, Some(layer)) if !dense => self.experts_up(layer),
            (Stage::ExpertsDown, Some(layer)) if !dense => self.experts_down(layer),
            _ => return Err(Fault::NoSuchStage { site }),
        }
        Ok(())
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        match self.buffers.get(&buffer) {
            Some(values) => Ok(values.iter().map(|&v| v as f32).collect()),
            None => Err(Fault::Buffer { buffer, why: "no stage of this step has written it".into() }),
        }
    }

    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
        if matches!(buffer, Buffer::CacheK | Buffer::CacheV) {
            return Err(Fault::Buffer { buffer, why: "the cache is written by rope_store alone".into() });
        }
        self.set(buffer, values.iter().map(|&v| f64::from(v)).collect());
        Ok(())
    }

    fn logits(&mut self) -> Result<&[f32], Fault> {
        Ok(&self.logits)
    }

    /// It keeps the inside of its stages in any case.
    fn observe(&mut self, _on: bool) -> bool {
        true
    }
}
