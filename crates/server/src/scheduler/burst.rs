//! Decoding without the host: as long as the same sequences decode and nobody waits, a backend that can choose tokens itself
//! does, and the host hears of each a step late. The tokens are those that the host would choose (`engine::sampler`).

use super::*;

/// Tokens of a burst at most: what it costs to begin one is then nothing.
const LONGEST: usize = 256;
/// Below this a burst is not worth its beginning.
const SHORTEST: usize = 4;

impl<B: Backend> Scheduler<B> {
    /// Decodes until something changes; false if it is not the time for it.
    pub(super) fn burst(&mut self) -> Result<bool, Fault> {
        let (vocab, context) = (self.backend.model().config.vocab, self.context());
        let room = |sequence: &Sequence| {
            let left = sequence.job.max_tokens - sequence.generated();
            left.min(context.saturating_sub(sequence.tokens.len()))
        };
        let steps = self.running.iter().map(room).min().unwrap_or(0).min(LONGEST);
        let free = |sequence: &Sequence| sequence.pending() == 1 && sequence.choice().is_some();
        if steps < SHORTEST
            || self.shared.waiting() > 0
            || self.running.len() > self.widest_burst.min(self.backend.max_rows())
            || !self.running.iter().all(free)
            || self.backend.chooser().is_none()
        {
            return Ok(false);
        }
        for sequence in &mut self.running {
            let blocks = (sequence.tokens.len() + steps).div_ceil(BLOCK);
            if self.cache.extend(&mut sequence.table, blocks).is_err() {
                return Ok(false);
            }
        }
        let parts: Vec<Part> =
            (0..self.running.len()).map(|index| Part { index, rows: 1, logits: 1 }).collect();
        let step = self.step(&parts);
        forward(&mut self.backend, &step)?;
        let furthest = self.running.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);
        // A backend may ask for a place for the furthest position in every table; it writes none of those beyond a
        // sequence's own, so any block will do.
        let padded = |table: &[u32]| {
            let mut table = table.to_vec();
            let last = table.last().copied().unwrap_or(0);
            table.resize((furthest + steps).div_ceil(BLOCK).max(table.len()), last);
            table
        };
        let lane = |sequence: &Sequence| Lane {
            // Positions are below the context, which is below 2^32.
            position: sequence.tokens.len() as u32,
            table: padded(&sequence.table),
            choice: sequence.choice().expect("it has just been asked for"),
        };
        let lanes: Vec<Lane> = self.running.iter().map(lane).collect();
        match self.backend.chooser().expect("it has just been asked for").start(&lanes) {
            Ok(()) => {}
            // So many at a time the host chooses for; the step is computed again, to the same bits.
            Err(Fault::Capacity { .. }) => {
                self.widest_burst = lanes.len() - 1;
                return Ok(false);
            }
            Err(fault) => return Err(fault),
        }
        let mut asked = 0;
        for done in 0..steps {
            let start = Instant::now();
            let chooser = self.backend.chooser().expect("as before");
            while asked < (done + 2).min(steps) {
                chooser.advance()?;
                asked += 1;
            }
            let drawn = chooser.collect()?;
            self.shared.metrics.step(0, start.elapsed());
            let before = self.running.len();
            for (mut sequence, drawn) in std::mem::take(&mut self.running).into_iter().zip(drawn) {
                sequence.computed = sequence.tokens.len();
                let outcome = match drawn {
                    Drawn::Token(token) => Outcome::Chosen(Chosen::of(token)),
                    Drawn::NonFinite { nan, infinite, first } => Outcome::Refused(Refusal::Numeric(format!(
                        "{nan} NaN and {infinite} infinite among {vocab} logits, the first at token id {first}"
                    ))),
                };
                let on = self.settle(sequence, outcome, context);
                self.running.extend(on);
            }
            // What is in flight ends before anything else begins; what it leaves lies beyond every end, and is written again.
            let unwanted = |sequence: &Sequence| !sequence.is_wanted() || start >= sequence.job.deadline;
            if self.running.len() < before || self.shared.waiting() > 0 || self.running.iter().any(unwanted) {
                break;
            }
        }
        Ok(true)
    }
}
