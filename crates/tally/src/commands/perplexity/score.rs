//! Runs the windows and scores each prediction. Knows neither files nor reports.

use std::ops::ControlFlow;

use engine::{Engine, EngineError, Session};
use model::Backend;
use rayon::ThreadPool;
use rayon::prelude::*;

use super::distribution::Distribution;
use super::windows::Windows;
use crate::failure::Failure;

/// Rows of logits that are held at a time: 78 MB for a vocabulary of 152,000, and enough for a product to be fast.
const ROWS: usize = 128;

/// One prediction.
#[derive(Clone, Copy)]
pub(super) struct Point {
    /// Minus the log-probability of the token that the text has, in nats.
    pub(super) nll: f64,
    /// Beside the reference.
    pub(super) versus: Option<Versus>,
}

/// One prediction beside the reference's.
#[derive(Clone, Copy)]
pub(super) struct Versus {
    /// The reference's for the same token.
    pub(super) nll: f64,
    /// Of this run from the reference, in nats.
    pub(super) divergence: f64,
    /// Whether both hold the same token for the likeliest.
    pub(super) same_top: bool,
}

/// Scores all windows. `reference` gives the logits of a scored position, counted over all windows; `each` sees the
/// logits of this run, `[rows, V]`, with the position of the first row.
///
/// The rows of a chunk are scored on the threads of `pool`, each by itself.
pub(super) fn score<B: Backend>(
    engine: &mut Engine<B>,
    pool: &ThreadPool,
    windows: &Windows,
    reference: Option<&(dyn Fn(usize) -> Vec<f32> + Sync)>,
    mut each: impl FnMut(usize, &[f32]) -> Result<(), Failure>,
) -> Result<Vec<Point>, Failure> {
    let vocab = engine.backend().model().config.vocab;
    let scored = windows.scored();
    let mut points = Vec::new();
    let mut session = Session::default();
    for window in windows.iter() {
        engine.truncate(&mut session, 0);
        let flow = engine.feed(&mut session, &window[..scored.start], |_| ControlFlow::Continue(()))?;
        debug_assert!(flow.is_continue());
        let mut outcome = Ok(());
        engine.score(&mut session, &window[scored.clone()], ROWS, |at, logits| {
            let (first, targets) = (points.len(), &window[scored.start + at + 1..]);
            let point = |(row, (logits, &target)): (usize, (&[f32], &u32))| {
                let reference = reference.map(|reference| reference(first + row));
                // A token id is an index into the logits.
                let point = compare(logits, reference.as_deref(), target as usize);
                point.map_err(|failure| failure.at(place(windows, first + row)))
            };
            // Of several failures, the first: which threads were quickest must not show.
            let rows =
                || logits.par_chunks_exact(vocab).zip(targets).enumerate().map(point).collect::<Vec<_>>();
            let rows: Result<Vec<_>, _> = pool.install(rows).into_iter().collect();
            outcome = rows.and_then(|rows| {
                points.extend(rows);
                each(first, logits)
            });
            if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        outcome?;
    }
    Ok(points)
}

/// Fails if a logit is not finite.
fn compare(logits: &[f32], reference: Option<&[f32]>, target: usize) -> Result<Point, Failure> {
    let Some(ours) = Distribution::of(logits) else {
        // Fails as well, and says how many and which.
        engine::logprobs(logits, 0, 0, u32::MAX).map_err(EngineError::from)?;
        unreachable!("logits that are not finite have log-probabilities");
    };
    let versus = match reference {
        None => None,
        Some(reference) => {
            let bad = || Failure::new("the reference's logits are not all finite");
            let theirs = Distribution::of(reference).ok_or_else(bad)?;
            Some(Versus {
                nll: -theirs.logprob(target),
                divergence: theirs.divergence(&ours),
                same_top: theirs.top() == ours.top(),
            })
        }
    };
    Ok(Point { nll: -ours.logprob(target), versus })
}

/// Where the `at`-th scored row is.
fn place(windows: &Windows, at: usize) -> String {
    let scored = windows.scored();
    format!("window {}, position {}", at / scored.len(), scored.start + at % scored.len())
}
