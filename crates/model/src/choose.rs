//! Generation without the host: a backend that chooses tokens itself and feeds them to its own next step.
//!
//! The rule of the choice is the engine's sampler (`engine::sampler`), which is its authority and its test; this is what
//! a backend needs to know of it.

use crate::Fault;

/// How the tokens of a sequence are chosen by its logits, once these are adjusted.
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
    /// Ids below this may be chosen; at least 1. A head may have more rows than there are tokens.
    pub ids: u32,
}

/// What changes the logits of a sequence before a choice: penalties on tokens that it has already, then biases.
#[derive(Debug, Clone, PartialEq)]
pub struct Adjustment {
    /// Divides positive and multiplies negative logits; 1 changes none.
    pub repeat: f32,
    /// Subtracted once; 0 changes none.
    pub presence: f32,
    /// Subtracted as often as the token is there; 0 changes none.
    pub frequency: f32,
    /// How many tokens before the one to choose the penalties look at; 0 if there are no penalties.
    pub window: usize,
    /// The last tokens before the first one to choose, in order; `window` of them, or all that there are.
    pub recent: Vec<u32>,
    /// Added to the logits of these ids, of which none is there twice.
    pub bias: Vec<(u32, f32)>,
}

impl Adjustment {
    /// Places of a backend's memory ([`Chooser::places`]) that a sequence needs for so many choices.
    pub fn places(&self, choices: usize) -> usize {
        self.recent.len() + self.bias.len() + choices
    }
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
    /// What changes its logits before that. Chosen tokens become part of the history that it looks at.
    pub adjustment: Option<Adjustment>,
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
    /// Places for the histories of all sequences together; [`Adjustment::places`] says what one takes. The choices of a
    /// sequence are at most as many as its table has positions left, and one.
    fn places(&self) -> usize;

    /// Takes up sequences: sequence `i` goes on from row `i` of the last step's logits. Ends what went on before.
    fn start(&mut self, lanes: &[Lane]) -> Result<(), Fault>;

    /// Chooses, and computes the next logits.
    fn advance(&mut self) -> Result<(), Fault>;

    /// What the oldest `advance` not yet collected has chosen, one for each sequence.
    fn collect(&mut self) -> Result<Vec<Chosen>, Fault>;
}
