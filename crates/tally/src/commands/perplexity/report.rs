//! What a run found, for people and for programs. Computes no probability.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::score::{Point, Versus};
use super::statistics::{Mean, quantile};
use super::windows::Windows;
use crate::device::Device;
use crate::failure::Failure;
use crate::output;

/// The settings and what came of them.
pub(super) struct Report<'a> {
    pub(super) model: &'a str,
    pub(super) text: &'a str,
    pub(super) activations: &'static str,
    pub(super) device: Device,
    pub(super) windows: &'a Windows,
    /// Of each scored token, in the order of the text.
    pub(super) points: &'a [Point],
    /// What the reference's logits came from, if there is one.
    pub(super) reference: Option<&'a str>,
    pub(super) seconds: f64,
}

/// How far this run is from the reference.
struct Distance {
    /// In nats.
    divergence: Mean,
    /// Median, 90th and 99th percentile.
    quantiles: [f64; 3],
    max: f64,
    /// Index of the scored token where it is.
    max_at: usize,
    /// Part of the tokens whose likeliest successor is the same.
    same_top: f64,
    /// Of the text's token, this run's minus the reference's.
    logprob_change: Mean,
    reference_nll: Mean,
}

const QUANTILES: [f64; 3] = [0.5, 0.9, 0.99];

impl Report<'_> {
    fn nll(&self) -> Mean {
        Mean::of(&self.points.iter().map(|point| point.nll).collect::<Vec<_>>())
    }

    fn distance(&self) -> Option<Distance> {
        let versus: Option<Vec<Versus>> = self.points.iter().map(|point| point.versus).collect();
        let versus = versus.filter(|all| !all.is_empty())?;
        let column = |of: &dyn Fn(&Versus) -> f64| versus.iter().map(of).collect::<Vec<_>>();
        let divergences = column(&|v| v.divergence);
        let mut sorted = divergences.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let max_at =
            (1..divergences.len()).fold(0, |m, i| if divergences[i] > divergences[m] { i } else { m });
        let changes: Vec<_> = self.points.iter().zip(&versus).map(|(p, v)| v.nll - p.nll).collect();
        Some(Distance {
            divergence: Mean::of(&divergences),
            quantiles: QUANTILES.map(|q| quantile(&sorted, q)),
            max: divergences[max_at],
            max_at,
            // Tokens of a text are exact in f64.
            same_top: versus.iter().filter(|v| v.same_top).count() as f64 / versus.len() as f64,
            logprob_change: Mean::of(&changes),
            reference_nll: Mean::of(&column(&|v| v.nll)),
        })
    }

    /// Index in the text, counted in tokens, of the `point`-th one scored.
    fn token_index(&self, point: usize) -> usize {
        let scored = self.windows.scored();
        // The token after the one whose logits are scored.
        point / scored.len() * self.windows.ctx() + scored.start + point % scored.len() + 1
    }

    pub(super) fn print(&self) -> Result<(), Failure> {
        let (nll, n) = (self.nll(), self.points.len() as u64); // `usize` is at most 64 bits wide
        let perplexity = nll.exp();
        let mut out = io::BufWriter::new(io::stdout().lock());
        writeln!(out, "perplexity         {:.4} ± {:.4}", perplexity.mean, perplexity.stderr)?;
        writeln!(out, "nats per token     {:.5} ± {:.5}", nll.mean, nll.stderr)?;
        let (count, ctx) = (self.windows.count(), self.windows.ctx());
        let windows = if count == 1 { "window" } else { "windows" };
        let tokens = output::grouped(n);
        writeln!(out, "tokens scored      {tokens}: the second half of {count} {windows} of {ctx}")?;
        if let (Some(distance), Some(source)) = (self.distance(), self.reference) {
            let Distance { divergence, quantiles: [median, p90, p99], logprob_change, .. } = distance;
            let reference = distance.reference_nll.exp();
            writeln!(out, "\nagainst {}", output::printable(source))?;
            writeln!(out, "its perplexity     {:.4} ± {:.4}", reference.mean, reference.stderr)?;
            writeln!(out, "KL divergence      {:.3e} ± {:.1e} nats", divergence.mean, divergence.stderr)?;
            writeln!(out, "  median           {median:.3e}")?;
            writeln!(out, "  90th percentile  {p90:.3e}")?;
            writeln!(out, "  99th percentile  {p99:.3e}")?;
            let at = self.token_index(distance.max_at);
            writeln!(out, "  maximum          {:.3e} at token {at}", distance.max)?;
            writeln!(out, "same top token     {:.3}%", 100.0 * distance.same_top)?;
            let Mean { mean, stderr } = logprob_change;
            writeln!(out, "log-probability    {mean:+.3e} ± {stderr:.1e} on average, of the text's token")?;
        }
        Ok(out.flush()?)
    }

    /// All figures; divergences and log-probabilities in nats.
    pub(super) fn json(&self) -> Value {
        let mean = |Mean { mean, stderr }| json!({ "mean": mean, "stderr": stderr });
        let (nll, scored) = (self.nll(), self.points.len());
        let against = self.distance().map(|distance| {
            let [median, p90, p99] = distance.quantiles;
            json!({
                "source": self.reference,
                "perplexity": mean(distance.reference_nll.exp()),
                "kl_divergence": {
                    "mean": distance.divergence.mean, "stderr": distance.divergence.stderr,
                    "median": median, "p90": p90, "p99": p99, "max": distance.max,
                    "max_at_token": self.token_index(distance.max_at),
                },
                "same_top": distance.same_top,
                "logprob_change": mean(distance.logprob_change),
            })
        });
        json!({
            "model": self.model, "text": self.text, "activations": self.activations,
            "device": self.device.to_string(),
            "ctx": self.windows.ctx(), "windows": self.windows.count(), "tokens_scored": scored,
            "perplexity": mean(nll.exp()), "nll": mean(nll), "against": against, "seconds": self.seconds,
        })
    }
}
