//! What is run and compared, at whatever place and in whatever size a test program asks for.

use std::sync::Arc;

use cpu::Cpu;
use cuda::Cuda;
use engine::{Sampler, SamplerParams};
use model::{Backend, Buffer, Chosen, Fault, Ffn, Lane, Model, Row, Step, forward};
use parity::claim::{self, Refuted};

use super::{Setup, plain, same, table, tokens};

/// A prompt in chunks, then decoding, each chunk compared by `run`.
pub(crate) fn sequence(
    what: &str,
    model: &Arc<Model>,
    setup: &Setup,
    chunks: &[usize],
    run: fn(&str, &mut Cpu, &mut Cuda, &Step),
) {
    let (mut cpu, mut cuda) = (setup.cpu(model), setup.cuda(model));
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

/// Sequences of different depths in one step, in any order of rows.
pub(crate) fn batches(model: &Arc<Model>, setup: &Setup, sizes: &[usize]) {
    let vocab = model.config.vocab;
    for &batch in sizes {
        let (mut cpu, mut cuda) = (setup.cpu(model), setup.cuda(model));
        let mut step = Step::default();
        for s in 0..batch as u32 {
            // Two blocks each; the prompt's length varies.
            step.tables.push(vec![2 * s, 2 * s + 1]);
            let n = 1 + (s * 37) % 90;
            let prompt = tokens(u64::from(s), n as usize, vocab);
            let mut prefill = Step::prefill(&prompt, 0, vec![2 * s, 2 * s + 1]);
            prefill.logits.clear();
            forward(&mut cpu, &prefill).unwrap();
            forward(&mut *cuda, &prefill).unwrap();
            step.rows.push(Row { token: s % vocab as u32, position: n, sequence: s });
        }
        for round in 0..3 {
            step.rows.rotate_left(round % batch);
            step.logits = (0..batch as u32).collect();
            plain(&format!("batch {batch}, round {round}"), &mut cpu, &mut cuda, &step);
            step.rows.iter_mut().for_each(|r| r.position += 1);
        }
    }
}

/// The same step again and again gives the same bits.
pub(crate) fn repeats(model: &Arc<Model>, setup: &Setup, rows: &[usize], times: usize) {
    let mut cuda = setup.cuda(model);
    for &n in rows {
        let step = Step::prefill(&tokens(1, n, model.config.vocab), 0, table(n));
        let mut first: Option<Vec<f32>> = None;
        for i in 0..times {
            forward(&mut *cuda, &step).unwrap();
            let logits = cuda.logits().unwrap();
            same(&format!("{n} rows, repeat {i}"), first.get_or_insert_with(|| logits.to_vec()), logits);
        }
    }
}

/// Every buffer after each of `times` whole steps, which are launched, then recorded, then replayed: the CPU's bits, or an
/// error that names the stage after which it could have been read.
pub(crate) fn reads_after_a_step(what: &str, model: &Arc<Model>, setup: &Setup, rows: usize, times: usize) {
    let (mut cpu, mut cuda) = (setup.cpu(model), setup.cuda(model));
    let vocab = model.config.vocab;
    for i in 0..times {
        let what = format!("{what}, {rows} rows, step {i}");
        let step = Step::prefill(&tokens(i as u64, rows, vocab), (i * rows) as u32, table(rows * times));
        forward(&mut cpu, &step).unwrap();
        forward(&mut *cuda, &step).unwrap();
        let mut gone = Vec::new();
        for buffer in Buffer::ALL {
            match (cpu.read(buffer), cuda.read(buffer)) {
                (Ok(left), Ok(right)) => same(&format!("{what}: {buffer:?}"), &left, &right),
                (_, Err(Fault::Buffer { why, .. })) if why.contains("read it right after") => {
                    gone.push(buffer)
                }
                // Nobody observes.
                (Err(_), Err(Fault::Buffer { .. })) => {}
                (left, right) => panic!("{what}: {buffer:?}: {left:?}, {right:?}"),
            }
        }
        let mut want = vec![Buffer::Q, Buffer::K, Buffer::V, Buffer::Attn];
        if let Ffn::Moe(_) = model.config.ffn {
            want.push(Buffer::Normed);
        }
        assert_eq!(gone, want, "{what}");
    }
}

/// Falsifier FALSIFY-QW3-MOE-GPU-PARITY-001: a prompt of three tokens gives the same logits on both. `say` hears how much
/// of each side is numbers before anything is judged.
pub(crate) fn parity(cpu: &mut Cpu, cuda: &mut Cuda, say: &mut dyn FnMut(String)) -> Result<(), Refuted> {
    let step = Step::prefill(&[1, 2, 3], 0, table(3));
    forward(cpu, &step).unwrap();
    forward(cuda, &step).unwrap();
    let place = cuda.gpu().place.to_string();
    claim::same_logits(["cpu", &place], cpu.logits().unwrap(), cuda.logits().unwrap(), say)
}

/// Two precisions of activations are two arithmetics: this has to panic.
pub(crate) fn another_arithmetic(model: &Arc<Model>, setup: &Setup) {
    let (mut cpu, mut cuda) = (setup.cpu(model), setup.a8().cuda(model));
    plain("a16 against a8", &mut cpu, &mut cuda, &Step::prefill(&[1, 2, 3], 0, table(3)));
}

/// What the engine's sampler draws from the CPU's logits, and what the backend draws and feeds to itself: `count` tokens
/// of sequences of every kind of parameters, alone and together.
pub(crate) fn sampling(model: &Arc<Model>, setup: &Setup, count: u64) {
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
        chosen(model, setup, params, count, &[]);
    }
}

