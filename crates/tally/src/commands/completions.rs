//! `tally completions`: a script that lets a shell complete commands, options and their values.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::Cli;
use crate::failure::Failure;

const EXAMPLES: &str = "\
Examples:
  tally completions bash > ~/.local/share/bash-completion/completions/tally
  tally completions zsh  > ~/.zfunc/_tally       with `fpath+=~/.zfunc` before compinit in ~/.zshrc
  tally completions fish > ~/.config/fish/completions/tally.fish";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The shell to write for.
    shell: Shell,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        // In memory first: the generator panics where a write fails.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "tally", &mut script);
        Ok(std::io::stdout().lock().write_all(&script)?)
    }
}
