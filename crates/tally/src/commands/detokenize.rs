//! `tally detokenize`: token ids to text.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use serde_json::json;

use crate::failure::Failure;
use crate::{input, output, source};

const EXAMPLES: &str = "\
Examples:
  tally detokenize model.gguf 8822 1887 368 314
  tally tokenize model.gguf --json 'fn main() {' | tally detokenize model.gguf -

Ids are separated by spaces, line breaks or commas; a JSON array is fine. The text is printed as it is, with no \
line break added unless it goes to a terminal. Bytes that make no character become U+FFFD.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model whose vocabulary to use.
    model: PathBuf,
    /// Token ids; `-`, or nothing, for standard input.
    #[arg(allow_hyphen_values = true)]
    ids: Vec<String>,
    /// Print one JSON string.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let tokenizer = source::tokenizer(&self.model)?;
        let listed = (!self.ids.is_empty()).then(|| self.ids.join(" "));
        let text = tokenizer
            .decode(&parse(&input::text(listed)?)?)
            .map_err(|error| Failure::from(error).hint("are these ids of another model?"))?;
        if self.json {
            return output::json_line(&json!(text));
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        if out.is_terminal() && !text.ends_with('\n') {
            writeln!(out)?;
        }
        Ok(out.flush()?)
    }
}

/// The ids in `list`.
fn parse(list: &str) -> Result<Vec<u32>, Failure> {
    let separates = |c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']');
    let words = list.split(separates).filter(|word| !word.is_empty());
    let id = |word: &str| {
        word.parse().map_err(|_| {
            let shown: String = word.chars().take(40).collect();
            Failure::new(format!("`{}` is no token id", output::printable(&shown)))
                .hint("ids are whole numbers from 0, as `tally tokenize` prints them")
        })
    };
    words.map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_ids() {
        let check = |list, want: Option<&[u32]>| assert_eq!(parse(list).ok().as_deref(), want, "{list:?}");
        check("1 2\n3", Some(&[1, 2, 3]));
        check("[1,2, 3]\n", Some(&[1, 2, 3]));
        check("", Some(&[]));
        check("-1", None);
        check("1.5", None);
        check("4294967296", None);
        check("1 two", None);
    }
}
