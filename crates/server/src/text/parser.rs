//! A model's text, in any pieces, to reasoning, content and calls. Whatever is no call, however much it looks like one, is
//! content, every character of it; of what is a call, nothing is.

use std::sync::Arc;

use super::json_call::{self, Arguments, Close, Probe, Scanner};
use super::tools::Tools;
use super::xml_call::XmlCall;
use super::{Begins, begins, tag};

/// What to look for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Syntax {
    /// Whether `<think>` at the start begins a part that is reasoning.
    pub(crate) reasoning: bool,
    /// Whether the prompt left off within it.
    pub(crate) begins_in_reasoning: bool,
    /// Calls are looked for if there are tools.
    pub(crate) tools: Arc<Tools>,
}

/// A piece of what was understood.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Delta {
    Reasoning(String),
    Content(String),
    /// A call begins; calls are counted from 0.
    Call {
        index: usize,
        name: String,
    },
    /// More of the JSON of the call's arguments.
    Arguments {
        index: usize,
        json: String,
    },
    /// The call is over.
    CallEnd {
        index: usize,
    },
}

#[derive(Debug)]
enum State {
    /// Before the first character that is no white space.
    Start,
    Content,
    Reasoning,
    Xml(XmlCall),
    /// In the arguments of a JSON call; the text so far, where they are a string that holds JSON.
    Json {
        scanner: Scanner,
        quoted: Option<String>,
    },
    /// After the arguments of a JSON call.
    JsonEnd,
    /// After the function of an XML call.
    XmlEnd,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Parser {
    syntax: Syntax,
    state: State,
    /// Text not yet understood.
    held: String,
    /// White space at the end of what went out: it follows only if something follows it. Before a tag it belongs to the
    /// format.
    space: String,
    /// Whether nothing but white space has come since a tag, which belongs to the format as well.
    after_tag: bool,
    calls: usize,
    /// Whether a call stands within reasoning, which then goes on.
    within_reasoning: bool,
    out: Vec<Delta>,
}

impl Parser {
    pub(crate) fn new(syntax: Syntax) -> Parser {
        let state = match syntax.begins_in_reasoning {
            true => State::Reasoning,
            false if syntax.reasoning => State::Start,
            false => State::Content,
        };
        Parser {
            after_tag: syntax.begins_in_reasoning,
            syntax,
            state,
            held: String::new(),
            space: String::new(),
            calls: 0,
            within_reasoning: false,
            out: Vec::new(),
        }
    }

