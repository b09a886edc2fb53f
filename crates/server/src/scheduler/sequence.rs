//! One sequence in the engine: its tokens, its blocks, and how the next token is chosen. Knows nothing of other sequences.

use engine::{SamplerError, logprobs};
use model::{BLOCK, Lane, Row};

use crate::job::{Event, Finish, Job, JobError, Logprobs};

/// A job, waiting or running.
pub(crate) struct Sequence {
    pub(crate) job: Job,
    /// The prompt and what was generated.
    pub(crate) tokens: Vec<u32>,
    /// How many of them are the prompt's.
    prompt: usize,
    /// KV blocks; those up to `computed` hold keys and values.
    pub(crate) table: Vec<u32>,
    /// Tokens whose keys and values are there.
    pub(crate) computed: usize,
    /// Blocks that others may find.
    pub(crate) published: usize,
    /// The order of arrival.
    pub(crate) number: u64,
    /// Whether [`Event::Begun`] was sent.
    begun: bool,
    checksum: u64,
}

/// What was chosen by a row of logits.
pub(crate) struct Chosen {
    token: u32,
    logprobs: Option<Box<Logprobs>>,
}

impl Chosen {
    /// A token that the backend has chosen.
    pub(crate) fn of(token: u32) -> Chosen {
        Chosen { token, logprobs: None }
    }
}

impl Sequence {
    pub(crate) fn new(mut job: Job, number: u64) -> Sequence {
        let tokens = std::mem::take(&mut job.prompt);
        Sequence {
            job,
            prompt: tokens.len(),
            tokens,
            table: Vec::new(),
            computed: 0,
            published: 0,
            number,
            begun: false,
            checksum: CHECKSUM,
        }
    }

    /// Rows to compute before the next token can be chosen: 1 while decoding.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens generated.
    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Whether the logits of the prompt's rows are wanted, and were not all sent.
    pub(crate) fn scores_prompt(&self) -> bool {
        self.job.prompt_logprobs.is_some() && self.generated() == 0
    }

    /// Its turn has come, with the keys and values of `cached` tokens there; whether that is the first time.
    pub(crate) fn begin(&mut self, cached: usize) -> bool {
        self.computed = cached;
        self.job.ticket = None;
        let first = !std::mem::replace(&mut self.begun, true);
        if first {
            self.send(Event::Begun { cached });
        }
        first
    }

    /// Whether choosing its tokens needs nothing that only the host has.
    pub(crate) fn is_free(&self) -> bool {
        let Job { grammar, logprobs, checksum, .. } = &self.job;
        grammar.is_none() && logprobs.is_none() && !checksum && !self.scores_prompt()
    }

    /// Itself, as what a backend goes on with that chooses its next tokens; none if that needs what only the host has.
    pub(crate) fn lane(&self, table: Vec<u32>) -> Option<Lane> {
        let params = self.job.sampler.params();
        self.is_free().then(|| Lane {
            // Positions are below the context, which is below 2^32.
            position: self.tokens.len() as u32,
            table,
            choice: params.choice(),
            adjustment: params.adjustment(&self.tokens),
        })
    }

    /// Places that its history takes of a backend that makes so many choices for it.
    pub(crate) fn history(&self, choices: usize) -> usize {
        let params = self.job.sampler.params();
        if params.adjusts() { params.adjusted(self.tokens.len()) + choices } else { 0 }
    }

    /// Tokens that it may still get, for each of which there is a place.
    pub(crate) fn room(&self, context: usize) -> usize {
        (self.job.max_tokens - self.generated()).min(context.saturating_sub(self.tokens.len()))
    }

    /// Blocks for its next `tokens`, or for as many as it may still get.
    pub(crate) fn places(&self, tokens: usize, context: usize) -> usize {
        (self.tokens.len() + tokens.min(self.room(context))).div_ceil(BLOCK)
    }

