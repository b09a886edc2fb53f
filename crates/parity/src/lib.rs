//! Two runs of a model held against each other: what each computed, and how far apart they are.
//!
//! Owns the statistics and the way a run is driven so that it can be compared. Generic over [`model::Backend`]: knows no
//! device, no file, no text, and prints nothing.

mod run;
mod stats;

pub use run::{Run, argmax};
pub use stats::{Apart, Comparison, Difference, Finiteness, canonical, ulps};
