//! The numeric debugger: two runs of a model held against each other, and where they part found, narrowed and explained.
//!
//! [`Trace::watch`] watches a run and [`dump`] keeps it on the disk; a [`Player`] lets such a trace stand in for a backend.
//! [`bisect()`] runs two sides stage by stage and narrows the first divergence down to a [`Report`]; a [`Reproduction`] is
//! the failing stage cut out, which [`replay`] runs alone; [`faults`] are planted on purpose, so that the debugger is itself
//! tested. Generic over [`model::Backend`]: knows no device, and prints
//! nothing.

mod bench;
mod bisect;
pub mod claim;
pub mod distribution;
pub mod dump;
mod explain;
pub mod faults;
mod fingerprint;
mod judge;
mod localise;
pub mod names;
mod pair;
pub mod place;
mod player;
pub mod report;
pub mod reproduction;
pub mod routing;
mod run;
pub mod scenario;
mod side;
mod stats;
pub mod sweep;
#[cfg(test)]
mod testing;
pub mod trace;
mod types;
mod verdict;

pub use bisect::{BisectError, Bisection, Options, bisect, compare};
pub use dump::{Arithmetic, Dump, DumpError};
pub use fingerprint::fingerprint;
pub use judge::Judge;
pub use place::{Number, Place};
pub use player::Player;
pub use report::Report;
pub use reproduction::{Replay, Reproduction, ReproductionError, replay};
pub use run::{Run, argmax};
pub use scenario::Scenario;
pub use side::{Engine, Side};
pub use stats::{Apart, Comparison, Difference, Finiteness, canonical, ulps};
pub use trace::{Filter, Summary, Trace, Traced};
