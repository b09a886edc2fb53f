//! A call in the form of Qwen3-Coder: `<function=NAME><parameter=KEY>value</parameter></function>`, to the JSON of its
//! arguments as it comes. Knows the tools' schemas, by which text becomes strings or JSON.
//!
//! A value may spell any tag: a file about this very format, say. So a closing tag closes only if what follows it is what
//! follows a parameter.

use serde_json::Value as Json;

use super::tools::{Kind, Tools};
use super::{Begins, begins, tag};

/// A call that is being written.
#[derive(Debug)]
pub(super) struct XmlCall {
    name: String,
    parameters: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Before a parameter, or the end.
    Between,
    /// In a value that is a string, and goes out as it comes.
    Streaming,
    /// In a value that goes out when it is whole.
    Buffering(Kind),
    Over,
}

/// What a closing tag is that stands somewhere in a value.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Closing {
    /// The value ends before it; so many bytes are skipped.
    Yes(usize),
    No,
    Perhaps,
}

impl XmlCall {
    pub(super) fn new(name: String) -> XmlCall {
        XmlCall { name, parameters: 0, state: State::Between }
    }

    /// Whether the call is over.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Takes what it can from the beginning of `held`, and appends JSON to `out`. `ended`: nothing more will come.
    pub(super) fn take(&mut self, held: &mut String, ended: bool, tools: &Tools, out: &mut String) {
        while !self.is_over() && self.advance(held, ended, tools, out) {}
    }

    /// Ends a call to which nothing more comes: it is complete unless it was `cut`.
    pub(super) fn finish(&mut self, cut: bool, out: &mut String) {
        if !cut && !self.is_over() {
            self.end(out);
        }
    }

    /// One step; false if more text is needed.
    fn advance(&mut self, held: &mut String, ended: bool, tools: &Tools, out: &mut String) -> bool {
        match self.state {
            State::Between => self.between(held, ended, tools, out),
            State::Over => false,
            State::Streaming | State::Buffering(_) => self.value(held, ended, out),
        }
    }

    fn between(&mut self, held: &mut String, ended: bool, tools: &Tools, out: &mut String) -> bool {
        // What stands between parameters means nothing.
        let junk = held.find('<').unwrap_or(held.len());
        held.drain(..junk);
        if held.is_empty() {
            return false;
        }
        match begins(held, tag::PARAMETER) {
            Begins::Yes => {
                let Some(end) = held.find('>') else { return false };
                let key = held[tag::PARAMETER.len()..end].trim().to_owned();
                // The line feed after the tag belongs to the format; it must be there to be seen.
                let value = end + 1;
                let Some(after) = held[value..].chars().next() else {
                    return false;
                };
                held.drain(..value + usize::from(after == '\n'));
                self.open(&key, tools, out);
                return true;
            }
            Begins::Perhaps if !ended => return false,
            _ => {}
        }
        for closing in [tag::END_FUNCTION, tag::END_CALL] {
            match begins(held, closing) {
                Begins::Yes => {
                    // A closing `</tool_call>` is the caller's to see.
                    if closing == tag::END_FUNCTION {
                        held.drain(..closing.len());
                    }
                    self.end(out);
                    return true;
                }
                Begins::Perhaps if !ended => return false,
                _ => {}
            }
        }
        held.drain(..1);
        true
    }

    fn open(&mut self, key: &str, tools: &Tools, out: &mut String) {
        out.push(if self.parameters == 0 { '{' } else { ',' });
        self.parameters += 1;
        out.push_str(&Json::from(key).to_string());
        out.push(':');
        self.state = match tools.kind(&self.name, key) {
            Kind::Text => {
                out.push('"');
                State::Streaming
            }
            kind => State::Buffering(kind),
        };
    }

    fn value(&mut self, held: &mut String, ended: bool, out: &mut String) -> bool {
        let (certain, closing) = find_closing(held, ended);
        match (&self.state, closing) {
            (State::Streaming, closing) => {
                escape(&held[..certain], out);
                held.drain(..certain + closing.unwrap_or(0));
                if closing.is_some() {
                    out.push('"');
                }
            }
            (State::Buffering(kind), Some(skip)) => {
                out.push_str(&json(&held[..certain], *kind));
                held.drain(..certain + skip);
            }
            _ => {}
        }
        if closing.is_some() {
            self.state = State::Between;
        }
        closing.is_some()
    }

    fn end(&mut self, out: &mut String) {
        match self.state {
            State::Streaming => out.push('"'),
            State::Buffering(_) => out.push_str("null"),
            State::Between | State::Over => {}
        }
        out.push_str(if self.parameters == 0 { "{}" } else { "}" });
        self.state = State::Over;
    }
}

/// How much of `text` is the value's for certain, and, if it ends there, how much after that is to be skipped.
fn find_closing(text: &str, ended: bool) -> (usize, Option<usize>) {
    for (at, _) in text.match_indices('<') {
        // The line feed before the tag belongs to the format.
        let value = text[..at].strip_suffix('\n').map_or(at, str::len);
        match closing(&text[at..], ended) {
            Closing::Yes(skip) => return (value, Some(at - value + skip)),
            Closing::Perhaps => return (value, None),
            Closing::No => {}
        }
    }
    if ended {
        return (text.len(), None);
    }
    (text.strip_suffix('\n').map_or(text.len(), str::len), None)
}

fn closing(text: &str, ended: bool) -> Closing {
    let followed_by = |tag: &str, next: &[&str], skip: usize| match begins(text, tag) {
        Begins::No => Closing::No,
        Begins::Perhaps => {
            if ended {
                Closing::No
            } else {
                Closing::Perhaps
            }
        }
        Begins::Yes => {
            let rest = text[tag.len()..].trim_start();
            if rest.is_empty() {
                return if ended { Closing::Yes(skip) } else { Closing::Perhaps };
            }
            let next = next.iter().map(|next| begins(rest, next));
            next.fold(Closing::No, |sum, next| match (sum, next) {
                (Closing::Yes(_), _) | (_, Begins::Yes) => Closing::Yes(skip),
                (Closing::Perhaps, _) | (_, Begins::Perhaps) if !ended => Closing::Perhaps,
                _ => sum,
            })
        }
    };
    let parameter = followed_by(
        tag::END_PARAMETER,
        &[tag::PARAMETER, tag::END_FUNCTION, tag::END_CALL],
        tag::END_PARAMETER.len(),
    );
    // A parameter that nobody closed.
    let function = followed_by(tag::END_FUNCTION, &[tag::END_CALL], 0);
    match (parameter, function) {
        (Closing::Yes(skip), _) | (_, Closing::Yes(skip)) => Closing::Yes(skip),
        (Closing::Perhaps, _) | (_, Closing::Perhaps) => Closing::Perhaps,
        _ => Closing::No,
    }
}

/// Appends `text` as it stands within a JSON string.
fn escape(text: &str, out: &mut String) {
    let quoted = Json::from(text).to_string();
    out.push_str(&quoted[1..quoted.len() - 1]);
}

/// The JSON of a value that may be no string.
fn json(text: &str, kind: Kind) -> String {
    let trimmed = text.trim();
    // Python's words, which models write.
    let word = match trimmed {
        "True" => "true",
        "False" => "false",
        "None" => "null",
        _ => trimmed,
    };
    match serde_json::from_str::<Json>(word) {
        Ok(Json::String(_)) if kind == Kind::Either => Json::from(text).to_string(),
        Ok(_) => word.to_owned(),
        Err(_) => Json::from(text).to_string(),
    }
}