/// Three tokens that take turns, as they are counted and forgotten.
fn in_turn(window: usize) -> SamplerParams {
    let logit_bias = [(7, 32.0), (9, 31.0), (11, 30.5)].into();
    SamplerParams { frequency_penalty: 3.0, penalty_window: window, logit_bias, ..SamplerParams::greedy() }
}

/// [`sampling`] of one sequence whose tokens depend on how often each was there.
pub(crate) fn counted(model: &Arc<Model>, setup: &Setup, count: u64) {
    chosen(model, setup, &[in_turn(3)], count, &[]);
}

/// [`sampling`] of sequences with penalties and biases and without, together; half of their tokens in one burst, half in the
/// next. Each has a prompt, which counts.
pub(crate) fn penalised(model: &Arc<Model>, setup: &Setup, count: u64) {
    let base = SamplerParams { penalty_window: usize::MAX, ..SamplerParams::greedy() };
    let warm = SamplerParams { temperature: 0.7, top_k: 20, top_p: 0.8, seed: 6, ..base.clone() };
    let batch = [
        // Qwen3-Coder's.
        SamplerParams { repeat_penalty: 1.05, ..warm.clone() },
        SamplerParams { repeat_penalty: 2.0, ..base.clone() },
        warm.clone(),
        in_turn(usize::MAX),
        in_turn(3),
        SamplerParams { presence_penalty: 3.0, penalty_window: 45, ids: 40, ..base.clone() },
        SamplerParams { repeat_penalty: 1.4, penalty_window: 45, ids: 40, ..warm.clone() },
    ];
    for params in batch.chunks(1).chain([&batch[..], &batch[..3]]) {
        chosen(model, setup, params, count, &[count / 2]);
    }
}

