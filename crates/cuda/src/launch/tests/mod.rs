//! The kernels between the products, each alone against its twin on the CPU: `just gpu-test`.

mod sample;
mod small;
mod streamed;

use std::sync::Arc;

use gguf::Dtype;
use model::{Config, Ffn, Model, Moe, Spec};
use quant::fixed::Activations;
use synth::Shape;

use super::{embed, experts_down, fixed, group, route, sample as host, stream};
use crate::compile::Sources;
use crate::{Cuda, KernelFiles, Options, Place};

/// What a test says when there is no GPU.
const NEEDS: &str = "this test needs a GPU (just gpu-test)";

/// Where these tests run.
fn place() -> Place {
    match std::env::var("TALLY_TEST_PLACE").as_deref() {
        Ok("emulated") => Place::EMULATED,
        _ => Place::Gpu(0),
    }
}

/// One layer of these dimensions, `experts` of 0 for a dense one.
fn shape(hidden: usize, vocab: usize, experts: usize, used: usize) -> Shape {
    let base = Shape::named(if experts == 0 { "tiny-dense" } else { "tiny-moe" }).expect("a named shape");
    let ffn = match experts {
        0 => Ffn::Dense { width: 96 },
        _ => Ffn::Moe(Moe { experts, used, width: 32, renormalise: true, scale: 1.5 }),
    };
    let config = Config { layers: 1, hidden, heads: 2, kv_heads: 1, head_dim: 32, vocab, ffn, ..base.config };
    Shape { config, tied: true }
}

/// Floats but for the embedding.
fn model(shape: &Shape, embedding: Dtype) -> Arc<Model> {
    let dtype = |s: &Spec| if s.name.starts_with("token_embd") { embedding } else { Dtype::F32 };
    Arc::new(synth::model(shape, 5, dtype))
}

fn cuda(model: &Arc<Model>, activations: Activations, max_rows: usize) -> Cuda {
    let place = place();
    // What is compiled is kept for as long as temporary files are: tests share most of it.
    let kernels = KernelFiles::cached(std::env::temp_dir().join("tally-kernel-tests"));
    let options =
        Options { place, kernels, activations, max_rows, kv_blocks: 32, ..Options::for_context(256) };
    Cuda::new(model.clone(), &options, &mut |_, _| ()).unwrap_or_else(|error| panic!("{NEEDS}: {error}"))
}

/// Random 64 bits, a hash of their place (splitmix64, Steele et al., OOPSLA 2014).
fn random(seed: u64, i: usize) -> u64 {
    let mut z = (seed << 40)
        .wrapping_add(i as u64)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(0x1234_5678_9abc_def1);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// About normal, mean 0, deviation 1: twelve uniform numbers.
fn normal(seed: u64, i: usize) -> f32 {
    let sum: f32 = (0..12).map(|j| (random(seed, i * 12 + j) >> 40) as f32 / (1u32 << 24) as f32).sum();
    sum - 6.0
}

/// Bits, every NaN taken as one.
fn bits(v: f32) -> u32 {
    if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }
}

fn same(what: &str, want: &[f32], got: &[f32]) {
    assert_eq!(want.len(), got.len(), "{what}: lengths");
    if let Some(i) = (0..want.len()).find(|&i| bits(want[i]) != bits(got[i])) {
        panic!("{what}: [{i}] is {} ({:08x}), not {} ({:08x})", got[i], bits(got[i]), want[i], bits(want[i]));
    }
}

/// A constant that host and kernels each spell must be one: shapes of launches and lengths of buffers follow from it.
#[test]
fn host_and_kernels_agree() {
    let sources = Sources::built_in();
    for (file, name, value) in [
        ("embed.cu", "THREADS", embed::THREADS.to_string()),
        ("norm.cuh", "NORM_THREADS", fixed::THREADS.to_string()),
        ("combine.cu", "THREADS", experts_down::THREADS.to_string()),
        ("combine.cu", "MAX_NORMED", experts_down::MAX_NORMED.to_string()),
        ("group.cu", "THREADS", group::THREADS.to_string()),
        ("route.cu", "THREADS", route::THREADS.to_string()),
        ("route_few.cu", "COLUMNS", route::FEW_COLUMNS.to_string()),
        ("route_few.cu", "MAX_HIDDEN", route::FEW_HIDDEN.to_string()),
        ("product_stream.cu", "WARPS", stream::WARPS.to_string()),
        ("product_stream.cu", "MAX_SLOTS", stream::MAX_SLOTS.to_string()),
        ("product_stream.cu", "MAX_PAIRS", stream::MAX_PAIRS.to_string()),
        ("sample.cuh", "SLICE_THREADS", host::SLICE_THREADS.to_string()),
        ("sample.cuh", "SLICE", format!("{} * SLICE_THREADS", host::SLICE / host::SLICE_THREADS as usize)),
        ("sample.cuh", "ROW_THREADS", host::ROW_THREADS.to_string()),
        ("sample.cuh", "BINS", host::BINS.to_string()),
        ("sample.cuh", "LISTED", host::LISTED.to_string()),
        ("sample.cuh", "RING", host::RING.to_string()),
        ("sample.cuh", "NO_TOKEN", format!("{:#x}u", host::NO_TOKEN)),
    ] {
        let source = sources.text(file);
        let line = format!("constexpr u32 {name} = {value};");
        assert!(source.contains(&line), "{file} does not say `{line}`");
    }
}
