//! `tally perplexity`: how well a model predicts a text, and how far two runs are apart.

mod distribution;
mod logits_file;
mod report;
mod score;
mod statistics;
mod windows;

use std::path::{Path, PathBuf};
use std::time::Instant;

use engine::{Engine, Specials};
use gguf::Writer;
use model::Backend;

use crate::device::Device;
use crate::failure::Failure;
use crate::load::{Loaded, Place, Running};
use crate::progress::Progress;
use crate::{input, model_file, output};
use logits_file::Reference;
use report::Report;
use score::Point;
use windows::Windows;

/// The word for the model that ships; a file of that name is `./shipped`.
const SHIPPED: &str = "shipped";

const EXAMPLES: &str = "\
Examples:
  tally perplexity model.gguf text.txt
  tally perplexity shipped models/heldout.txt --activations a8
  tally perplexity model-f16.gguf text.txt --chunks 20 --save-logits f16.logits
  tally perplexity model-q4.gguf  text.txt --chunks 20 --against f16.logits

What is measured, as llama.cpp's tool of the same name does it: the text is cut into windows of --ctx tokens that do
not overlap, each read with an empty cache. The first half of a window is context; each token of the second half is
predicted from all before it in the window. What is left at the end of the text is dropped. `<|im_end|>` and the like
in the text are taken as the text that they are made of.

Perplexity is the exponential of the mean negative log-probability (natural) of the predicted tokens; ± is the
standard error, which takes the tokens for independent. It can be compared between models of one tokenizer only.

--save-logits keeps all logits of the scored tokens, as a GGUF file with one F32 tensor of 4 bytes times vocabulary
times scored tokens: 4 MB a window of 512 tokens for a vocabulary of 4,096, and 155 MB for one of 151,936. --against
compares with them: the Kullback-Leibler divergence of this run from the reference for each token, how often both
hold the same token for the likeliest, and how the log-probability of the text's token changes. A run against its own
logits has a divergence of exactly 0 throughout.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model, or `shipped` for the one that ships.
    model: PathBuf,
    /// The text; `-` for standard input.
    #[arg(value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, value_name = "N", default_value_t = 512,
          value_parser = clap::value_parser!(u32).range(i64::from(Windows::LEAST)..))]
    ctx: u32,
    /// Windows to score at most, from the start of the text.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Write the logits of all scored tokens.
    #[arg(long, value_name = "OUT")]
    save_logits: Option<PathBuf>,
    /// Compare with logits that were written by --save-logits, on the same windows of the same text.
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let start = Instant::now();
        let text = read(&self.text)?;
        let loaded = Loaded::open(&Some(self.model.clone()).filter(|path| path != Path::new(SHIPPED)))?;
        let windows = self.cut(&loaded, &text)?;
        let reference = self
            .against
            .as_deref()
            .map(|path| Reference::open(path, loaded.vocab_rows(), &windows))
            .transpose()?;
        let (points, device) = self.score(&loaded, &windows, reference.as_ref())?;
        // A file that was cut short or replaced in the meantime: then the figures are of nothing.
        loaded.check_unchanged()?;
        reference.as_ref().map_or(Ok(()), Reference::check_unchanged)?;
        let report = Report {
            model: &loaded.name,
            text: &self.text.display().to_string(),
            activations: self.place.activations().name(),
            device,
            windows: &windows,
            points: &points,
            reference: reference.as_ref().map(Reference::source),
            seconds: start.elapsed().as_secs_f64(),
        };
        if self.json { output::json(&report.json()) } else { report.print() }
    }

    /// The text's windows.
    fn cut(&self, loaded: &Loaded, text: &str) -> Result<Windows, Failure> {
        // A u32 fits: the crate runs on 64 bits, as the map of a model does.
        let (ctx, limit) = (self.ctx as usize, self.chunks.map(|n| n as usize));
        if ctx > loaded.context() {
            let message =
                format!("--ctx {ctx}: {} was made for at most {} positions", loaded.name, loaded.context());
            return Err(Failure::new(message).hint("try a smaller --ctx"));
        }
        let ids = loaded.tokenizer.encode(text, Specials::AsText)?;
        let tokens = ids.len();
        let windows = Windows::cut(ids, ctx, limit, loaded.tokenizer.bos_to_add());
        if windows.count() == 0 {
            let plural = if tokens == 1 { "" } else { "s" };
            let message =
                format!("{}: {tokens} token{plural}, less than one window of {ctx}", self.text.display());
            let hint = match u32::try_from(tokens) {
                Ok(tokens) if tokens >= Windows::LEAST => format!("try --ctx {tokens}, or a longer text"),
                _ => "a longer text is needed".to_owned(),
            };
            return Err(Failure::new(message).hint(hint));
        }
        Ok(windows)
    }

    /// Scores all windows, and keeps the logits if that is wanted.
    fn score(
        &self,
        loaded: &Loaded,
        windows: &Windows,
        reference: Option<&Reference>,
    ) -> Result<(Vec<Point>, Device), Failure> {
        let Running { engine, device } = loaded.engine_of(windows.ctx(), &self.place, false)?;
        let Some(path) = &self.save_logits else {
            let rows = windows.count() * windows.scored().len();
            let progress = Progress::steps("scoring", rows as u64); // `usize` is at most 64 bits wide
            return Ok((self.run_engine(engine, windows, reference, None, &progress)?, device));
        };
        let source = format!("{}, {}", loaded.name, self.place.activations().name());
        let (metadata, tensor) =
            (logits_file::metadata(source, windows), logits_file::tensor(loaded.vocab_rows(), windows));
        let mut points = Vec::new();
        model_file::write(path, &metadata, &[tensor], "scoring", |writer, progress| {
            points = self.run_engine(engine, windows, reference, Some(writer), progress)?;
            Ok(())
        })?;
        Ok((points, device))
    }

    /// Scores; `progress` counts the bytes that `writer` is given or, without one, rows.
    fn run_engine(
        &self,
        mut engine: Engine<Box<dyn Backend>>,
        windows: &Windows,
        reference: Option<&Reference>,
        writer: Option<&Writer>,
        progress: &Progress,
    ) -> Result<Vec<Point>, Failure> {
        let vocab = engine.backend().model().config.vocab;
        let row = reference.map(|reference| |row| reference.row(row));
        let row = row.as_ref().map(|row| row as &(dyn Fn(usize) -> Vec<f32> + Sync));
        score::score(&mut engine, &self.place.threads().pool()?, windows, row, |first, logits| {
            // `usize` is at most 64 bits wide.
            let Some(writer) = writer else {
                progress.add((logits.len() / vocab) as u64);
                return Ok(());
            };
            let bytes = logits_file::encode(logits);
            writer.write_at(0, (first * vocab * size_of::<f32>()) as u64, &bytes)?;
            progress.add(bytes.len() as u64);
            Ok(())
        })
    }
}

/// The text.
fn read(path: &Path) -> Result<String, Failure> {
    if path == Path::new("-") { input::text(None) } else { input::file(path) }
}
