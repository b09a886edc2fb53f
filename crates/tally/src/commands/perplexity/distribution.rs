//! The distribution that a row of logits stands for, in f64: log-probabilities and how far two are apart.
//!
//! Figures for people to read, not part of the arithmetic: `exp` and `ln` are the platform's.

/// A row of finite logits with what normalises them.
#[derive(Clone, Copy)]
pub(super) struct Distribution<'a> {
    /// `[V]`.
    logits: &'a [f32],
    /// The largest.
    max: f64,
    /// The logarithm of the sum of the exponentials of what they are below it.
    ln_sum: f64,
    /// The likeliest token; of equals the lowest.
    top: usize,
}

impl<'a> Distribution<'a> {
    /// Of at least one logit; `None` if one is NaN or infinite.
    pub(super) fn of(logits: &'a [f32]) -> Option<Distribution<'a>> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        let top = (1..logits.len()).fold(0, |top, id| if logits[id] > logits[top] { id } else { top });
        let max = f64::from(logits[top]);
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        Some(Distribution { logits, max, ln_sum: sum.ln(), top })
    }

    /// The natural logarithm of the probability of token `id`.
    pub(super) fn logprob(&self, id: usize) -> f64 {
        f64::from(self.logits[id]) - self.max - self.ln_sum
    }

    /// The likeliest token; of equals the lowest.
    pub(super) fn top(&self) -> usize {
        self.top
    }

    /// The Kullback-Leibler divergence of `other` from this one in nats: the sum of `p (ln p - ln q)` in id order,
    /// `p` this one's probabilities. Exactly 0 if the logits are the same; where they all but are, the sum's rounding
    /// may leave some 1e-16 below 0.
    pub(super) fn divergence(&self, other: &Distribution<'_>) -> f64 {
        let term = |id| {
            let logprob = self.logprob(id);
            logprob.exp() * (logprob - other.logprob(id))
        };
        (0..self.logits.len()).map(term).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_and_top() {
        let check = |logits: &[f32], top, want: &[f64]| {
            let distribution = Distribution::of(logits).expect("finite");
            assert_eq!(distribution.top(), top);
            for (id, want) in want.iter().enumerate() {
                let got = distribution.logprob(id);
                assert!((got - want).abs() < 1e-15, "{logits:?}: {got} for {id}, not {want}");
            }
        };
        let half = 0.5f64.ln();
        check(&[3.0], 0, &[0.0]);
        check(&[1.0, 1.0], 0, &[half, half]);
        // Where exponentials themselves would overflow.
        check(&[-3e38, 3e38, 3e38], 1, &[-3e38f32 as f64 - 3e38f32 as f64, half, half]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Distribution::of(&[0.0, bad]).is_none());
        }
    }

    #[test]
    fn divergences() {
        let check = |p: &[f32], q: &[f32], want: f64| {
            let [p, q] = [p, q].map(|logits| Distribution::of(logits).expect("finite"));
            let got = p.divergence(&q);
            assert!((got - want).abs() < 1e-15, "{got}, not {want}");
        };
        let ln3 = 3f32.ln();
        // p = (1/2, 1/2), q = (1/4, 3/4), up to the rounding of the logarithm of 3 to an f32.
        let q = 1.0 / (1.0 + f64::from(ln3).exp());
        check(&[0.0, 0.0], &[0.0, ln3], 0.5 * (0.5 / q).ln() + 0.5 * (0.5 / (1.0 - q)).ln());
        check(&[0.0, ln3], &[0.0, 0.0], q * (2.0 * q).ln() + (1.0 - q) * (2.0 * (1.0 - q)).ln());
        // A shift of all logits changes nothing.
        check(&[1.0, 2.0, 4.0], &[11.0, 12.0, 14.0], 0.0);
        // A probability that underflows to 0 adds 0.
        check(&[0.0, -2000.0], &[0.0, -3000.0], 0.0);
    }

    #[test]
    fn nothing_from_itself() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 / 31.0).collect();
        let p = Distribution::of(&logits).expect("finite");
        assert_eq!(p.divergence(&p), 0.0);
    }
}
