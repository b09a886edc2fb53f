//! Checks of a GPU itself: the memory that a model takes of it, and how near generation comes to its bandwidth.

use std::time::Instant;

use contract::{Figures, Ground, Miss, Parameters, Verdict};
use model::{Backend, Choice, Ffn, Lane, Model, Step, forward};

use super::forward::{count, table};
use super::lab::{Lab, Room, broke, tokens};
use super::planted::{Wrong, broken};
use crate::device::{Facts, Placed};

/// Tokens generated before and while time is taken.
const WARM_UP: usize = 8;

fn on_a_gpu(lab: &mut Lab, room: Room) -> Result<(Box<dyn Backend>, Box<cuda::Ready>), Miss> {
    if lab.ground() != Ground::Gpu {
        return Err(Miss::unable("needs a real GPU: pass --device cuda (and --model, for the real shape)"));
    }
    let model = lab.model();
    match lab.place(&model, "gpu", room)? {
        Placed { backend, facts: Facts::Cuda(ready), .. } => Ok((backend, ready)),
        _ => Err(Miss::unable("needs a real GPU")),
    }
}

fn of_driver(error: cuda::Error) -> Miss {
    Miss::failed(error.to_string())
}

/// What is in use of the card's memory, by whomever, once the model is on it and has run.
pub(super) fn memory(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let most = parameters.number("percent_at_most").unwrap_or(95.0);
    let context = count(parameters, "context");
    lab.of_shape(parameters)?;
    let (mut backend, ready) = on_a_gpu(lab, Room::of(context))?;
    forward(&mut backend, &Step::prefill(&[1], 0, table(1))).map_err(broke)?;
    backend.logits().map_err(broke)?;
    let free = if fault.is_some() { 0 } else { ready.free_memory().map_err(of_driver)? };
    // Gigabytes: exact as f64.
    let (used, all) = ((ready.gpu.memory - free) as f64, ready.gpu.memory as f64);
    let percent = 100.0 * used / all;
    let figures = Figures::from_iter([
        ("percent".into(), percent.into()),
        ("bytes_used".into(), (ready.gpu.memory - free).into()),
        ("bytes_planned".into(), ready.plan.total().into()),
        ("context".into(), context.into()),
    ]);
    if percent <= most {
        return Ok(figures);
    }
    Err(Miss::Failed {
        why: format!("{percent:.1}% of the card's memory is in use, more than {most}%"),
        figures,
    })
}

/// Bytes that generating a token must read of a model's weights.
fn bytes_of_a_token(model: &Model) -> f64 {
    let part = match model.config.ffn {
        Ffn::Moe(moe) => moe.used as f64 / moe.experts as f64,
        Ffn::Dense { .. } => 1.0,
    };
    let bytes = |tensor: &gguf::Tensor| {
        let all = tensor.data.len() as f64;
        if tensor.name.contains("_exps.") { all * part } else { all }
    };
    let weights = &model.weights;
    let layers = weights.layers.iter().flat_map(model::LayerWeights::tensors);
    let ends = [&weights.output_norm, &weights.output];
    weights.token_embd.row_bytes() as f64 + layers.chain(ends).map(bytes).sum::<f64>()
}

/// Generation of one sequence, as a part of what the memory's bandwidth allows.
pub(super) fn throughput(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let least = parameters.number("of_bound_at_least").unwrap_or(0.5);
    let n = count(parameters, "tokens");
    lab.of_shape(parameters)?;
    let room = Room::of(WARM_UP + n + 8);
    let (mut backend, ready) = on_a_gpu(lab, room)?;
    if fault.is_some() {
        backend = broken(backend, Wrong::Slow);
    }
    let (_, mut rates) =
        cuda::ReadBandwidth::new(&ready, &lab.kernels()).map_err(of_driver)?.measure().map_err(of_driver)?;
    rates.sort_by(f64::total_cmp);
    let bandwidth = rates[rates.len() / 2];
    let seconds = generate(&mut *backend, n, room.context)?;
    let rate = n as f64 / seconds;
    let bound = bandwidth / bytes_of_a_token(&lab.model());
    let figures = Figures::from_iter([
        ("of_bound".into(), (rate / bound).into()),
        ("tokens_per_second".into(), rate.into()),
        ("bound_tokens_per_second".into(), bound.into()),
        ("bytes_per_second".into(), bandwidth.into()),
        ("bytes_per_token".into(), bytes_of_a_token(&lab.model()).into()),
    ]);
    if rate >= least * bound {
        return Ok(figures);
    }
    let why = format!(
        "{rate:.1} tokens/s, {:.2} of the {bound:.1} that the bandwidth allows; at least {least}",
        rate / bound
    );
    Err(Miss::Failed { why, figures })
}

/// Seconds that `n` tokens take, chosen by the device itself where it can.
fn generate(backend: &mut dyn Backend, n: usize, context: usize) -> Result<f64, Miss> {
    let mut step = Step::prefill(&tokens(1, 1, backend.model().config.vocab), 0, table(context));
    forward(backend, &step).map_err(broke)?;
    let choice =
        Choice { inverse_temperature: None, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, ids: u32::MAX };
    let lane = Lane { position: 1, table: table(context), choice, adjustment: None };
    let mut start = Instant::now();
    if let Some(chooser) = backend.chooser() {
        chooser.start(&[lane]).map_err(broke)?;
        chooser.advance().map_err(broke)?;
        for i in 0..WARM_UP + n {
            if i == WARM_UP {
                start = Instant::now();
            }
            chooser.advance().map_err(broke)?;
            chooser.collect().map_err(broke)?;
        }
        return Ok(start.elapsed().as_secs_f64());
    }
    for i in 0..WARM_UP + n {
        if i == WARM_UP {
            start = Instant::now();
        }
        step.rows[0].position += 1;
        forward(backend, &step).map_err(broke)?;
        backend.logits().map_err(broke)?;
    }
    Ok(start.elapsed().as_secs_f64())
}
