//! `tally replay`: the stage that a bisection cut out, run alone; or a request whose numbers went wrong in a server, computed
//! again.

use std::path::PathBuf;

use parity::Reproduction;
use serde_json::json;

use crate::capture::Capture;
use crate::failure::Failure;
use crate::live::Live;
use crate::output;
use crate::prompted::ComputeArgs;

const EXAMPLES: &str = "\
Examples:
  tally replay out/reproduction.safetensors --device cuda
  tally replay out/reproduction.safetensors --device cpu           the side that was held to be right

  tally replay captures/req_1.json --model model.gguf              a request that `tally serve --captures` wrote down

A reproduction has all that is needed: the stage, its inputs, the weights concerned, what was expected and what came.
A capture has the tokens of a request, and needs its model: it is computed again, and the first value that is no number is
named.

Exit codes: 0 what was expected came, or all values are numbers; 3 NaN or infinity; 4 something else came; 1 something failed; 2 wrong usage.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file that `tally bisect --out` wrote, or `tally serve --captures`.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The model of a capture; without one, the small one that ships.
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Where to run: cpu, cpu-scalar, cuda, cuda:N, emulated, oracle, or faulty:NAME (`tally faults --list`).
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Live,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        if let Some(capture) = Capture::read(&self.file)? {
            return capture.replay(&self.model, &self.compute, &self.device, self.json);
        }
        let reproduction = Reproduction::read(&self.file)?;
        let context = reproduction.context();
        let mut failed = None;
        let replay =
            reproduction.replay(|model| match self.compute.place(&model, &self.device, context, 1) {
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
            if let Some(first) = figures.apart.first.filter(|_| replay.wrong > 0) {
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
