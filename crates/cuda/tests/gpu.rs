//! The CUDA backend against the CPU, bit for bit, on a real GPU: `just gpu-test`.
//!
//! Every test here needs a GPU and is ignored by a plain `cargo test`; run with `--ignored` on a machine without one,
//! it fails and says what is missing.

use std::sync::Arc;

use cpu::Cpu;
use cuda::Cuda;
use engine::{Sampler, SamplerParams};
use gguf::Dtype;
use model::{BLOCK, Backend, Chosen, Config, Ffn, Lane, Model, Moe, Row, Site, Stage, Step, forward};
use quant::fixed::Activations;
use synth::Shape;

const SUPER: [Dtype; 5] = [Dtype::Q2K, Dtype::Q3K, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];
const SMALL: [Dtype; 8] =
    [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::F16, Dtype::BF16, Dtype::F32];

/// How both backends of a comparison are built.
#[derive(Clone, Copy)]
struct Setup {
    activations: Activations,
    context: usize,
    max_rows: usize,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup { activations: Activations::A16, context: 1024, max_rows: 256 }
    }
}

const KV_BLOCKS: usize = 160;

fn pair(model: &Arc<Model>, setup: Setup) -> (Cpu, Cuda) {
    let Setup { activations, context, max_rows } = setup;
    let cpu = cpu::Options {
        activations,
        kv_blocks: KV_BLOCKS,
        max_rows,
        ..cpu::Options::for_context(context)
    };
    let cuda = cuda::Options {
        activations,
        kv_blocks: KV_BLOCKS,
        max_rows,
        ..cuda::Options::for_context(context)
    };
    (Cpu::new(model.clone(), &cpu).unwrap(), gpu(model, &cuda))
}

fn gpu(model: &Arc<Model>, options: &cuda::Options) -> Cuda {
    Cuda::new(model.clone(), options, &mut |_, _| ())
        .unwrap_or_else(|error| panic!("this test needs a GPU (just gpu-test): {error}"))
}

/// The bits of a value, every NaN taken as one.
fn bits(v: f32) -> u32 {
    if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }
}

/// Fails at the first value that differs, with how many do.
fn same(what: &str, left: &[f32], right: &[f32]) {
    assert_eq!(left.len(), right.len(), "{what}: lengths");
    let differs: Vec<usize> = (0..left.len()).filter(|&i| bits(left[i]) != bits(right[i])).collect();
    if let Some(&i) = differs.first() {
        panic!(
            "{what}: {} of {} differ, first at {i}: cpu {} ({:08x}), cuda {} ({:08x}); next at {:?}",
            differs.len(),
            left.len(),
            left[i],
            left[i].to_bits(),
            right[i],
            right[i].to_bits(),
            &differs[1..differs.len().min(8)],
        );
    }
}

/// Every stage of a step on both, all that it writes compared.
fn lockstep(what: &str, cpu: &mut Cpu, cuda: &mut Cuda, step: &Step) {
    let config = cpu.model().config;
    cpu.begin(step).unwrap();
    cuda.begin(step).unwrap();
    let mut sites = vec![Site { stage: Stage::Embed, layer: None }];
    for layer in 0..config.layers {
        let tail: &[Stage] = match config.ffn {
            Ffn::Dense { .. } => &[Stage::FeedForward],
            Ffn::Moe(_) => &[Stage::Route, Stage::ExpertsUp, Stage::ExpertsDown],
        };
        let head = [Stage::Qkv, Stage::RopeStore, Stage::Attend, Stage::AttnOut];
        sites.extend(head.iter().chain(tail).map(|&stage| Site { stage, layer: Some(layer) }));
    }
    if !step.logits.is_empty() {
        sites.push(Site { stage: Stage::Head, layer: None });
    }
    for site in sites {
        cpu.run(site).unwrap_or_else(|e| panic!("{what}: cpu: {e}"));
        cuda.run(site).unwrap_or_else(|e| panic!("{what}: cuda: {e}"));
        for &buffer in site.stage.writes() {
            let (left, right) = (cpu.read(buffer).unwrap(), cuda.read(buffer).unwrap());
            same(&format!("{what}: {site} {buffer:?} ({} rows)", step.rows.len()), &left, &right);
        }
    }
}

