//! Generation without the host: a backend that chooses tokens itself and feeds them to its own next step.
//!
//! The rule of the choice is the engine's sampler (`engine::sampler`), which is its authority and its test; this is what
//! a backend needs to know of it.

use crate::Fault;

/// How the tokens of a sequence are chosen: the sampler's parameters without penalties and bias, which look at text
/// that only the host has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// `1 / temperature`, rounded to f32 once; `None` is greedy.
    pub inverse_temperature: Option<f32>,
    /// Keeps the likeliest k; 0 keeps all.
    pub top_k: u32,
    /// Keeps the likeliest that together have this part of the probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps what has this part of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// Key of the random numbers.
    pub seed: u64,
}

/// A sequence that goes on from the logits of the last step.
#[derive(Debug, Clone, PartialEq)]
pub struct Lane {
    /// The place of the token to choose, counted from 0.
    pub position: u32,
    /// KV blocks for every position that will be reached.
    pub table: Vec<u32>,
    /// How its tokens are chosen.
    pub choice: Choice,
}

/// What was chosen for a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chosen {
    /// A token.
    Token(u32),
    /// Nothing: logits were not finite.
    NonFinite {
        /// NaNs among them.
        nan: u32,
        /// Infinities among them.
        infinite: u32,
        /// The lowest id whose logit is neither.
        first: u32,
    },
}

/// A backend that chooses tokens itself, so that no step waits for the host.
///
/// After [`Chooser::start`], each [`Chooser::advance`] chooses a token of every sequence from the logits that are there
/// and runs the step that computes the next ones; it returns at once. [`Chooser::collect`] hands out what was chosen, in
/// order, waiting for it if need be. A caller that keeps one more `advance` in flight than it has collected never lets
/// the device idle; what it then finds it does not want has cost a step, and left keys and values beyond the end.
pub trait Chooser {
    /// Takes up sequences: sequence `i` goes on from row `i` of the last step's logits. Ends what went on before.
    fn start(&mut self, lanes: &[Lane]) -> Result<(), Fault>;

    /// Chooses, and computes the next logits.
    fn advance(&mut self) -> Result<(), Fault>;

    /// What the oldest `advance` not yet collected has chosen, one for each sequence.
    fn collect(&mut self) -> Result<Vec<Chosen>, Fault>;
}
