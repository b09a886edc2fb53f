//! The vocabulary of the forward: stages (verbs), sites (a stage in a layer) and buffers (nouns).
//!
//! A stage is the unit of fusion, tracing, comparison, benchmarking and kernel naming. What is fused inside one has
//! no name; everything named here can be observed on every backend.

use std::fmt;

use crate::{Config, Ffn};

/// One step of the forward. Reads and writes are named [`Buffer`]s; shapes use `T` rows of the step, `D` hidden size,
/// `H`/`KH` query and key/value heads, `HD` head size, `E`/`K` experts and experts chosen, `F` feed-forward width,
/// `V` vocabulary, `R` rows whose logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Token ids to `X`.
    Embed,
    /// Normalise `X`; project to `Q`, `K`, `V`.
    Qkv,
    /// Normalise the heads of `Q` and `K`, rotate both, store `K` and `V` in the cache.
    RopeStore,
    /// `Q` against the cache to `Attn`.
    Attend,
    /// Project `Attn`, adding into `X`.
    AttnOut,
    /// Normalise `X` to `Normed`; score the experts; choose the best: `RouterLogits`, `Experts`, `ExpertWeights`.
    Route,
    /// Gate and up projections of each chosen expert, and SwiGLU: `Normed` to `Hidden`.
    ExpertsUp,
    /// Down projection of each chosen expert, weighted and summed in rank order, adding into `X`.
    ExpertsDown,
    /// The dense feed-forward network (normalise, gate, up, SwiGLU, down), adding into `X`.
    FeedForward,
    /// Normalise the wanted rows of `X`; project to `Logits`.
    Head,
}

impl Stage {
    /// All stages, in the order in which a forward meets them.
    pub const ALL: [Stage; 10] = [
        Stage::Embed,
        Stage::Qkv,
        Stage::RopeStore,
        Stage::Attend,
        Stage::AttnOut,
        Stage::Route,
        Stage::ExpertsUp,
        Stage::ExpertsDown,
        Stage::FeedForward,
        Stage::Head,
    ];

    /// The stem that names this stage everywhere: files, kernels, bench rows, traces.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Embed => "embed",
            Stage::Qkv => "qkv",
            Stage::RopeStore => "rope_store",
            Stage::Attend => "attend",
            Stage::AttnOut => "attn_out",
            Stage::Route => "route",
            Stage::ExpertsUp => "experts_up",
            Stage::ExpertsDown => "experts_down",
            Stage::FeedForward => "ffn",
            Stage::Head => "head",
        }
    }

    /// The buffers this stage reads. Together with the weights and, for [`Stage::Attend`], the cache, they determine
    /// what it writes: a stage can be replayed from them alone.
    pub const fn reads(self) -> &'static [Buffer] {
        use Buffer::*;
        match self {
            Stage::Embed => &[],
            Stage::Qkv | Stage::Route | Stage::FeedForward | Stage::Head => &[X],
            Stage::RopeStore => &[Q, K, V],
            Stage::Attend => &[Q],
            Stage::AttnOut => &[Attn, X],
            Stage::ExpertsUp => &[Normed, Experts],
            Stage::ExpertsDown => &[Hidden, Experts, ExpertWeights, X],
        }
    }

    /// The buffers this stage writes, in the order in which a comparison should look at them.
    pub const fn writes(self) -> &'static [Buffer] {
        use Buffer::*;
        match self {
            Stage::Embed | Stage::AttnOut | Stage::ExpertsDown | Stage::FeedForward => &[X],
            Stage::Qkv => &[Q, K, V],
            Stage::RopeStore => &[Q, CacheK, CacheV],
            Stage::Attend => &[Attn],
            Stage::Route => &[Normed, RouterLogits, Experts, ExpertWeights],
            Stage::ExpertsUp => &[Hidden],
            Stage::Head => &[Logits],
        }
    }

    /// The buffers that exist only while the backend observes ([`crate::Backend::observe`]): what goes on inside the
    /// stage, in the order in which a comparison should look at them, which is before what the stage writes.
    pub const fn inside(self) -> &'static [Buffer] {
        use Buffer::*;
        match self {
            Stage::ExpertsUp => &[Gate, Up],
            Stage::ExpertsDown => &[Down],
            // What is `Hidden` between two stages of a mixture of experts lies within this one stage.
            Stage::FeedForward => &[Gate, Up, Hidden, Down],
            _ => &[],
        }
    }

    /// The stage of this [`Stage::name`].
    pub fn named(name: &str) -> Option<Stage> {
        Stage::ALL.into_iter().find(|stage| stage.name() == name)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A stage in its place: what labels an error, a profile row, a trace entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site {
    /// The stage.
    pub stage: Stage,
    /// The layer, counted from 0; `None` for `embed` and `head`.
    pub layer: Option<usize>,
}

impl Site {
    /// Whether a model of this configuration has this stage in this place.
    pub fn exists(self, config: &Config) -> bool {
        match (self.stage, config.ffn) {
            (Stage::Embed | Stage::Head, _) => self.layer.is_none(),
            (Stage::FeedForward, Ffn::Moe(_))
            | (Stage::Route | Stage::ExpertsUp | Stage::ExpertsDown, Ffn::Dense { .. }) => false,
            _ => self.layer.is_some_and(|layer| layer < config.layers),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "layer {layer} {}", self.stage),
            None => write!(f, "{}", self.stage),
        }
    }
}

