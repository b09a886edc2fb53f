//! A model file to an engine that can answer: what is opened, checked and planned before the first token. Knows
//! nothing of prompts or sampling.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use cuda::KernelFiles;
use engine::{ChatError, ChatTemplate, Engine, Tokenizer};
use gguf::{File, Metadata};
use model::{Backend, Model};
use quant::fixed::Activations;

use crate::activations::ActivationsArg;
use crate::device::{self, Device, DeviceArgs, Request, Wish};
use crate::failure::Failure;
use crate::source;
use crate::threads::Threads;

/// How a model is run, for commands that compute.
#[derive(clap::Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct Options {
    /// Positions of the context, prompt and answer together, up to what the model was made for [default: as many as
    /// the text is likely to need].
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    #[command(flatten)]
    place: Place,
}

/// Where and how a model is run.
#[derive(clap::Args)]
pub(crate) struct Place {
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    activations: ActivationsArg,
}

impl Options {
    /// The precision of activations.
    pub(crate) fn activations(&self) -> Activations {
        self.place.activations()
    }
}

impl Place {
    /// The precision of activations.
    pub(crate) fn activations(&self) -> Activations {
        self.activations.value()
    }

    /// The device that was asked for.
    pub(crate) fn device(&self) -> Wish {
        self.device.device
    }

    /// Where kernels come from and are kept.
    pub(crate) fn kernels(&self) -> KernelFiles {
        self.device.kernels.files()
    }

    /// The CPU's threads.
    pub(crate) fn threads(&self) -> &Threads {
        &self.threads
    }
}

/// A model that can answer, and where it does.
pub(crate) struct Running {
    pub(crate) engine: Engine<Box<dyn Backend>>,
    pub(crate) device: Device,
}

/// A model that was opened and checked; no weight was read yet.
pub(crate) struct Loaded {
    /// How messages call it.
    pub(crate) name: String,
    pub(crate) tokenizer: Tokenizer,
    model: Arc<Model>,
    file: File,
}

impl Loaded {
    /// Opens the model at `path`, or the one that ships.
    pub(crate) fn open(path: &Option<PathBuf>) -> Result<Loaded, Failure> {
        let name = source::name(path);
        let file = source::open(path.as_deref())?;
        let model = Model::load(&file).map_err(|error| Failure::from(error).at(&name))?;
        let tokenizer =
            Tokenizer::from_metadata(file.metadata()).map_err(|error| Failure::from(error).at(&name))?;
        let (tokens, rows) = (tokenizer.vocab_len(), model.config.vocab);
        if tokens > rows {
            let message = format!("{name}: {tokens} tokens, but only {rows} rows in `token_embd.weight`");
            return Err(Failure::new(message));
        }
        Ok(Loaded { name, tokenizer, model: Arc::new(model), file })
    }

    pub(crate) fn metadata(&self) -> &Metadata {
        self.file.metadata()
    }

    /// The model, for who makes a backend of it.
    pub(crate) fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Another tokenizer of the same vocabulary, for who keeps it longer than this.
    pub(crate) fn fresh_tokenizer(&self) -> Result<Tokenizer, Failure> {
        Ok(Tokenizer::from_metadata(self.metadata())?)
    }

    /// Positions that the model was made for.
    pub(crate) fn context(&self) -> usize {
        self.model.config.context
    }

    /// Rows of the head: at least as many as there are tokens.
    pub(crate) fn vocab_rows(&self) -> usize {
        self.model.config.vocab
    }

    /// Fails where a file of the model was cut short or grew since it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<(), Failure> {
        Ok(self.file.check_unchanged()?)
    }

    /// The chat template of the file, if it carries one.
    pub(crate) fn template(&self) -> Result<Option<ChatTemplate>, Failure> {
        match ChatTemplate::from_metadata(self.metadata(), &self.tokenizer) {
            Ok(template) => Ok(Some(template)),
            Err(ChatError::Missing) => Ok(None),
            Err(error) => Err(Failure::from(error).at(&self.name)),
        }
    }

    /// An engine for one sequence of `options.ctx` positions, or of `wanted` as far as the model goes. What `auto` chose
    /// is said unless `quiet`.
    pub(crate) fn engine(&self, options: &Options, wanted: usize, quiet: bool) -> Result<Running, Failure> {
        let limit = self.model.config.context;
        // A u32 fits: the crate runs on 64 bits, as the map of a model does.
        let context = options.ctx.map_or(wanted.min(limit), |ctx| ctx as usize);
        if context > limit {
            let message = format!("--ctx {context}: {} was made for at most {limit} positions", self.name);
            return Err(Failure::new(message).hint("leave --ctx out to get as much as the text needs"));
        }
        self.engine_of(context, &options.place, quiet)
    }

    /// An engine for one sequence of `context` positions, no more than the model was made for.
    pub(crate) fn engine_of(&self, context: usize, place: &Place, quiet: bool) -> Result<Running, Failure> {
        let request = Request {
            context,
            sequences: 1,
            threads: place.threads.count(),
            activations: place.activations(),
            kernels: place.kernels(),
        };
        let note = |text: fmt::Arguments<'_>| {
            if !quiet {
                device::note(text);
            }
        };
        let placed = request.place(&self.model, place.device(), note)?;
        Ok(Running { engine: Engine::new(placed.backend), device: placed.device })
    }

    /// What to do about a text of `tokens` that does not fit the context.
    pub(crate) fn context_hint(&self, tokens: usize) -> String {
        match self.model.config.context {
            limit if tokens <= limit => format!("try a larger --ctx: {} goes up to {limit}", self.name),
            limit => format!("{} was made for at most {limit} positions: shorten the text", self.name),
        }
    }
}
