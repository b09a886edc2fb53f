//! One file a command: its arguments and what it does.

pub(crate) mod bench;
pub(crate) mod bisect;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod contract;
pub(crate) mod detokenize;
pub(crate) mod faults;
pub(crate) mod inspect;
pub(crate) mod parity;
pub(crate) mod perplexity;
pub(crate) mod prewarm;
pub(crate) mod quantize;
pub(crate) mod replay;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod synth;
pub(crate) mod tokenize;
pub(crate) mod trace;
