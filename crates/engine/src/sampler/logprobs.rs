//! Log-probabilities to report. No token is chosen by them.

use std::cmp::Ordering;

use super::SamplerError;
use super::survey::Survey;

/// A token and the natural logarithm of its probability, before penalties, temperature and truncation.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "the type's documentation says it")]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f64,
}

/// The log-probability of `chosen`, and of the `top` likeliest tokens below `ids` in descending order, of equals the lower id
/// first. `logits`: `[V]`, as the model gives them; all of them are part of the distribution.
///
/// Computed in f64, the sum in id order: for people and clients to read, not part of the arithmetic.
///
/// # Errors
/// [`SamplerError::NonFinite`] and [`SamplerError::NoLogits`], which an id beyond the logits is as well.
pub fn logprobs(
    logits: &[f32],
    chosen: u32,
    top: usize,
    ids: u32,
) -> Result<(TokenLogprob, Vec<TokenLogprob>), SamplerError> {
    let mut survey = Survey::default();
    let max = f64::from(logits[survey.look(logits)? as usize]);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    let normaliser = max + sum.ln();
    let of = |id: u32| -> Option<TokenLogprob> {
        let logit = *logits.get(usize::try_from(id).ok()?)?;
        Some(TokenLogprob { id, logprob: f64::from(logit) - normaliser })
    };
    let chosen = of(chosen).ok_or(SamplerError::NoLogits)?;

    let tokens = &logits[..logits.len().min(ids as usize)]; // 32 bits fit
    survey.look(tokens)?;
    let least = survey.reached_by(top).unwrap_or(f32::MIN);
    let all = (0u32..).zip(tokens).filter(|&(_, &logit)| top > 0 && logit >= least);
    let mut ids: Vec<u32> = all.map(|(id, _)| id).collect();
    let rank = |a: &u32, b: &u32| {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.partial_cmp(&x).unwrap_or(Ordering::Equal).then(a.cmp(b))
    };
    if top < ids.len() {
        ids.select_nth_unstable_by(top, rank);
        ids.truncate(top);
    }
    ids.sort_unstable_by(rank);
    Ok((chosen, ids.into_iter().filter_map(of).collect()))
}
