//! A call in the form of Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Knows where JSON values
//! end; what they say is the client's to check.

use super::{Begins, begins, tag};

/// What a text that may be a call turns out to be.
#[derive(Debug, PartialEq)]
pub(super) enum Probe {
    /// It is too short to tell.
    More,
    /// It is no call.
    No,
    /// It is a call of `name`; its arguments begin at this byte, or were seen already.
    Call { name: String, arguments: Arguments },
}

#[derive(Debug, PartialEq)]
pub(super) enum Arguments {
    /// They begin here.
    At(usize),
    /// They came before the name: this is all of them, and this is where they were followed by what comes.
    Were(String, usize),
}

/// Looks at `text`, which begins with a brace. `ended`: nothing more will come.
pub(super) fn probe(text: &str, ended: bool) -> Probe {
    let more = if ended { Probe::No } else { Probe::More };
    let (mut name, mut arguments) = (None, None);
    let mut at = 1;
    loop {
        at += space(&text[at..]);
        let rest = &text[at..];
        match rest.as_bytes().first() {
            None => return more,
            Some(b'"') => {}
            Some(b'}') => {
                return match name {
                    Some(name) => Probe::Call {
                        name,
                        arguments: Arguments::Were(arguments.unwrap_or_else(|| "{}".to_owned()), at),
                    },
                    None => Probe::No,
                };
            }
            Some(_) => return Probe::No,
        }
        let Some(end) = Scanner::default().end(rest) else { return more };
        let Ok(key) = serde_json::from_str::<String>(&rest[..end]) else { return Probe::No };
        at += end;
        at += space(&text[at..]);
        match text.as_bytes().get(at) {
            None => return more,
            Some(b':') => at += 1,
            Some(_) => return Probe::No,
        }
        at += space(&text[at..]);
        let value = &text[at..];
        if value.is_empty() {
            return more;
        }
        let is_arguments = key == "arguments" || key == "parameters";
        if let Some(name) = name.take_if(|_| is_arguments) {
            return Probe::Call { name, arguments: Arguments::At(at) };
        }
        let Some(end) = Scanner::default().end(value) else { return more };
        if key == "name" {
            match serde_json::from_str(&value[..end]) {
                Ok(text) => name = Some(text),
                Err(_) => return Probe::No,
            }
        } else if is_arguments {
            arguments = Some(value[..end].to_owned());
        }
        at += end;
        at += space(&text[at..]);
        match text.as_bytes().get(at) {
            None => return more,
            Some(b',') => at += 1,
            Some(b'}') => {}
            Some(_) => return Probe::No,
        }
        // Both are known: what follows means nothing.
        if let Some((name, arguments)) = name.as_ref().zip(arguments.as_ref()) {
            return Probe::Call { name: name.clone(), arguments: Arguments::Were(arguments.clone(), at) };
        }
    }
}

fn space(text: &str) -> usize {
    text.len() - text.trim_start_matches([' ', '\t', '\r', '\n']).len()
}

/// Finds the end of a JSON value whose text comes in pieces.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    depth: usize,
    in_string: bool,
    escaped: bool,
    begun: bool,
}

impl Scanner {
    /// Takes more text; where the value ends in it, if it does. Numbers and words end before what follows them.
    pub(super) fn end(&mut self, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => {
                        self.in_string = false;
                        if self.depth == 0 {
                            return Some(at + 1);
                        }
                    }
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 1 => self.depth -= 1,
                // Closes the value, or what the value is in.
                b'}' | b']' => return Some(if self.depth == 1 { at + 1 } else { at }),
                b',' | b' ' | b'\n' | b'\r' | b'\t' | b'<' if self.depth == 0 && self.begun => {
                    return Some(at);
                }
                _ => {}
            }
            self.begun = true;
        }
        None
    }
}

/// What follows the arguments of a call, up to the end of the call.
#[derive(Debug, PartialEq)]
pub(super) enum Close {
    /// The call ends here.
    At(usize),
    /// It is too short to tell.
    More,
}

/// Where a call ends whose arguments are over: after its brace and the closing tag, if they are there.
pub(super) fn close(text: &str, ended: bool) -> Close {
    let mut at = space(text);
    loop {
        let rest = &text[at..];
        if rest.is_empty() {
            return if ended { Close::At(at) } else { Close::More };
        }
        match rest.as_bytes()[0] {
            b'}' => at += 1,
            b'<' => {
                return match begins(rest, tag::END_CALL) {
                    Begins::Yes => Close::At(at + tag::END_CALL.len()),
                    Begins::Perhaps if !ended => Close::More,
                    _ => Close::At(at),
                };
            }
            // Further fields of the object, which mean nothing.
            b',' => match rest.find(['}', '<']) {
                Some(end) => at += end,
                None if ended => return Close::At(text.len()),
                None => return Close::More,
            },
            _ => return Close::At(at),
        }
        at += space(&text[at..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_call() {
        let call = |name: &str, arguments| Probe::Call { name: name.into(), arguments };
        for (text, want) in [
            (r#"{"name": "f", "arguments": {"a": 1}}"#, call("f", Arguments::At(27))),
            (r#"{ "name":"f","parameters":"#, Probe::More),
            (r#"{ "name":"f","parameters":{"#, call("f", Arguments::At(26))),
            (
                r#"{"arguments": {"a": [1, "}"]}, "name": "f"}"#,
                call("f", Arguments::Were(r#"{"a": [1, "}"]}"#.into(), 42)),
            ),
            (r#"{"name": "f"}"#, call("f", Arguments::Were("{}".into(), 12))),
            (r#"{"id": 3, "name": "f", "arguments": {}}"#, call("f", Arguments::At(36))),
            ("{", Probe::More),
            (r#"{"na"#, Probe::More),
            (r#"{"name": "f"#, Probe::More),
            ("{}", Probe::No),
            ("{x", Probe::No),
            (r#"{"a": 1}"#, Probe::No),
            (r#"{"name": 3, "#, Probe::No),
            (r#"{"name" "f"}"#, Probe::No),
        ] {
            assert_eq!(probe(text, false), want, "{text}");
        }
        assert_eq!(probe("{", true), Probe::No);
    }

    #[test]
    fn ends_of_values() {
        for (text, want) in [
            (r#"{"a": "}"} x"#, Some(10)),
            (r#""a\"b" x"#, Some(6)),
            (r#"[[1], 2]]"#, Some(8)),
            ("12, ", Some(2)),
            ("true}", Some(4)),
            ("{", None),
            (r#""a\""#, None),
        ] {
            assert_eq!(Scanner::default().end(text), want, "{text}");
            // Cut anywhere, the same.
            for cut in 0..text.len() {
                let mut scanner = Scanner::default();
                let (head, tail) = text.split_at(cut);
                let got = scanner.end(head).or_else(|| Some(cut + scanner.end(tail)?));
                assert_eq!(got, want, "{head}|{tail}");
            }
        }
    }
}
