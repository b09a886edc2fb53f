//! Logits to one token. Knows nothing of text, models or batches.
//!
//! The arithmetic is part of Tally's promise of equal bits: the same logits, history, parameters, seed and position
//! give the same token on any device. In order:
//!
//! 1. Rows beyond the tokens fall away. `params.rs` adjusts raw logits: penalties, then bias, in f32 as written there.
//! 2. Greedy: the largest logit, of equals the lowest id. Else every logit becomes an integer weight,
//!    `w = round_ties_even(exp((l - l_max) * (1 / T)) * 2^32)`, where `1 / T` is rounded to f32 once, the difference
//!    and the product to f32, `exp` is the project's own, and what follows it is exact. Weights being integers, no
//!    sum below depends on its order.
//! 3. In the order (logit descending, id ascending): top-k keeps the first k; top-p the shortest beginning of those
//!    whose weight is at least `ceil(top_p * total)`; min-p those with `w >= ceil(min_p * w_max)`. Both products are
//!    exact, with the f32 parameter taken at its exact value. A token of weight 0 is never drawn.
//! 4. `r = floor(bits * total / 2^64)`, with 64 random bits that depend on seed and position alone; the token is the
//!    first in ascending id order at which the cumulated weight exceeds r.

mod logprobs;
mod params;
mod survey;

use std::cmp::Ordering;

use model::math;

use crate::rng;
pub use logprobs::{TokenLogprob, logprobs};
pub use params::SamplerParams;
use survey::{LANES, Survey};

/// A token that may be drawn.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    /// After penalties and bias.
    logit: f32,
    /// The logit less the largest, divided by the temperature: at most 0.
    scaled: f32,
    /// In units of 2^-32 of the likeliest token's.
    weight: u64,
}

