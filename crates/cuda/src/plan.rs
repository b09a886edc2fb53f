//! The plan of memory: what a model will take of a GPU, held against what is free before anything big is allocated.
//! Arithmetic alone; allocates nothing and asks no device.

use model::{BLOCK, Model};

use crate::buffers::Buffers;
use crate::launch::adjust::places;
use crate::launch::sample::Sampling;
use crate::step::{DeviceStep, MAX_SEQUENCES};
use crate::{Error, Options, weights};

/// Left free at least, and as a part of the GPU's memory: kernels and their recorded graphs, the logits of steps that
/// ask for more than one row, what the driver takes as it goes, and other programs' growth. None of it can be known
/// ahead, and a GPU that is full fails in the middle of an answer.
const RESERVE: u64 = 256 << 20;
const RESERVE_PART: u64 = 20;

/// What a model takes of a GPU's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Free before anything was allocated.
    pub free: u64,
    /// Weights, in the layout they have on the GPU.
    pub weights: u64,
    /// Keys and values of all KV blocks.
    pub kv: u64,
    /// Activations, what attention and sampling work in, the step's tables and the rotary table; at least what uploading needs for a while.
    pub workspace: u64,
    /// Not to be used.
    pub reserve: u64,
}

impl Plan {
    /// The plan for `model` on a GPU of `memory` bytes, `free` of which are; an error with the arithmetic, and the
    /// context that would fit, if it does not fit.
    pub(crate) fn new(model: &Model, options: &Options, memory: u64, free: u64) -> Result<Plan, Error> {
        let plan = Plan::of(model, options, options.context, memory, free);
        if plan.total() <= free {
            return Ok(plan);
        }
        let Plan { weights, kv, workspace, reserve, .. } = plan;
        let would_fit = longest(model, options, memory, free);
        Err(Error::Memory { free, weights, kv, workspace, reserve, context: options.context, would_fit })
    }

    /// Everything together.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.workspace + self.reserve
    }

    /// As if `options` asked for sequences of `context` positions, as many of them as it has blocks for.
    fn of(model: &Model, options: &Options, context: usize, memory: u64, free: u64) -> Plan {
        let config = &model.config;
        let asked = options.context.div_ceil(BLOCK).max(1);
        // Not below what is asked for, so that at the context asked for it is that.
        let blocks = (options.kv_blocks * context.div_ceil(BLOCK)).div_ceil(asked);
        let rows = options.max_rows.min(context.max(1));
        let rope = context * config.head_dim * size_of::<f32>();
        let sequences = rows.min(MAX_SEQUENCES);
        let sampling = Sampling::bytes(config.vocab, sequences, places(sequences, blocks, context));
        let running = Buffers::bytes(config, rows, blocks, options.activations)
            + DeviceStep::bytes(rows, context)
            + sampling
            + rope;
        // `usize` is at most 64 bits wide.
        Plan {
            free,
            weights: weights::bytes(model) as u64,
            kv: (blocks * BLOCK * config.kv_bytes_per_position()) as u64,
            // Gone when the buffers come.
            workspace: running.max(weights::STAGE) as u64,
            reserve: RESERVE.max(memory / RESERVE_PART),
        }
    }
}

/// The longest context that fits, in whole KV blocks; `None` if not even one block does.
fn longest(model: &Model, options: &Options, memory: u64, free: u64) -> Option<usize> {
    let fits = |blocks: usize| Plan::of(model, options, blocks * BLOCK, memory, free).total() <= free;
    // What is needed grows with the context. `fit` blocks do, `not` blocks do not.
    let (mut fit, mut not) = (0, options.context.div_ceil(BLOCK).max(1));
    while not - fit > 1 {
        let middle = fit + (not - fit) / 2;
        if fits(middle) { fit = middle } else { not = middle }
    }
    (fit > 0).then_some(fit * BLOCK)
}

#[cfg(test)]
mod tests {
    use gguf::Dtype;
    use synth::Shape;

    use super::*;

    fn tiny() -> Model {
        synth::model(&Shape::named("tiny-moe").expect("a shape of the list"), 1, |_| Dtype::F32)
    }

    const MEMORY: u64 = 8_000_000_000;

    #[test]
    fn what_is_needed_is_the_limit() {
        let model = tiny();
        let options = Options::for_context(4096);
        let need = Plan::of(&model, &options, options.context, MEMORY, 0).total();
        let plan = Plan::new(&model, &options, MEMORY, need).expect("exactly as much as is needed");
        assert_eq!((plan.total(), plan.free), (need, need));
        // 6 layers, 2 heads of 64: two rows of two planes and a scale.
        assert_eq!(plan.kv, 4096 * 6 * 2 * 2 * (2 * 64 + 4));
        assert_eq!(plan.reserve, MEMORY / 20);
        assert!(Plan::new(&model, &options, MEMORY, need - 1).is_err());
    }

    #[test]
    fn the_context_that_would_fit_does_and_the_next_does_not() {
        let model = tiny();
        let check = |options: Options, part: f64| {
            let full = Plan::of(&model, &options, options.context, MEMORY, 0);
            let least = Plan::of(&model, &options, BLOCK, MEMORY, 0).total();
            let free = least + ((full.total() - least) as f64 * part) as u64;
            let Err(Error::Memory { would_fit: Some(context), .. }) =
                Plan::new(&model, &options, MEMORY, free)
            else {
                panic!("{options:?} fits into {part}")
            };
            assert!(context % BLOCK == 0 && context < options.context, "{context}");
            // As if it had been asked for, with the same number of sequences.
            let sequences = options.kv_blocks / options.context.div_ceil(BLOCK);
            let asked = |context: usize| Options {
                context,
                kv_blocks: sequences * context.div_ceil(BLOCK),
                max_rows: options.max_rows.min(context),
                ..options.clone()
            };
            assert!(Plan::new(&model, &asked(context), MEMORY, free).is_ok(), "{context} at {part}");
            assert!(Plan::new(&model, &asked(context + BLOCK), MEMORY, free).is_err(), "{context} at {part}");
        };
        let long = Options::for_context(1 << 20);
        for part in [0.0, 0.01, 0.5, 0.999] {
            check(long.clone(), part);
            check(Options { kv_blocks: 8 * (1 << 20) / BLOCK, ..long.clone() }, part);
        }
    }

    #[test]
    fn nothing_fits_beside_the_weights() {
        let model = tiny();
        let options = Options::for_context(4096);
        let free = Plan::of(&model, &options, BLOCK, MEMORY, 0).total() - 1;
        let Err(error) = Plan::new(&model, &options, MEMORY, free) else { panic!("it fits") };
        assert!(matches!(error, Error::Memory { would_fit: None, .. }), "{error}");
        assert!(error.to_string().contains("no context would fit"), "{error}");
    }
}
