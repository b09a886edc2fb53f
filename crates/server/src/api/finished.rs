//! Whole answers, for requests that do not stream. Knows no protocol.

use crate::answer::{Answer, End, Piece, Usage};
use crate::error::ApiError;
use crate::job::Logprobs;
use crate::text::Delta;

/// A choice that has ended.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) reasoning: String,
    pub(crate) content: String,
    pub(crate) calls: Vec<Call>,
    /// Ids, with their log-probabilities if asked for.
    pub(crate) tokens: Vec<(u32, Option<Box<Logprobs>>)>,
    /// Of the prompt, from the second token on.
    pub(crate) prompt: Vec<Logprobs>,
    pub(crate) end: End,
}

/// A call of a tool.
#[derive(Debug, Default)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// JSON, unless it was cut off.
    pub(crate) arguments: String,
    /// False if the limit cut it off.
    pub(crate) ended: bool,
}

#[derive(Default)]
struct Growing {
    reasoning: String,
    content: String,
    calls: Vec<Call>,
    tokens: Vec<(u32, Option<Box<Logprobs>>)>,
    prompt: Vec<Logprobs>,
    end: Option<End>,
}

/// Waits for all choices.
///
/// # Errors
/// The first failure; the other choices are given up.
pub(crate) async fn finished(answer: &mut Answer) -> Result<Vec<Whole>, ApiError> {
    let mut all: Vec<Growing> = Vec::new();
    all.resize_with(answer.choices, Growing::default);
    while let Some((choice, piece)) = answer.next().await {
        let growing = &mut all[choice];
        match piece {
            Piece::Prompt(scored) => growing.prompt.extend(scored),
            Piece::Token(id, logprobs) => growing.tokens.push((id, logprobs)),
            Piece::Delta(Delta::Reasoning(text)) => growing.reasoning.push_str(&text),
            Piece::Delta(Delta::Content(text)) => growing.content.push_str(&text),
            Piece::Delta(Delta::Call { name, .. }) => {
                growing.calls.push(Call { name, arguments: String::new(), ended: false });
            }
            Piece::Delta(Delta::Arguments { index, json }) => growing.calls[index].arguments.push_str(&json),
            Piece::Delta(Delta::CallEnd { index }) => growing.calls[index].ended = true,
            Piece::End(end) => growing.end = Some(end),
            Piece::Failed(error) => return Err(error),
        }
    }
    let whole = |growing: Growing| {
        let Growing { reasoning, content, calls, tokens, prompt, end } = growing;
        let end = end.ok_or_else(|| ApiError::internal("an answer broke off"))?;
        Ok(Whole { reasoning, content, calls, tokens, prompt, end })
    };
    all.into_iter().map(whole).collect()
}

/// Tokens of all choices together; the prompt counts once.
pub(crate) fn total(usages: impl IntoIterator<Item = Usage>) -> Usage {
    usages.into_iter().fold(Usage::default(), |sum, usage| Usage {
        prompt: usage.prompt,
        // The first choice's: the others find what the first has read.
        cached: if sum.prompt == 0 { usage.cached } else { sum.cached },
        generated: sum.generated + usage.generated,
        reasoning: sum.reasoning + usage.reasoning,
    })
}
