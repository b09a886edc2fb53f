//! Stop strings over streamed text. Knows nothing of tokens.

/// Passes text on until one of its strings appears, and never any part of that string.
///
/// The string that ends first wins, of those the longest: so that the answer does not depend on how the text was cut
/// into pieces. Text that may be the beginning of a stop string is withheld until it is known not to be.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text not passed on yet: the longest end of the text so far that begins a stop string.
    held: String,
    /// What the last call returned.
    ready: String,
    matched: Option<usize>,
}

/// A stop string was empty: it would stop before the first character.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a stop string is empty")]
pub struct EmptyStop;

impl StopStrings {
    /// A matcher at the start of a text.
    ///
    /// # Errors
    /// [`EmptyStop`].
    pub fn new(stops: impl IntoIterator<Item = impl Into<String>>) -> Result<Self, EmptyStop> {
        let stops: Vec<String> = stops.into_iter().map(Into::into).collect();
        if stops.iter().any(String::is_empty) {
            return Err(EmptyStop);
        }
        Ok(Self { stops, held: String::new(), ready: String::new(), matched: None })
    }

    /// Which string stopped the text, by its place in the list; `None` while none has.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Takes more text and returns what can be passed on now. After a match that is nothing, ever.
    pub fn push(&mut self, text: &str) -> &str {
        self.ready.clear();
        if self.matched.is_some() {
            return &self.ready;
        }
        if self.stops.is_empty() {
            self.ready.push_str(text);
            return &self.ready;
        }
        for c in text.chars() {
            self.held.push(c);
            let ends_here = |&(_, stop): &(usize, &String)| self.held.ends_with(stop.as_str());
            let found = self.stops.iter().enumerate().filter(ends_here).max_by_key(|(_, stop)| stop.len());
            if let Some((index, stop)) = found {
                self.held.truncate(self.held.len() - stop.len());
                self.ready.push_str(&self.held);
                self.held.clear();
                self.matched = Some(index);
                break;
            }
            let free = self.held.len() - self.longest_beginning();
            self.ready.extend(self.held.drain(..free));
        }
        &self.ready
    }

    /// Ends the text: returns what was withheld, which turned out to be no stop string.
    pub fn finish(&mut self) -> &str {
        self.ready.clear();
        self.ready.push_str(&self.held);
        self.held.clear();
        &self.ready
    }

    /// The length of the longest end of `held` that is the beginning of a stop string.
    fn longest_beginning(&self) -> usize {
        let starts = self.held.char_indices().map(|(start, _)| &self.held[start..]);
        starts.into_iter().find(|end| self.stops.iter().any(|stop| stop.starts_with(end))).map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `pieces`; what each call passed on, the end included, and which string matched.
    fn stream(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<usize>) {
        let mut matcher = StopStrings::new(stops.iter().copied()).unwrap();
        let mut out: Vec<String> = pieces.iter().map(|piece| matcher.push(piece).to_owned()).collect();
        out.push(matcher.finish().to_owned());
        (out, matcher.matched())
    }

    #[test]
    fn table() {
        for (stops, pieces, want, matched) in [
            (&[] as &[&str], &["ab"] as &[&str], &["ab", ""] as &[&str], None),
            (&["END"], &["abENDcd", "ef"], &["ab", "", ""], Some(0)),
            (&["END"], &["aE", "N", "Db"], &["a", "", "", ""], Some(0)),
            (&["END"], &["aE", "N", "x"], &["a", "", "ENx", ""], None),
            (&["END"], &["aEN"], &["a", "EN"], None),
            // The beginning may begin again.
            (&["aab"], &["aa", "a", "b"], &["", "a", "", ""], Some(0)),
            (&["abab!"], &["ababab", "!"], &["ab", "", ""], Some(0)),
            // Overlapping strings: the one that ends first; of two that end together, the longer.
            (&["abcd", "bc"], &["xabcd"], &["xa", ""], Some(1)),
            (&["c", "abc"], &["xabc"], &["x", ""], Some(1)),
            (&["abc", "ab"], &["xabc"], &["x", ""], Some(1)),
            (&["é", "世界"], &["e世", "é"], &["e", "世", ""], Some(0)),
            (&["世界"], &["a世", "界b"], &["a", "", ""], Some(0)),
            (&["\n\n"], &["a\n", "b\n", "\n"], &["a", "\nb", "", ""], Some(0)),
        ] {
            assert_eq!(
                stream(stops, pieces),
                (want.iter().map(|s| s.to_string()).collect(), matched),
                "{stops:?} {pieces:?}"
            );
        }
        assert_eq!(StopStrings::new(["a", ""]).unwrap_err(), EmptyStop);
    }

    /// Where the first match ends, by trying every end.
    fn naive<'t>(stops: &[String], text: &'t str) -> (&'t str, bool) {
        for end in text.char_indices().map(|(i, c)| i + c.len_utf8()) {
            let longest =
                stops.iter().filter(|stop| text[..end].ends_with(stop.as_str())).map(String::len).max();
            if let Some(len) = longest {
                return (&text[..end - len], true);
            }
        }
        (text, false)
    }

    proptest! {
        /// However the text is cut, the same text comes out; and nothing is withheld that begins no stop string.
        #[test]
        fn equal_to_naive(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
        ) {
            let text = pieces.concat();
            let (want, is_match) = naive(&stops, &text);
            let mut matcher = StopStrings::new(stops.clone()).unwrap();
            let (mut out, mut seen) = (String::new(), String::new());
            for piece in &pieces {
                out.push_str(matcher.push(piece));
                seen.push_str(piece);
                if matcher.matched().is_none() {
                    let held = seen.strip_prefix(&out).unwrap();
                    prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)), "{held}");
                }
            }
            out.push_str(matcher.finish());
            prop_assert_eq!(out, want);
            prop_assert_eq!(matcher.matched().is_some(), is_match);
        }
    }
}
