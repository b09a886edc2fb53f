//! Lines to messages and commands: what the prompt of `tally chat` understands. Knows nothing of terminals or models.

/// What a user entered.
#[derive(Debug, PartialEq)]
pub(super) enum Entry {
    /// Something to say to the model.
    Message(String),
    /// Forget the conversation.
    Reset,
    /// Print figures.
    Stats,
    /// Print what can be entered.
    Help,
    /// Leave.
    Exit,
    /// A command that there is not.
    Unknown(String),
    /// An empty line.
    Nothing,
}

/// An entry that may need more lines: one that ends with `\` does, and so does one that opens with `"""` until a line
/// ends with that.
#[derive(Debug, Default)]
pub(super) struct Draft {
    lines: Vec<String>,
    block: bool,
}

const QUOTES: &str = "\"\"\"";

impl Draft {
    /// Whether nothing was entered yet.
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Takes a line, without its line break; returns the entry if it is complete.
    pub(super) fn push(&mut self, line: &str) -> Option<Entry> {
        let mut line = line;
        if self.is_empty() {
            match line.trim_start().strip_prefix(QUOTES) {
                Some(rest) => {
                    self.block = true;
                    line = rest;
                }
                None if !line.ends_with('\\') => return Some(single(line)),
                None => {}
            }
        }
        let (text, more) = match self.block {
            true => line.trim_end().strip_suffix(QUOTES).map_or((line, true), |last| (last, false)),
            false => line.strip_suffix('\\').map_or((line, false), |text| (text, true)),
        };
        self.lines.push(text.to_owned());
        if more { None } else { self.finish() }
    }

    /// The message of the lines so far, if there are any: for an input that ends within it.
    pub(super) fn finish(&mut self) -> Option<Entry> {
        let mut lines = std::mem::take(self).lines;
        // Quotes on a line of their own are no empty line of the message.
        for edge in [lines.len().saturating_sub(1), 0] {
            if lines.get(edge).is_some_and(String::is_empty) {
                lines.remove(edge);
            }
        }
        if lines.is_empty() { None } else { Some(Entry::Message(lines.join("\n"))) }
    }
}

/// The entry of a line that stands alone.
fn single(line: &str) -> Entry {
    if line.trim().is_empty() {
        return Entry::Nothing;
    }
    // A space before the slash makes it a message.
    match line.strip_prefix('/').map(str::trim_end) {
        None => Entry::Message(line.to_owned()),
        Some("reset") => Entry::Reset,
        Some("stats") => Entry::Stats,
        Some("help" | "?") => Entry::Help,
        Some("exit" | "quit" | "bye") => Entry::Exit,
        Some(other) => Entry::Unknown(format!("/{other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries() {
        let message = |text: &str| vec![Entry::Message(text.into())];
        let check = |lines: &[&str], want: Vec<Entry>| {
            let mut draft = Draft::default();
            let mut got: Vec<_> = lines.iter().filter_map(|line| draft.push(line)).collect();
            got.extend(draft.finish());
            assert_eq!(got, want, "{lines:?}");
        };
        check(&["hello"], message("hello"));
        check(&["", "  "], vec![Entry::Nothing, Entry::Nothing]);
        check(&["one \\", "two"], message("one \ntwo"));
        check(&["one\\", "\\", "two"], message("one\n\ntwo"));
        check(&["one\\"], message("one"));
        check(&["\"\"\"", "one", "", "/reset\\", "\"\"\""], message("one\n\n/reset\\"));
        check(&["\"\"\"one", "two\"\"\" "], message("one\ntwo"));
        check(&["\"\"\"one\"\"\""], message("one"));
        check(&["\"\"\"one", "two"], message("one\ntwo"));
        check(&["\"\"\"", "\"\"\"", "next"], message("next"));
        check(&["say \"\"\"x\"\"\""], message("say \"\"\"x\"\"\""));
        check(&["/reset", "/stats ", "/help"], vec![Entry::Reset, Entry::Stats, Entry::Help]);
        check(&["/exit", "/quit"], vec![Entry::Exit, Entry::Exit]);
        check(&["/rest now"], vec![Entry::Unknown("/rest now".into())]);
        check(&[" /etc/passwd?"], message(" /etc/passwd?"));
    }
}
