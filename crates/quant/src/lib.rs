//! Block-quantised tensor types: layout, dequantise, quantise, and which type each tensor of a file mix gets.
//!
//! Owns what the bytes of a block mean. Knows nothing of files, models or backends: it turns a row of bytes into
//! numbers and back. A row is always a whole number of blocks of its [`Dtype`](gguf::Dtype).

pub mod block;
pub mod dequantise;
pub mod fixed;
pub mod mix;
pub mod quantise;

pub use block::{SmallBlock, SuperBlock, close_small, close_super, f16_at, open_small, open_super};
pub use dequantise::dequantise_row;
pub use mix::{Mix, MixContext};
pub use quantise::quantise_row;
