//! Choosing without the host, where a backend can: the logits stay where they are, and one number a sequence comes back. The
//! tokens are those that the host would choose (`engine::sampler`).
//!
//! A *draw* chooses once, by the logits of a step that the host put together. A *burst* goes on by itself, as long as the
//! same sequences decode and nobody joins them; the host hears of each token a step late. Who comes to an end within a burst
//! stays in it as ballast until a good part has: beginning anew costs two steps, and a row that nobody wants costs little.

use super::sequence::Chosen;
use super::*;

/// Tokens of a burst at most: what it costs to begin one is then nothing.
const LONGEST: usize = 256;
/// Below this a burst is not worth its beginning.
const SHORTEST: usize = 4;
/// The part of a burst's sequences that may be over before it ends.
const BALLAST: usize = 8;

/// Whether the backend can choose `choices` tokens for each of `sequences` and remember what their penalties look at.
fn remembers<'a>(
    backend: &mut impl Backend,
    sequences: impl Iterator<Item = &'a Sequence>,
    choices: usize,
) -> bool {
    // Tables end with a block.
    let needed = sequences.map(|sequence| sequence.history(choices + BLOCK)).sum();
    backend.chooser().is_some_and(|chooser| chooser.places() >= needed)
}

impl<B: Backend> Scheduler<B> {
    /// What the backend chooses by the step of `parts`, whose forward was run: one for each part with logits. None where a
    /// choice needs what only the host has, or the backend cannot choose.
    pub(super) fn draw(&mut self, parts: &[Part]) -> Result<Option<Vec<Drawn>>, Fault> {
        let chosen = parts.iter().filter(|part| part.logits > 0).map(|part| &self.running[part.index]);
        if !remembers(&mut self.backend, chosen.clone(), 1) {
            return Ok(None);
        }
        // The next step is the host's: there is no place for the token that is chosen, so it is not fed.
        let lanes: Option<Vec<Lane>> = chosen.map(|sequence| sequence.lane(Vec::new())).collect();
        match lanes {
            Some(lanes) if self.take_up(&lanes)? => {}
            _ => return Ok(None),
        }
        let chooser = self.backend.chooser().expect("it has taken them up");
        chooser.advance()?;
        chooser.collect().map(Some)
    }

    /// Whether the backend goes on with `lanes` by itself from here.
    fn take_up(&mut self, lanes: &[Lane]) -> Result<bool, Fault> {
        if lanes.is_empty() || lanes.len() > self.widest_burst {
            return Ok(false);
        }
        let Some(chooser) = self.backend.chooser() else { return Ok(false) };
        match chooser.start(lanes) {
            Ok(()) => Ok(true),
            // So many at a time the host chooses for.
            Err(Fault::Capacity { .. }) => {
                self.widest_burst = lanes.len() - 1;
                Ok(false)
            }
            Err(fault) => Err(fault),
        }
    }

    /// Decodes until something changes; false if it is not the time for it.
    pub(super) fn burst(&mut self) -> Result<bool, Fault> {
        let mut steps = self.steps_of_burst();
        while steps >= SHORTEST && self.blocks_of_burst(steps) > self.cache.available() {
            steps /= 2;
        }
        if steps < SHORTEST {
            return Ok(false);
        }
        let mut scratch = Vec::new();
        let lanes = self.lanes(steps, &mut scratch);
        let outcome = match lanes {
            Some(lanes) => self.run_burst(&lanes, steps),
            None => Ok(false),
        };
        self.cache.truncate(&mut scratch, 0);
        // What was taken in advance and not used is there for who comes next.
        for sequence in &mut self.running {
            self.cache.truncate(&mut sequence.table, sequence.tokens.len().div_ceil(BLOCK));
        }
        outcome
    }