impl Candidate {
    /// The order of top-k and top-p. Logits are finite, and -0 equals +0.
    fn rank(&self, other: &Self) -> Ordering {
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// Chooses tokens by checked parameters. What it chooses depends on its arguments only: it keeps buffers, no state.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplerParams,
    logits: Vec<f32>,
    survey: Survey,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Checks `params`.
    ///
    /// # Errors
    /// [`SamplerError::Parameter`] for one outside its range.
    pub fn new(params: SamplerParams) -> Result<Self, SamplerError> {
        params.check()?;
        Ok(Self { params, logits: Vec::new(), survey: Survey::default(), candidates: Vec::new() })
    }

    /// The parameters.
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// The id of the next token.
    ///
    /// `logits`: `[V]`, as the model gives them. `history`: the tokens before this one, prompt included; penalties
    /// look at its end. `position`: the place of the token to choose in the sequence, from 0.
    ///
    /// # Errors
    /// [`SamplerError::NonFinite`] for a NaN or an infinity among the logits; [`SamplerError::NoLogits`];
    /// [`SamplerError::BiasedId`] for a bias on an id that there is not.
    pub fn sample(&mut self, logits: &[f32], history: &[u32], position: u64) -> Result<u32, SamplerError> {
        self.sample_allowed(logits, history, position, None)
    }

    /// [`Sampler::sample`] among the tokens that a grammar allows: bit `id % 32` of word `id / 32` of `allowed`.
    ///
    /// # Errors
    /// Those of [`Sampler::sample`]; [`SamplerError::NothingAllowed`].
    pub fn sample_allowed(
        &mut self,
        logits: &[f32],
        history: &[u32],
        position: u64,
        allowed: Option<&[u32]>,
    ) -> Result<u32, SamplerError> {
        // Of what cannot be chosen the numbers count nevertheless: it was computed beside the others.
        let (tokens, rest) = logits.split_at(logits.len().min(self.params.ids as usize));
        if rest.iter().any(|logit| !logit.is_finite()) {
            return Err(SamplerError::non_finite(logits));
        }
        let mut best = self.survey.look(tokens).map_err(|error| match error {
            // Counted among all.
            SamplerError::NonFinite { .. } => SamplerError::non_finite(logits),
            error => error,
        })?;
        let mut logits = tokens;
        if self.params.adjusts() || allowed.is_some() {
            self.logits.clear();
            self.logits.extend_from_slice(logits);
            self.params.adjust(&mut self.logits, history)?;
            if let Some(allowed) = allowed {
                forbid(&mut self.logits, allowed)?;
            }
            logits = &self.logits;
            best = self.survey.look(logits)?;
        }
        if self.params.is_greedy() {
            return Ok(best);
        }

        // Of 151,936 tokens few are among the first k: the others never become candidates.
        let least = self.survey.reached_by(self.params.top_k);
        near(logits, least, logits[best as usize], self.params.temperature, &mut self.candidates);
        if self.params.top_k > 0 {
            select(&mut self.candidates, self.params.top_k);
            self.candidates.truncate(self.params.top_k);
        }
        weigh(&mut self.candidates);
        if self.params.top_p < 1.0 {
            top_p(&mut self.candidates, self.params.top_p);
        }
        if self.params.min_p > 0.0 {
            min_p(&mut self.candidates, self.params.min_p);
        }
        // Untruncated candidates are in id order already, and a sorted vector sorts in one pass.
        self.candidates.sort_unstable_by_key(|candidate| candidate.id);
        Ok(draw(&self.candidates, rng::bits_at(self.params.seed, position)))
    }
}

/// Puts the logits of tokens that are not allowed so far down that they weigh nothing, and lifts those of allowed ones
/// above that, whatever biased them.
fn forbid(logits: &mut [f32], allowed: &[u32]) -> Result<(), SamplerError> {
    /// Above `f32::MIN` by more than any temperature takes away.
    const LOWEST: f32 = f32::MIN / 2.0;
    let mut some = false;
    for (id, logit) in logits.iter_mut().enumerate() {
        let is_allowed = allowed.get(id / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
        some |= is_allowed;
        *logit = if is_allowed { logit.max(LOWEST) } else { f32::MIN };
    }
    if some { Ok(()) } else { Err(SamplerError::NothingAllowed) }
}

/// Replaces `candidates` with the tokens, in id order, whose logit is at least `least`, if there is such a bound, and whose
/// weight may be positive. It is yet to be computed: until then the field holds nothing.
fn near(logits: &[f32], least: Option<f32>, max: f32, temperature: f32, candidates: &mut Vec<Candidate>) {
    /// exp(-23) * 2^32 is 0.44, which rounds to 0.
    const NO_WEIGHT: f32 = -23.0;
    let inverse = 1.0 / temperature;
    let candidate = |(id, &logit)| Candidate { id, logit, scaled: (logit - max) * inverse, weight: 0 };
    let may_weigh = |candidate: &Candidate| candidate.scaled > NO_WEIGHT;
    candidates.clear();
    let Some(least) = least else {
        candidates.extend((0u32..).zip(logits).map(candidate).filter(may_weigh));
        return;
    };
    for (first, some) in (0u32..).step_by(LANES).zip(logits.chunks(LANES)) {
        // All of them at once, for the compiler to use vectors.
        if some.iter().fold(false, |any, &logit| any | (logit >= least)) {
            let all = (first..).zip(some).filter(|&(_, &logit)| logit >= least);
            candidates.extend(all.map(candidate).filter(may_weigh));
        }
    }
}

/// Computes the weights, and drops what has none.
fn weigh(candidates: &mut Vec<Candidate>) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        /// The same operations; without the features, every fused multiply-add would be a call of the C library.
        #[target_feature(enable = "avx2,fma")]
        fn weigh_each_fma(candidates: &mut [Candidate]) {
            weigh_each(candidates);
        }
        // SAFETY: the processor was just asked for both features.
        unsafe { weigh_each_fma(candidates) };
        candidates.retain(|candidate| candidate.weight > 0);
        return;
    }
    weigh_each(candidates);
    candidates.retain(|candidate| candidate.weight > 0);
}

#[inline(always)]
fn weigh_each(candidates: &mut [Candidate]) {
    const ONE: f64 = (1u64 << 32) as f64; // exact
    for candidate in candidates {
        // From 0 to 2^32, so the conversion is exact.
        candidate.weight = (f64::from(math::exp(candidate.scaled)) * ONE).round_ties_even() as u64;
    }
}

