//! `tally parity --sweep`: many small comparisons instead of one prompt. Chooses none of them: `parity::sweep` does.

use model::Backend;
use parity::sweep::{Axis, Options, Trial, sweep};
use serde_json::json;

use super::report::{self, Format};
use crate::failure::Failure;
use crate::live::Live;
use crate::output;
use crate::progress::Progress;
use crate::prompted::Prompted;

/// The arguments, to be flattened into the command's.
#[derive(clap::Args)]
#[group(id = "sweep_args")]
pub(super) struct Args {
    /// Vary lengths, positions, batches, cuts, recordings and repeats instead of running a prompt.
    #[arg(long, conflicts_with_all = ["generate", "layers"])]
    sweep: bool,
    /// Of --sweep: vary only these, of length, position, batch, cut, replay and repeat.
    #[arg(long, value_name = "AXIS,..", value_delimiter = ',', value_parser = axis, requires = "sweep")]
    axes: Vec<Axis>,
    /// Of --sweep: tokens of the longest prompt.
    #[arg(long, value_name = "N", default_value_t = 130, value_parser = clap::value_parser!(u32).range(1..), requires = "sweep")]
    longest: u32,
    /// Of --sweep: sequences of the largest batch.
    #[arg(long, value_name = "N", default_value_t = 17, value_parser = clap::value_parser!(u32).range(1..=256), requires = "sweep")]
    streams: u32,
    /// Of --sweep: how often a step is repeated.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(2..10_000), requires = "sweep")]
    repeats: u32,
}

fn axis(name: &str) -> Result<Axis, String> {
    let found = Axis::ALL.into_iter().find(|axis| axis.name() == name);
    found.ok_or_else(|| format!("expected {}", Axis::ALL.map(Axis::name).join(", ")))
}

impl Args {
    pub(super) fn wanted(&self) -> bool {
        self.sweep
    }

    pub(super) fn run(
        self,
        prompted: &Prompted,
        [first, second]: [Live; 2],
        format: Format,
    ) -> Result<(), Failure> {
        // u32 fits: the crate runs on 64 bits.
        let options = Options {
            axes: if self.axes.is_empty() { Axis::ALL.to_vec() } else { self.axes },
            longest: (self.longest as usize).min(prompted.model.config.context),
            streams: self.streams as usize,
            repeats: self.repeats as usize,
        };
        let place =
            |live| prompted.place_for(live, options.longest, options.streams).map_err(Failure::of_a_side);
        let [mut left, mut right] = [place(&first)?, place(&second)?];
        let mut value = report::head(format, prompted, [(first, &left.facts), (second, &right.facts)])?;
        let progress = (format == Format::Json).then(|| Progress::steps("comparing", 0));
        let mut printed = if format == Format::Text { output::line(format_args!("")) } else { Ok(()) };
        let trials = {
            let sides = [
                (first.to_string(), &mut left.backend as &mut dyn Backend),
                (second.to_string(), &mut right.backend),
            ];
            sweep(sides, &options, &mut |trial| {
                progress.iter().for_each(|progress| progress.add(1));
                if format == Format::Text && printed.is_ok() {
                    printed = output::line(format_args!("{}", line(trial)));
                }
            })?
        };
        printed?;
        drop(progress);
        prompted.check_unchanged()?;
        let verdict = verdict(&trials);
        if format == Format::Json {
            value["verdict"] = match &verdict {
                Ok(()) => "equal",
                Err(_) if trials.iter().all(Trial::finite) => "mismatch",
                Err(_) => "non-finite",
            }
            .into();
            value["trials"] = json!(trials);
            output::json(&value)?;
        } else if verdict.is_ok() {
            let logits: usize = trials.iter().map(|trial| trial.figures.total).sum();
            let logits = output::grouped(logits as u64); // `usize` is at most 64 bits wide
            output::line(format_args!("\nall bits agree: {logits} logits in {} comparisons", trials.len()))?;
        }
        verdict
    }
}

fn line(trial: &Trial) -> String {
    let Trial { axis, case, between: [left, right], seconds, .. } = trial;
    let found = match trial.equal() {
        _ if !trial.finite() => "NOT FINITE".into(),
        true => "bits equal".into(),
        false => format!("{} of {} DIFFER", trial.figures.apart.differing, trial.figures.total),
    };
    format!("{axis:<8}  {case:<22}  {found}  {left} | {right}, {seconds:.3} s")
}

/// What is not finite first; then the first that differs.
fn verdict(trials: &[Trial]) -> Result<(), Failure> {
    let place = |trial: &Trial| format!("{}, {}", trial.axis, trial.case);
    if let Some(bad) = trials.iter().find(|trial| !trial.finite()) {
        let [left, right] = &bad.between;
        return Err(Failure::numeric(format!("{}: logits of {left} or {right} are no numbers", place(bad))));
    }
    match trials.iter().find(|trial| !trial.equal()) {
        Some(bad) => {
            let (figures, [left, right]) = (&bad.figures, &bad.between);
            Err(Failure::mismatch(format!(
                "{}: {} of {} logits differ between {left} and {right}",
                place(bad),
                figures.apart.differing,
                figures.total
            )))
        }
        None => Ok(()),
    }
}