/// A burst ends, and the next begins, where `tokens_each` reaches one of `anew`.
fn chosen(model: &Arc<Model>, setup: &Setup, params: &[SamplerParams], tokens_each: u64, anew: &[u64]) {
    let (mut cpu, mut cuda) = (setup.cpu(model), setup.cuda(model));
    let vocab = model.config.vocab;
    let prompt = |s: usize| tokens(s as u64, 3 + 40 * s, vocab);
    let mut step = Step::default();
    for s in 0..params.len() as u32 {
        step.tables.push((8 * s..8 * s + 8).collect());
        for (position, token) in (0..).zip(prompt(s as usize)) {
            step.rows.push(Row { token, position, sequence: s });
        }
        step.logits.push(step.rows.len() as u32 - 1);
    }
    // In two steps: a batch of prompts may be longer than a step.
    let lanes: Vec<Lane> = (params.iter().zip(&step.tables).enumerate())
        .map(|(s, (p, table))| Lane {
            position: 3 + 40 * s as u32,
            table: table.clone(),
            choice: p.choice(),
            adjustment: p.adjustment(&prompt(s)),
        })
        .collect();
    for (s, lane) in lanes.iter().enumerate() {
        let rows = step.rows.iter().filter(|r| r.sequence == s as u32 && r.position + 1 < lane.position);
        let rows: Vec<Row> = rows.map(|r| Row { sequence: 0, ..*r }).collect();
        let before = Step { rows, tables: vec![lane.table.clone()], logits: vec![] };
        forward(&mut cpu, &before).unwrap();
        forward(&mut *cuda, &before).unwrap();
    }
    step.rows.retain(|r| r.position + 1 == lanes[r.sequence as usize].position);
    step.logits = (0..params.len() as u32).collect();
    plain("before the first token", &mut cpu, &mut cuda, &step);
    let mut samplers: Vec<Sampler> = params.iter().map(|p| Sampler::new(p.clone()).unwrap()).collect();
    let mut histories: Vec<Vec<u32>> = (0..params.len()).map(prompt).collect();
    for i in 0..tokens_each {
        if i == 0 || anew.contains(&i) {
            // The step that computed these logits is run once more, by whoever puts the next burst together.
            if i > 0 {
                forward(&mut *cuda, &step).unwrap();
            }
            let lane = |(s, lane): (usize, &Lane)| Lane {
                position: lane.position + i as u32,
                adjustment: params[s].adjustment(&histories[s]),
                ..lane.clone()
            };
            let lanes: Vec<Lane> = lanes.iter().enumerate().map(lane).collect();
            let chooser = cuda.chooser().unwrap();
            chooser.start(&lanes).unwrap();
            chooser.advance().unwrap();
        }
        let chooser = cuda.chooser().unwrap();
        chooser.advance().unwrap();
        let got = chooser.collect().unwrap();
        let logits = cpu.logits().unwrap().to_vec();
        for (s, sampler) in samplers.iter_mut().enumerate() {
            let position = u64::from(lanes[s].position) + i;
            let want = sampler.sample(&logits[s * vocab..][..vocab], &histories[s], position).unwrap();
            assert_eq!(got[s], Chosen::Token(want), "graphs {}, token {i} of {:?}", setup.graphs, params[s]);
            histories[s].push(want);
            step.rows[s].token = want;
            step.rows[s].position = position as u32;
        }
        forward(&mut cpu, &step).unwrap();
    }
}

/// Every kernel once, on little.
pub(crate) fn a_little_of_everything(model: &Arc<Model>, setup: &Setup) {
    let mut cuda = setup.cuda(model);
    for (start, n) in [(0, 70), (70, 1), (71, 1), (72, 1), (73, 5)] {
        forward(&mut *cuda, &Step::prefill(&tokens(2, n, model.config.vocab), start, table(200))).unwrap();
    }
    let warm =
        SamplerParams { top_k: 20, top_p: 0.9, min_p: 0.01, repeat_penalty: 1.1, ..SamplerParams::default() };
    let adjustment = warm.adjustment(&tokens(2, 78, model.config.vocab));
    let lane = Lane { position: 78, table: table(200), choice: warm.choice(), adjustment };
    let chooser = cuda.chooser().unwrap();
    chooser.start(&[lane]).unwrap();
    for _ in 0..3 {
        chooser.advance().unwrap();
        chooser.collect().unwrap();
    }
}
