//! What commands print: JSON for programs, and text from files made safe for a terminal.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};

use serde_json::Value;

use crate::failure::Failure;
use crate::table::Table;

/// Prints one line of text.
pub(crate) fn line(text: fmt::Arguments<'_>) -> Result<(), Failure> {
    Ok(writeln!(io::stdout().lock(), "{text}")?)
}

/// Prints a table.
pub(crate) fn table(table: &Table) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    table.text("", &mut out)?;
    Ok(out.flush()?)
}

/// Prints `value` over several lines, for people who read JSON too.
pub(crate) fn json(value: &Value) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

/// Prints `value` on one line: arrays of numbers, and one record a line.
pub(crate) fn json_line(value: &Value) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    serde_json::to_writer(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

/// A name or value from a file, with line breaks and whatever else a terminal might obey spelled out.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let spell = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(spell).collect::<String>().into()
}

/// An argument as a word of a shell.
pub(crate) fn word(arg: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=@%+".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        return arg.into();
    }
    format!("'{}'", arg.replace('\'', r"'\''")).into()
}

/// `n` with a comma every three digits from the right, as in `151,936`.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let starts_group = |i: usize| i > 0 && (digits.len() - i).is_multiple_of(3);
    digits.char_indices().flat_map(|(i, c)| starts_group(i).then_some(',').into_iter().chain([c])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_groups_of_three() {
        let check = |n, want: &str| assert_eq!(grouped(n), want);
        check(0, "0");
        check(999, "999");
        check(1000, "1,000");
        check(151_936, "151,936");
        check(30_532_122_624, "30,532,122,624");
    }

    #[test]
    fn nothing_that_a_terminal_obeys() {
        let check = |text, want: &str| assert_eq!(printable(text), want);
        check("ein Mühlrad 🦙 \"x\"", "ein Mühlrad 🦙 \"x\"");
        check("\u{1b}[31mred\n\u{9b}0m\r", "\\u{1b}[31mred\\n\\u{9b}0m\\r");
    }

    #[test]
    fn words_of_a_shell() {
        let check = |arg, want| assert_eq!(word(arg), want, "{arg}");
        check("model.gguf", "model.gguf");
        check("faulty:wrong-epsilon@cuda:1", "faulty:wrong-epsilon@cuda:1");
        check("", "''");
        check("fn main() {", "'fn main() {'");
        check("it's", r"'it'\''s'");
    }
}
