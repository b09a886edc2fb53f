//! `tally replay`: the stage that a bisection cut out, run alone.

use std::path::PathBuf;

use parity::Reproduction;
use serde_json::json;

use crate::device::Device;
use crate::failure::Failure;
use crate::output;
use crate::prompted::ComputeArgs;

const EXAMPLES: &str = "\
Examples:
  tally replay out/reproduction.safetensors --device cuda
  tally replay out/reproduction.safetensors --device cpu           the side that was held to be right

The file has all that is needed: the stage, its inputs, the weights concerned, what was expected and what came. No model
is loaded.

Exit codes: 0 what was expected came; 4 it did not; 1 something failed; 2 wrong usage.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file that `tally bisect --out` wrote.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where to run: cpu, cpu-scalar, cuda, cuda:N, emulated or oracle.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let reproduction = Reproduction::read(&self.file)?;
        let context = reproduction.context();
        let mut failed = None;
        let replay = reproduction.replay(|model| match self.compute.place(&model, self.device, context, 1) {
            Ok(placed) => Ok(placed.backend),
            Err(failure) => {
                failed = Some(failure);
                Err("no backend".into())
            }
        });
        // The failure itself has the hint.
        let replay = match (replay, failed) {
            (Err(_), Some(failure)) => return Err(failure),
            (replay, _) => replay?,
        };
        let figures = &replay.figures;
        if self.json {
            let value = json!({
                "place": replay.place, "device": self.device.to_string(), "wrong": replay.wrong,
                "as_then": replay.as_then, "seconds": replay.elapsed.as_secs_f64(), "figures": figures,
            });
            output::json(&value)?;
        } else {
            let then = if replay.as_then { "the same as then, in every bit" } else { "not what came then" };
            output::line(format_args!(
                "{} on {}: {} of {} values are wrong; {then} ({:.1} ms)",
                replay.place,
                self.device,
                replay.wrong,
                figures.total,
                replay.elapsed.as_secs_f64() * 1e3
            ))?;
            if let Some(first) = figures.first.filter(|_| replay.wrong > 0) {
                output::line(format_args!(
                    "at {}: expected {}, got {}",
                    first.index, first.left, first.right
                ))?;
            }
        }
        if replay.wrong == 0 {
            return Ok(());
        }
        Err(Failure::mismatch(format!("{} of {} values are wrong", replay.wrong, figures.total)))
    }
}
