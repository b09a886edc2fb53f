//! A conversation to the text that the model was trained to continue, by the file's own chat template. Knows
//! nothing of tokens, and of no model's format.
//!
//! Templates are Jinja programs from the model file, written for Python: they are run as `transformers`'
//! `apply_chat_template` runs them (its settings, `tojson`, `raise_exception` and `strftime_now`; Python's string
//! and dict methods), and, since a file may be hostile, under a budget of work and of output.

mod json;
mod python;
mod strftime;

use std::error::Error as _;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{io, thread};

use gguf::Metadata;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, State};
use serde_json::Value as Json;

use crate::{Tokenizer, TokenizerError};

const KEY: &str = "tokenizer.chat_template";
/// The name that errors give the template: `(in chat_template:12)`.
const NAME: &str = "chat_template";

/// The budget of one rendering.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// minijinja's fuel: about one unit an instruction or 64 bytes handled.
    pub fuel: u64,
    /// The longest output, in bytes.
    pub output: usize,
    /// The longest time. Fuel ends almost all hostile templates within a fraction of a second; this is for what
    /// minijinja does without asking for fuel, such as comparing two lists that hold themselves many times over.
    /// Such a rendering cannot be interrupted: it is abandoned, and goes on until it is done or the process ends.
    pub time: Duration,
    /// The most renderings at a time, abandoned ones included: so that a hostile template holds that many threads and
    /// no more, however often it is asked.
    pub threads: usize,
}

impl Default for Limits {
    /// Room for thousands of messages and megabytes of text.
    fn default() -> Self {
        Self { fuel: 1_000_000, output: 32 << 20, time: Duration::from_secs(5), threads: 16 }
    }
}

/// What a template is given.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// The messages, each an object with `role`, `content`, perhaps `tool_calls`, ... in OpenAI's form. Arguments
    /// of a tool call should be objects, as templates expect, not the JSON strings of OpenAI's wire format.
    pub messages: Vec<Json>,
    /// The tools' JSON schemas. Where there are none, templates see `none`.
    pub tools: Vec<Json>,
    /// Whether to end with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Whether a thinking model shall think; `None` leaves it to the template.
    pub enable_thinking: Option<bool>,
    /// Further variables by name, `chat_template_kwargs` elsewhere; they win over the ones above.
    pub variables: serde_json::Map<String, Json>,
    /// The time that `strftime_now` tells, in seconds since 1970 in the time zone to be told. Passed in, not asked
    /// for: the same conversation must give the same text.
    pub now: i64,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    limits: Limits,
    /// One reference for each rendering that goes on.
    rendering: Arc<()>,
    /// `bos_token`, `eos_token` and `pad_token`, as far as the file names them.
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// The template that a model file carries.
    ///
    /// # Errors
    /// [`ChatError::Missing`] where it carries none: no format is guessed from the vocabulary.
    pub fn from_metadata(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        let source = metadata.opt_str(KEY)?.ok_or(ChatError::Missing)?;
        let mut template = Self::new(source)?;
        let eos = metadata.opt_u32("tokenizer.ggml.eos_token_id")?;
        let named = [("bos_token", tokenizer.bos()), ("eos_token", eos), ("pad_token", tokenizer.padding())];
        for (name, id) in named.into_iter().filter_map(|(name, id)| Some((name, id?))) {
            template.special_tokens.push((name, tokenizer.decode(&[id])?));
        }
        Ok(template)
    }

    /// Compiles `source`, which sees no special tokens, under the default limits.
    ///
    /// # Errors
    /// [`ChatError::Template`] where it is no valid template.
    pub fn new(source: &str) -> Result<Self, ChatError> {
        Self::with_limits(source, Limits::default())
    }

    /// Compiles `source`, which sees no special tokens, under other limits.
    ///
    /// # Errors
    /// [`ChatError::Template`] where it is no valid template.
    pub fn with_limits(source: &str, limits: Limits) -> Result<Self, ChatError> {
        let source = source.to_owned();
        let environment =
            bounded(limits, move || environment(source, limits.fuel).map_err(ChatError::Template))?;
        let (environment, rendering) = (Arc::new(environment), Arc::new(()));
        Ok(Self { environment, limits, rendering, special_tokens: Vec::new() })
    }

    /// The prompt for `conversation`: text that spells control tokens, for [`crate::Specials::Parse`].
    ///
    /// # Errors
    /// [`ChatError::Refused`] where the template raises an exception; [`ChatError::Budget`], [`ChatError::TooLong`],
    /// [`ChatError::TooSlow`] and [`ChatError::Busy`] where it exceeds its limits; [`ChatError::Template`] for other failures.
    pub fn render(&self, conversation: &Conversation) -> Result<String, ChatError> {
        let (environment, context, limits) =
            (Arc::clone(&self.environment), self.context(conversation), self.limits);
        let held = Arc::clone(&self.rendering);
        // The template has one reference of its own. Of renderings that begin at once, all may find that they are too many.
        if Arc::strong_count(&held) > limits.threads + 1 {
            return Err(ChatError::Busy { threads: limits.threads });
        }
        bounded(limits, move || {
            let rendered = render(&environment, context, limits);
            drop(held);
            rendered
        })
    }

    /// The template's variables, by the names that `transformers` gives them.
    fn context(&self, conversation: &Conversation) -> Value {
        let list = |items: &[Json]| -> Value { items.iter().map(value_of).collect() };
        let tools = if conversation.tools.is_empty() { Value::from(()) } else { list(&conversation.tools) };
        let mut variables = vec![
            ("messages", list(&conversation.messages)),
            ("tools", tools),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(conversation.add_generation_prompt)),
            (NOW, Value::from(conversation.now)),
        ];
        variables
            .extend(self.special_tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str()))));
        variables
            .extend(conversation.enable_thinking.map(|thinking| ("enable_thinking", Value::from(thinking))));
        let others = conversation.variables.iter().map(|(name, value)| (name.as_str(), value_of(value)));
        // Of two values for one name the later wins.
        Value::from_pairs(variables.into_iter().chain(others))
    }
}

