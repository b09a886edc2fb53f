//! One step: its rows run, its tokens are chosen, by the backend or here, and what that means for each sequence. Decides
//! nothing about who runs.

use rayon::prelude::*;

use super::sequence::Chosen;
use super::*;

/// Logits of a step from which on they are looked at on several threads.
const MANY_LOGITS: usize = 1 << 20;
/// Sequences for which a backend chooses at least, if that is to be worth a step of their own.
const FEW: usize = 4;

/// What a sequence has in a step.
pub(super) struct Part {
    /// Index among those running.
    pub(super) index: usize,
    /// Rows.
    pub(super) rows: usize,
    /// How many of them, at the end, have logits.
    pub(super) logits: usize,
}

impl<B: Backend> Scheduler<B> {
    /// Runs a step of `parts`, and hands out what comes of it.
    pub(super) fn compute(&mut self, parts: Vec<Part>) -> Result<(), Fault> {
        let (start, context) = (Instant::now(), self.context());
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        let decoding = parts.iter().filter(|part| part.rows == 1 && part.logits == 1).count();
        let chooses = parts.iter().any(|part| part.logits > 0);
        let mut outcomes: Vec<Option<Outcome>> = Vec::new();
        outcomes.resize_with(self.running.len(), || None);
        for group in self.groups(parts) {
            self.run(&group, &mut outcomes)?;
        }
        let elapsed = start.elapsed();
        // The device may run behind its host until something is asked of it: then a step has taken its time.
        if chooses {
            self.pace.observe(rows - decoding, decoding, elapsed);
        }
        self.shared.metrics.step(rows - decoding, elapsed);
        for (sequence, outcome) in std::mem::take(&mut self.running).into_iter().zip(outcomes) {
            let on = match outcome {
                Some(outcome) => self.settle(sequence, outcome, context),
                None => Some(sequence),
            };
            self.running.extend(on);
        }
        Ok(())
    }

    /// The parts that are computed together: all, unless the backend can choose for many and the host must for some. Logits
    /// come to the host row by row, and one who asks for log-probabilities must not bring down those of everybody.
    fn groups(&mut self, parts: Vec<Part>) -> Vec<Vec<Part>> {
        let Some(chooser) = self.backend.chooser() else { return vec![parts] };
        let mut places = chooser.places();
        let is_free = |part: &Part| {
            let sequence = &self.running[part.index];
            if part.logits == 0 || !sequence.is_free() {
                return part.logits == 0;
            }
            // One choice, and no more of a block than that leaves.
            let needed = sequence.history(1 + BLOCK);
            let fits = needed <= places;
            places -= if fits { needed } else { 0 };
            fits
        };
        let (free, held): (Vec<Part>, Vec<Part>) = parts.into_iter().partition(is_free);
        let chosen = free.iter().filter(|part| part.logits > 0).count();
        match held.is_empty() || chosen < FEW {
            true => vec![free.into_iter().chain(held).collect()],
            false => vec![free, held],
        }
    }

    /// Computes `parts`, and chooses.
    fn run(&mut self, parts: &[Part], outcomes: &mut [Option<Outcome>]) -> Result<(), Fault> {
        let (step, vocab) = (self.step(parts), self.backend.model().config.vocab);
        if step.rows.is_empty() {
            return Ok(());
        }
        forward(&mut self.backend, &step)?;
        match self.draw(parts)? {
            Some(drawn) => self.drawn(parts, drawn, outcomes),
            // Asked for once: it may be a copy from a device.
            None => {
                let logits = if step.logits.is_empty() { &[] } else { self.backend.logits()? };
                choose(&mut self.running, parts, logits, vocab, outcomes);
            }
        }
        Ok(())
    }

    /// Takes what the backend has chosen.
    fn drawn(&mut self, parts: &[Part], drawn: Vec<Drawn>, outcomes: &mut [Option<Outcome>]) {
        let mut drawn = drawn.into_iter();
        for part in parts {
            self.running[part.index].computed += part.rows;
            let chosen = if part.logits > 0 { drawn.next() } else { None };
            outcomes[part.index] = Some(chosen.map_or(Outcome::Reading, |chosen| self.outcome(chosen)));
        }
    }

    pub(super) fn step(&self, parts: &[Part]) -> Step {
        let mut step = Step::default();
        // Sequences and rows of a step are below 2^32.
        for (number, part) in (0..).zip(parts) {
            let sequence = &self.running[part.index];
            step.rows.extend(sequence.rows(part.rows, number));
            step.tables.push(sequence.table.clone());
            let end = step.rows.len() as u32;
            step.logits.extend(end - part.logits as u32..end);
        }
        step
    }
}

/// Chooses for `running` what a step of `parts` gives, by `logits`, `[R, V]`, in the order of the parts. Nothing changes for
/// those that the step did not touch.
fn choose(
    running: &mut [Sequence],
    parts: &[Part],
    logits: &[f32],
    vocab: usize,
    outcomes: &mut [Option<Outcome>],
) {
    let mut sequences: Vec<Option<&mut Sequence>> = running.iter_mut().map(Some).collect();
    let mut row = 0;
    let work = parts.iter().map(|part| {
        let sequence = sequences[part.index].take().expect("a sequence has one part of a step");
        let logits = &logits[row * vocab..(row + part.logits) * vocab];
        row += part.logits;
        (part, sequence, logits)
    });
    let work: Vec<(&Part, &mut Sequence, &[f32])> = work.collect();
    let choose = |(part, sequence, logits): (&Part, &mut Sequence, &[f32])| {
        (part.index, Outcome::of(part, sequence, logits, vocab))
    };
    let chosen: Vec<(usize, Outcome)> = if logits.len() >= MANY_LOGITS {
        work.into_par_iter().map(choose).collect()
    } else {
        work.into_iter().map(choose).collect()
    };
    chosen.into_iter().for_each(|(index, outcome)| outcomes[index] = Some(outcome));
}

/// What a step meant for a sequence.
pub(super) enum Outcome {
    /// More of the prompt is to be read.
    Reading,
    Chosen(Chosen),
    Refused(Refusal),
}

impl Outcome {
    /// Takes the rows of `part` as computed, and chooses if they were the last.
    fn of(part: &Part, sequence: &mut Sequence, logits: &[f32], vocab: usize) -> Outcome {
        let from = sequence.computed;
        sequence.computed += part.rows;
        if part.logits == 0 {
            return Outcome::Reading;
        }
        if sequence.scores_prompt()
            && let Err(refusal) = sequence.score(from, logits, vocab)
        {
            return Outcome::Refused(refusal);
        }
        if sequence.pending() > 0 {
            return Outcome::Reading;
        }
        match sequence.choose(&logits[(part.logits - 1) * vocab..]) {
            Ok(chosen) => Outcome::Chosen(chosen),
            Err(refusal) => Outcome::Refused(refusal),
        }
    }
}