    /// How many tokens a burst could give now; 0 where there can be none.
    fn steps_of_burst(&mut self) -> usize {
        let free = |sequence: &Sequence| sequence.pending() == 1 && sequence.is_free();
        if self.running.len() > self.widest_burst.min(self.backend.max_rows())
            || !self.running.iter().all(free)
            || self.shared.has_news()
            || !remembers(&mut self.backend, self.running.iter(), LONGEST)
        {
            return 0;
        }
        let context = self.context();
        let mut room: Vec<usize> = self.running.iter().map(|sequence| sequence.room(context)).collect();
        room.sort_unstable();
        // Those that end soon may be ballast; the one that is furthest must find a place for every token.
        let ballast = room.len() / BALLAST;
        let furthest = self.running.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);
        match room.get(ballast) {
            Some(&least) if least >= SHORTEST => {
                room[room.len() - 1].min(LONGEST).min(context.saturating_sub(furthest))
            }
            _ => 0,
        }
    }

    /// Blocks that a burst of `steps` tokens needs beyond those that there are.
    fn blocks_of_burst(&self, steps: usize) -> usize {
        let context = self.context();
        let more = |sequence: &Sequence| sequence.places(steps, context).saturating_sub(sequence.table.len());
        1 + self.running.iter().map(more).sum::<usize>()
    }

    /// Every running sequence with its places for a burst of `steps` tokens. `scratch` gets the block for what a sequence
    /// computes beyond its own end. None where memory is short.
    fn lanes(&mut self, steps: usize, scratch: &mut Vec<u32>) -> Option<Vec<Lane>> {
        let context = self.context();
        self.cache.extend(scratch, 1).ok()?;
        let furthest = self.running.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);
        // A backend may ask for a place for the furthest position in every table.
        let all = (furthest + steps).div_ceil(BLOCK);
        let mut lanes = Vec::new();
        for sequence in &mut self.running {
            let places = sequence.places(steps, context);
            self.cache.extend(&mut sequence.table, places).ok()?;
            let mut table = sequence.table.clone();
            table.resize(all.max(table.len()), scratch[0]);
            lanes.push(sequence.lane(table).expect("its choice was asked for before"));
        }
        Some(lanes)
    }

    fn run_burst(&mut self, lanes: &[Lane], steps: usize) -> Result<bool, Fault> {
        let parts: Vec<Part> = (0..lanes.len()).map(|index| Part { index, rows: 1, logits: 1 }).collect();
        let (step, context) = (self.step(&parts), self.context());
        forward(&mut self.backend, &step)?;
        if !self.take_up(lanes)? {
            // The step is computed again, to the same bits.
            return Ok(false);
        }
        // Of each that still runs, its place among the lanes.
        let mut places: Vec<usize> = (0..lanes.len()).collect();
        let mut asked = 0;
        for done in 0..steps {
            let start = Instant::now();
            let chooser = self.backend.chooser().expect("it has taken them up");
            while asked < (done + 2).min(steps) {
                chooser.advance()?;
                asked += 1;
            }
            let drawn = chooser.collect()?;
            let elapsed = start.elapsed();
            self.shared.metrics.step(0, elapsed);
            // The first two begin together.
            if done > 1 {
                self.pace.observe(0, lanes.len(), elapsed);
            }
            let (running, at) = (std::mem::take(&mut self.running), std::mem::take(&mut places));
            let mut refused = false;
            for (mut sequence, place) in running.into_iter().zip(at) {
                sequence.computed = sequence.tokens.len();
                let outcome = self.outcome(drawn[place]);
                refused |= matches!(outcome, Outcome::Refused(_));
                if let Some(sequence) = self.settle(sequence, outcome, context) {
                    self.running.push(sequence);
                    places.push(place);
                }
            }
            self.tell();
            // What is in flight ends before anything else begins; what it leaves lies beyond every end, and is written again.
            let over = lanes.len() - places.len();
            let shed = places.is_empty() || over > lanes.len() / BALLAST;
            if refused || shed || (over > 0 && self.waiting.len() > 0) || self.has_changed(start) {
                break;
            }
        }
        Ok(true)
    }

    /// Whether somebody has come, has gone, or is out of time.
    fn has_changed(&self, now: Instant) -> bool {
        let unwanted = |sequence: &Sequence| !sequence.is_wanted() || now >= sequence.job.deadline;
        self.shared.has_news() || self.running.iter().any(unwanted) || self.waiting.any(unwanted)
    }

    /// What the backend has chosen, as the host would say it.
    pub(super) fn outcome(&self, drawn: Drawn) -> Outcome {
        let vocab = self.backend.model().config.vocab;
        match drawn {
            Drawn::Token(token) => Outcome::Chosen(Chosen::of(token)),
            Drawn::NonFinite { nan, infinite, first } => Outcome::Refused(Refusal::Numeric(format!(
                "{nan} NaN and {infinite} infinite among {vocab} logits, the first at token id {first}"
            ))),
        }
    }
}
