//! Where lines come from: a line editor with history on a terminal, else standard input as it is.

use std::env;
use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;

use rustyline::config::Behavior;
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

use crate::failure::Failure;

/// Entries that the history keeps.
const HISTORY: usize = 1000;

/// What reading a line gave.
pub(super) enum Line {
    Text(String),
    /// Ctrl-C: whatever was typed is to be dropped.
    Dropped,
    /// No more lines.
    End,
}

/// A source of lines.
pub(super) enum Lines {
    /// A person at a terminal.
    Terminal {
        editor: Box<DefaultEditor>,
        /// Where the history is kept, unless that failed or is not wanted.
        history: Option<PathBuf>,
    },
    /// A pipe or a file.
    Pipe,
}

impl Lines {
    /// Standard input; `keep_history` across runs, where it is a terminal.
    pub(super) fn stdin(keep_history: bool) -> Result<Lines, Failure> {
        if !io::stdin().is_terminal() {
            return Ok(Lines::Pipe);
        }
        // Where standard output is a pipe it gets the answers alone: the line is edited on the terminal itself.
        let behavior = if io::stdout().is_terminal() { Behavior::Stdio } else { Behavior::PreferTerm };
        let config = Config::builder().behavior(behavior).max_history_size(HISTORY).map_err(terminal)?;
        let mut editor = DefaultEditor::with_config(config.build()).map_err(terminal)?;
        let history = if keep_history { history_file() } else { None };
        if let Some(path) = &history {
            // There is none before the first message was sent; an unreadable one is no reason not to talk.
            let _ = editor.load_history(path);
        }
        Ok(Lines::Terminal { editor: Box::new(editor), history })
    }

    /// Whether a person is there, who is shown prompts.
    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Lines::Terminal { .. })
    }

    /// The next line, without its line break.
    pub(super) fn next(&mut self, prompt: &str) -> Result<Line, Failure> {
        match self {
            Lines::Terminal { editor, .. } => match editor.readline(prompt) {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(Line::Dropped),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(terminal(error)),
            },
            Lines::Pipe => match io::stdin().lock().lines().next() {
                Some(Ok(line)) => Ok(Line::Text(line)),
                Some(Err(error)) => Err(Failure::new(format!("cannot read standard input: {error}"))),
                None => Ok(Line::End),
            },
        }
    }

    /// Remembers an entry, across runs where there is a place for that.
    pub(super) fn remember(&mut self, entry: &str) {
        let Lines::Terminal { editor, history } = self else { return };
        let added = editor.add_history_entry(entry);
        let Some(path) = history else { return };
        let kept = added.map_err(io::Error::other).and_then(|_| {
            // Made when there is something to put into it.
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            editor.append_history(path).map_err(io::Error::other)
        });
        if let Err(error) = kept {
            eprintln!("note: the history is not kept: {}: {error}", path.display());
            *history = None;
        }
    }
}

fn terminal(error: ReadlineError) -> Failure {
    Failure::new(format!("cannot read from the terminal: {error}"))
}

/// `tally/history` in the user's directory for state, by the XDG Base Directory Specification 0.8.
fn history_file() -> Option<PathBuf> {
    // "All paths set in these environment variables must be absolute", and are to be ignored if they are not.
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let given = env::var_os("XDG_STATE_HOME").map(PathBuf::from).and_then(absolute);
    let state = given.or_else(|| Some(env::home_dir().and_then(absolute)?.join(".local/state")))?;
    Some(state.join("tally/history"))
}
