//! `tally bench`: prompt and generation speed, beside what the memory bandwidth of the device allows.

mod bandwidth;
mod measure;
mod report;
mod stages;
mod traffic;

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use engine::Engine;
use gguf::File;
use model::{Backend, Model};
use rayon::prelude::*;

use crate::device::{self, Device, Facts, Placed, Request, Wish};
use crate::failure::Failure;
use crate::load::Place;
use crate::machine::{self, Peak};
use crate::progress::Progress;
use crate::{output, source};
use bandwidth::Bandwidth;
use measure::{Bench, Row, Test};
use report::{Hardware, Machine, ModelFacts, Report};
use stages::{Shape, Stages};
use traffic::Traffic;

const EXAMPLES: &str = "\
Examples:
  tally bench model.gguf
  tally bench model.gguf --prompt 512,2048 --generate 128 --depth 0,4096
  tally bench model.gguf --prompt 0 --repeat 20 --threads 1     generation alone, on one core
  tally bench model.gguf --device cuda --batch 1,8,32,64        streams generated together
  tally bench model.gguf --device cuda --stages                 where the time of a step goes
  tally bench model.gguf --json > today.json                    every sample

What is measured:
  prompt     tokens fed in chunks (of 512 on the CPU, 2,048 on a GPU), with the logits of the last one.
  generate   tokens fed one at a time, with the logits of each; sampling is not timed.
  batch      streams that are generated together, each with a cache of its own; tokens/s is of all together.
  depth      tokens in each cache before the first one that is timed.
Tokens are random, of a fixed seed. On the CPU the weights are read once before anything is timed, so that they lie in
the page cache, and each row starts with a warm-up that does not count. Speeds are the median of the repeats.

  bytes/token    what a token must read: all dense weights, the experts that it uses, one row of the embedding, the
                 head, and the keys and values of the positions before it (the mean over the tokens generated). In a
                 batch weights are shared: experts count as often as evenly chosen ones would be met.
  GB/s           those bytes times the median speed.
  of bandwidth   GB/s as a part of the device's memory bandwidth, which is measured before each row and after the
                 last; the best pass counts. On the CPU all threads read ordinary memory in order, 8 times the
                 last-level cache; on a GPU a kernel reads 4 GiB.