/// Minijinja set up as `transformers` sets up Jinja, with `source` compiled.
fn environment(source: String, fuel: u64) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_fuel(Some(fuel));
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(python::format);
    environment.add_filter("string", python::string);
    environment.add_filter("tojson", json::tojson);
    environment.add_test("iterable", python::is_iterable);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

fn render(environment: &Environment<'_>, context: Value, limits: Limits) -> Result<String, ChatError> {
    let mut out = Bounded { text: Vec::new(), limit: limits.output, exceeded: false };
    let template = environment.get_template(NAME);
    match template.and_then(|template| template.render_captured_to(context, &mut out).map(drop)) {
        Ok(()) => Ok(String::from_utf8(out.text).expect("templates write whole strings")),
        Err(_) if out.exceeded => Err(ChatError::TooLong { limit: limits.output }),
        Err(error) if error.kind() == ErrorKind::OutOfFuel => Err(ChatError::Budget { fuel: limits.fuel }),
        Err(error) => Err(match raised(&error) {
            Some(message) => ChatError::Refused(message.to_owned()),
            None => ChatError::Template(error),
        }),
    }
}

/// Runs `work` on a thread of its own, which a hostile template can neither overflow nor hold up.
///
/// The stack: a value nested as deep as the fuel allows is dropped, compared and written by recursion. A level costs
/// at least 3 units of fuel to build, and a debug build's frames some 300 bytes to walk; the pages are only
/// reserved until they are used.
fn bounded<T: Send + 'static>(
    limits: Limits,
    work: impl FnOnce() -> Result<T, ChatError> + Send + 'static,
) -> Result<T, ChatError> {
    const STACK_PER_FUEL: u64 = 256;
    let stack =
        usize::try_from(limits.fuel.saturating_mul(STACK_PER_FUEL)).unwrap_or(usize::MAX).max(1 << 20);
    let (send, receive) = mpsc::sync_channel(1);
    let thread = thread::Builder::new().name("chat template".into()).stack_size(stack);
    // Nobody hears a late answer: then the send fails, and that is all.
    thread.spawn(move || drop(send.send(work()))).map_err(ChatError::Thread)?;
    match receive.recv_timeout(limits.time) {
        Ok(done) => done,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(ChatError::TooSlow { limit: limits.time }),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(ChatError::Panicked),
    }
}

/// A JSON value as templates see it, its objects in their order.
fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(value), _) => Value::from(value),
            (_, Some(value)) => Value::from(value),
            _ => Value::from(number.as_f64()),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value_of).collect(),
        Json::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, value)| (name.as_str(), value_of(value))))
        }
    }
}

/// The variable in which [`strftime_now`] finds the time; no template can spell it.
const NOW: &str = " now";

fn strftime_now(state: &State, format: &str) -> Result<String, Error> {
    let now = state.lookup(NOW).and_then(|now| now.as_i64()).unwrap_or_default();
    strftime::strftime(now, format).map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
}

/// What a template said when it raised an exception.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// The message of the exception behind `error`, if the template raised one.
fn raised(error: &Error) -> Option<&str> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message);
        }
        cause = error.source();
    }
    None
}

/// A buffer that refuses to grow past its limit.
struct Bounded {
    text: Vec<u8>,
    limit: usize,
    exceeded: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.text.len() {
            self.exceeded = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why there is no prompt. Each is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The file has no template.
    #[error(
        "{KEY}: missing, so the file does not say how a conversation is written (hint: --raw continues plain text)"
    )]
    Missing,
    /// The key has another type than string.
    #[error(transparent)]
    Metadata(#[from] gguf::Error),
    /// A special token is outside the vocabulary.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The template does not compile, or failed on this conversation.
    #[error("chat template: {0}")]
    Template(Error),
    /// The template raised an exception: the conversation is not one that the model knows.
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template ran for too long.
    #[error("the chat template exceeded its budget of {fuel} units of work")]
    #[allow(missing_docs, reason = "the message says it")]
    Budget { fuel: u64 },
    /// The template ran for too long without using up its budget.
    #[error("the chat template was not done after {limit:?}")]
    #[allow(missing_docs, reason = "the message says it")]
    TooSlow { limit: Duration },
    /// Control tokens spelled in messages cannot be kept apart from the template's.
    #[error("the conversation spells a control token and has every character of private use")]
    NoMark,
    /// Too many renderings go on.
    #[error("the chat template is being rendered {threads} times already")]
    #[allow(missing_docs, reason = "the message says it")]
    Busy { threads: usize },
    /// There is no thread to run the template on.
    #[error("cannot start a thread for the chat template: {0}")]
    Thread(io::Error),
    /// The template engine panicked: a fault of its own, kept from taking the process with it.
    #[error("the template engine panicked on the chat template")]
    Panicked,
    /// The template wrote too much.
    #[error("the chat template wrote more than {limit} bytes")]
    #[allow(missing_docs, reason = "the message says it")]
    TooLong { limit: usize },
}