    /// Whether what comes next is reasoning, as far as is known.
    pub(crate) fn is_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning)
    }

    /// Calls so far.
    pub(crate) fn calls(&self) -> usize {
        self.calls
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Delta> {
        self.held.push_str(text);
        while self.advance(false) {}
        std::mem::take(&mut self.out)
    }

    /// Ends the text. `cut`: it was not the model that ended it; a call that was being written then stays incomplete, so that
    /// nobody takes half a file for a whole one.
    pub(crate) fn finish(&mut self, cut: bool) -> Vec<Delta> {
        while self.advance(true) {}
        if let State::Xml(call) = &mut self.state {
            let mut json = String::new();
            call.finish(cut, &mut json);
            self.arguments(json);
        }
        let written = matches!(self.state, State::JsonEnd | State::XmlEnd);
        if written || !cut && matches!(self.state, State::Xml(_) | State::Json { .. }) {
            self.end_call();
        }
        let space = std::mem::take(&mut self.space);
        self.put(space);
        std::mem::take(&mut self.out)
    }

    /// One step; false if more text is needed.
    fn advance(&mut self, ended: bool) -> bool {
        if self.held.is_empty() {
            return false;
        }
        match &mut self.state {
            State::Start => self.start(ended),
            State::Content | State::Reasoning => self.free(ended),
            State::Xml(call) => {
                let mut json = String::new();
                call.take(&mut self.held, ended, &self.syntax.tools, &mut json);
                let is_over = call.is_over();
                self.arguments(json);
                if is_over {
                    self.state = State::XmlEnd;
                }
                is_over
            }
            State::Json { scanner, quoted } => {
                let end = scanner.end(&self.held);
                let piece: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                let piece = match quoted {
                    None => piece,
                    Some(text) => {
                        text.push_str(&piece);
                        if end.is_some() { unquoted(text) } else { String::new() }
                    }
                };
                self.arguments(piece);
                if end.is_some() {
                    self.state = State::JsonEnd;
                }
                end.is_some()
            }
            State::JsonEnd => match json_call::close(&self.held, ended) {
                Close::At(end) => {
                    self.held.drain(..end);
                    self.end_call();
                    true
                }
                Close::More => false,
            },
            State::XmlEnd => self.xml_end(ended),
        }
    }

    /// White space, then perhaps the tag that begins reasoning.
    fn start(&mut self, ended: bool) -> bool {
        let text = self.held.trim_start();
        match begins(text, tag::THINK) {
            Begins::Yes => {
                let end = self.held.len() - text.len() + tag::THINK.len();
                self.held.drain(..end);
                self.enter(State::Reasoning);
            }
            Begins::Perhaps if !ended => return false,
            _ => self.state = State::Content,
        }
        true
    }

    /// Content or reasoning: passes on what is certain, up to the next tag.
    fn free(&mut self, ended: bool) -> bool {
        let mut from = 0;
        while let Some(at) = self.held[from..].find('<').map(|at| from + at) {
            match self.tag(&self.held[at..], ended) {
                Found::Nothing => from = at + 1,
                Found::Perhaps => {
                    self.pass(at);
                    return false;
                }
                Found::EndOfReasoning => {
                    self.pass(at);
                    self.held.drain(..tag::END_THINK.len());
                    self.enter(State::Content);
                    return true;
                }
                Found::Call(call, skip) => {
                    self.pass(at);
                    self.held.drain(..skip);
                    self.begin_call(call);
                    return true;
                }
            }
        }
        self.pass(self.held.len());
        false
    }

    /// What stands at the beginning of `text`.
    fn tag(&self, text: &str, ended: bool) -> Found {
        let mut found = Found::Nothing;
        if self.is_reasoning() {
            match begins(text, tag::END_THINK) {
                Begins::Yes => return Found::EndOfReasoning,
                Begins::Perhaps if !ended => found = Found::Perhaps,
                _ => {}
            }
        }
        if self.syntax.tools.is_empty() {
            return found;
        }
        match opening(text, ended, &self.syntax.tools) {
            Found::Nothing => found,
            other => other,
        }
    }

    /// A part of the text begins, after a tag.
    fn enter(&mut self, state: State) {
        self.state = state;
        self.space.clear();
        self.after_tag = true;
    }

    /// Passes on the first `len` bytes of what is held, but for white space at their end.
    fn pass(&mut self, len: usize) {
        let text: String = self.held.drain(..len).collect();
        let text = if self.after_tag { text.trim_start() } else { &text };
        let body = text.trim_end();
        if body.is_empty() {
            self.space.push_str(text);
            return;
        }
        self.after_tag = false;
        let whole = std::mem::take(&mut self.space) + body;
        self.put(whole);
        self.space = text[body.len()..].to_owned();
    }

    fn put(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        self.out.push(if self.is_reasoning() { Delta::Reasoning(text) } else { Delta::Content(text) });
    }

    fn begin_call(&mut self, call: Begun) {
        self.within_reasoning = self.is_reasoning();
        let (name, state, arguments) = match call {
            Begun::Xml(name) => (name.clone(), State::Xml(XmlCall::new(name)), String::new()),
            Begun::Json(name, Some(arguments)) => (name, State::JsonEnd, arguments),
            Begun::Json(name, None) => {
                let quoted = self.held.starts_with('"').then(String::new);
                (name, State::Json { scanner: Scanner::default(), quoted }, String::new())
            }
        };
        self.enter(state);
        self.out.push(Delta::Call { index: self.calls, name });
        self.calls += 1;
        self.arguments(arguments);
    }

    fn arguments(&mut self, json: String) {
        if !json.is_empty() {
            self.out.push(Delta::Arguments { index: self.calls - 1, json });
        }
    }

    fn xml_end(&mut self, ended: bool) -> bool {
        let text = self.held.trim_start();
        match begins(text, tag::END_CALL) {
            Begins::Yes => {
                let end = self.held.len() - text.len() + tag::END_CALL.len();
                self.held.drain(..end);
            }
            Begins::Perhaps if !ended => return false,
            _ => {}
        }
        self.end_call();
        true
    }

    fn end_call(&mut self) {
        self.out.push(Delta::CallEnd { index: self.calls - 1 });
        self.enter(if self.within_reasoning { State::Reasoning } else { State::Content });
    }
}