MODEL may be left out: the small one that ships is measured then, which fits into most caches.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model to measure [default: the one that ships].
    model: Option<PathBuf>,
    /// Lengths of prompts, in tokens; 0 for none.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "128,512")]
    prompt: Vec<u32>,
    /// Tokens to generate, one or more lengths; 0 for none.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "64")]
    generate: Vec<u32>,
    /// Streams that generate together, one or more numbers.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=256))]
    batch: Vec<u32>,
    /// Tokens in the cache beforehand, one or more depths.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "0,1024")]
    depth: Vec<u32>,
    /// Instead of the table: how long each stage of a step and each of its kernels takes on the GPU, and the bytes that it
    /// reads.
    #[arg(long)]
    stages: bool,
    /// Repeats of each row.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    #[command(flatten)]
    place: Place,
    /// Print JSON, with every sample.
    #[arg(long, conflicts_with = "md")]
    json: bool,
    /// Print Markdown.
    #[arg(long)]
    md: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let name = source::name(&self.model);
        let plan = self.plan()?;
        let file = source::open(self.model.as_deref())?;
        let model = Arc::new(Model::load(&file).map_err(|error| Failure::from(error).at(&name))?);
        plan.check(model.config.context)?;
        if self.stages {
            return self.stages(&plan, &model);
        }
        let pool = self.place.threads().pool()?;
        let request = Request {
            context: plan.context(),
            sequences: plan.streams(),
            threads: pool.current_num_threads(),
            activations: self.place.activations(),
            kernels: self.place.kernels(),
        };
        let start = Instant::now();
        let Placed { backend, device, facts } = request.place(&model, self.place.device(), device::note)?;
        if let Facts::Cpu { .. } = facts {
            pool.install(|| touch(&file));
        }
        let load_seconds = start.elapsed().as_secs_f64();
        let (mut bandwidth, mut peak) = (Bandwidth::default(), Peak::default());
        let on_gpu = match &facts {
            Facts::Cuda(ready) => Some((ready, cuda::ReadBandwidth::new(ready, &self.place.kernels())?)),
            _ => None,
        };
        let mut gpu_memory = 0;
        let mut measure_bandwidth = || match &on_gpu {
            Some((ready, read)) => {
                gpu_memory = gpu_memory.max(ready.gpu.memory.saturating_sub(ready.free_memory()?));
                bandwidth.add(read.measure()?);
                Ok(())
            }
            None => {
                let failed = |error| Failure::new(format!("cannot measure the memory bandwidth: {error}"));
                peak.without(|| bandwidth.measure(&pool)).map_err(failed)
            }
        };
        let rows = plan.measure(backend, &mut measure_bandwidth)?;
        // Cut short or replaced in the meantime, perhaps: then the figures are of no one's model.
        file.check_unchanged()?;
        let report = Report {
            model: ModelFacts {
                name,
                arch: model.config.arch.name(),
                layers: model.config.layers,
                // `usize` is at most 64 bits wide.
                parameters: file.tensors().iter().map(|tensor| tensor.len() as u64).sum(),
                bytes: file.size(),
            },
            machine: Machine {
                device,
                hardware: hardware(facts, gpu_memory),
                activations: request.activations.name(),
            },
            load_seconds,
            traffic: Traffic::of(&model),
            bandwidth,
            rows,
            peak: peak.bytes(),
        };
        match self.format() {
            Format::Json => output::json(&report.json()),
            Format::Markdown => report.print_markdown(),
            Format::Text => report.print(),
        }
    }

    fn format(&self) -> Format {
        match (self.json, self.md) {
            (true, _) => Format::Json,
            (_, true) => Format::Markdown,
            _ => Format::Text,
        }
    }

    /// Takes apart a step of each row: of a prompt its first chunk, of generation one step.
    fn stages(&self, plan: &Plan, model: &Arc<Model>) -> Result<(), Failure> {
        let ordinal = match self.place.device() {
            Wish::On(Device::Cuda(ordinal)) => ordinal,
            Wish::Auto => 0,
            Wish::On(_) => {
                return Err(
                    Failure::usage("--stages takes apart the steps of a GPU").hint("add --device cuda")
                );
            }
        };
        let request = Request {
            context: plan.context(),
            sequences: plan.streams(),
            threads: self.place.threads().count(),
            activations: self.place.activations(),
            kernels: self.place.kernels(),
        };
        let (mut cuda, ready) = request.load_cuda(model, ordinal)?;
        let mut bandwidth = Bandwidth::default();
        bandwidth.add(cuda::ReadBandwidth::new(&ready, &self.place.kernels())?.measure()?);
        let mut all = Vec::new();
        for &depth in &plan.depths {
            for test in &plan.tests {
                let (streams, tokens) = match *test {
                    Test::Prompt(tokens) => (1, tokens.min(cuda.max_rows())),
                    Test::Generate { streams, .. } => (streams, 1),
                };
                let shape = Shape { streams, tokens, depth };
                all.push(Stages::measure(&mut cuda, model, shape, plan.repeats)?);
            }
        }
        stages::print(&all, bandwidth.bound(), self.format())
    }

    fn plan(&self) -> Result<Plan, Failure> {
        // A u32 fits: the crate runs on 64 bits, as the map of a model does.
        let lengths = |list: &[u32]| list.iter().map(|&n| n as usize).filter(|&n| n > 0).collect::<Vec<_>>();
        let prompts = lengths(&self.prompt).into_iter().map(Test::Prompt);
        let mut streams: Vec<_> = self.batch.iter().map(|&n| n as usize).collect();
        // Ascending, as depths are: caches are filled for as many streams as a row needs.
        streams.sort_unstable();
        streams.dedup();
        let generate = lengths(&self.generate).into_iter();
        let generate = generate
            .flat_map(|tokens| streams.iter().map(move |&streams| Test::Generate { tokens, streams }));
        let tests: Vec<_> = prompts.chain(generate).collect();
        if tests.is_empty() {
            return Err(Failure::usage("nothing to measure: every --prompt and --generate is 0"));
        }
        let mut depths: Vec<_> = self.depth.iter().map(|&n| n as usize).collect();
        // Ascending: each depth continues the cache of the one before.
        depths.sort_unstable();
        depths.dedup();
        Ok(Plan { tests, depths, repeats: self.repeat as usize })
    }
}

