//! The sampling parameters: their ranges, and those that change logits. Knows nothing of weights or chance.

use std::collections::BTreeMap;

use model::{Adjustment, Choice};

use super::SamplerError;

/// How tokens are chosen. Each field says at which value it has no effect.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerParams {
    /// Divides the logits; from 0 to 100. 0 (and below the smallest normal f32) is greedy: always the likeliest token.
    pub temperature: f32,
    /// Keeps the likeliest k tokens. 0: all.
    pub top_k: usize,
    /// Keeps the likeliest tokens that together have this part of the probability; above 0, to 1. 1: all.
    /// Source: Holtzman et al., "The curious case of neural text degeneration", ICLR 2020.
    pub top_p: f32,
    /// Keeps the tokens with at least this part of the likeliest token's probability; from 0, below 1. 0: all.
    /// Source: Nguyen et al., "Turning up the heat: min-p sampling", ICLR 2025.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the window; above 0. 1: none.
    /// Source: Keskar et al., "CTRL", 2019.
    pub repeat_penalty: f32,
    /// Subtracted from the logits of tokens in the window. 0: none.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the window as often as they are there. 0: none.
    pub frequency_penalty: f32,
    /// How many tokens at the end of the history the three penalties look at.
    pub penalty_window: usize,
    /// Added to the logits of these ids, after penalties.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Ids from this on are never chosen, whatever their logits: a head may have more rows than there are tokens. At least 1.
    pub ids: u32,
    /// Selects one of 2^64 sequences of random numbers.
    pub seed: u64,
}

impl Default for SamplerParams {
    /// The model's own distribution: temperature 1, nothing cut off, no penalty, seed 0.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 64,
            logit_bias: BTreeMap::new(),
            ids: u32::MAX,
            seed: 0,
        }
    }
}

impl SamplerParams {
    /// Always the likeliest token, without penalties.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the likeliest token is always chosen.
    pub fn is_greedy(&self) -> bool {
        // Below, 1 / temperature may be infinite.
        self.temperature < f32::MIN_POSITIVE
    }

    /// The same for a backend that chooses tokens itself.
    pub fn choice(&self) -> Choice {
        Choice {
            inverse_temperature: (!self.is_greedy()).then(|| 1.0 / self.temperature),
            // No vocabulary reaches 2^32: the largest k keeps all.
            top_k: u32::try_from(self.top_k).unwrap_or(u32::MAX),
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            ids: self.ids,
        }
    }

    /// What such a backend changes of the logits before that, from the end of `history` on; none where nothing changes.
    pub fn adjustment(&self, history: &[u32]) -> Option<Adjustment> {
        let window = if self.penalises() { self.penalty_window } else { 0 };
        self.adjusts().then(|| Adjustment {
            repeat: self.repeat_penalty,
            presence: self.presence_penalty,
            frequency: self.frequency_penalty,
            window,
            recent: recent(history, window).to_vec(),
            bias: self.logit_bias.iter().map(|(&id, &bias)| (id, bias)).collect(),
        })
    }

    /// Checks that there are so many logits that every bias has one.
    ///
    /// # Errors
    /// [`SamplerError::BiasedId`].
    pub(crate) fn check_bias(&self, len: usize) -> Result<(), SamplerError> {
        let len = len.min(self.ids as usize); // 32 bits fit
        match self.logit_bias.last_key_value() {
            Some((&id, _)) if id as usize >= len => Err(SamplerError::BiasedId { id, len }),
            _ => Ok(()),
        }
    }

    /// How many tokens of a history of `length` [`SamplerParams::adjustment`] takes up, and how many biases.
    pub fn adjusted(&self, length: usize) -> usize {
        let seen = if self.penalises() { self.penalty_window.min(length) } else { 0 };
        seen + self.logit_bias.len()
    }

    /// Checks every range; a comparison with NaN is false.
    pub(super) fn check(&self) -> Result<(), SamplerError> {
        let Self { temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty, .. } =
            *self;
        let in_range = [
            ("temperature", temperature, (0.0..=100.0).contains(&temperature), "from 0 to 100"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", min_p, (0.0..1.0).contains(&min_p), "at least 0 and below 1"),
            (
                "repeat_penalty",
                repeat_penalty,
                repeat_penalty > 0.0 && repeat_penalty.is_finite(),
                "above 0 and finite",
            ),
            ("presence_penalty", presence_penalty, presence_penalty.is_finite(), "finite"),
            ("frequency_penalty", frequency_penalty, frequency_penalty.is_finite(), "finite"),
        ];
        if self.ids == 0 {
            return Err(SamplerError::NoLogits);
        }
        let biases = self.logit_bias.values().map(|&bias| ("logit_bias", bias, bias.is_finite(), "finite"));
        match in_range.into_iter().chain(biases).find(|&(_, _, is_in_range, _)| !is_in_range) {
            Some((name, value, _, range)) => Err(SamplerError::Parameter { name, value, range }),
            None => Ok(()),
        }
    }

    /// Whether a penalty can change a logit.
    fn penalises(&self) -> bool {
        let some =
            self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0;
        some && self.penalty_window > 0
    }

    /// Whether penalties or biases can change a logit.
    pub fn adjusts(&self) -> bool {
        self.penalises() || !self.logit_bias.is_empty()
    }

    /// Penalties and bias, on finite logits, each operation rounded to f32:
    /// `l = l / repeat` if `l > 0`, else `l * repeat`; `l = (l - count * frequency) - presence`; `l = l + bias`.
    /// What overflows stays the largest finite number of its sign.
    pub(super) fn adjust(&self, logits: &mut [f32], history: &[u32]) -> Result<(), SamplerError> {
        let finite = |logit: f32| logit.clamp(f32::MIN, f32::MAX);
        let mut window = recent(history, self.penalty_window).to_vec();
        window.sort_unstable();
        for same in window.chunk_by(|a, b| a == b) {
            // An id beyond the logits cannot be chosen, so needs no penalty.
            let Some(logit) = logits.get_mut(same[0] as usize) else { continue };
            let repeated =
                if *logit > 0.0 { *logit / self.repeat_penalty } else { *logit * self.repeat_penalty };
            let count = same.len() as f32; // exact to 2^24, longer than any context
            *logit = finite(finite(repeated) - finite(count * self.frequency_penalty));
            *logit = finite(*logit - self.presence_penalty);
        }
        self.check_bias(logits.len())?;
        for (&id, bias) in &self.logit_bias {
            logits[id as usize] = finite(logits[id as usize] + bias);
        }
        Ok(())
    }
}

/// The last `window` of `history`.
fn recent(history: &[u32], window: usize) -> &[u32] {
    &history[history.len().saturating_sub(window)..]
}
