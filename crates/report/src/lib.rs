//! What the numeric debugger found, to look at: a directory that `tally bisect` or `tally trace` wrote is read into a
//! [`View`], which a terminal's table and the [page](page()) are drawn from.
//!
//! Compares nothing and decides nothing: that is `parity`. Knows no device and no terminal.

mod columns;
mod page;
mod source;
mod trace;
mod types;
mod view;

pub use columns::{Column, columns};
pub use page::page;
pub use source::{Source, SourceError};
pub use types::{TypeMap, TypeRow};
pub use view::{Cell, Command, Run, Side, SideStats, Step, Tone, View};
