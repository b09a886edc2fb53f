//! What a model is: its configuration, its weights, its stages, and the one [`forward()`].
//!
//! Owns the meaning of a Qwen3 or Qwen3-MoE network and the part of the arithmetic that every backend shares
//! (`exp`, the rotary table). Knows no device, does no I/O, and never looks at a weight's bytes.

mod backend;
mod choose;
mod config;
mod forward;
mod hooked;
pub mod math;
pub mod rope;
mod stage;
mod weights;

pub use backend::{BLOCK, Backend, Fault, Row, Step, StepError};
pub use choose::{Adjustment, Choice, Chooser, Chosen, Lane};
pub use config::{Arch, Config, ConfigError, Ffn, Moe};
pub use forward::forward;
pub use hooked::{Hook, Hooked};
pub use stage::{Buffer, Site, Stage};
pub use weights::{FfnWeights, LayerWeights, Model, ModelError, Spec, Weights, specs};
