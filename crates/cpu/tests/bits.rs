//! The promise of the arithmetic on the CPU: no choice of instruction set, threads, chunks or company in a batch
//! changes a bit of a logit.

use std::sync::Arc;

use cpu::{Cpu, Isa, Options};
use gguf::Dtype;
use model::{BLOCK, Backend, Buffer, Config, Ffn, Model, Moe, Row, Step, forward};
use proptest::prelude::*;
use quant::fixed::Activations;
use synth::Shape;

const SUPER: [Dtype; 5] = [Dtype::Q2K, Dtype::Q3K, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];
const SMALL: [Dtype; 8] =
    [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::F16, Dtype::BF16, Dtype::F32];

/// A shape of two layers; `k256` decides whether rows are whole super-blocks.
fn shape(dense: bool, k256: bool, experts: usize, used: usize, heads: usize, head_dim: usize) -> Shape {
    let base = Shape::named(if dense { "tiny-dense" } else { "tiny-moe" }).unwrap();
    let width = if k256 { 256 } else { 96 };
    let ffn = if dense {
        Ffn::Dense { width: 2 * width }
    } else {
        Ffn::Moe(Moe { experts, used, width, renormalise: used.is_multiple_of(2), scale: 1.0 })
    };
    let heads = if k256 { 256 / head_dim } else { heads };
    let kv_heads = if heads.is_multiple_of(2) { heads / 2 } else { heads };
    let hidden = if k256 { 256 } else { 160 };
    let config = Config { layers: 2, hidden, heads, kv_heads, head_dim, vocab: 300, ffn, ..base.config };
    Shape { config, tied: dense }
}

/// Every tensor gets its own type, so every mix within a layer is met.
fn mixed(shape: &Shape, seed: u64, k256: bool) -> Arc<Model> {
    let types: Vec<Dtype> = if k256 { SUPER.into_iter().chain(SMALL).collect() } else { SMALL.to_vec() };
    let pick = |name: &str| {
        let hash = name.bytes().fold(seed | 1, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        types[(hash >> 20) as usize % types.len()]
    };
    Arc::new(synth::model(shape, seed, |s| if s.dims.len() == 1 { Dtype::F32 } else { pick(&s.name) }))
}

fn options() -> Options {
    Options {
        isa: Isa::available()[0],
        threads: 1,
        kv_blocks: 64,
        max_rows: 256,
        ..Options::for_context(1024)
    }
}

/// Logits of every position of `tokens`, as bits, fed in chunks of the given lengths (the last one repeats).
fn logits(model: &Arc<Model>, options: &Options, tokens: &[u32], chunks: &[usize]) -> Vec<u32> {
    let mut cpu = Cpu::new(model.clone(), options).unwrap();
    let table: Vec<u32> = (0..tokens.len().div_ceil(BLOCK) as u32).rev().collect();
    let (mut start, mut out, mut chunks) = (0, Vec::new(), chunks.iter().copied());
    let mut size = chunks.next().unwrap();
    while start < tokens.len() {
        let end = (start + size).min(tokens.len());
        let mut step = Step::prefill(&tokens[start..end], start as u32, table.clone());
        step.logits = (0..(end - start) as u32).collect();
        forward(&mut cpu, &step).unwrap();
        out.extend(cpu.logits().unwrap().iter().map(|v| v.to_bits()));
        (start, size) = (end, chunks.next().unwrap_or(size));
    }
    out
}

fn tokens(seed: u64, n: usize, vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((seed ^ i.wrapping_mul(0x9e37_79b9)) % vocab as u64) as u32).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_choice_changes_a_bit(
        seed: u64,
        dense: bool,
        k256: bool,
        a8: bool,
        experts in 2usize..9,
        heads in 1usize..5,
        head_dim in prop::sample::select(vec![32usize, 64, 128]),
        n in 1usize..90,
        chunks in prop::collection::vec(1usize..70, 1..4),
    ) {
        let shape = shape(dense, k256, experts, 1 + seed as usize % experts, heads, head_dim);
        let model = mixed(&shape, seed, k256);
        let tokens = tokens(seed, n, shape.config.vocab);
        let activations = if a8 { Activations::A8 } else { Activations::A16 };
        let scalar = Options { activations, ..options() };
        let want = logits(&model, &scalar, &tokens, &[n]);
        prop_assert!(want.iter().all(|&b| f32::from_bits(b).is_finite()));
        for isa in Isa::available() {
            for threads in [1, 3] {
                let options = Options { isa, threads, ..scalar.clone() };
                prop_assert_eq!(&logits(&model, &options, &tokens, &chunks), &want, "{} {}", isa.name(), threads);
            }
        }
    }
}

