//! The bytes that generating one token must read: what memory bandwidth bounds. Counted from the model's tensors,
//! never measured.

use gguf::Tensor;
use model::{Ffn, FfnWeights, LayerWeights, Model};

/// Bytes of memory that a step of generation reads at least once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Traffic {
    /// Of weights, whatever the batch: everything dense and the whole head.
    dense: u64,
    /// Of the embedding, for each token: a row.
    row: u64,
    /// Of an expert, over all layers.
    expert: u64,
    /// Experts, and how many of them a token uses; 0 in a dense model.
    experts: [u64; 2],
    /// Of the key/value cache, for each position before a token and its own.
    pub(super) position: u64,
}

impl Traffic {
    /// Counts the tensors of `model`.
    pub(super) fn of(model: &Model) -> Traffic {
        let weights = &model.weights;
        let experts = match model.config.ffn {
            Ffn::Moe(moe) => [moe.experts as u64, moe.used as u64], // `usize` is at most 64 bits wide
            Ffn::Dense { .. } => [0, 0],
        };
        // A tied head is the embedding once more: all of it, besides the row that is looked up.
        let ends = bytes(&weights.output_norm) + bytes(&weights.output);
        let row = weights.token_embd.row_bytes() as u64; // as above
        let position = model.config.kv_bytes_per_position() as u64; // as above
        let dense = weights.layers.iter().map(dense_bytes).sum::<u64>() + ends;
        let expert = weights.layers.iter().map(|layer| expert_bytes(layer, experts[0])).sum();
        Traffic { dense, row, expert, experts, position }
    }

    /// Of weights, a step of `streams` tokens: of the experts, as many as that many tokens meet on average if each
    /// chooses its own evenly, which is exact for a single one.
    pub(super) fn weights(&self, streams: usize) -> f64 {
        self.dense as f64 + streams as f64 * self.row as f64 + self.experts_met(streams) * self.expert as f64
    }

    /// Experts that a step of `tokens` meets, on average.
    pub(super) fn experts_met(&self, tokens: usize) -> f64 {
        let [experts, used] = self.experts.map(|n| n as f64);
        let missed = |part: f64| (1.0 - part).powf(tokens as f64);
        if tokens == 1 || experts == 0.0 { used } else { experts * (1.0 - missed(used / experts)) }
    }

    /// Experts of a layer; 0 in a dense model.
    pub(super) fn experts(&self) -> f64 {
        self.experts[0] as f64
    }

    /// Bytes a token, over the mean of `tokens` generated one after the other from `depth` on by each of `streams`.
    pub(super) fn per_token(&self, depth: usize, tokens: usize, streams: usize) -> f64 {
        // The i-th token, from 0, sees `depth + i + 1` positions.
        let positions = depth as f64 + (tokens as f64 + 1.0) / 2.0;
        self.weights(streams) / streams as f64 + positions * self.position as f64
    }
}

/// Of a layer, whatever the batch.
fn dense_bytes(layer: &LayerWeights) -> u64 {
    let attention = [
        &layer.attn_norm,
        &layer.attn_q,
        &layer.attn_k,
        &layer.attn_v,
        &layer.attn_q_norm,
        &layer.attn_k_norm,
        &layer.attn_output,
        &layer.ffn_norm,
    ];
    let ffn = match &layer.ffn {
        FfnWeights::Dense { gate, up, down } => bytes(gate) + bytes(up) + bytes(down),
        FfnWeights::Moe { gate_inp, .. } => bytes(gate_inp),
    };
    attention.into_iter().map(bytes).sum::<u64>() + ffn
}

/// Of one of a layer's `experts`, which are equal in size: the division leaves no rest.
fn expert_bytes(layer: &LayerWeights, experts: u64) -> u64 {
    match &layer.ffn {
        FfnWeights::Dense { .. } => 0,
        FfnWeights::Moe { gate, up, down, .. } => (bytes(gate) + bytes(up) + bytes(down)) / experts,
    }
}

/// Of a tensor's data.
pub(super) fn bytes(tensor: &Tensor) -> u64 {
    tensor.data.len() as u64 // `usize` is at most 64 bits wide
}

#[cfg(test)]
mod tests {
    use gguf::Dtype;
    use synth::Shape;

    use super::*;

    /// `want` counts the weights that a token meets, each of 4 bytes.
    fn check(shape: &str, want_weights: u64, want_position: u64) {
        let shape = Shape::named(shape).expect("a shape of the list");
        let traffic = Traffic::of(&synth::model(&shape, 1, |_| Dtype::F32));
        assert_eq!(traffic.weights(1), 4.0 * want_weights as f64);
        assert_eq!(traffic.position, want_position);
    }

    #[test]
    fn counted_by_hand() {
        // 6 layers of D 256, H 4, KH 2, HD 64: norms 2 * 256 + 2 * 64; Q and out 256 * 256 each, K and V 256 * 128.
        let attention = 2 * 256 + 2 * 64 + 2 * 256 * 256 + 2 * 256 * 128;
        // The output norm, a head of 1024 rows, a row of the embedding.
        let ends = 256 + 1024 * 256 + 256;
        // Keys and values: a position of a head is 2 * 64 bytes and a scale of 4.
        let position = 6 * 2 * 2 * (2 * 64 + 4);
        // A router of 8; 2 experts of three 256 * 256 matrices.
        check("tiny-moe", 6 * (attention + 8 * 256 + 2 * 3 * 256 * 256) + ends, position);
        check("tiny-dense", 6 * (attention + 3 * 256 * 512) + ends, position);
    }

    impl Traffic {
        /// Of a dense model.
        pub(in super::super) fn dense(dense: u64, position: u64) -> Traffic {
            Traffic { dense, row: 0, expert: 0, experts: [0, 0], position }
        }
    }

    const OF_MOE: Traffic = Traffic { dense: 900, row: 10, expert: 45, experts: [8, 2], position: 10 };

    #[test]
    fn positions_are_averaged() {
        let check = |depth, tokens, want: f64| assert_eq!(OF_MOE.per_token(depth, tokens, 1), want);
        check(0, 1, 1010.0);
        check(0, 3, 1020.0);
        check(100, 1, 2010.0);
    }

    #[test]
    fn a_batch_shares_weights() {
        let check = |traffic: Traffic, streams, want: f64| assert_eq!(traffic.weights(streams), want);
        check(OF_MOE, 1, 900.0 + 10.0 + 2.0 * 45.0);
        // Two tokens with 2 of 8 experts each: 8 * (1 - (3/4)^2) of them on average.
        check(OF_MOE, 2, 900.0 + 20.0 + 3.5 * 45.0);
        let dense = Traffic { expert: 0, experts: [0, 0], ..OF_MOE };
        check(dense, 2, 920.0);
        assert_eq!(dense.per_token(0, 1, 2), 460.0 + 10.0);
    }
}