/// Their weights' sum: below 2^32 candidates of at most 2^32.
fn total(candidates: &[Candidate]) -> u64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// Moves the first `k` by rank to the front, in any order, if there are more.
fn select(candidates: &mut [Candidate], k: usize) {
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k, Candidate::rank);
    }
}

fn top_p(candidates: &mut Vec<Candidate>, p: f32) {
    let needed = part(p, total(candidates));
    // A vocabulary is not sorted for the few dozen tokens that usually suffice: ever longer beginnings are tried.
    let mut k = candidates.len().min(64);
    loop {
        select(candidates, k);
        if k == candidates.len() || total(&candidates[..k]) >= needed {
            break;
        }
        k = k.saturating_mul(8).min(candidates.len());
    }
    candidates.truncate(k);
    candidates.sort_unstable_by(Candidate::rank);
    let mut sum = 0;
    let short = candidates.iter().take_while(|candidate| {
        sum += candidate.weight;
        sum < needed
    });
    let kept = short.count() + 1;
    candidates.truncate(kept);
}

fn min_p(candidates: &mut Vec<Candidate>, p: f32) {
    let max = candidates.iter().map(|candidate| candidate.weight).max().unwrap_or(0);
    let needed = part(p, max);
    candidates.retain(|candidate| candidate.weight >= needed);
}

/// `ceil(fraction * whole)` without rounding, for a fraction from 0 to 1.
fn part(fraction: f32, whole: u64) -> u64 {
    // fraction = mantissa * 2^-shift, a subnormal's exponent being that of the smallest normal number
    let (bits, exponent) = (fraction.to_bits() & 0x7F_FFFF, fraction.to_bits() >> 23);
    let mantissa = if exponent == 0 { bits } else { bits | 0x80_0000 };
    let shift = 150 - exponent.max(1);
    let product = u128::from(mantissa) * u128::from(whole); // below 2^88
    let parts = if shift < u128::BITS { product.div_ceil(1 << shift) } else { u128::from(product > 0) };
    u64::try_from(parts).expect("a fraction of a u64 is one")
}

/// The token that `bits` select. `candidates`: in ascending id order, at least one.
fn draw(candidates: &[Candidate], bits: u64) -> u32 {
    let product = u128::from(bits) * u128::from(total(candidates));
    let mut rest = (product >> 64) as u64; // below the total
    for candidate in candidates {
        if rest < candidate.weight {
            return candidate.id;
        }
        rest -= candidate.weight;
    }
    unreachable!("the likeliest token has weight 2^32, and r is below the total")
}

/// Why no token can be chosen. Each is one line.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// A parameter is outside its range.
    #[error("{name} is {value}; it must be {range}")]
    #[allow(missing_docs, reason = "the message says it")]
    Parameter { name: &'static str, value: f32, range: &'static str },
    /// A bias names an id beyond the logits.
    #[error("logit_bias: token id {id} is outside the vocabulary of {len} tokens")]
    #[allow(missing_docs, reason = "the message says it")]
    BiasedId { id: u32, len: usize },
    /// The model computed no numbers: a numeric fault, which no choice of token can mend.
    #[error("{nan} NaN and {infinite} infinite among {len} logits, the first at token id {first}")]
    #[allow(missing_docs, reason = "the message says it")]
    NonFinite { nan: usize, infinite: usize, first: usize, len: usize },
    /// A grammar leaves no token to choose.
    #[error("the grammar allows no token here")]
    NothingAllowed,
    /// There are no logits, or more than ids.
    #[error("there are no logits to choose from")]
    NoLogits,
}

impl SamplerError {
    #[cold]
    fn non_finite(logits: &[f32]) -> Self {
        let count = |fault: fn(&f32) -> bool| logits.iter().filter(|logit| fault(logit)).count();
        Self::NonFinite {
            nan: count(|logit| logit.is_nan()),
            infinite: count(|logit| logit.is_infinite()),
            first: logits.iter().position(|logit| !logit.is_finite()).unwrap_or_default(),
            len: logits.len(),
        }
    }
}

#[cfg(test)]
mod tests;
