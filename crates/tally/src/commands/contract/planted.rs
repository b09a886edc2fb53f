//! Faults that checks plant into what they look at, so that each is seen to fail once: a backend that is wrong in one
//! way, and a model one of whose tensors is misread. Judges nothing.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use gguf::{Bytes, Tensor};
use model::{Backend, Buffer, Fault, FfnWeights, Model, Site, Stage, Step};

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
    /// Every step takes a hundred milliseconds longer.
    Slow,
}

/// A backend that is wrong.
pub(super) struct Faulty<B> {
    inner: B,
    wrong: Wrong,
    steps: usize,
    sequences: usize,
}

impl<B: Backend> Faulty<B> {
    pub(super) fn new(inner: B, wrong: Wrong) -> Faulty<B> {
        Faulty { inner, wrong, steps: 0, sequences: 0 }
    }

    fn change(&mut self, buffer: Buffer, change: impl FnOnce(&mut [f32])) -> Result<(), Fault> {
        let mut values = self.inner.read(buffer)?;
        change(&mut values);
        self.inner.write(buffer, &values)
    }

    fn one_ulp(&mut self) -> Result<(), Fault> {
        self.change(Buffer::X, |x| x.iter_mut().for_each(|x| *x = x.next_up()))
    }
}

impl<B: Backend> Backend for Faulty<B> {
    fn model(&self) -> &Model {
        self.inner.model()
    }

    fn max_rows(&self) -> usize {
        self.inner.max_rows()
    }

    fn context(&self) -> usize {
        self.inner.context()
    }

    fn kv_blocks(&self) -> usize {
        self.inner.kv_blocks()
    }

    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.steps += 1;
        self.sequences = step.tables.len();
        if self.wrong == Wrong::Slow {
            thread::sleep(Duration::from_millis(100));
        }
        self.inner.begin(step)
    }

    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.inner.run(site)?;
        let at = |stage, layer| site == Site { stage, layer: Some(layer) };
        // The last stage of a layer that adds into the residual stream.
        let end_of_layer_0 = at(Stage::ExpertsDown, 0) || at(Stage::FeedForward, 0);
        match self.wrong {
            Wrong::NanInHidden if at(Stage::ExpertsUp, 1) => self.change(Buffer::Hidden, |h| h[0] = f32::NAN),
            Wrong::WeightsTooLarge if at(Stage::Route, 1) => {
                self.change(Buffer::ExpertWeights, |w| w.iter_mut().for_each(|w| *w *= 1.001))
            }
            Wrong::ExpertTwice if at(Stage::Route, 1) => self.change(Buffer::Experts, |ids| ids[0] = ids[1]),
            Wrong::Ulp if end_of_layer_0 => self.one_ulp(),
            Wrong::UlpInCompany if end_of_layer_0 && self.sequences > 1 => self.one_ulp(),
            Wrong::UlpInThirdStep if end_of_layer_0 && self.steps == 3 => self.one_ulp(),
            _ => Ok(()),
        }
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        let values = self.inner.read(buffer)?;
        if self.wrong == Wrong::UlpWhenObserved && buffer == Buffer::X {
            self.one_ulp()?;
        }
        Ok(values)
    }

    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
        self.inner.write(buffer, values)
    }

    fn logits(&mut self) -> Result<&[f32], Fault> {
        self.inner.logits()
    }

    fn observe(&mut self, on: bool) -> bool {
        self.inner.observe(on)
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
