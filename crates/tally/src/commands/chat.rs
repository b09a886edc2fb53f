//! `tally chat`: a conversation, turn by turn.

mod draft;
mod lines;

use std::path::PathBuf;

use anstyle::Style;
use engine::{ChatEncoder, ChatTemplate, Sampler, Session, Tokenizer};
use model::Backend;

use crate::answer::{End, Limits, Responder};
use crate::clock;
use crate::failure::Failure;
use crate::figures::Figures;
use crate::load::{self, Loaded};
use crate::message::{self, Message, Role};
use crate::sampling::Sampling;
use crate::text_out::TextOut;
use draft::{Draft, Entry};
use lines::{Line, Lines};

/// Positions of the context, if the model has them: a conversation cannot ask for more later, and memory is taken as
/// it grows.
const CONTEXT: usize = 16_384;

const EXAMPLES: &str = "\
Examples:
  tally chat                                        the small model that ships
  tally chat model.gguf --system 'Answer in one sentence.'
  printf 'Hello!\\nAnd in French?\\n' | tally chat model.gguf

";

/// What can be entered at the prompt.
const ENTRIES: &str = "\
At the prompt:
  /reset  forget the conversation     /stats  figures     /help  this list     /exit, Ctrl-D  leave
  A line that ends with \\ goes on in the next one.
  A message between \"\"\" and \"\"\" may have any lines.
  A space before the slash makes a message of what looks like a command.
  Ctrl-C stops an answer (twice: the program); at the prompt it drops what was typed.
  What was said of an answer that was stopped stays in the conversation.";

const NOTES: &str = "

What the engine has computed of the conversation is kept between turns, which changes no bit of the \
answers. Messages are kept in $XDG_STATE_HOME/tally/history, or ~/.local/state/tally/history, unless \
--no-history is given.";

#[derive(clap::Args)]
#[command(after_help = [EXAMPLES, ENTRIES, NOTES].concat())]
pub(crate) struct Args {
    /// The model; without one, the small one that ships.
    model: Option<PathBuf>,
    /// What the model is told before the conversation, as the chat template's system message.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Do not keep messages across runs.
    #[arg(long)]
    no_history: bool,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    engine: load::Options,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let loaded = Loaded::open(&self.model)?;
        let Some(template) = loaded.template()? else {
            let message = format!("{}: there is no chat template in the file", loaded.name);
            return Err(Failure::new(message).hint("`tally run --raw` continues plain text"));
        };
        let params = self.sampling.params(&loaded)?;
        let sampler = Sampler::new(params).map_err(|error| Failure::new(error).at(&loaded.name))?;
        let engine = loaded.engine(&self.engine, CONTEXT, false)?.engine;
        let (tokenizer, limits) = (&loaded.tokenizer, &self.limits);
        let mut conversation = Conversation {
            loaded: &loaded,
            encoder: ChatEncoder::new(tokenizer, &template)?,
            now: clock::now(),
            responder: Responder { tokenizer, engine, session: Session::default(), sampler, limits },
            messages: self.system.iter().map(|text| Message::new(Role::System, text)).collect(),
            last: None,
        };
        conversation.talk(Lines::stdin(!self.no_history)?)
    }
}

struct Conversation<'a> {
    loaded: &'a Loaded,
    encoder: ChatEncoder<&'a Tokenizer, &'a ChatTemplate>,
    /// When it began, in seconds since 1970.
    now: i64,
    responder: Responder<'a, Box<dyn Backend>>,
    /// The system message, if there is one, then the user's and the assistant's in turn.
    messages: Vec<Message>,
    /// Of the last answer.
    last: Option<Figures>,
}

