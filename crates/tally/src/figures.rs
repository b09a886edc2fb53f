//! The figures of an answer: what it took, and the peak of memory. Knows how to print them, not how they came about.

use std::fmt;
use std::time::Duration;

use indicatif::DecimalBytes;
use serde_json::{Value, json};

use crate::machine::peak_resident_bytes;

/// What an answer took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    /// Tokens of the prompt, those found in the cache included.
    pub(crate) prompt: usize,
    /// Tokens of the prompt whose keys and values were in the cache.
    pub(crate) reused: usize,
    /// Tokens of the prompt that were computed: the others, unless that was interrupted.
    pub(crate) computed: usize,
    /// Time to compute them.
    pub(crate) prompt_time: Duration,
    /// From the start of the prompt to the first token.
    pub(crate) first_token: Option<Duration>,
    /// Tokens generated.
    pub(crate) generated: usize,
    /// From the first token to the last.
    pub(crate) generation_time: Duration,
}

impl Figures {
    /// Tokens of the prompt computed a second.
    fn prompt_rate(&self) -> Option<f64> {
        rate(self.computed, self.prompt_time)
    }

    /// Tokens generated a second. The first one came out of the prompt, so its step is not in the time.
    fn generation_rate(&self) -> Option<f64> {
        rate(self.generated.saturating_sub(1), self.generation_time)
    }

    /// The figures by name; times in seconds, rates in tokens a second.
    pub(crate) fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "cached_tokens": self.reused,
            "prompt_seconds": self.prompt_time.as_secs_f64(),
            "prompt_tokens_per_second": self.prompt_rate(),
            "first_token_seconds": self.first_token.map(|time| time.as_secs_f64()),
            "generated_tokens": self.generated,
            "generation_seconds": self.generation_time.as_secs_f64(),
            "generated_tokens_per_second": self.generation_rate(),
            "peak_resident_bytes": peak_resident_bytes(),
        })
    }
}

/// Such as `prompt 12 tokens, 345.6 tok/s; generated 100 tokens, 45.2 tok/s; first token after 0.04 s; peak memory 36
/// MB (resident, mapped weights included)`. What cannot be told is left out.
impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!(", {rate:.1} tok/s"));
        write!(f, "prompt {}", tokens(self.prompt))?;
        if self.reused > 0 {
            write!(f, " ({} cached)", self.reused)?;
        }
        let (prompt, generation) = (per_second(self.prompt_rate()), per_second(self.generation_rate()));
        write!(f, "{prompt}; generated {}{generation}", tokens(self.generated))?;
        if let Some(time) = self.first_token {
            write!(f, "; first token after {:.2} s", time.as_secs_f64())?;
        }
        if let Some(bytes) = peak_resident_bytes() {
            write!(f, "; peak memory {} (resident, mapped weights included)", DecimalBytes(bytes))?;
        }
        Ok(())
    }
}

/// `1 token` or `2 tokens`.
fn tokens(n: usize) -> String {
    format!("{n} token{}", if n == 1 { "" } else { "s" })
}

fn rate(tokens: usize, time: Duration) -> Option<f64> {
    // A context's length is exact in f64.
    (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_figures() {
        let check = |figures: Figures, want: &str| {
            let line = figures.to_string();
            let (line, _) = line.split_once("; peak memory").unwrap_or((&line, ""));
            assert_eq!(line, want);
        };
        let seconds = Duration::from_secs_f64;
        let whole = Figures {
            prompt: 12,
            reused: 0,
            computed: 12,
            prompt_time: seconds(0.5),
            first_token: Some(seconds(0.52)),
            generated: 101,
            generation_time: seconds(4.0),
        };
        check(
            whole,
            "prompt 12 tokens, 24.0 tok/s; generated 101 tokens, 25.0 tok/s; first token after 0.52 s",
        );
        check(
            Figures { reused: 10, computed: 2, generated: 1, ..whole },
            "prompt 12 tokens (10 cached), 4.0 tok/s; generated 1 token; first token after 0.52 s",
        );
        check(Figures { prompt: 1, ..Figures::default() }, "prompt 1 token; generated 0 tokens");
    }
}