/// Decoding one by one, with every span boundary of attention crossed.
#[test]
fn prefill_and_decode_agree_across_spans() {
    let shape = shape(false, true, 4, 2, 4, 64);
    let model = mixed(&shape, 5, true);
    let tokens = tokens(5, 4 * 64 + 70, shape.config.vocab);
    let best = Options { isa: Isa::best(), threads: 2, max_rows: 512, ..options() };
    let want = logits(&model, &best, &tokens, &[tokens.len()]);
    assert_eq!(logits(&model, &best, &tokens, &[1]), want);
    assert_eq!(logits(&model, &best, &tokens, &[255, 1, 3, 64]), want);
    let scalar = Options { max_rows: 512, ..options() };
    assert_eq!(logits(&model, &scalar, &tokens, &[tokens.len()]), want);
}

/// Three sequences in one step, their blocks interleaved, against each one alone.
#[test]
fn company_in_a_batch_changes_nothing() {
    let shape = shape(false, true, 8, 2, 4, 64);
    let model = mixed(&shape, 11, true);
    let options = Options { isa: Isa::best(), threads: 2, ..options() };
    let prompts: Vec<_> =
        [5usize, 65, 30].iter().enumerate().map(|(i, &n)| tokens(i as u64, n, 300)).collect();
    let alone: Vec<_> = prompts.iter().map(|p| logits(&model, &options, p, &[p.len()])).collect();

    let mut cpu = Cpu::new(model, &options).unwrap();
    let mut step = Step { tables: vec![vec![4, 7], vec![9, 1], vec![0, 12]], ..Step::default() };
    for (sequence, prompt) in prompts.iter().enumerate() {
        let row = |(position, &token): (usize, &u32)| Row {
            token,
            position: position as u32,
            sequence: sequence as u32,
        };
        step.rows.extend(prompt.iter().enumerate().map(row));
    }
    step.logits = (0..step.rows.len() as u32).collect();
    forward(&mut cpu, &step).unwrap();
    let together: Vec<u32> = cpu.logits().unwrap().iter().map(|v| v.to_bits()).collect();
    assert_eq!(together, alone.concat());
}

/// The check must be able to fail: the two precisions of activations are two arithmetics.
#[test]
fn another_arithmetic_is_noticed() {
    let model = mixed(&shape(false, true, 4, 2, 4, 64), 3, true);
    let a16 = logits(&model, &options(), &[1, 2, 3], &[3]);
    let a8 = logits(&model, &Options { activations: Activations::A8, ..options() }, &[1, 2, 3], &[3]);
    assert_ne!(a16, a8);
}

/// Buffers of every stage of every layer, observed or not, and whether the inside can be read.
#[test]
fn observing_changes_no_bit() {
    for dense in [false, true] {
        let shape = shape(dense, true, 6, 2, 4, 64);
        let model = mixed(&shape, 5, true);
        let step = Step::prefill(&[3, 1, 4, 1, 5, 9, 2, 6], 0, vec![0]);
        let mut cpu = Cpu::new(model.clone(), &options()).unwrap();
        let bits = |cpu: &mut Cpu| -> Vec<u32> {
            forward(cpu, &step).unwrap();
            cpu.logits().unwrap().iter().map(|v| v.to_bits()).collect()
        };
        let plain = bits(&mut cpu);
        let inside = [Buffer::Gate, Buffer::Up, Buffer::Down];
        assert!(inside.iter().all(|&b| cpu.read(b).is_err()), "nothing is kept unless asked for");
        assert!(cpu.observe(true));
        assert_eq!(bits(&mut cpu), plain, "dense {dense}");
        for buffer in inside {
            let values = cpu.read(buffer).unwrap();
            assert_eq!(values.len(), buffer.shape(&model.config, 8, 1).iter().product::<usize>(), "{buffer}");
            assert!(values.iter().any(|&v| v != 0.0), "{buffer}");
        }
        // SwiGLU of what was kept is what the stage handed on.
        let [gate, up, hidden] = [Buffer::Gate, Buffer::Up, Buffer::Hidden].map(|b| cpu.read(b).unwrap());
        let again = gate.iter().zip(&up).map(|(g, u)| model::math::silu(*g) * u);
        assert!(again.eq(hidden.iter().copied()), "dense {dense}");
        assert!(cpu.observe(false) && cpu.read(Buffer::Gate).is_err());
    }
}