impl Conversation<'_> {
    /// Takes entries until there are no more.
    fn talk(&mut self, mut lines: Lines) -> Result<(), Failure> {
        if lines.is_terminal() {
            let (name, context) = (&self.loaded.name, self.responder.context());
            note(format_args!("{name}, a context of {context} positions; /help says what you can enter"));
        }
        let mut draft = Draft::default();
        loop {
            let entry = match lines.next(if draft.is_empty() { "> " } else { ". " })? {
                Line::Text(line) => draft.push(&line),
                Line::Dropped => {
                    if draft.is_empty() {
                        note(format_args!("Ctrl-D or /exit leaves"));
                    }
                    draft = Draft::default();
                    None
                }
                // Ctrl-D within a draft drops it; a pipe that ends there has said all it will.
                Line::End if !draft.is_empty() && lines.is_terminal() => {
                    draft = Draft::default();
                    None
                }
                Line::End => {
                    return match draft.finish() {
                        Some(Entry::Message(text)) => self.say(text),
                        _ => Ok(()),
                    };
                }
            };
            match entry {
                None | Some(Entry::Nothing) => {}
                Some(Entry::Message(text)) => {
                    lines.remember(&text);
                    self.say(text)?;
                }
                Some(Entry::Reset) => self.reset(),
                Some(Entry::Stats) => self.stats(),
                Some(Entry::Help) => eprintln!("{ENTRIES}"),
                Some(Entry::Exit) => return Ok(()),
                Some(Entry::Unknown(command)) => {
                    note(format_args!(
                        "there is no command {command:?}; /help lists them, a space first sends it"
                    ));
                }
            }
        }
    }

    /// A turn: the user's message and the answer to it. A message that does not fit, or whose answer was stopped
    /// before it began, was never said.
    fn say(&mut self, text: String) -> Result<(), Failure> {
        self.messages.push(Message::new(Role::User, text));
        let prompt = self.encoder.encode(&message::conversation(&self.messages, self.now))?;
        let context = self.responder.context();
        if prompt.len() > context {
            self.messages.pop();
            let hint = self.loaded.context_hint(prompt.len());
            note(format_args!(
                "not sent: with this message the conversation has {} tokens, the context {context} positions; /reset \
                 starts a new conversation ({hint})",
                prompt.len()
            ));
            return Ok(());
        }
        let mut out = TextOut::stdout();
        let answer = match self.responder.answer(&prompt, |text| out.write(text)) {
            Ok(answer) => answer,
            Err(failure) => {
                // On a terminal the error begins a line; that writing fails is no worse than what has failed.
                let _ = out.end();
                return Err(failure);
            }
        };
        out.end_line()?;
        self.last = Some(answer.figures);
        match answer.end {
            End::Model | End::StopString(_) => {}
            End::Interrupted if answer.ids.is_empty() => {
                self.messages.pop();
                note(format_args!(
                    "stopped before the answer began; the message is not part of the conversation"
                ));
                return Ok(());
            }
            End::ContextFull => {
                note(format_args!(
                    "the context of {context} positions is full; /reset starts a new conversation"
                ));
            }
            End::MaxTokens | End::Interrupted => note(format_args!("{}", answer.end)),
        }
        self.messages.push(Message::new(Role::Assistant, answer.text));
        Ok(())
    }

    /// Forgets everything but the system message. The cache is left: what the next prompt shares with it stays valid.
    fn reset(&mut self) {
        self.messages.retain(|message| message.role == Role::System);
        self.last = None;
        note(format_args!("a new conversation"));
    }

    fn stats(&self) {
        let turns = self.messages.iter().filter(|message| message.role == Role::Assistant).count();
        let (used, context) = (self.responder.session.tokens().len(), self.responder.context());
        note(format_args!("turns {turns}; {used} of {context} positions in the cache"));
        if let Some(figures) = self.last {
            note(format_args!("last answer: {figures}"));
        }
    }
}

/// What is not the model's goes to standard error, and on a terminal looks different.
fn note(text: std::fmt::Arguments<'_>) {
    let dim = Style::new().dimmed();
    anstream::eprintln!("{dim}{text}{dim:#}");
}
