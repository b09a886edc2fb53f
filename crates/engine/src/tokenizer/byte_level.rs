//! The byte-level alphabet: one printable character for each byte, so that BPE over characters is BPE over
//! bytes. Knows nothing of vocabularies.
//!
//! Source: GPT-2's `bytes_to_unicode` (Radford et al., 2019). Printable Latin-1 stands for itself; the other
//! 68 bytes take U+0100 and up, in ascending order.

/// Whether `byte` stands for itself.
const fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character of each byte.
const CHARS: [char; 256] = {
    let mut chars = ['\0'; 256];
    let (mut byte, mut shifted) = (0usize, 0u32);
    while byte < 256 {
        chars[byte] = if is_printable(byte as u8) {
            byte as u8 as char
        } else {
            shifted += 1;
            match char::from_u32(0xFF + shifted) {
                Some(c) => c,
                None => unreachable!(),
            }
        };
        byte += 1;
    }
    chars
};

/// The byte of each character below U+0144, the end of the alphabet; `None` where the character is outside it.
const BYTES: [Option<u8>; 0x144] = {
    let mut bytes = [None; 0x144];
    let mut byte = 0usize;
    while byte < 256 {
        bytes[CHARS[byte] as usize] = Some(byte as u8);
        byte += 1;
    }
    bytes
};

/// The character that stands for `byte`.
pub(super) const fn char_of(byte: u8) -> char {
    CHARS[byte as usize]
}

/// The byte that `c` stands for, if it is in the alphabet.
pub(super) fn byte_of(c: char) -> Option<u8> {
    // A char is at most 0x10FFFF, which fits every usize that Rust's std supports.
    BYTES.get(c as usize).copied().flatten()
}

/// Replaces `out` with the characters that stand for the bytes of `text`.
pub(super) fn spell(text: &str, out: &mut String) {
    out.clear();
    out.extend(text.bytes().map(char_of));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        for byte in 0..=255 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
    }

    /// Values from GPT-2's published `vocab.json`.
    #[test]
    fn published_characters() {
        for (byte, c) in
            [(b' ', 'Ġ'), (b'\n', 'Ċ'), (b'\t', 'ĉ'), (0, 'Ā'), (0x7F, 'ġ'), (0xA0, 'ł'), (0xAD, 'Ń')]
        {
            assert_eq!(char_of(byte), c, "byte {byte:#04x}");
        }
        for outside in [' ', '\n', '\u{AD}', 'ń', '世'] {
            assert_eq!(byte_of(outside), None, "{outside:?}");
        }
    }
}
