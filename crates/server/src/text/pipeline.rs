//! Token ids to what a client reads: characters as soon as they are whole, up to a stop string, understood by the parser.

use std::sync::Arc;

use engine::{EmptyStop, StopStrings, StreamDecoder, Tokenizer, TokenizerError};

use super::{Delta, Parser, Syntax};

/// One text, as it comes.
pub(crate) struct Text {
    decoder: StreamDecoder<Arc<Tokenizer>>,
    stops: StopStrings,
    parser: Parser,
}

impl Text {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, stop: &[String], syntax: Syntax) -> Result<Text, EmptyStop> {
        let stops = StopStrings::new(stop)?;
        Ok(Text { decoder: StreamDecoder::new(tokenizer), stops, parser: Parser::new(syntax) })
    }

    /// What is certain with one token more.
    pub(crate) fn push(&mut self, id: u32) -> Result<Vec<Delta>, TokenizerError> {
        Ok(self.parser.push(self.stops.push(self.decoder.push(id)?)))
    }

    /// The stop string that ended the text, by its place in the list.
    pub(crate) fn stopped(&self) -> Option<usize> {
        self.stops.matched()
    }

    /// Whether the next token is reasoning.
    pub(crate) fn is_reasoning(&self) -> bool {
        self.parser.is_reasoning()
    }

    /// Calls so far.
    pub(crate) fn calls(&self) -> usize {
        self.parser.calls()
    }

    /// Ends the text; `cut` as in [`Parser::finish`].
    pub(crate) fn finish(&mut self, cut: bool) -> Vec<Delta> {
        let mut rest = self.parser.push(self.stops.push(self.decoder.finish()));
        rest.extend(self.parser.push(self.stops.finish()));
        rest.extend(self.parser.finish(cut));
        rest
    }
}
