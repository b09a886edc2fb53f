//! Faults that checks plant into what they look at, so that each is seen to fail once: a backend that is wrong in one
//! way, and a model one of whose tensors is misread. Judges nothing.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use gguf::{Bytes, Tensor};
use model::{Backend, Buffer, Fault, FfnWeights, Hook, Hooked, Model, Site, Stage, Step};

/// How a backend is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    /// A NaN in the experts' hidden values of layer 1.
    NanInHidden,
    /// The weights of the experts of layer 1 are a thousandth too large.
    WeightsTooLarge,
    /// An expert of layer 1 is chosen twice.
    ExpertTwice,
    /// Every value of the residual stream after layer 0 is one unit in the last place off, in every step: one value alone
    /// can vanish when it is rounded to fixed point.
    Ulp,
    /// The same, in steps of several sequences alone.
    UlpInCompany,
    /// The same, in the third step alone.
    UlpInThirdStep,
    /// The same, whenever somebody has looked at it.
    UlpWhenObserved,
    /// Every step takes ten milliseconds longer.
    Slow,
}

/// `backend`, wrong in this way.
pub(super) fn broken(backend: Box<dyn Backend>, wrong: Wrong) -> Box<dyn Backend> {
    Box::new(Hooked::with(backend, Box::new(Break { wrong, steps: 0, sequences: 0 })))
}

/// What makes a backend wrong.
struct Break {
    wrong: Wrong,
    /// Steps so far.
    steps: usize,
    /// Of the step.
    sequences: usize,
}

fn change(inner: &mut dyn Backend, buffer: Buffer, change: impl FnOnce(&mut [f32])) -> Result<(), Fault> {
    let mut values = inner.read(buffer)?;
    change(&mut values);
    inner.write(buffer, &values)
}

fn one_ulp(inner: &mut dyn Backend) -> Result<(), Fault> {
    change(inner, Buffer::X, |x| x.iter_mut().for_each(|x| *x = x.next_up()))
}

impl Hook for Break {
    fn begin(&mut self, step: &Step) -> Step {
        self.steps += 1;
        self.sequences = step.tables.len();
        if self.wrong == Wrong::Slow {
            thread::sleep(Duration::from_millis(10));
        }
        step.clone()
    }

    fn run(&mut self, inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
        inner.run(site)?;
        let at = |stage, layer| site == Site { stage, layer: Some(layer) };
        // The last stage of a layer that adds into the residual stream.
        let end_of_layer_0 = at(Stage::ExpertsDown, 0) || at(Stage::FeedForward, 0);
        match self.wrong {
            Wrong::NanInHidden if at(Stage::ExpertsUp, 1) => {
                change(inner, Buffer::Hidden, |h| h[0] = f32::NAN)
            }
            Wrong::WeightsTooLarge if at(Stage::Route, 1) => {
                change(inner, Buffer::ExpertWeights, |w| w.iter_mut().for_each(|w| *w *= 1.001))
            }
            Wrong::ExpertTwice if at(Stage::Route, 1) => {
                change(inner, Buffer::Experts, |ids| ids[0] = ids[1])
            }
            Wrong::Ulp if end_of_layer_0 => one_ulp(inner),
            Wrong::UlpInCompany if end_of_layer_0 && self.sequences > 1 => one_ulp(inner),
            Wrong::UlpInThirdStep if end_of_layer_0 && self.steps == 3 => one_ulp(inner),
            _ => Ok(()),
        }
    }

    fn read(&mut self, inner: &mut dyn Backend, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        let values = inner.read(buffer)?;
        if self.wrong == Wrong::UlpWhenObserved && buffer == Buffer::X {
            one_ulp(inner)?;
        }
        Ok(values)
    }
}

/// `model` with the first `ffn_down_exps` (or `ffn_down`) whose type is not that of the layer before it taken for that
/// type: what an engine does that chooses one kernel for a projection. `None` where all layers have the same type.
pub(super) fn misread(model: &Model) -> Option<Arc<Model>> {
    let mut model = model.clone();
    let mut downs: Vec<_> = model
        .weights
        .layers
        .iter_mut()
        .map(|layer| match &mut layer.ffn {
            FfnWeights::Dense { down, .. } | FfnWeights::Moe { down, .. } => down,
        })
        .collect();
    let at = (1..downs.len()).find(|&at| downs[at].dtype != downs[at - 1].dtype)?;
    let wrong = downs[at - 1].dtype;
    let down: &mut Tensor = downs[at];
    let bytes = wrong.row_bytes(down.row_len())? * down.rows();
    // Larger blocks reach into what follows: more of the same.
    down.data = Bytes::from(down.data.iter().copied().cycle().take(bytes).collect::<Vec<u8>>());
    down.dtype = wrong;
    Some(Arc::new(model))
}
