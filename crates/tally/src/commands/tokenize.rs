//! `tally tokenize`: text to token ids.

use std::path::PathBuf;

use engine::{Specials, Tokenizer};
use serde_json::json;

use crate::failure::Failure;
use crate::table::{Align, Table};
use crate::{input, output, source};

const EXAMPLES: &str = "\
Examples:
  tally tokenize model.gguf 'fn main() {'          ids, separated by spaces
  tally tokenize model.gguf --pieces 'fn main() {' one line for each token, with its text
  tally tokenize model.gguf --json - < main.rs     one JSON array
  tally tokenize model.gguf - < main.rs | wc -w    how many tokens a file has

The text is taken as it is, the line break at the end of a file included; no token is put before or after it. \
Only the vocabulary of the model is needed: a file without tensors will do.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model whose vocabulary to use.
    model: PathBuf,
    /// The text; `-`, or nothing, for standard input.
    #[arg(allow_hyphen_values = true)]
    text: Option<String>,
    /// Take `<|im_end|>` and the like as the text that they are made of, not as control tokens.
    #[arg(long)]
    as_text: bool,
    /// Show the text of each token.
    #[arg(long)]
    pieces: bool,
    /// Print one JSON array: of ids or, with --pieces, of objects with `id` and `text`.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let tokenizer = source::tokenizer(&self.model)?;
        let text = input::text(self.text)?;
        let specials = if self.as_text { Specials::AsText } else { Specials::Parse };
        let ids = tokenizer.encode(&text, specials)?;
        match (self.json, self.pieces) {
            (true, false) => output::json_line(&json!(ids)),
            (true, true) => {
                let piece = |&id: &u32| Ok(json!({ "id": id, "text": tokenizer.decode(&[id])? }));
                output::json_line(&ids.iter().map(piece).collect::<Result<_, Failure>>()?)
            }
            (false, true) => pieces(&tokenizer, &ids),
            (false, false) => {
                let ids: Vec<_> = ids.iter().map(u32::to_string).collect();
                output::line(format_args!("{}", ids.join(" ")))
            }
        }
    }
}

/// Bytes that are no text by themselves, such as a part of a character, are shown as `\xE2`.
fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Result<(), Failure> {
    let mut table = Table::new(&[("id", Align::Right), ("text", Align::Left)]);
    for &id in ids {
        let bytes = tokenizer.token_bytes(id)?;
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => format!("{text:?}"),
            Err(_) => format!("\"{}\"", bytes.escape_ascii()),
        };
        table.row([id.to_string(), text]);
    }
    output::table(&table)
}
