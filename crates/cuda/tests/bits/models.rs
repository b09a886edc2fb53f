//! Small models for every type, shape and mix.

use std::sync::Arc;

use gguf::{Dtype, Tensor};
use model::{Config, Ffn, FfnWeights, Model, Moe};
use synth::Shape;

pub(crate) const SUPER: [Dtype; 5] = [Dtype::Q2K, Dtype::Q3K, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];
pub(crate) const SMALL: [Dtype; 8] =
    [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::F16, Dtype::BF16, Dtype::F32];
/// Types of the fused batch-1 kernels.
pub(crate) const FUSED: [Dtype; 4] = [Dtype::Q4K, Dtype::Q6K, Dtype::Q5K, Dtype::Q8_0];

/// Two layers; `k256` decides whether rows are whole super-blocks.
pub(crate) fn shape(dense: bool, k256: bool, heads: usize, head_dim: usize) -> Shape {
    let base = Shape::named(if dense { "tiny-dense" } else { "tiny-moe" }).unwrap();
    let width = if k256 { 256 } else { 96 };
    let ffn = if dense {
        Ffn::Dense { width: 2 * width }
    } else {
        Ffn::Moe(Moe { experts: 6, used: 3, width, renormalise: k256, scale: if k256 { 1.0 } else { 2.5 } })
    };
    let kv_heads = if heads.is_multiple_of(2) { heads / 2 } else { heads };
    let hidden = if k256 { 256 } else { 160 };
    let config = Config { layers: 2, hidden, heads, kv_heads, head_dim, vocab: 300, ffn, ..base.config };
    Shape { config, tied: dense }
}

pub(crate) fn uniform(shape: &Shape, seed: u64, dtype: Dtype) -> Arc<Model> {
    Arc::new(synth::model(shape, seed, |s| if s.dims.len() == 1 { Dtype::F32 } else { dtype }))
}

/// Every matrix gets its own type, of five: a compiler takes the longer the more types there are. Over four seeds of which
/// two and two follow each other (0, 1, 4, 5), every type is there.
pub(crate) fn mixed(shape: &Shape, seed: u64, k256: bool) -> Arc<Model> {
    let all: Vec<Dtype> = if k256 { SUPER.into_iter().chain(SMALL).collect() } else { SMALL.to_vec() };
    let first = 5 * (seed as usize / 4 * 2 + seed as usize % 2);
    // Three steps on, which come to every type, are of another family.
    let types: Vec<Dtype> = (first..first + 5).map(|i| all[3 * i % all.len()]).collect();
    let pick = |name: &str| {
        let hash = name.bytes().fold(seed | 1, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        types[(hash >> 20) as usize % types.len()]
    };
    Arc::new(synth::model(shape, seed, |s| if s.dims.len() == 1 { Dtype::F32 } else { pick(&s.name) }))
}

/// The mix of a file that people use.
pub(crate) fn q4_k_m(shape: &Shape, seed: u64) -> Arc<Model> {
    let experts = if let Ffn::Moe(moe) = shape.config.ffn { moe.experts } else { 0 };
    let context = quant::MixContext { n_layers: shape.config.layers, n_experts: experts, tied: shape.tied };
    Arc::new(synth::model(shape, seed, |s| quant::Mix::Q4KM.tensor_type(&context, &s.name, &s.dims)))
}

/// The shape of attention and experts that matters most, small elsewhere.
pub(crate) fn like_30b() -> Shape {
    let base = Shape::named("qwen3-30b-a3b").unwrap();
    let Ffn::Moe(moe) = base.config.ffn else { unreachable!("a mixture of experts") };
    let config = Config { layers: 3, vocab: 1000, ffn: Ffn::Moe(Moe { experts: 16, ..moe }), ..base.config };
    Shape { config, ..base }
}

/// Types in turn, one to a matrix; turn 0 begins with the first. Over as many turns as there are types, every type comes
/// to every position, and each of the models has all types: one compilation serves them all. On even turns `up` is of
/// `gate`'s type, which kernels that make both at once like better.
pub(crate) fn in_turn(shape: &Shape, seed: u64, types: &[Dtype], turn: usize) -> Arc<Model> {
    let next = std::cell::Cell::new(turn);
    model(shape, seed, |name| {
        let n = next.get();
        if turn.is_multiple_of(2) && name.contains("ffn_up") {
            return types[(n + types.len() - 1) % types.len()];
        }
        next.set(n + 1);
        types[n % types.len()]
    })
}

/// The model with every value of the F32 tensor that `pick` finds replaced.
pub(crate) fn filled(model: &Arc<Model>, pick: fn(&mut Model) -> &mut Tensor, value: f32) -> Arc<Model> {
    let mut model = Model::clone(model);
    let tensor = pick(&mut model);
    assert_eq!(tensor.dtype, Dtype::F32, "{}", tensor.name);
    tensor.data = value.to_le_bytes().repeat(tensor.data.len() / 4).into();
    Arc::new(model)
}

/// The router of a layer.
pub(crate) fn router(model: &mut Model, layer: usize) -> &mut Tensor {
    match &mut model.weights.layers[layer].ffn {
        FfnWeights::Moe { gate_inp, .. } => gate_inp,
        FfnWeights::Dense { .. } => panic!("a dense model has no router"),
    }
}

/// The first layer has every type; the others and the head have those of the fused kernels, in turn.
pub(crate) fn fused(shape: &Shape, seed: u64, turn: usize) -> Arc<Model> {
    let types = [&SUPER[..], &SMALL].concat();
    let (first, next) = (std::cell::Cell::new(0), std::cell::Cell::new(turn));
    let take = |counter: &std::cell::Cell<usize>| counter.replace(counter.get() + 1);
    model(shape, seed, |name| match name {
        _ if name.contains("gate_inp") => [Dtype::F32, Dtype::F16, Dtype::BF16][turn % 3],
        _ if name.starts_with("blk.0.") || name.starts_with("token_embd") => {
            types[take(&first) % types.len()]
        }
        _ => FUSED[take(&next) % FUSED.len()],
    })
}

/// Q4_K, but for one matrix of a layer, which the kernels of a single row do not take: they make a part of the layer then.
pub(crate) fn fused_but(shape: &Shape, seed: u64, matrix: &str) -> Arc<Model> {
    model(shape, seed, |name| match name {
        _ if name.contains("gate_inp") => Dtype::F32,
        _ if name.contains(matrix) => Dtype::Q3K,
        _ => Dtype::Q4K,
    })
}

/// `pick` names the type of a matrix; norms are F32.
fn model(shape: &Shape, seed: u64, pick: impl Fn(&str) -> Dtype) -> Arc<Model> {
    Arc::new(synth::model(shape, seed, |s| if s.dims.len() == 1 { Dtype::F32 } else { pick(&s.name) }))
}
