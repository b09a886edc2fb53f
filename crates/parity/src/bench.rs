//! A stage alone on both sides: a fresh sequence from position 0, inputs given, outputs read. What localisation asks its
//! questions of.

use std::collections::BTreeMap;

use model::{BLOCK, Backend, Buffer, Fault, Site, Stage, Step};

use crate::bisect::BisectError;

/// Inputs or outputs of a stage.
pub(crate) type Values = BTreeMap<Buffer, Vec<f32>>;

/// Two backends to be asked.
pub(crate) struct Bench<'a> {
    pub(crate) backends: [&'a mut dyn Backend; 2],
    pub(crate) names: [String; 2],
    /// Whether both keep the inside of stages.
    pub(crate) inside: bool,
}

/// A step of one sequence from position 0 in the first KV blocks, with logits of every row.
pub(crate) fn fresh(tokens: &[u32]) -> Step {
    from(0, tokens)
}

/// The same from position `start` on.
pub(crate) fn from(start: u32, tokens: &[u32]) -> Step {
    // Positions of a step are far below 2^32, and `usize` is no narrower.
    let table = (0..(start as usize + tokens.len()).div_ceil(BLOCK) as u32).collect();
    Step { logits: (0..tokens.len() as u32).collect(), ..Step::prefill(tokens, start, table) }
}

/// Runs `site` alone on one backend and returns `outputs`. Attention is given its keys and values by `rope_store` on
/// [`Buffer::K`] and [`Buffer::V`] first, if they are among the inputs.
pub(crate) fn run_stage(
    backend: &mut dyn Backend,
    step: &Step,
    site: Site,
    inputs: &Values,
    outputs: &[Buffer],
) -> Result<Values, Fault> {
    backend.begin(step)?;
    if site.stage == Stage::Attend && inputs.contains_key(&Buffer::K) {
        let rows = step.rows.len();
        let queries = vec![0.0; Buffer::Q.shape(&backend.model().config, rows, 0).iter().product()];
        backend.write(Buffer::Q, &queries)?;
        for buffer in [Buffer::K, Buffer::V] {
            backend.write(buffer, &inputs[&buffer])?;
        }
        backend.run(Site { stage: Stage::RopeStore, ..site })?;
    }
    for &buffer in site.stage.reads() {
        if let Some(values) = inputs.get(&buffer) {
            backend.write(buffer, values)?;
        }
    }
    backend.run(site)?;
    outputs.iter().map(|&buffer| Ok((buffer, backend.read(buffer)?))).collect()
}

impl Bench<'_> {
    /// What each side makes of the inputs.
    pub(crate) fn ask(
        &mut self,
        step: &Step,
        site: Site,
        inputs: &Values,
        outputs: &[Buffer],
    ) -> Result<[Values; 2], BisectError> {
        let mut answers = [Values::new(), Values::new()];
        for ((backend, name), answer) in self.backends.iter_mut().zip(&self.names).zip(&mut answers) {
            *answer = run_stage(&mut **backend, step, site, inputs, outputs)
                .map_err(|source| BisectError::Side { side: name.clone(), source })?;
        }
        Ok(answers)
    }

    /// Rows that a step may have on both.
    pub(crate) fn max_rows(&self) -> usize {
        self.backends
            .iter()
            .map(|b| b.max_rows().min(b.context()).min(b.kv_blocks() * BLOCK))
            .min()
            .unwrap_or(0)
    }
}
