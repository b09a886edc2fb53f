//! `tally bisect`: where two runs part, why, and a file that shows it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use model::{Site, Stage};
use parity::report::{self, Outcome, Report, Status};
use parity::{Bisection, Dump, Engine, Options, Player, Scenario, Side, bisect};

use crate::commands::trace::arithmetic;
use crate::compared::{figures, layers};
use crate::device::Placed;
use crate::failure::Failure;
use crate::live::{FAULTY, Live};
use crate::output;
use crate::prompted::{Prompted, PromptedArgs};

const EXAMPLES: &str = "\
Examples:
  tally bisect model.gguf -p 'fn main() {'                            the CPU against the GPU
  tally bisect model.gguf --ids 1,2,3 --left cpu --right oracle       against double precision, by its error
  tally bisect model.gguf -p 'fn main() {' --right dump:trace         against what another engine wrote
  tally bisect model.gguf -p 'fn main() {' --mask 3.experts_up        what comes after a fault that is known
  tally bisect model.gguf -p 'fn main() {' --right faulty:wrong-rope-base   against a fault planted on purpose

Sides: cpu, cpu-scalar, cuda, cuda:N, emulated, oracle; dump:DIR (`tally trace --out DIR`, or another engine's);
faulty:NAME or faulty:NAME@DEVICE, a device with a fault in it: `tally faults --list` shows all.

The prompt is run on both sides in ever less simple ways (whole, chunked, decode, batch, repeat, unobserved) until a
buffer of some stage differs. That stage is then given the left's inputs: if it still errs the error is local, else it was
inherited; what errs only in some ways of running is a matter of state. A local error is narrowed down to tensor, expert,
row, block and element, and cut out into DIR/reproduction.safetensors, for `tally replay`.

Exit codes: 0 all agrees; 4 it does not; 3 values are NaN or infinite; 1 something failed; 2 wrong usage.";

/// The reproduction's name in the directory.
const REPRODUCTION: &str = "reproduction.safetensors";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    prompted: PromptedArgs,
    /// One side, held to be right.
    #[arg(long, value_name = "SIDE", default_value = "cpu")]
    left: SideArg,
    /// The other side.
    #[arg(long, value_name = "SIDE", default_value = "cuda")]
    right: SideArg,
    /// Ways of running, in this order [default: all].
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = scenario)]
    scenarios: Vec<Scenario>,
    /// How often `repeat` runs.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..1000))]
    repeats: u32,
    /// Stages whose faults are known, such as 3.experts_up: the right is given the left's outputs there.
    #[arg(long, value_name = "LAYER.STAGE,..", value_delimiter = ',', value_parser = site)]
    mask: Vec<Site>,
    /// Take what a dump has for enough, though buffers are missing in it.
    #[arg(long)]
    partial: bool,
    /// Directory for report.json and the reproduction, made if need be.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// A side by name.
#[derive(Debug, Clone)]
pub(crate) enum SideArg {
    Live(Live),
    Dump(PathBuf),
}

impl FromStr for SideArg {
    type Err = String;

    fn from_str(text: &str) -> Result<SideArg, String> {
        match text.strip_prefix("dump:") {
            Some("") => Err("dump: needs a directory".into()),
            Some(dir) => Ok(SideArg::Dump(dir.into())),
            None => {
                text.parse().map(SideArg::Live).map_err(|error: String| match text.strip_prefix(FAULTY) {
                    Some(_) => error,
                    None => format!("{error}, or dump:DIR"),
                })
            }
        }
    }
}

fn scenario(name: &str) -> Result<Scenario, String> {
    let all: Vec<_> = Scenario::LIVE.iter().map(|scenario| scenario.name()).collect();
    Scenario::named(name).ok_or_else(|| format!("expected {}", all.join(", ")))
}

fn site(text: &str) -> Result<Site, String> {
    let (layer, stage) = match text.split_once('.') {
        Some((layer, stage)) => (layer.parse().ok(), stage),
        None => (None, text),
    };
    let found = Stage::named(stage).map(|stage| Site { stage, layer });
    let layered = |site: &Site| matches!(site.stage, Stage::Embed | Stage::Head) == site.layer.is_none();
    found.filter(layered).ok_or_else(|| "expected a layer and a stage, such as 3.experts_up, or head".into())
}

/// A side that is ready.
enum Ready {
    Live(Live, Box<Placed>),
    Dump(String, Box<Player>),
}

impl Ready {
    fn of(side: &SideArg, prompted: &Prompted) -> Result<Ready, Failure> {
        match side {
            // Beside another sequence.
            SideArg::Live(live) => {
                Ok(Ready::Live(*live, Box::new(prompted.place(live, 2).map_err(Failure::of_a_side)?)))
            }
            SideArg::Dump(dir) => {
                let dump = Dump::open(dir)?;
                dump.check(&prompted.model, &prompted.ids)?;
                Ok(Ready::Dump(format!("dump:{}", dir.display()), Box::new(Player::new(dump))))
            }
        }
    }

