//! What a model wrote to what a client reads: reasoning, content and calls of tools told apart as the text comes, whatever
//! way it was cut into pieces. Knows nothing of tokens or protocols.

mod json_call;
mod parser;
mod pipeline;
mod tools;
mod xml_call;

pub(crate) use parser::{Delta, Parser, Syntax};
pub(crate) use pipeline::Text;
pub(crate) use tools::{Tool, Tools};

/// Spellings that have a meaning.
pub(crate) mod tag {
    pub(crate) const THINK: &str = "<think>";
    pub(crate) const END_THINK: &str = "</think>";
    pub(crate) const CALL: &str = "<tool_call>";
    pub(crate) const END_CALL: &str = "</tool_call>";
    pub(crate) const FUNCTION: &str = "<function=";
    pub(crate) const END_FUNCTION: &str = "</function>";
    pub(crate) const PARAMETER: &str = "<parameter=";
    pub(crate) const END_PARAMETER: &str = "</parameter>";
}

/// Whether `text` begins with `prefix`, does not, or may once there is more of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    Yes,
    No,
    /// `text` is a beginning of `prefix`.
    Perhaps,
}

fn begins(text: &str, prefix: &str) -> Begins {
    match text.starts_with(prefix) {
        true => Begins::Yes,
        false if prefix.starts_with(text) => Begins::Perhaps,
        false => Begins::No,
    }
}
