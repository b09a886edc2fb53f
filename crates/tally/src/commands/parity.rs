//! `tally parity`: one prompt on two devices, their logits held against each other bit for bit.

mod report;
mod sweep;

use std::time::{Duration, Instant};

use model::Backend;
use parity::report::RunFacts;
use parity::{Comparison, Engine, Run, Scenario, argmax, compare};

use crate::commands::trace::arithmetic;
use crate::device::{Facts, Placed};
use crate::failure::Failure;
use crate::live::Live;
use crate::progress::Progress;
use crate::prompted::{Prompted, PromptedArgs};
use report::{Format, Report};

const EXAMPLES: &str = "\
Examples:
  tally parity model.gguf -p 'fn main() {'                       the CPU against the GPU
  tally parity model.gguf --left cpu --right cuda:1 --ids 1,2,3 --generate 32
  tally parity --right oracle -p 'fn main() {'                   how far from double precision
  tally parity --right cpu-scalar --file text.txt                vector instructions against none
  tally parity model.gguf --ids 1,2,3 --layers                   every stage of every layer as well, in a table
  tally parity model.gguf --sweep --longest 600                  many prompts, positions, batches, cuts and repeats

Sides: cpu; cpu-scalar, without vector instructions; cuda or cuda:N, a GPU; emulated, the GPU's kernels on the CPU, for
those who write kernels, and slow; oracle, everything in double precision, slow, and equal to nothing else in bits;
faulty:NAME or faulty:NAME@DEVICE, with a fault in it that `tally faults --list` shows.

The prompt is taken as it stands, without the chat template. With --generate N the left's likeliest token is fed to both
sides, N times, and the logits of each step are compared. For each side first: how many logits are numbers, the first
that is not, the smallest and the largest; time, likeliest token and its logit. Then whether all bits agree or, if not,
the first place where they do not, and how far apart the two are. Every NaN counts as the same value.

With --sweep there is no prompt: lengths of prompts, positions of single tokens, batches together and alone, prompts cut
in several ways, steps replayed from a recording and stage by stage (graph on and off), and repeats. What gives the same
logits by two ways on one side is compared there, too.

Exit codes: 0 all bits agree; 4 they do not; 3 a logit is NaN or infinite; 1 something failed; 2 wrong usage.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    prompted: PromptedArgs,
    /// One side, held to be right.
    #[arg(long, value_name = "SIDE", default_value = "cpu")]
    left: Live,
    /// The other side.
    #[arg(long, value_name = "SIDE", default_value = "cuda")]
    right: Live,
    /// Tokens to generate after the prompt.
    #[arg(long, value_name = "N", default_value_t = 0)]
    generate: u32,
    /// Compare every stage of the prompt, too, and print layers by stages.
    #[arg(long)]
    layers: bool,
    #[command(flatten)]
    sweep: sweep::Args,
    /// Print one JSON object when done.
    #[arg(long)]
    json: bool,
}

/// One side: a run on a device.
struct Side {
    live: Live,
    facts: Facts,
    run: Run<Box<dyn Backend>>,
}

/// What both sides made of one step.
struct Step {
    /// The token that was fed; `None` for the prompt.
    token: Option<u32>,
    comparison: Comparison,
    /// Likeliest token and its logit, of left and right.
    tops: [Option<(u32, f32)>; 2],
    times: [Duration; 2],
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let format = if self.json { Format::Json } else { Format::Text };
        if self.sweep.wanted() {
            let prompted = self.prompted.open_without_prompt()?;
            return self.sweep.run(&prompted, [self.left, self.right], format);
        }
        let prompted = self.prompted.open()?;
        let steps = self.generate as usize; // a u32 fits: the crate runs on 64 bits
        prompted.fits(steps)?;
        let place = |live| -> Result<(Live, Placed), Failure> {
            let placed = prompted.place_for(&live, prompted.ids.len() + steps, 1);
            Ok((live, placed.map_err(Failure::of_a_side)?))
        };
        let mut placed = [place(self.left)?, place(self.right)?];
        let layers = if self.layers { Some(layers(&prompted, &mut placed)?) } else { None };
        let mut sides =
            placed.map(|(live, Placed { backend, facts, .. })| Side { live, facts, run: Run::new(backend) });
        let about = [0, 1].map(|i| (sides[i].live, &sides[i].facts));
        let mut report = Report::begin(format, &prompted, about, layers)?;
        // Text is its own progress. `usize` is at most 64 bits wide.
        let progress = self.json.then(|| Progress::steps("comparing", 1 + steps as u64));
        let compared = || progress.iter().for_each(|progress| progress.add(1));
        let mut next = report.step(step(&mut sides, None, &prompted.ids)?)?;
        compared();
        for _ in 0..steps {
            // Without a number on the left there is nothing to go on with.
            let Some((token, _)) = next else { break };
            next = report.step(step(&mut sides, Some(token), &[token])?)?;
            compared();
        }
        prompted.check_unchanged()?;
        report.finish()
    }
}

/// Every stage of the prompt on both sides.
fn layers(prompted: &Prompted, placed: &mut [(Live, Placed); 2]) -> Result<RunFacts, Failure> {
    let activations = prompted.activations().name();
    let mut sides = placed.each_mut().map(|(live, placed)| parity::Side {
        name: live.to_string(),
        arithmetic: arithmetic(live.device, activations),
        engine: Engine::Live(&mut placed.backend),
    });
    Ok(compare(&prompted.model, &mut sides, &prompted.ids, Scenario::Whole)?)
}

/// Feeds both sides.
fn step(sides: &mut [Side; 2], token: Option<u32>, tokens: &[u32]) -> Result<Step, Failure> {
    let [left, right] = sides;
    let feed = |side: &mut Side| -> Result<(Vec<f32>, Duration), Failure> {
        let start = Instant::now();
        let logits = side.run.feed(tokens);
        let time = start.elapsed();
        let logits = logits.map_err(|fault| Failure::from(fault).at(side.live))?;
        Ok((logits.to_vec(), time))
    };
    let ((left, left_time), (right, right_time)) = (feed(left)?, feed(right)?);
    Ok(Step {
        token,
        tops: [argmax(&left), argmax(&right)],
        times: [left_time, right_time],
        comparison: Comparison::of(&left, &right),
    })
}
