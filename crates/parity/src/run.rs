//! A run that can be compared: tokens in, the last one's logits out, one sequence that has the whole cache.

use model::{BLOCK, Backend, Fault, Step, forward};

/// One sequence on a backend.
pub struct Run<B> {
    backend: B,
    fed: usize,
}

impl<B: Backend> Run<B> {
    /// Takes a backend whose whole cache belongs to the run.
    pub fn new(backend: B) -> Run<B> {
        Run { backend, fed: 0 }
    }

    /// Appends `tokens`, in chunks of the backend's size, and returns the logits of the last one, `[V]`.
    ///
    /// # Panics
    /// If there are no tokens.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], Fault> {
        assert!(!tokens.is_empty(), "the last token's logits need a token");
        let reached = self.fed + tokens.len();
        let limit = self.backend.context().min(self.backend.kv_blocks() * BLOCK);
        if reached > limit {
            return Err(Fault::Capacity { what: "a context", got: reached, limit });
        }
        // Positions and blocks are below the context, which is below 2^32.
        let table: Vec<u32> = (0..reached.div_ceil(BLOCK) as u32).collect();
        for chunk in tokens.chunks(self.backend.max_rows()) {
            let mut step = Step::prefill(chunk, self.fed as u32, table.clone());
            self.fed += chunk.len();
            if self.fed < reached {
                step.logits.clear();
            }
            forward(&mut self.backend, &step)?;
        }
        self.backend.logits()
    }
}

/// The token with the largest logit, the lowest id of several, and its logit; a NaN is below every number. `None` if
/// there is no number.
pub fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let numbers = logits.iter().enumerate().filter(|(_, v)| !v.is_nan());
    let best = numbers.fold(None, |best: Option<(usize, f32)>, (id, &v)| match best {
        Some((_, max)) if max >= v => best,
        _ => Some((id, v)),
    });
    // A vocabulary's ids are u32.
    best.map(|(id, v)| (id as u32, v))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cpu::Cpu;
    use gguf::Dtype;
    use model::Model;
    use oracle::Oracle;
    use synth::Shape;

    use super::*;
    use crate::Comparison;

    fn model() -> Arc<Model> {
        let mut shape = Shape::named("tiny-moe").expect("a shape of the list");
        shape.config.layers = 2;
        Arc::new(synth::model(&shape, 7, |_| Dtype::F32))
    }

    fn cpu(model: &Arc<Model>, max_rows: usize) -> Run<Cpu> {
        let options = cpu::Options { max_rows, threads: 1, ..cpu::Options::for_context(100) };
        Run::new(Cpu::new(model.clone(), &options).expect("one thread"))
    }

    const PROMPT: [u32; 5] = [9, 8, 7, 6, 5];

    #[test]
    fn a_run_is_the_same_however_it_is_fed() {
        let model = model();
        let mut whole = cpu(&model, 100);
        let want = whole.feed(&PROMPT).expect("it computes").to_vec();
        let check = |max_rows, cut: usize| {
            let mut run = cpu(&model, max_rows);
            run.feed(&PROMPT[..cut]).expect("it computes");
            let got = run.feed(&PROMPT[cut..]).expect("it computes");
            let comparison = Comparison::of(&want, got);
            assert!(comparison.bits_equal() && comparison.finite(), "{max_rows} {cut}: {comparison:?}");
        };
        check(100, 1);
        check(100, 4);
        check(2, 3);
        check(1, 2);
        // Another prompt has other logits.
        let other = cpu(&model, 100).feed(&[9, 8, 7, 5, 6]).expect("it computes").to_vec();
        assert!(!Comparison::of(&want, &other).bits_equal());
    }

    #[test]
    fn backends_of_any_kind() {
        let model = model();
        let boxed: [Box<dyn Backend>; 2] = [
            Box::new(Cpu::new(model.clone(), &cpu::Options::for_context(100)).expect("threads")),
            Box::new(Oracle::new(model.clone(), 100, 2)),
        ];
        let [left, right] =
            boxed.map(|backend| Run::new(backend).feed(&PROMPT).expect("it computes").to_vec());
        let comparison = Comparison::of(&left, &right);
        let apart = comparison.apart.expect("numbers");
        assert!(!comparison.bits_equal() && apart.cosine.is_some_and(|c| c > 0.9999), "{comparison:?}");
    }

    #[test]
    fn a_context_has_an_end() {
        let model = model();
        let mut run = cpu(&model, 100);
        run.feed(&[1; 100]).expect("it fits");
        let Err(Fault::Capacity { got: 101, limit: 100, .. }) = run.feed(&[1]) else {
            panic!("it does not fit")
        };
    }

    #[test]
    fn the_likeliest_token() {
        let check = |logits: &[f32], want| assert_eq!(argmax(logits), want, "{logits:?}");
        check(&[], None);
        check(&[f32::NAN], None);
        check(&[1.0, 3.0, 3.0, 2.0], Some((1, 3.0)));
        check(&[f32::NAN, -1.0, f32::NEG_INFINITY], Some((1, -1.0)));
        check(&[f32::NEG_INFINITY], Some((0, f32::NEG_INFINITY)));
    }
}