/// The same step as a user runs it: nothing read between stages.
fn plain(what: &str, cpu: &mut Cpu, cuda: &mut Cuda, step: &Step) {
    forward(cpu, step).unwrap();
    forward(cuda, step).unwrap();
    same(what, cpu.logits().unwrap(), cuda.logits().unwrap());
}

fn tokens(seed: u64, n: usize, vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((seed ^ i.wrapping_mul(0x9e37_79b9)) % vocab as u64) as u32).collect()
}

fn table(n: usize) -> Vec<u32> {
    // Backwards: a block's id is not its place.
    (0..n.div_ceil(BLOCK) as u32).rev().collect()
}

/// A prompt in chunks, then decoding, each chunk compared by `run`.
fn sequence(
    what: &str,
    model: &Arc<Model>,
    setup: Setup,
    chunks: &[usize],
    run: fn(&str, &mut Cpu, &mut Cuda, &Step),
) {
    let (mut cpu, mut cuda) = pair(model, setup);
    let n: usize = chunks.iter().sum();
    let (tokens, table) = (tokens(n as u64, n, model.config.vocab), table(n));
    let mut start = 0;
    for &chunk in chunks {
        let mut step = Step::prefill(&tokens[start..start + chunk], start as u32, table.clone());
        // Several rows' logits where they are few, the last one's else.
        if chunk <= 70 {
            step.logits = (0..chunk as u32).step_by(3).collect();
        }
        run(&format!("{what}, {chunk} rows at {start}"), &mut cpu, &mut cuda, &step);
        start += chunk;
    }
}