    fn side(&mut self, activations: &str) -> Side<'_> {
        match self {
            Ready::Live(live, placed) => Side {
                name: live.to_string(),
                arithmetic: arithmetic(live.device, activations),
                engine: Engine::Live(&mut placed.backend),
            },
            Ready::Dump(name, player) => Side {
                name: name.clone(),
                arithmetic: player.dump().manifest.origin.arithmetic.clone(),
                engine: Engine::Dump(player),
            },
        }
    }
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let prompted = self.prompted.open()?;
        let activations = prompted.activations().name();
        let config = &prompted.model.config;
        if let Some(site) = self.mask.iter().find(|site| !site.exists(config)) {
            return Err(Failure::usage(format!("--mask: the model has no {site}")));
        }
        let mut sides = [Ready::of(&self.left, &prompted)?, Ready::of(&self.right, &prompted)?];
        let options = Options {
            scenarios: if self.scenarios.is_empty() { Scenario::LIVE.to_vec() } else { self.scenarios },
            repeats: self.repeats as usize, // a u32 fits: the crate runs on 64 bits
            masked: self.mask.into_iter().collect::<BTreeSet<_>>(),
            detail: self.out.is_some() || self.json,
        };
        let start = Instant::now();
        let Bisection { mut report, reproduction } = {
            let [left, right] = &mut sides;
            let mut pair = [left.side(activations), right.side(activations)];
            bisect(&prompted.model, &mut pair, &prompted.ids, &options)?
        };
        prompted.check_unchanged()?;
        report.seconds = Some(start.elapsed().as_secs_f64());
        report.command = Some(command());
        report.kernels = prompted.kernels().map(|folder| folder.display().to_string());
        if let Some(dir) = &self.out {
            let failed = |path: &PathBuf| {
                let path = path.display().to_string();
                move |error: std::io::Error| Failure::new(format!("{path}: {error}"))
            };
            fs::create_dir_all(dir).map_err(failed(dir))?;
            if let Some(reproduction) = &reproduction {
                reproduction.write(&dir.join(REPRODUCTION))?;
                if let Some(finding) = &mut report.finding {
                    finding.reproduction = Some(REPRODUCTION.into());
                }
            }
            let path = dir.join(report::FILE);
            let text = serde_json::to_string(&report).expect("names, numbers and lists are JSON");
            fs::write(&path, text + "\n").map_err(failed(&path))?;
        }
        if self.json {
            output::json(&serde_json::to_value(&report).expect("names, numbers and lists are JSON"))?;
        } else {
            output::line(format_args!("{}", text(&report)))?;
        }
        match report.outcome {
            Outcome::Agree => match missing(&report) {
                Some(failure) if !self.partial => Err(failure),
                _ => Ok(()),
            },
            Outcome::Diverge => Err(Failure::mismatch(first(&report))),
            Outcome::NonFinite => Err(Failure::numeric(first(&report))),
        }
    }
}

/// The command as it was given, for whoever wants to run it again.
fn command() -> String {
    let rest = std::env::args_os().skip(1).map(|arg| output::word(&arg.to_string_lossy()).into_owned());
    ["tally".to_owned()].into_iter().chain(rest).collect::<Vec<_>>().join(" ")
}

/// Why the command fails, in a line.
fn first(report: &Report) -> String {
    match &report.finding {
        Some(finding) => format!("{}: the first difference ({})", finding.place, finding.class.name()),
        None => "values are not finite, on both sides alike".into(),
    }
}

/// What was not compared is no success: how much that is, and where it begins.
fn missing(report: &Report) -> Option<Failure> {
    let cells = || report.runs.iter().flat_map(|run| &run.cells);
    let mut missing = cells().filter(|cell| cell.status == Status::Missing);
    let first = missing.next()?.place;
    let (missing, all) = (1 + missing.count(), cells().count());
    let message =
        format!("{missing} of {all} buffers are not there on both sides, the first of them {first}");
    Some(Failure::new(message).hint("what is there agrees; if that is enough, add --partial"))
}

fn text(report: &Report) -> String {
    let mut text = format!("{}\n", report.judge);
    for run in &report.runs {
        let compared = run.cells.iter().filter(|cell| cell.status != Status::Missing).count();
        let bad = run
            .first_divergence
            .map_or("agree".to_owned(), |at| format!("differ from {}", run.cells[at].place));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<10}  {compared} buffers {bad}", run.scenario);
    }
    for skipped in &report.skipped {
        let _ = writeln!(text, "{:<10}  not run: {}", skipped.scenario, skipped.why);
    }
    if let Some(run) =
        report.runs.last().filter(|run| run.first_divergence.or(run.first_non_finite).is_some())
    {
        let _ = write!(text, "\n{}", layers(run));
        for at in [run.first_divergence, run.first_non_finite].into_iter().flatten().collect::<BTreeSet<_>>()
        {
            let _ = write!(text, "\n{}", figures(&run.cells[at]));
        }
    }
    if let Some(finding) = &report.finding {
        text.push('\n');
        for note in finding.location.iter().flat_map(|location| &location.notes) {
            let _ = writeln!(text, "note: {note}");
        }
        for f in finding.features.iter().take(5) {
            let _ = writeln!(
                text,
                "{}: {} ({} of {} failing, {} of {} passing, lift {:.1})",
                f.among, f.text, f.failing_with, f.failing, f.passing_with, f.passing, f.lift
            );
        }
    }
    for line in &report.reading {
        let _ = writeln!(text, "reading: {line}");
    }
    let _ = write!(text, "\n{}", report.verdict);
    if let Some(seconds) = report.seconds {
        let _ = write!(text, "\n{seconds:.2} s after loading");
    }
    output::printable(&text).replace("\\n", "\n")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn sides_and_sites_by_name() {
        assert!(matches!("dump:a/b".parse(), Ok(SideArg::Dump(dir)) if dir == Path::new("a/b")));
        assert!(matches!("oracle".parse(), Ok(SideArg::Live(_))));
        assert!("dump:".parse::<SideArg>().is_err() && "gpu".parse::<SideArg>().is_err());
        let check = |text, stage, layer| assert_eq!(site(text), Ok(Site { stage, layer }), "{text}");
        check("3.experts_up", Stage::ExpertsUp, Some(3));
        check("head", Stage::Head, None);
        for bad in ["", "experts_up", "3.head", "x.qkv", "3.qkvx", "3."] {
            assert!(site(bad).is_err(), "{bad}");
        }
    }
}
