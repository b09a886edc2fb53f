//! `tally faults`: every fault that the debugger is tested with, planted, and what it says of each.

use std::sync::Arc;

use model::{Backend, Model};
use parity::faults::{self, Host, Planted, Trial};
use serde_json::{Value, json};
use synth::Shape;

use crate::device::Device;
use crate::failure::Failure;
use crate::output;
use crate::progress::Progress;
use crate::prompted::ComputeArgs;

const EXAMPLES: &str = "\
Examples:
  tally faults > faults.md                         the table of the repository
  tally faults --only one-kernel-for-all-types     the story that began it all
  tally faults --device cuda                       planted around a GPU's stages and in its weights

Each fault is planted in one of two backends that are equal otherwise, on a small random model, and the debugger is let
loose on both. The table says what it named.

Exit codes: 0 all were named exactly; 4 one was not; 1 something failed; 2 wrong usage.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Only these faults.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = named)]
    only: Vec<String>,
    /// Where to run both sides: cpu, cpu-scalar, cuda, cuda:N or emulated.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn named(name: &str) -> Result<String, String> {
    let all = faults::all();
    match all.iter().any(|fault| fault.name == name) {
        true => Ok(name.to_owned()),
        false => Err(format!("known are {}", all.iter().map(|f| f.name).collect::<Vec<_>>().join(", "))),
    }
}

/// Of the random weights; any would do.
const SEED: u64 = 7;

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let chosen =
            |fault: &Planted| self.only.is_empty() || self.only.iter().any(|name| name == fault.name);
        let faults: Vec<Planted> = faults::all().into_iter().filter(chosen).collect();
        let progress = Progress::steps("planting", faults.len() as u64); // `usize` is at most 64 bits wide
        let mut trials = Vec::new();
        for fault in &faults {
            let host = fault.host;
            let model =
                synth::model(&Shape { config: host.config(), tied: false }, SEED, |spec| host.dtype(spec));
            let build = |model: Arc<Model>| self.build(&model, host);
            trials.push(fault.find(&model, &build).map_err(|error| Failure::new(error).at(fault.name))?);
            progress.add(1);
        }
        drop(progress);
        if self.json {
            output::json(&Value::from(trials.iter().map(trial).collect::<Vec<_>>()))?;
        } else {
            output::line(format_args!("{}", faults::table(&trials).trim_end()))?;
        }
        let missed: Vec<&str> =
            trials.iter().filter(|t| !t.missed.is_empty()).map(|t| t.fault.name).collect();
        if missed.is_empty() {
            return Ok(());
        }
        Err(Failure::mismatch(format!("not named exactly: {}", missed.join(", "))))
    }

    fn build(&self, model: &Arc<Model>, host: Host) -> Result<Box<dyn Backend>, String> {
        // Two sequences of the prompt, side by side in one step.
        let placed = self.compute.place(model, self.device, 2 * host.prompt().len(), 2);
        placed.map(|placed| placed.backend).map_err(|failure| failure.message().to_owned())
    }
}

fn trial(trial: &Trial) -> Value {
    let report = &trial.bisection.report;
    json!({
        "name": trial.fault.name, "what": trial.fault.what, "source": trial.fault.source,
        "found": trial.missed.is_empty(), "missed": trial.missed, "finding": report.finding,
        "verdict": report.verdict,
    })
}
