//! Which tensors a wrong buffer can be the fault of. Asks nobody.

use gguf::Tensor;
use model::{Buffer, FfnWeights, LayerWeights, Model, Site, Stage};

use crate::report::{Count, TensorPlace};

/// The tensors whose fault a wrong buffer can be, likeliest first. Without the inside, what is wrong within the experts
/// shows in what the stage hands on.
pub(crate) fn suspects(model: &Model, site: Site, buffer: Buffer, inside: bool) -> Vec<&Tensor> {
    let weights = &model.weights;
    let Some(layer) = site.layer else {
        return match site.stage {
            Stage::Embed => vec![&weights.token_embd],
            _ => vec![&weights.output],
        };
    };
    let w: &LayerWeights = &weights.layers[layer];
    let (router, gate, up, down) = match &w.ffn {
        FfnWeights::Dense { gate, up, down } => (None, gate, up, down),
        FfnWeights::Moe { gate_inp, gate, up, down } => (Some(gate_inp), gate, up, down),
    };
    match (site.stage, buffer) {
        (Stage::Qkv, Buffer::Q) => vec![&w.attn_q],
        (Stage::Qkv, Buffer::K) => vec![&w.attn_k],
        (Stage::Qkv, _) => vec![&w.attn_v],
        (Stage::RopeStore, Buffer::Q) => vec![&w.attn_q_norm],
        (Stage::RopeStore, Buffer::CacheK) => vec![&w.attn_k_norm],
        (Stage::AttnOut, _) => vec![&w.attn_output],
        (Stage::Route, Buffer::Normed) => vec![&w.ffn_norm],
        (Stage::Route, Buffer::RouterLogits) => router.into_iter().collect(),
        (_, Buffer::Gate) => vec![gate],
        (_, Buffer::Up) => vec![up],
        (_, Buffer::Down) => vec![down],
        (Stage::ExpertsUp, Buffer::Hidden) if !inside => vec![gate, up],
        (Stage::ExpertsDown, Buffer::X) if !inside => vec![down],
        (Stage::FeedForward, Buffer::X) if !inside => vec![gate, up, down],
        _ => Vec::new(),
    }
}

/// The norm before a stage's products, whose fault all of them share.
pub(super) fn shared_norm(model: &Model, site: Site) -> Option<&Tensor> {
    let layer = site.layer.map(|layer| &model.weights.layers[layer]);
    match site.stage {
        Stage::Qkv => Some(&layer?.attn_norm),
        Stage::FeedForward => Some(&layer?.ffn_norm),
        Stage::Head => Some(&model.weights.output_norm),
        _ => None,
    }
}

pub(super) fn outline(tensor: &Tensor) -> TensorPlace {
    TensorPlace {
        name: tensor.name.to_string(),
        dtype: tensor.dtype.to_string(),
        expert: None,
        experts: Vec::new(),
        row: None,
        rows: Count { of: 0, total: 0 },
        block: None,
        block_len: tensor.dtype.block_len(),
        blocks: None,
        element: None,
        elements: None,
        contribution: None,
    }
}