/// Two layers; `k256` decides whether rows are whole super-blocks.
fn shape(dense: bool, k256: bool, heads: usize, head_dim: usize) -> Shape {
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

fn uniform(shape: &Shape, seed: u64, dtype: Dtype) -> Arc<Model> {
    Arc::new(synth::model(shape, seed, |s| if s.dims.len() == 1 { Dtype::F32 } else { dtype }))
}

/// Every matrix gets its own type.
fn mixed(shape: &Shape, seed: u64, k256: bool) -> Arc<Model> {
    let types: Vec<Dtype> = if k256 { SUPER.into_iter().chain(SMALL).collect() } else { SMALL.to_vec() };
    let pick = |name: &str| {
        let hash = name.bytes().fold(seed | 1, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        types[(hash >> 20) as usize % types.len()]
    };
    Arc::new(synth::model(shape, seed, |s| if s.dims.len() == 1 { Dtype::F32 } else { pick(&s.name) }))
}

/// The mix of a file that people use.
fn q4_k_m(shape: &Shape, seed: u64) -> Arc<Model> {
    let experts = if let Ffn::Moe(moe) = shape.config.ffn { moe.experts } else { 0 };
    let context = quant::MixContext { n_layers: shape.config.layers, n_experts: experts, tied: shape.tied };
    Arc::new(synth::model(shape, seed, |s| quant::Mix::Q4KM.tensor_type(&context, &s.name, &s.dims)))
}

/// The shape of attention and experts that matters most, small elsewhere.
fn like_30b() -> Shape {
    let base = Shape::named("qwen3-30b-a3b").unwrap();
    let Ffn::Moe(moe) = base.config.ffn else { unreachable!("a mixture of experts") };
    let config = Config { layers: 3, vocab: 1000, ffn: Ffn::Moe(Moe { experts: 16, ..moe }), ..base.config };
    Shape { config, ..base }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn every_type_in_every_position() {
    for dense in [false, true] {
        for (k256, types) in [(true, [&SUPER[..], &SMALL].concat()), (false, SMALL.to_vec())] {
            for dtype in types {
                let model = uniform(&shape(dense, k256, 4, if k256 { 64 } else { 32 }), 7, dtype);
                let name = format!("{dtype} dense {dense} k256 {k256}");
                sequence(&name, &model, Setup::default(), &[5, 1, 33, 1], lockstep);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn any_mix_of_types() {
    for seed in 0..8 {
        let (dense, k256) = (seed % 2 == 1, seed % 4 < 2);
        let heads = [4, 8, 2, 3][seed as usize % 4];
        let head_dim = if k256 { 256 / if heads == 3 { 4 } else { heads } } else { 32 };
        if k256 && heads * head_dim % 256 != 0 {
            continue;
        }
        let model = mixed(&shape(dense, k256, heads, head_dim.max(32)), seed, k256);
        for activations in [Activations::A16, Activations::A8] {
            let setup = Setup { activations, ..Setup::default() };
            sequence(&format!("mix {seed} {}", activations.name()), &model, setup, &[7, 1, 2, 65, 1], lockstep);
        }
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn the_mix_that_people_use() {
    let model = q4_k_m(&like_30b(), 3);
    for activations in [Activations::A16, Activations::A8] {
        let setup = Setup { activations, ..Setup::default() };
        sequence(&format!("Q4_K_M {}", activations.name()), &model, setup, &[3, 1, 1, 70, 2, 1], lockstep);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn prompts_of_every_awkward_length() {
    let model = q4_k_m(&like_30b(), 4);
    for n in [1, 2, 63, 64, 65, 511, 513, 4097] {
        let setup = Setup { context: 4200, max_rows: 4097, ..Setup::default() };
        sequence(&format!("prompt {n}"), &model, setup, &[n, 1, 1], plain);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn prompts_in_any_chunks() {
    let model = q4_k_m(&like_30b(), 5);
    let setup = Setup { max_rows: 1024, ..Setup::default() };
    for chunks in [&[600][..], &[1, 599], &[64, 64, 472], &[255, 1, 3, 64, 277], &[300, 300]] {
        sequence(&format!("chunks {chunks:?}"), &model, setup, chunks, plain);
    }
}

/// Sequences of different depths in one step, in this order of rows.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn batches_in_any_order() {
    let model = q4_k_m(&like_30b(), 6);
    for batch in [1, 2, 3, 8, 17, 64] {
        let (mut cpu, mut cuda) = pair(&model, Setup::default());
        let mut step = Step::default();
        for s in 0..batch as u32 {
            // Two blocks each; the prompt's length varies.
            step.tables.push(vec![2 * s, 2 * s + 1]);
            let n = 1 + (s * 37) % 90;
            let prompt = tokens(u64::from(s), n as usize, model.config.vocab);
            let mut prefill = Step::prefill(&prompt, 0, vec![2 * s, 2 * s + 1]);
            prefill.logits.clear();
            forward(&mut cpu, &prefill).unwrap();
            forward(&mut cuda, &prefill).unwrap();
            step.rows.push(Row { token: s % 1000, position: n, sequence: s });
        }
        for round in 0..3 {
            step.rows.rotate_left(round);
            step.logits = (0..batch as u32).collect();
            plain(&format!("batch {batch}, round {round}"), &mut cpu, &mut cuda, &step);
            step.rows.iter_mut().for_each(|r| r.position += 1);
        }
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn a_hundred_repeats_agree() {
    let model = q4_k_m(&like_30b(), 8);
    let (_, mut cuda) = pair(&model, Setup::default());
    for n in [1usize, 3, 130] {
        let step = Step::prefill(&tokens(1, n, 1000), 0, table(n));
        let mut first: Option<Vec<f32>> = None;
        for i in 0..100 {
            forward(&mut cuda, &step).unwrap();
            let logits = cuda.logits().unwrap();
            same(&format!("{n} rows, repeat {i}"), first.get_or_insert_with(|| logits.to_vec()), logits);
        }
    }
}

/// The check must be able to fail: two precisions of activations are two arithmetics.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
#[should_panic(expected = "differ, first at")]
fn another_arithmetic_is_noticed() {
    let model = q4_k_m(&like_30b(), 9);
    let (mut cpu, _) = pair(&model, Setup::default());
    let (_, mut cuda) = pair(&model, Setup { activations: Activations::A8, ..Setup::default() });
    plain("a16 against a8", &mut cpu, &mut cuda, &Step::prefill(&[1, 2, 3], 0, table(3)));
}

/// What the engine's sampler draws from the CPU's logits, and what the GPU draws and feeds to itself.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn tokens_chosen_on_the_gpu_are_the_samplers() {
    let model = q4_k_m(&like_30b(), 10);
    let greedy = SamplerParams::greedy();
    let warm = SamplerParams { temperature: 0.8, seed: 3, ..greedy.clone() };
    let batch = [
        greedy.clone(),
        warm.clone(),
        SamplerParams { top_k: 20, ..warm.clone() },
        SamplerParams { top_p: 0.9, seed: 4, ..warm.clone() },
        SamplerParams { min_p: 0.05, ..warm.clone() },
        SamplerParams { top_k: 40, top_p: 0.95, min_p: 0.01, temperature: 1.3, seed: 5, ..warm.clone() },
    ];
    for params in batch.chunks(1).chain([&batch[..], &batch[..2]]) {
        for graphs in [true, false] {
            chosen(&model, params, graphs);
        }
    }
}

fn chosen(model: &Arc<Model>, params: &[SamplerParams], graphs: bool) {
    let (mut cpu, _) = pair(model, Setup::default());
    let options = cuda::Options { kv_blocks: KV_BLOCKS, max_rows: 256, graphs, ..cuda::Options::for_context(1024) };
    let mut cuda = gpu(model, &options);
    let mut step = Step::default();
    for s in 0..params.len() as u32 {
        let n = 3 + 40 * s;
        step.tables.push((8 * s..8 * s + 8).collect());
        for (position, token) in (0..).zip(tokens(u64::from(s), n as usize, 1000)) {
            step.rows.push(Row { token, position, sequence: s });
        }
        step.logits.push(step.rows.len() as u32 - 1);
    }
    // In two steps: a batch of prompts may be longer than a step.
    let lanes: Vec<Lane> = (params.iter().zip(&step.tables).enumerate())
        .map(|(s, (p, table))| Lane { position: 3 + 40 * s as u32, table: table.clone(), choice: p.choice().unwrap() })
        .collect();
    for (s, lane) in lanes.iter().enumerate() {
        let rows = step.rows.iter().filter(|r| r.sequence == s as u32 && r.position + 1 < lane.position);
        let rows: Vec<Row> = rows.map(|r| Row { sequence: 0, ..*r }).collect();
        let before = Step { rows, tables: vec![lane.table.clone()], logits: vec![] };
        forward(&mut cpu, &before).unwrap();
        forward(&mut cuda, &before).unwrap();
    }
    step.rows.retain(|r| r.position + 1 == lanes[r.sequence as usize].position);
    step.logits = (0..params.len() as u32).collect();
    plain("before the first token", &mut cpu, &mut cuda, &step);
    let mut samplers: Vec<Sampler> = params.iter().map(|p| Sampler::new(p.clone()).unwrap()).collect();
    let chooser = cuda.chooser().unwrap();
    chooser.start(&lanes).unwrap();
    chooser.advance().unwrap();
    for i in 0..60 {
        chooser.advance().unwrap();
        let got = chooser.collect().unwrap();
        let logits = cpu.logits().unwrap().to_vec();
        for (s, sampler) in samplers.iter_mut().enumerate() {
            let position = u64::from(lanes[s].position) + i;
            let want = sampler.sample(&logits[s * 1000..][..1000], &[], position).unwrap();
            assert_eq!(got[s], Chosen::Token(want), "graphs {graphs}, token {i} of {:?}", params[s]);
            step.rows[s].token = want;
            step.rows[s].position = position as u32;
        }
        forward(&mut cpu, &step).unwrap();
    }
}

/// What compute-sanitizer runs: every kernel once, on little.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn sanitized() {
    for (dense, k256) in [(false, true), (true, false)] {
        let model = mixed(&shape(dense, k256, 4, if k256 { 64 } else { 32 }), 21, k256);
        let options = cuda::Options { max_rows: 128, ..cuda::Options::for_context(256) };
        let mut cuda = gpu(&model, &options);
        for (start, n) in [(0, 70), (70, 1), (71, 1), (72, 1), (73, 5)] {
            forward(&mut cuda, &Step::prefill(&tokens(2, n, 300), start, table(200))).unwrap();
        }
        let warm = SamplerParams { top_k: 20, top_p: 0.9, min_p: 0.01, ..SamplerParams::default() };
        let lane = Lane { position: 78, table: table(200), choice: warm.choice().unwrap() };
        let chooser = cuda.chooser().unwrap();
        chooser.start(&[lane]).unwrap();
        for _ in 0..3 {
            chooser.advance().unwrap();
            chooser.collect().unwrap();
        }
    }
}
