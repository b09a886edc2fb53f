//! Text from an argument or from standard input.

use std::io::{self, IsTerminal, Read};

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
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::new(format!("standard input is not UTF-8: byte {at} belongs to no character"))
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
