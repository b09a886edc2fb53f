//! Text from an argument, a file or standard input.

use std::fs;
use std::io::{self, IsTerminal, Read};
use std::path::Path;

use crate::failure::Failure;

/// `argument`, or all of standard input where it is `-` or not given.
pub(crate) fn text(argument: Option<String>) -> Result<String, Failure> {
    match argument {
        Some(text) if text != "-" => Ok(text),
        _ => standard_input(),
    }
}

fn standard_input() -> Result<String, Failure> {
    let stdin = io::stdin().lock();
    if stdin.is_terminal() {
        eprintln!("reading text from the terminal; end it with Ctrl-D on a line of its own");
    }
    read(stdin)
}

fn read(mut from: impl Read) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes)
        .map_err(|error| Failure::new(format!("cannot read standard input: {error}")))?;
    utf8(bytes, "standard input")
}

/// A text file.
pub(crate) fn file(path: &Path) -> Result<String, Failure> {
    let place = path.display().to_string();
    let bytes = fs::read(path).map_err(|error| match error.kind() {
        io::ErrorKind::IsADirectory => {
            Failure::new("a directory, not a text").hint("name a file in it").at(&place)
        }
        _ => Failure::new(format!("cannot read the text: {error}")).hint("is the path right?").at(&place),
    })?;
    utf8(bytes, &place)
}

/// `bytes` as text; `place` says in the error where they come from.
fn utf8(bytes: Vec<u8>, place: &str) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::new(format!("{place} is not UTF-8: byte {at} belongs to no character"))
            .hint("convert it first, for example with `iconv -f latin1 -t utf-8`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_as_they_come() {
        assert_eq!(text(Some("a\n".into())).expect("given"), "a\n");
        assert_eq!(read(&b"line\r\n \xC3\xA9"[..]).expect("UTF-8"), "line\r\n \u{e9}");
        let failure = format!("{:?}", read(&b"ab\xFFc"[..]).expect_err("no UTF-8"));
        assert!(failure.contains("byte 2 "), "{failure}");
    }
}
