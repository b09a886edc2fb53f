//! `-p`, `--file` and `-`: where the text of a prompt comes from. Knows nothing of what is done with it.

use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::input;

/// The arguments, to be flattened into a command's after its model.
#[derive(clap::Args)]
pub(crate) struct PromptArgs {
    /// `-` takes the prompt from standard input.
    #[arg(value_name = "-", value_parser = ["-"], conflicts_with_all = ["prompt", "file"])]
    stdin: Option<String>,
    /// The prompt; `-` takes it from standard input.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "file")]
    prompt: Option<String>,
    /// Take the prompt from a file.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl PromptArgs {
    /// Takes a `-` that stands where the model would: the model that ships with a prompt from standard input.
    pub(crate) fn take_dash(&mut self, model: &mut Option<PathBuf>) {
        if model.as_deref() == Some(Path::new("-")) && self.stdin.is_none() {
            self.stdin = model.take().map(|_| "-".into());
        }
    }

    /// Whether there is one.
    pub(crate) fn is_given(&self) -> bool {
        self.stdin.is_some() || self.prompt.is_some() || self.file.is_some()
    }

    /// The prompt's text, from wherever it is to come.
    pub(crate) fn text(&self) -> Result<String, Failure> {
        let text = match (&self.prompt, &self.file, &self.stdin) {
            (Some(text), ..) => input::text(Some(text.clone()))?,
            (_, Some(path), _) => input::file(path)?,
            (.., Some(_)) => input::text(None)?,
            _ => {
                return Err(Failure::usage("there is no prompt")
                    .hint("give -p TEXT, --file FILE, or - for standard input"));
            }
        };
        if text.is_empty() {
            return Err(
                Failure::new("the prompt is empty").hint("a model needs at least one token to go on from")
            );
        }
        Ok(text)
    }
}
