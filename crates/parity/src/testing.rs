//! Models and backends for the tests of this crate.

use std::sync::Arc;

use cpu::Cpu;
use gguf::Dtype;
use model::{Config, Ffn, Model, Moe, Spec};
use synth::Shape;

/// A shape of `layers` layers that runs in milliseconds and still has super-blocks, groups of heads and experts.
pub(crate) fn shape(dense: bool, layers: usize) -> Shape {
    let base = Shape::named(if dense { "tiny-dense" } else { "tiny-moe" }).expect("a shape of the list");
    let ffn = if dense {
        Ffn::Dense { width: 512 }
    } else {
        Ffn::Moe(Moe { experts: 6, used: 2, width: 256, renormalise: true, scale: 1.0 })
    };
    let config =
        Config { layers, hidden: 512, heads: 4, kv_heads: 2, head_dim: 64, vocab: 64, ffn, ..base.config };
    Shape { config, tied: dense }
}

/// Q4_K_M in spirit: the first two layers' down projections and values Q6_K, then Q4_K.
pub(crate) fn mix(spec: &Spec) -> Dtype {
    let sensitive = spec.name.contains("attn_v") || spec.name.contains("ffn_down");
    match spec.layer {
        _ if spec.dims.len() == 1 || spec.name.contains("gate_inp") => Dtype::F32,
        None => Dtype::Q6K,
        Some(layer) if sensitive && layer < 2 => Dtype::Q6K,
        Some(_) => Dtype::Q4K,
    }
}

pub(crate) fn model(dense: bool, layers: usize) -> Arc<Model> {
    Arc::new(synth::model(&shape(dense, layers), 7, mix))
}

pub(crate) fn cpu(model: &Arc<Model>) -> Cpu {
    let options = cpu::Options { threads: 1, max_rows: 96, kv_blocks: 8, ..cpu::Options::for_context(256) };
    Cpu::new(model.clone(), &options).expect("one thread")
}
