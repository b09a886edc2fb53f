//! What others call our stages and buffers, so that a user of another engine finds the tensor that they know.
//!
//! llama.cpp's names are those that its graph callback gives (`build_qwen3moe`, `build_moe_ffn`), which its
//! `eval-callback` tool prints with the layer after a dash: `ffn_moe_topk-12`. `moe_router` and `moe_ffn_out` are those
//! of per-stage comparisons in Rust engines.

use model::{Buffer, Stage};

/// One row: what a buffer is called elsewhere after a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alias {
    /// Our stage.
    pub stage: Stage,
    /// The buffer after it.
    pub buffer: Buffer,
    /// Names elsewhere, llama.cpp's first.
    pub names: &'static [&'static str],
}

const fn alias(stage: Stage, buffer: Buffer, names: &'static [&'static str]) -> Alias {
    Alias { stage, buffer, names }
}

/// All of them, in the order of the forward.
pub const ALIASES: &[Alias] = &[
    alias(Stage::Embed, Buffer::X, &["inp_embd"]),
    alias(Stage::Qkv, Buffer::Q, &["Qcur"]),
    alias(Stage::Qkv, Buffer::K, &["Kcur"]),
    alias(Stage::Qkv, Buffer::V, &["Vcur"]),
    alias(Stage::RopeStore, Buffer::Q, &["Qcur_rope"]),
    alias(Stage::RopeStore, Buffer::CacheK, &["Kcur_rope", "cache_k_l"]),
    alias(Stage::RopeStore, Buffer::CacheV, &["cache_v_l"]),
    alias(Stage::Attend, Buffer::Attn, &["kqv_out"]),
    alias(Stage::AttnOut, Buffer::X, &["ffn_inp"]),
    alias(Stage::Route, Buffer::Normed, &["ffn_norm"]),
    alias(Stage::Route, Buffer::RouterLogits, &["ffn_moe_logits", "moe_router"]),
    alias(Stage::Route, Buffer::Experts, &["ffn_moe_topk"]),
    alias(Stage::Route, Buffer::ExpertWeights, &["ffn_moe_weights_norm"]),
    alias(Stage::ExpertsUp, Buffer::Gate, &["ffn_moe_gate"]),
    alias(Stage::ExpertsUp, Buffer::Up, &["ffn_moe_up"]),
    alias(Stage::ExpertsUp, Buffer::Hidden, &["ffn_moe_swiglu", "moe_swiglu"]),
    alias(Stage::ExpertsDown, Buffer::Down, &["ffn_moe_down"]),
    // The residual stream is in it, as in llama.cpp's `l_out`; `moe_ffn_out` elsewhere is the part that was added.
    alias(Stage::ExpertsDown, Buffer::X, &["l_out", "moe_ffn_out"]),
    alias(Stage::FeedForward, Buffer::Gate, &["ffn_gate"]),
    alias(Stage::FeedForward, Buffer::Up, &["ffn_up"]),
    alias(Stage::FeedForward, Buffer::Hidden, &["ffn_swiglu"]),
    alias(Stage::FeedForward, Buffer::Down, &["ffn_out"]),
    alias(Stage::FeedForward, Buffer::X, &["l_out"]),
    alias(Stage::Head, Buffer::Logits, &["result_output", "logits"]),
];

/// What a buffer after a stage is called elsewhere.
pub fn aliases(stage: Stage, buffer: Buffer) -> &'static [&'static str] {
    let found = ALIASES.iter().find(|alias| alias.stage == stage && alias.buffer == buffer);
    found.map_or(&[], |alias| alias.names)
}

/// The stages that a name stands for: a stage's own name, or that of one of its buffers elsewhere.
pub fn stages(name: &str) -> Vec<Stage> {
    if let Some(stage) = Stage::named(name) {
        return vec![stage];
    }
    ALIASES.iter().filter(|alias| alias.names.contains(&name)).map(|alias| alias.stage).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn everything_written_has_a_name() {
        let named: Vec<_> = ALIASES.iter().map(|a| (a.stage, a.buffer)).collect();
        let distinct: BTreeSet<_> = named.iter().collect();
        assert_eq!(named.len(), distinct.len());
        for stage in Stage::ALL {
            for &buffer in stage.inside().iter().chain(stage.writes()) {
                assert!(!aliases(stage, buffer).is_empty(), "{stage} {buffer}");
            }
        }
        assert_eq!(stages("moe_router"), [Stage::Route]);
        assert_eq!(stages("moe_ffn_out"), [Stage::ExpertsDown]);
        assert_eq!(stages("l_out"), [Stage::ExpertsDown, Stage::FeedForward]);
        assert_eq!(stages("qkv"), [Stage::Qkv]);
        assert!(stages("nothing").is_empty());
    }
}