/// For whom the figures are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Markdown,
    Json,
}

/// The rows to measure: every test at every depth.
struct Plan {
    tests: Vec<Test>,
    /// Ascending.
    depths: Vec<usize>,
    repeats: usize,
}

impl Plan {
    /// The deepest depth and the longest test.
    fn longest(&self) -> (usize, usize) {
        let tokens = self.tests.iter().map(|test| test.tokens()).max();
        (self.depths.iter().copied().max().unwrap_or(0), tokens.unwrap_or(0))
    }

    /// The most streams of a test.
    fn streams(&self) -> usize {
        self.tests.iter().map(|test| test.streams()).max().unwrap_or(1)
    }

    /// Positions that are reached.
    fn context(&self) -> usize {
        let (depth, tokens) = self.longest();
        depth + tokens
    }

    /// Fails where the rows go beyond what the model was made for.
    fn check(&self, context: usize) -> Result<(), Failure> {
        let (depth, tokens) = self.longest();
        if depth + tokens <= context {
            return Ok(());
        }
        let message = format!("{tokens} tokens at depth {depth} go beyond the model's {context} positions");
        Err(Failure::new(message).hint("give a smaller --depth, --prompt or --generate"))
    }

    /// Measures every row, with `between` before each and after the last, the backend still there.
    fn measure(
        &self,
        backend: Box<dyn Backend>,
        between: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Vec<Row>, Failure> {
        let max_rows = backend.max_rows();
        let work = |&test| Bench::<Box<dyn Backend>>::work(test, max_rows, self.repeats);
        let filling = self.longest().0 * self.streams();
        let total = filling + self.depths.len() * self.tests.iter().map(work).sum::<usize>();
        let progress = Progress::steps("measuring", total as u64); // `usize` is at most 64 bits wide
        let computed = |tokens| progress.add(tokens as u64); // as above
        let mut bench = Bench::new(Engine::new(backend), self.streams(), &computed);
        let mut rows = Vec::new();
        for &depth in &self.depths {
            for &test in &self.tests {
                between()?;
                rows.push(bench.measure(test, depth, self.repeats)?);
            }
        }
        between()?;
        Ok(rows)
    }
}

/// What is measured on; on a GPU `used` bytes of its memory were taken at most, by whatever runs there.
fn hardware(facts: Facts, used: u64) -> Hardware {
    match facts {
        Facts::Cuda(ready) => Hardware::Gpu {
            gpu: ready.gpu.clone(),
            nvrtc: ready.compiler.clone(),
            kernel_hash: ready.kernel_hash.clone(),
            plan: ready.plan,
            beyond_weights: used.saturating_sub(ready.plan.weights),
        },
        Facts::Cpu { isa, threads } => Hardware::Cpu {
            processor: machine::processor(),
            cache: machine::last_level_cache(),
            isa: isa.name(),
            threads,
        },
        Facts::Oracle => unreachable!("`--device` does not name it"),
    }
}

/// Reads one byte of every page of every tensor, so that no row waits for the disk.
fn touch(file: &File) {
    /// The smallest page of any system.
    const PAGE: usize = 4096;
    /// What a thread reads in order: enough for the system to read ahead.
    const SPAN: usize = 8 << 20;
    file.tensors().par_iter().flat_map(|tensor| tensor.data.par_chunks(SPAN)).for_each(|span| {
        black_box(span.iter().step_by(PAGE).fold(0u8, |sum, &byte| sum ^ byte));
    });
}