/// A named activation of the current step, `f32` and row-major whatever the backend keeps internally.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Buffer {
    /// The residual stream, `[T, D]`.
    X,
    /// Queries, `[T, H, HD]`.
    Q,
    /// Keys as projected, `[T, KH, HD]`.
    K,
    /// Values as projected, `[T, KH, HD]`.
    V,
    /// The step's rows of the key cache, `[T, KH, HD]`: normalised, rotated and rounded to fixed point.
    CacheK,
    /// The step's rows of the value cache, `[T, KH, HD]`: rounded to fixed point.
    CacheV,
    /// What the heads gathered, `[T, H, HD]`.
    Attn,
    /// `X` after the feed-forward norm, `[T, D]`.
    Normed,
    /// Router scores before softmax, `[T, E]`.
    RouterLogits,
    /// Chosen experts in rank order, `[T, K]`; ids, exact as `f32`.
    Experts,
    /// Their weights, `[T, K]`.
    ExpertWeights,
    /// SwiGLU of each chosen expert, `[T, K, F]`.
    Hidden,
    /// `[R, V]`.
    Logits,
    /// Gate projections before SwiGLU, `[T, K, F]` (dense: `[T, 1, F]`); only while the backend observes.
    Gate,
    /// Up projections before SwiGLU, `[T, K, F]` (dense: `[T, 1, F]`); only while the backend observes.
    Up,
    /// Down projections before they are weighted and summed, `[T, K, D]` (dense: `[T, 1, D]`); only while the backend
    /// observes.
    Down,
}

impl Buffer {
    /// All buffers, in the order in which a forward first writes them.
    pub const ALL: [Buffer; 16] = [
        Buffer::X,
        Buffer::Q,
        Buffer::K,
        Buffer::V,
        Buffer::CacheK,
        Buffer::CacheV,
        Buffer::Attn,
        Buffer::Normed,
        Buffer::RouterLogits,
        Buffer::Experts,
        Buffer::ExpertWeights,
        Buffer::Gate,
        Buffer::Up,
        Buffer::Hidden,
        Buffer::Down,
        Buffer::Logits,
    ];

    /// The name in traces and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Buffer::X => "x",
            Buffer::Q => "q",
            Buffer::K => "k",
            Buffer::V => "v",
            Buffer::CacheK => "cache_k",
            Buffer::CacheV => "cache_v",
            Buffer::Attn => "attn",
            Buffer::Normed => "normed",
            Buffer::RouterLogits => "router_logits",
            Buffer::Experts => "experts",
            Buffer::ExpertWeights => "expert_weights",
            Buffer::Hidden => "hidden",
            Buffer::Logits => "logits",
            Buffer::Gate => "gate",
            Buffer::Up => "up",
            Buffer::Down => "down",
        }
    }

    /// The buffer of this [`Buffer::name`].
    pub fn named(name: &str) -> Option<Buffer> {
        Buffer::ALL.into_iter().find(|buffer| buffer.name() == name)
    }

    /// Its shape in a step of `rows` rows of which `outputs` have logits, row-major; the first is the number of rows.
    /// A dense model counts as one with a single expert.
    pub fn shape(self, config: &Config, rows: usize, outputs: usize) -> Vec<usize> {
        let (experts, used, width) = match config.ffn {
            Ffn::Dense { width } => (1, 1, width),
            Ffn::Moe(moe) => (moe.experts, moe.used, moe.width),
        };
        match self {
            Buffer::X | Buffer::Normed => vec![rows, config.hidden],
            Buffer::Q | Buffer::Attn => vec![rows, config.heads, config.head_dim],
            Buffer::K | Buffer::V | Buffer::CacheK | Buffer::CacheV => {
                vec![rows, config.kv_heads, config.head_dim]
            }
            Buffer::RouterLogits => vec![rows, experts],
            Buffer::Experts | Buffer::ExpertWeights => vec![rows, used],
            Buffer::Gate | Buffer::Up | Buffer::Hidden => vec![rows, used, width],
            Buffer::Down => vec![rows, used, config.hidden],
            Buffer::Logits => vec![outputs, config.vocab],
        }
    }
}

impl fmt::Display for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
