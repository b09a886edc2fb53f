//! The bytes that generating one token must read: what memory bandwidth bounds. Counted from the model's tensors,
//! never measured.

use gguf::Tensor;
use model::{Ffn, FfnWeights, LayerWeights, Model};

/// Bytes of memory that a token at batch 1 reads at least once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Traffic {
    /// Of weights: everything dense, the chosen experts of each layer, one row of the embedding, the whole head.
    pub(super) weights: u64,
    /// Of the key/value cache, for each position before the token and its own.
    pub(super) position: u64,
}

impl Traffic {
    /// Counts the tensors of `model`.
    pub(super) fn of(model: &Model) -> Traffic {
        let weights = &model.weights;
        let layers: u64 = weights.layers.iter().map(|layer| layer_bytes(layer, &model.config.ffn)).sum();
        // A tied head is the embedding once more: all of it, besides the row that is looked up.
        let ends = bytes(&weights.output_norm) + bytes(&weights.output);
        let row = weights.token_embd.row_bytes() as u64; // `usize` is at most 64 bits wide
        let position = model.config.kv_bytes_per_position() as u64; // as above
        Traffic { weights: layers + ends + row, position }
    }

    /// Bytes a token, over the mean of `tokens` generated one after the other from `depth` on.
    pub(super) fn per_token(&self, depth: usize, tokens: usize) -> f64 {
        // The i-th token, from 0, sees `depth + i + 1` positions.
        let positions = depth as f64 + (tokens as f64 + 1.0) / 2.0;
        self.weights as f64 + positions * self.position as f64
    }
}

fn layer_bytes(layer: &LayerWeights, ffn: &Ffn) -> u64 {
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
    let experts = match (&layer.ffn, ffn) {
        (FfnWeights::Dense { gate, up, down }, _) => bytes(gate) + bytes(up) + bytes(down),
        (FfnWeights::Moe { gate_inp, gate, up, down }, Ffn::Moe(moe)) => {
            // The experts of a tensor are equal in size: the division leaves no rest.
            let chosen = |tensor: &Tensor| bytes(tensor) / moe.experts as u64 * moe.used as u64;
            bytes(gate_inp) + chosen(gate) + chosen(up) + chosen(down)
        }
        (FfnWeights::Moe { .. }, Ffn::Dense { .. }) => {
            unreachable!("a model's layers are what its configuration says")
        }
    };
    attention.into_iter().map(bytes).sum::<u64>() + experts
}

fn bytes(tensor: &Tensor) -> u64 {
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
        assert_eq!(traffic, Traffic { weights: 4 * want_weights, position: want_position });
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

    #[test]
    fn positions_are_averaged() {
        let traffic = Traffic { weights: 1000, position: 10 };
        let check = |depth, tokens, want: f64| assert_eq!(traffic.per_token(depth, tokens), want);
        check(0, 1, 1010.0);
        check(0, 3, 1020.0);
        check(100, 1, 2010.0);
    }
}
