//! The numeric debugger: two runs of a model held against each other, and where they part found, narrowed and explained.
//!
//! [`Traced`] watches a run and [`dump`] keeps it on the disk. Generic over [`model::Backend`]: knows no device, and
//! prints nothing.

pub mod distribution;
pub mod dump;
mod fingerprint;
pub mod names;
pub mod place;
pub mod report;
pub mod routing;
mod run;
pub mod scenario;
mod stats;
#[cfg(test)]
mod testing;
pub mod trace;

pub use fingerprint::fingerprint;
pub use place::{Number, Place};
pub use report::Report;
pub use run::{Run, argmax};
pub use scenario::Scenario;
pub use stats::{Apart, Comparison, Difference, Finiteness, canonical, ulps};
pub use trace::{Filter, Summary, Trace, Traced};
