//! `tally parity`: one prompt on two devices, their logits held against each other bit for bit.

mod report;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::Tokenizer;
use gguf::File;
use model::{Backend, Model};
use parity::{Comparison, Run, argmax};

use crate::activations::ActivationsArg;
use crate::device::{Device, Facts, KernelArgs, Placed, Request};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::prompt_args::PromptArgs;
use crate::source;
use crate::threads::Threads;
use report::{Format, Report};

const EXAMPLES: &str = "\
Examples:
  tally parity model.gguf -p 'fn main() {'                       the CPU against the GPU
  tally parity model.gguf --left cpu --right cuda:1 --ids 1,2,3 --generate 32
  tally parity --right oracle -p 'fn main() {'                   how far from double precision
  tally parity --right cpu-scalar --file text.txt                vector instructions against none

Sides: cpu; cpu-scalar, without vector instructions; cuda or cuda:N, a GPU; emulated, the GPU's kernels on the CPU, for
those who write kernels, and slow; oracle, everything in double precision, slow, and equal to nothing else in bits.

The prompt is taken as it stands, without the chat template. With --generate N the left's likeliest token is fed to both
sides, N times, and the logits of each step are compared. For each side first: how many logits are numbers, the first
that is not, the smallest and the largest; time, likeliest token and its logit. Then whether all bits agree or, if not,
the first place where they do not, and how far apart the two are. Every NaN counts as the same value.

Exit codes: 0 all bits agree; 4 they do not; 3 a logit is NaN or infinite; 1 something failed; 2 wrong usage.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model; without one, the small one that ships.
    model: Option<PathBuf>,
    #[command(flatten)]
    prompt: PromptArgs,
    /// The prompt as token ids.
    #[arg(long, value_name = "ID,..", value_delimiter = ',', conflicts_with_all = ["prompt", "file", "stdin"])]
    ids: Vec<u32>,
    /// One side, held to be right.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    left: Device,
    /// The other side.
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    right: Device,
    /// Tokens to generate after the prompt.
    #[arg(long, value_name = "N", default_value_t = 0)]
    generate: u32,
    /// Print one JSON object when done.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    activations: ActivationsArg,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// One side: a run on a device.
struct Side {
    device: Device,
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
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        self.prompt.take_dash(&mut self.model);
        let name = source::name(&self.model);
        let file = source::open(self.model.as_deref())?;
        let model = Arc::new(Model::load(&file).map_err(|error| Failure::from(error).at(&name))?);
        let ids = self.ids(&file).map_err(|failure| failure.at(&name))?;
        let steps = self.generate as usize; // a u32 fits: the crate runs on 64 bits
        check(&ids, steps, &model).map_err(|failure| failure.at(&name))?;
        let mut sides = [self.side(&model, &ids, self.left)?, self.side(&model, &ids, self.right)?];
        let format = if self.json { Format::Json } else { Format::Text };
        let mut report = Report::begin(format, &name, &ids, self.activations.value(), &sides)?;
        // Text is its own progress. `usize` is at most 64 bits wide.
        let progress = self.json.then(|| Progress::steps("comparing", 1 + steps as u64));
        let compared = || progress.iter().for_each(|progress| progress.add(1));
        let mut next = report.step(step(&mut sides, None, &ids)?)?;
        compared();
        for _ in 0..steps {
            // Without a number on the left there is nothing to go on with.
            let Some((token, _)) = next else { break };
            next = report.step(step(&mut sides, Some(token), &[token])?)?;
            compared();
        }
        // Cut short or replaced in the meantime, perhaps: then the figures are of no one's model.
        file.check_unchanged()?;
        report.finish()
    }

    /// The prompt's ids; a file without a vocabulary will do for --ids.
    fn ids(&self, file: &File) -> Result<Vec<u32>, Failure> {
        if !self.ids.is_empty() {
            return Ok(self.ids.clone());
        }
        let text = self.prompt.text()?;
        let tokenizer = Tokenizer::from_metadata(file.metadata())?;
        Ok(engine::raw_prompt(&tokenizer, &text)?)
    }

    fn side(&self, model: &Arc<Model>, ids: &[u32], device: Device) -> Result<Side, Failure> {
        let request = Request {
            context: ids.len() + self.generate as usize, // as above
            sequences: 1,
            threads: self.threads.count(),
            activations: self.activations.value(),
            kernels: self.kernels.files(),
        };
        let Placed { backend, device, facts } = request.place_on(model, device)?;
        Ok(Side { device, facts, run: Run::new(backend) })
    }
}

/// Fails where the prompt is not one for this model.
fn check(ids: &[u32], generate: usize, model: &Model) -> Result<(), Failure> {
    let (vocab, context) = (model.config.vocab, model.config.context);
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Failure::new(format!("token id {id} is outside the vocabulary of {vocab} tokens")));
    }
    let tokens = ids.len() + generate;
    if tokens > context {
        let message = format!("{tokens} tokens, of a model that was made for at most {context} positions");
        return Err(Failure::new(message).hint("give a shorter prompt, or a smaller --generate"));
    }
    Ok(())
}

/// Feeds both sides.
fn step(sides: &mut [Side; 2], token: Option<u32>, tokens: &[u32]) -> Result<Step, Failure> {
    let [left, right] = sides;
    let feed = |side: &mut Side| -> Result<(Vec<f32>, Duration), Failure> {
        let start = Instant::now();
        let logits = side.run.feed(tokens);
        let time = start.elapsed();
        let logits = logits.map_err(|fault| Failure::from(fault).at(side.device))?;
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
