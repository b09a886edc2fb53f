//! `--activations`: the precision of activations. Part of the arithmetic: results depend on it.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use quant::fixed::Activations;

/// The argument, to be flattened into a command's.
#[derive(clap::Args)]
pub(crate) struct ActivationsArg {
    /// Precision of activations in products with quantised weights.
    #[arg(long, value_name = "KIND", default_value = "a16", value_parser = parser())]
    activations: Activations,
}

impl ActivationsArg {
    /// What was chosen.
    pub(crate) fn value(&self) -> Activations {
        self.activations
    }
}

fn parser() -> impl TypedValueParser<Value = Activations> {
    let value = |kind: Activations, help| PossibleValue::new(kind.name()).help(help);
    PossibleValuesParser::new([
        value(Activations::A16, "16 bits: as good as floats"),
        value(Activations::A8, "8 bits: half the work, and the error of llama.cpp's CPU path"),
    ])
    .map(|name| if name == Activations::A8.name() { Activations::A8 } else { Activations::A16 })
}
