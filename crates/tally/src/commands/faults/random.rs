//! `tally faults --random N`: no fault is planted, and none may be found.

use std::sync::Arc;
use std::time::Instant;

use parity::faults::Random;
use parity::report::Outcome;
use parity::{Options, Side, bisect};
use serde_json::json;
use synth::Shape;

use super::Args;
use crate::device::Device;
use crate::failure::Failure;
use crate::output;

/// What came of one model.
struct Bisected {
    random: Random,
    /// Ways of running that were compared, and buffers in them.
    ways: usize,
    buffers: usize,
    /// What was found, although there is nothing.
    verdict: Option<String>,
}

impl Args {
    pub(super) fn without_a_fault(&self, count: u64) -> Result<(), Failure> {
        let start = Instant::now();
        let models: Vec<Random> = (0..count).map(Random).collect();
        // What is compiled for the first of each kind serves the others.
        let (first, rest) = models.split_at(models.len().min(Random::KINDS));
        let mut all = self.side_by_side(first, |random| self.bisected(*random))?;
        all.extend(self.side_by_side(rest, |random| self.bisected(*random))?);
        let (left, right) = self.sides();
        let [ways, buffers] =
            [|b: &Bisected| b.ways, |b: &Bisected| b.buffers].map(|n| all.iter().map(n).sum::<usize>());
        let found: Vec<&Bisected> = all.iter().filter(|b| b.verdict.is_some()).collect();
        if self.json {
            let findings: Vec<_> =
                found.iter().map(|b| json!({ "model": b.random.0, "verdict": b.verdict })).collect();
            output::json(&json!({
                "left": left.to_string(), "right": right.to_string(), "models": count, "kinds": first.len(),
                "ways": ways, "buffers": buffers, "seconds": start.elapsed().as_secs_f64(), "findings": findings,
            }))?;
        } else {
            for Bisected { random, verdict, .. } in &found {
                output::line(format_args!("model {}: {}", random.0, verdict.as_deref().unwrap_or_default()))?;
            }
            output::line(format_args!(
                "{count} random models on {left} and {right}: {buffers} buffers of {ways} ways of running compared, {} findings",
                found.len()
            ))?;
        }
        if found.is_empty() {
            return Ok(());
        }
        Err(Failure::mismatch(format!("found in {} of {count} models that have no fault", found.len())))
    }

    fn sides(&self) -> (Device, Device) {
        (if self.device == Device::Cpu { Device::CpuScalar } else { Device::Cpu }, self.device)
    }

    fn bisected(&self, random: Random) -> Result<Bisected, Failure> {
        let at = |failure: Failure| failure.at(format!("model {}", random.0));
        let shape = Shape { config: random.config(), tied: false };
        let model = Arc::new(synth::model(&shape, random.0, |spec| random.dtype(spec)));
        let (ids, (left, right)) = (random.prompt(), self.sides());
        let place = |device| self.place(&model, ids.len(), device, None).map_err(at);
        let (mut left, mut right) = (place(left)?, place(right)?);
        let mut sides = [Side::live("left", "a16", &mut left), Side::live("right", "a16", &mut right)];
        let found =
            bisect(&model, &mut sides, &ids, &Options::default()).map_err(|error| at(error.into()))?;
        let report = found.report;
        // What was not run proves nothing.
        if let Some(skipped) = report.skipped.first() {
            return Err(at(Failure::new(format!("{skipped:?}"))));
        }
        let clean = report.outcome == Outcome::Agree && report.finding.is_none();
        Ok(Bisected {
            random,
            ways: report.runs.len(),
            buffers: report.runs.iter().map(|run| run.cells.len()).sum(),
            verdict: (!clean).then_some(report.verdict),
        })
    }
}
