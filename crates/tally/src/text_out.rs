//! The model's text on standard output: at once, and never able to command a terminal.

use std::io::{self, IsTerminal, Write};

/// Where one text of a model goes. To a file or pipe it goes as it is; on a terminal, control characters other than line
/// breaks and tabs are spelled out.
pub(crate) struct TextOut {
    terminal: bool,
    /// Whether the text so far ends with a line break.
    ends_line: bool,
}

impl TextOut {
    /// A text to begin on standard output.
    pub(crate) fn stdout() -> TextOut {
        TextOut { terminal: io::stdout().is_terminal(), ends_line: false }
    }

    /// Writes `text` and flushes it.
    pub(crate) fn write(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.ends_line = text.ends_with('\n');
        let mut out = io::stdout().lock();
        if self.terminal {
            out.write_all(spelled(text).as_bytes())?;
        } else {
            out.write_all(text.as_bytes())?;
        }
        out.flush()
    }

    /// Ends a text: on a terminal the last line is completed.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        if self.terminal { self.end_line() } else { Ok(()) }
    }

    /// Completes the last line, wherever it went; of an empty text, an empty one.
    pub(crate) fn end_line(&mut self) -> io::Result<()> {
        if self.ends_line { Ok(()) } else { self.write("\n") }
    }
}

/// `text` with what a terminal might obey spelled out.
fn spelled(text: &str) -> String {
    let obeyed = |c: char| c.is_control() && c != '\n' && c != '\t';
    let spell = |c: char| if obeyed(c) { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(spell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_commanded() {
        assert_eq!(spelled("fn\tmain() {\n}"), "fn\tmain() {\n}");
        assert_eq!(spelled("\u{1b}]0;title\u{7}\r\u{9b}2J"), "\\u{1b}]0;title\\u{7}\\r\\u{9b}2J");
    }
}