/// What was found at a `<`.
enum Found {
    Nothing,
    /// It is too short to tell.
    Perhaps,
    EndOfReasoning,
    /// A call, whose opening has so many bytes.
    Call(Begun, usize),
}

enum Begun {
    Xml(String),
    /// With its arguments, if they were seen already.
    Json(String, Option<String>),
}

/// Whether a call begins at the beginning of `text`: the tag alone makes none, what follows it must be a call's.
fn opening(text: &str, ended: bool, tools: &Tools) -> Found {
    match begins(text, tag::CALL) {
        Begins::Yes => {}
        Begins::Perhaps if !ended => return Found::Perhaps,
        // Some leave the tag out. Then only a tool that there is makes it a call, and no strict one: what holds its calls to the
        // schema begins with the tag.
        _ => {
            let is_known = |name: &str| tools.0.iter().any(|tool| tool.name == name && !tool.strict);
            return function(text, 0, ended, is_known);
        }
    }
    let body = text[tag::CALL.len()..].trim_start();
    let skip = text.len() - body.len();
    match body.chars().next() {
        None if ended => Found::Nothing,
        None => Found::Perhaps,
        Some('{') => match json_call::probe(body, ended) {
            Probe::More => Found::Perhaps,
            Probe::No => Found::Nothing,
            Probe::Call { name, arguments: Arguments::At(at) } => {
                Found::Call(Begun::Json(name, None), skip + at)
            }
            Probe::Call { name, arguments: Arguments::Were(json, at) } => {
                let json = if json.starts_with('"') { unquoted(&json) } else { json };
                Found::Call(Begun::Json(name, Some(json)), skip + at)
            }
        },
        Some(_) => function(body, skip, ended, |_| true),
    }
}

/// `<function=NAME>` at the beginning of `text`, which `skip` bytes precede.
fn function(text: &str, skip: usize, ended: bool, is_known: impl Fn(&str) -> bool) -> Found {
    /// Beyond this it is no name.
    const LONGEST: usize = 256;
    match begins(text, tag::FUNCTION) {
        Begins::Yes => {}
        Begins::Perhaps if !ended => return Found::Perhaps,
        _ => return Found::Nothing,
    }
    let rest = &text[tag::FUNCTION.len()..];
    let end = rest.find(['>', '<', '\n']);
    match end {
        Some(end) if rest[end..].starts_with('>') => {
            let name = rest[..end].trim();
            match !name.is_empty() && is_known(name) {
                true => Found::Call(Begun::Xml(name.to_owned()), skip + tag::FUNCTION.len() + end + 1),
                false => Found::Nothing,
            }
        }
        None if !ended && rest.len() < LONGEST => Found::Perhaps,
        _ => Found::Nothing,
    }
}

/// The text of a JSON string, which should be JSON itself; what is no string as it stands.
fn unquoted(json: &str) -> String {
    serde_json::from_str(json).unwrap_or_else(|_| json.to_owned())
}

#[cfg(test)]
mod tests;
