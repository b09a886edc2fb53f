//! A file type on the command line: the names of mixes, with those that users of llama.cpp type for the same.

use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use quant::Mix;

/// Parses a [`Mix`] by name in either case; the names are listed in help and completions.
pub(crate) fn mix() -> impl TypedValueParser<Value = Mix> {
    let named = Mix::ALL.map(|mix| {
        let value = PossibleValue::new(mix.name());
        match mix {
            Mix::Q4KM => value.alias("Q4_K"),
            Mix::Q5KM => value.alias("Q5_K"),
            _ => value,
        }
    });
    // An alias comes through as it was typed, and `Mix` knows both.
    PossibleValuesParser::new(named).try_map(|name| Mix::from_str(&name))
}
