//! One answer: a prompt's ids in, text out as it is generated, until one of the reasons to end. Knows nothing of where
//! prompts come from.

use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use engine::{Engine, Finish, Sampler, Session, StopStrings, StreamDecoder, Tokenizer};
use model::Backend;

use crate::failure::Failure;
use crate::figures::Figures;
use crate::interrupt::Stop;
use crate::progress::Progress;

/// The arguments that say when an answer ends, to be flattened into a command's.
#[derive(clap::Args)]
#[command(next_help_heading = "End of the answer")]
pub(crate) struct Limits {
    /// Generate at most N tokens [default: until the model ends or the context is full].
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// End where the text STR appears, which is not printed; may be repeated.
    #[arg(long, value_name = "STR", allow_hyphen_values = true,
          value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
}

impl Limits {
    /// The most tokens of an answer.
    pub(crate) fn max_tokens(&self) -> Option<usize> {
        // A u32 fits: the crate runs on 64 bits, as the map of a model does.
        self.max_tokens.map(|n| n as usize)
    }
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    /// The model ended it.
    Model,
    /// `--max-tokens`.
    MaxTokens,
    /// The context is full.
    ContextFull,
    /// `--stop`: this string.
    StopString(String),
    /// Ctrl-C.
    Interrupted,
}

impl End {
    /// For programs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            End::Model => "end_of_text",
            End::MaxTokens => "max_tokens",
            End::ContextFull => "context_full",
            End::StopString(_) => "stop_string",
            End::Interrupted => "interrupted",
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Model => f.write_str("the model ended the text"),
            End::MaxTokens => f.write_str("stopped at --max-tokens"),
            End::ContextFull => f.write_str("the context is full"),
            End::StopString(string) => write!(f, "stopped at {string:?}"),
            End::Interrupted => f.write_str("interrupted"),
        }
    }
}

/// A finished answer.
pub(crate) struct Answer {
    /// What was written.
    pub(crate) text: String,
    /// The tokens generated; the last ones may spell a stop string. No id that ended the text.
    pub(crate) ids: Vec<u32>,
    pub(crate) end: End,
    pub(crate) figures: Figures,
}

/// What answers: a model in an engine, with one sequence in its cache.
pub(crate) struct Responder<'a, B> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) engine: Engine<B>,
    pub(crate) session: Session,
    pub(crate) sampler: Sampler,
    pub(crate) limits: &'a Limits,
}

impl<B: Backend> Responder<'_, B> {
    /// Positions that prompt and answer may take together.
    pub(crate) fn context(&self) -> usize {
        self.engine.context()
    }

    /// Answers `prompt`, handing text to `write` as soon as it is certain. What the cache holds of the prompt's
    /// beginning is not computed again; that changes no bit. Ctrl-C ends the answer, not the process.
    pub(crate) fn answer(
        &mut self,
        prompt: &[u32],
        write: impl FnMut(&str) -> io::Result<()>,
    ) -> Result<Answer, Failure> {
        let stop = Stop::catch();
        let start = Instant::now();
        let reused = self.keep_common(prompt);
        let read = self.read(&prompt[reused..], &stop)?;
        if read.is_continue() {
            // A backend may run behind its host: the logits are there when the prompt has been read.
            self.engine.logits()?;
        }
        let prompt_time = start.elapsed();
        let computed = self.session.tokens().len() - reused;
        let mut writer = Writer::new(self.tokenizer, &self.limits.stop, &stop, write);
        let end = match read {
            ControlFlow::Break(()) => End::Interrupted,
            ControlFlow::Continue(()) => {
                let max_tokens = self.limits.max_tokens().unwrap_or(usize::MAX);
                let each = |id| writer.push(id);
                let Self { engine, session, sampler, .. } = self;
                let finish = engine.generate(session, sampler, self.tokenizer.eos(), max_tokens, each)?;
                writer.end(finish)?
            }
        };
        let figures = Figures {
            prompt: prompt.len(),
            reused,
            computed,
            prompt_time,
            first_token: writer.first.map(|first| first - start),
            generated: writer.ids.len(),
            generation_time: writer.generation_time(),
        };
        Ok(Answer { text: writer.text, ids: writer.ids, end, figures })
    }

    /// Forgets what the cache holds beyond the beginning it shares with `prompt`; returns that one's length. The last
    /// token is always computed: the first token of the answer is chosen by its logits.
    fn keep_common(&mut self, prompt: &[u32]) -> usize {
        let cached = self.session.tokens().iter();
        let common = cached.zip(prompt).take_while(|(cached, token)| cached == token).count();
        let common = common.min(prompt.len().saturating_sub(1));
        self.engine.truncate(&mut self.session, common);
        common
    }

    fn read(&mut self, tokens: &[u32], stop: &Stop) -> Result<ControlFlow<()>, Failure> {
        let progress = Progress::steps("reading the prompt", tokens.len() as u64); // `usize` is at most 64 bits
        let mut done = 0;
        Ok(self.engine.feed(&mut self.session, tokens, |now| {
            progress.add((now - done) as u64); // as above
            done = now;
            if stop.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?)
    }
}

/// Tokens to text to `write`, watching for stop strings and Ctrl-C.
struct Writer<'a, W> {
    decoder: StreamDecoder<&'a Tokenizer>,
    strings: &'a [String],
    stops: StopStrings,
    stop: &'a Stop,
    write: W,
    text: String,
    ids: Vec<u32>,
    first: Option<Instant>,
    last: Option<Instant>,
    failure: Option<Failure>,
}

impl<'a, W: FnMut(&str) -> io::Result<()>> Writer<'a, W> {
    fn new(tokenizer: &'a Tokenizer, strings: &'a [String], stop: &'a Stop, write: W) -> Self {
        let stops = StopStrings::new(strings).expect("clap refuses empty stop strings");
        Writer {
            decoder: StreamDecoder::new(tokenizer),
            strings,
            stops,
            stop,
            write,
            text: String::new(),
            ids: Vec::new(),
            first: None,
            last: None,
            failure: None,
        }
    }

    /// Takes a token; breaks off at a stop string, at Ctrl-C, and where nobody takes the text any more.
    fn push(&mut self, id: u32) -> ControlFlow<()> {
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        self.ids.push(id);
        let passed = match self.decoder.push(id) {
            Ok(text) => put(self.stops.push(text), &mut self.text, &mut self.write),
            Err(error) => Err(error.into()),
        };
        self.failure = passed.err();
        if self.failure.is_some() || self.stops.matched().is_some() || self.stop.requested() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    /// Writes what was withheld, and says why the answer ended.
    fn end(&mut self, finish: Finish) -> Result<End, Failure> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        put(self.stops.push(self.decoder.finish()), &mut self.text, &mut self.write)?;
        put(self.stops.finish(), &mut self.text, &mut self.write)?;
        Ok(match (self.stops.matched(), finish) {
            (Some(index), _) => End::StopString(self.strings[index].clone()),
            (None, Finish::Stopped) => End::Interrupted,
            (None, Finish::EndOfText) => End::Model,
            (None, Finish::Length) => End::MaxTokens,
            (None, Finish::ContextFull) => End::ContextFull,
        })
    }

    /// From the first token to the last.
    fn generation_time(&self) -> Duration {
        self.first.zip(self.last).map_or(Duration::ZERO, |(first, last)| last - first)
    }
}

fn put(text: &str, all: &mut String, write: &mut impl FnMut(&str) -> io::Result<()>) -> Result<(), Failure> {
    all.push_str(text);
    Ok(write(text)?)
}