    /// The next `count` rows, of sequence `index` of a step.
    pub(crate) fn rows(&self, count: usize, index: u32) -> impl Iterator<Item = Row> + '_ {
        // Positions are below the context, which is below 2^32.
        let positions = self.computed as u32..;
        let tokens = &self.tokens[self.computed..][..count];
        tokens.iter().zip(positions).map(move |(&token, position)| Row { token, position, sequence: index })
    }

    /// Chooses the next token by `logits`, `[V]`. Every logit is looked at, which is the numeric guard.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> Result<Chosen, Refusal> {
        let mask = match &mut self.job.grammar {
            Some(grammar) => grammar.mask().map_err(|error| Refusal::Choice(error.to_string()))?,
            None => None,
        };
        // As many positions as tokens: exact.
        let position = self.tokens.len() as u64;
        let sampler = &mut self.job.sampler;
        let ids = sampler.params().ids;
        let token = sampler.sample_allowed(
            logits,
            &self.tokens,
            position,
            mask.as_ref().map(|mask| mask.as_slice()),
        )?;
        let logprobs = match self.job.logprobs {
            Some(top) => {
                let (chosen, top) = logprobs(logits, token, top, ids)?;
                Some(Box::new(Logprobs { chosen, top }))
            }
            None => None,
        };
        if self.job.checksum {
            self.checksum = mix(self.checksum, logits);
        }
        Ok(Chosen { token, logprobs })
    }

    /// Sends the log-probabilities of the prompt's tokens that follow the rows of `logits`, `[rows, V]`, the first of which
    /// is at position `from`.
    pub(crate) fn score(&self, from: usize, logits: &[f32], vocab: usize) -> Result<(), Refusal> {
        let Some(top) = self.job.prompt_logprobs else { return Ok(()) };
        let ids = self.job.sampler.params().ids;
        let next = self.tokens[from + 1..self.prompt].iter();
        let scored = logits.chunks_exact(vocab).zip(next).map(|(row, &token)| {
            let (chosen, top) = logprobs(row, token, top, ids)?;
            Ok(Logprobs { chosen, top })
        });
        let scored = scored.collect::<Result<Vec<_>, SamplerError>>()?;
        self.send(Event::Prompt(scored));
        Ok(())
    }

    /// Takes what was chosen; says why, if the sequence ends with it. `context`: the positions that there are.
    pub(crate) fn accept(&mut self, chosen: Chosen, context: usize) -> Result<Option<Finish>, Refusal> {
        let Chosen { token, logprobs } = chosen;
        if self.job.ends.contains(&token) {
            return Ok(Some(Finish::Stop));
        }
        self.tokens.push(token);
        self.send(Event::Token { id: token, logprobs });
        if let Some(grammar) = &mut self.job.grammar
            && grammar.accept(token).map_err(|error| Refusal::Choice(error.to_string()))?
        {
            return Ok(Some(Finish::Stop));
        }
        let is_full = self.generated() == self.job.max_tokens || self.tokens.len() > context;
        Ok(is_full.then_some(Finish::Length))
    }

    /// The last word.
    pub(crate) fn end(&self, finish: Finish) {
        self.send(Event::End(finish, self.job.checksum.then_some(self.checksum)));
    }

    /// The last word where it went wrong.
    pub(crate) fn fail(&self, error: JobError) {
        self.send(Event::Failed(error));
    }

    /// Whether somebody still listens.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.job.events.is_closed()
    }

    fn send(&self, event: Event) {
        // Who no longer listens is noticed before the next step.
        let _ = self.job.events.send(event);
    }
}

/// Why no token was chosen.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The logits are no numbers.
    Numeric(String),
    /// The sampler or the grammar has none.
    Choice(String),
}

impl From<SamplerError> for Refusal {
    fn from(error: SamplerError) -> Refusal {
        match error {
            SamplerError::NonFinite { .. } => Refusal::Numeric(error.to_string()),
            _ => Refusal::Choice(error.to_string()),
        }
    }
}

/// What a checksum begins with.
pub(crate) const CHECKSUM: u64 = 0x9E37_79B9_7F4A_7C15;

/// A checksum of logits: every bit counts, and so does their order. Multiplication by an odd number and exclusive or, in
/// four lanes for speed: 600 kB of logits take some 50 microseconds.
pub(crate) fn mix(seed: u64, logits: &[f32]) -> u64 {
    const ODD: u64 = 0xD6E8_FEB8_6659_FD93;
    let mut lanes = [seed, !seed, seed.rotate_left(17), seed.rotate_left(43)];
    for four in logits.chunks(4) {
        for (lane, logit) in lanes.iter_mut().zip(four) {
            *lane = (*lane ^ u64::from(logit.to_bits())).wrapping_mul(ODD);
            *lane ^= *lane >> 32;
        }
    }
    lanes.into_iter().fold(seed, |sum, lane| (sum ^ lane).wrapping_mul(ODD).rotate_left(29))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_counts() {
        let logits: Vec<f32> = (0u8..103).map(f32::from).collect();
        let sum = mix(CHECKSUM, &logits);
        assert_ne!(mix(CHECKSUM + 1, &logits), sum);
        assert_ne!(mix(CHECKSUM, &logits[..102]), sum);
        for at in 0..logits.len() {
            for bit in 0..32 {
                let mut other = logits.clone();
                other[at] = f32::from_bits(other[at].to_bits() ^ 1 << bit);
                assert_ne!(mix(CHECKSUM, &other), sum, "{at} {bit}");
            }
            let mut other = logits.clone();
            other.swap(at, (at + 1) % 103);
            assert_ne!(mix(CHECKSUM, &other), sum, "{at} swapped");
        }
    }
}
