//! A model and the tokens of a prompt, for commands that compare what is computed from them. Knows nothing of what is
//! compared.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::Tokenizer;
use gguf::File;
use model::Model;
use quant::fixed::Activations;
use rayon::ThreadPool;

use crate::activations::ActivationsArg;
use crate::device::{KernelArgs, Placed, Request};
use crate::failure::Failure;
use crate::live::Live;
use crate::prompt_args::PromptArgs;
use crate::source;
use crate::threads::Threads;

/// The arguments, to be flattened into a command's.
#[derive(clap::Args)]
pub(crate) struct PromptedArgs {
    /// The model; without one, the small one that ships.
    model: Option<PathBuf>,
    #[command(flatten)]
    prompt: PromptArgs,
    /// The prompt as token ids.
    #[arg(long, value_name = "ID,..", value_delimiter = ',', conflicts_with_all = ["prompt", "file", "stdin"])]
    ids: Vec<u32>,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// How backends are built.
#[derive(clap::Args)]
pub(crate) struct ComputeArgs {
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    activations: ActivationsArg,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// A model that was opened, and a prompt that it can run.
pub(crate) struct Prompted {
    /// How messages call the model.
    pub(crate) name: String,
    pub(crate) model: Arc<Model>,
    pub(crate) ids: Vec<u32>,
    file: File,
    compute: ComputeArgs,
}

impl Prompted {
    /// The folder of kernels that stand in for the built-in ones.
    pub(crate) fn kernels(&self) -> Option<&Path> {
        self.compute.kernels.folder()
    }
}

impl ComputeArgs {
    pub(crate) fn activations(&self) -> Activations {
        self.activations.value()
    }

    /// A backend for `sequences` of `context` positions.
    pub(crate) fn place(
        &self,
        model: &Arc<Model>,
        side: &Live,
        context: usize,
        sequences: usize,
    ) -> Result<Placed, Failure> {
        side.place(model, self.request(context, sequences))
    }

    /// What a backend for `sequences` of `context` positions is built for.
    pub(crate) fn request(&self, context: usize, sequences: usize) -> Request {
        Request {
            context,
            sequences,
            threads: self.threads.count(),
            activations: self.activations(),
            kernels: self.kernels.files(),
        }
    }

    /// As many threads as were asked for, for work beside backends.
    pub(crate) fn pool(&self) -> Result<ThreadPool, Failure> {
        self.threads.pool()
    }
}

impl PromptedArgs {
    /// Opens the model, and turns the prompt into tokens as it stands, without the chat template.
    pub(crate) fn open(self) -> Result<Prompted, Failure> {
        self.open_with(|args, file| {
            if !args.ids.is_empty() {
                return Ok(args.ids.clone());
            }
            let text = args.prompt.text()?;
            // A file without a vocabulary will do for --ids.
            let tokenizer = Tokenizer::from_metadata(file.metadata())?;
            Ok(engine::raw_prompt(&tokenizer, &text)?)
        })
    }

    /// Opens the model, for who makes prompts of its own.
    pub(crate) fn open_without_prompt(self) -> Result<Prompted, Failure> {
        if !self.ids.is_empty() || self.prompt.is_given() {
            return Err(Failure::usage("this command makes its own prompts"));
        }
        self.open_with(|_, _| Ok(Vec::new()))
    }

    fn open_with(
        mut self,
        ids: impl FnOnce(&PromptedArgs, &File) -> Result<Vec<u32>, Failure>,
    ) -> Result<Prompted, Failure> {
        self.prompt.take_dash(&mut self.model);
        let name = source::name(&self.model);
        let at = |failure: Failure| failure.at(&name);
        let file = source::open(self.model.as_deref())?;
        let model = Arc::new(Model::load(&file).map_err(|error| at(error.into()))?);
        let ids = ids(&self, &file).map_err(at)?;
        let vocab = model.config.vocab;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(at(Failure::new(format!(
                "token id {id} is outside the vocabulary of {vocab} tokens"
            ))));
        }
        let prompted = Prompted { name, model, ids, file, compute: self.compute };
        prompted.fits(0)?;
        Ok(prompted)
    }
}

impl Prompted {
    pub(crate) fn activations(&self) -> Activations {
        self.compute.activations()
    }

    /// Fails where the model was not made for the prompt and `generate` tokens after it.
    pub(crate) fn fits(&self, generate: usize) -> Result<(), Failure> {
        let (tokens, context) = (self.ids.len() + generate, self.model.config.context);
        if tokens <= context {
            return Ok(());
        }
        let message = format!("{tokens} tokens, of a model that was made for at most {context} positions");
        let hint = if generate > 0 {
            "give a shorter prompt, or a smaller --generate"
        } else {
            "give a shorter prompt"
        };
        Err(Failure::new(message).at(&self.name).hint(hint))
    }

    /// A backend on which the prompt can be run, beside as many others as make `sequences`.
    pub(crate) fn place(&self, side: &Live, sequences: usize) -> Result<Placed, Failure> {
        self.place_for(side, self.ids.len(), sequences)
    }

    /// A backend for `sequences` of `context` positions.
    pub(crate) fn place_for(&self, side: &Live, context: usize, sequences: usize) -> Result<Placed, Failure> {
        self.compute.place(&self.model, side, context, sequences)
    }

    /// Fails where the model's file was cut short or replaced meanwhile: then the figures are of no one's model.
    pub(crate) fn check_unchanged(&self) -> Result<(), Failure> {
        Ok(self.file.check_unchanged()?)
    }
}

impl From<parity::DumpError> for Failure {
    fn from(error: parity::DumpError) -> Failure {
        let hint = match &error {
            parity::DumpError::OtherModel { .. } => "name the model that was traced, or trace this one",
            parity::DumpError::OtherPrompt { .. } => {
                "give the prompt that was traced: its ids are in manifest.json"
            }
            _ => return Failure::new(error),
        };
        Failure::new(&error).hint(hint)
    }
}

impl From<parity::BisectError> for Failure {
    fn from(error: parity::BisectError) -> Failure {
        match error {
            parity::BisectError::Dump(error) => error.into(),
            parity::BisectError::Side { side, source } => Failure::from(source).at(side),
            _ => Failure::new(error),
        }
    }
}

impl From<parity::ReproductionError> for Failure {
    fn from(error: parity::ReproductionError) -> Failure {
        match error {
            parity::ReproductionError::Fault(fault) => fault.into(),
            _ => Failure::new(error),
        }
    }
}
