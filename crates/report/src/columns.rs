//! The columns of the table of layers and stages: what a layer writes, in the order in which it does.

use model::{Buffer, Stage};
use parity::names::aliases;
use serde::Serialize;

/// A buffer after a stage, in every layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Column {
    /// [`Stage::name`].
    pub stage: &'static str,
    /// [`Buffer::name`].
    pub buffer: &'static str,
    /// What others call it, llama.cpp first.
    pub aliases: &'static [&'static str],
    /// The layer's tensors that the stage reads, without `blk.N.` and `.weight`.
    pub weights: &'static [&'static str],
    /// What it is, in a line, with its shape.
    pub about: &'static str,
}

/// The column of a buffer after a stage.
fn column(stage: Stage, buffer: Buffer) -> Column {
    Column {
        stage: stage.name(),
        buffer: buffer.name(),
        aliases: aliases(stage, buffer),
        weights: weights(stage),
        about: about(buffer),
    }
}

/// The stages of `found`, each with all that it writes of which `found` has something, in the order of execution.
pub fn columns(found: impl Fn(Stage, Buffer) -> bool) -> Vec<Column> {
    let of_stage =
        |stage: Stage| stage.inside().iter().chain(stage.writes()).map(move |&buffer| (stage, buffer));
    let places = Stage::ALL.into_iter().flat_map(of_stage);
    places
        .filter(|&(stage, buffer)| found(stage, buffer))
        .map(|(stage, buffer)| column(stage, buffer))
        .collect()
}

fn weights(stage: Stage) -> &'static [&'static str] {
    match stage {
        Stage::Embed => &["token_embd"],
        Stage::Qkv => &["attn_norm", "attn_q", "attn_k", "attn_v"],
        Stage::RopeStore => &["attn_q_norm", "attn_k_norm"],
        Stage::Attend => &[],
        Stage::AttnOut => &["attn_output"],
        Stage::Route => &["ffn_norm", "ffn_gate_inp"],
        Stage::ExpertsUp => &["ffn_gate_exps", "ffn_up_exps"],
        Stage::ExpertsDown => &["ffn_down_exps"],
        Stage::FeedForward => &["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"],
        Stage::Head => &["output_norm", "output"],
    }
}

fn about(buffer: Buffer) -> &'static str {
    match buffer {
        Buffer::X => "the residual stream [T, D]",
        Buffer::Q => "queries [T, H, HD]",
        Buffer::K => "keys as projected [T, KH, HD]",
        Buffer::V => "values as projected [T, KH, HD]",
        Buffer::CacheK => "the step's rows of the key cache [T, KH, HD]",
        Buffer::CacheV => "the step's rows of the value cache [T, KH, HD]",
        Buffer::Attn => "what the heads gathered [T, H, HD]",
        Buffer::Normed => "the residual stream, normalised [T, D]",
        Buffer::RouterLogits => "router scores before softmax [T, E]",
        Buffer::Experts => "the experts chosen, by rank [T, K]",
        Buffer::ExpertWeights => "the chosen experts' weights [T, K]",
        Buffer::Gate => "gate projections before SwiGLU [T, K, F]",
        Buffer::Up => "up projections before SwiGLU [T, K, F]",
        Buffer::Hidden => "SwiGLU of each chosen expert [T, K, F]",
        Buffer::Down => "down projections before they are weighted and summed [T, K, D]",
        Buffer::Logits => "logits of the rows asked for [R, V]",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_the_order_of_execution() {
        let names = |columns: &[Column]| {
            columns.iter().map(|c| format!("{}.{}", c.stage, c.buffer)).collect::<Vec<_>>()
        };
        let all = columns(|_, _| true);
        assert_eq!(all.len(), 2 + 3 + 3 + 1 + 1 + 4 + 3 + 2 + 5);
        assert_eq!(names(&all[..5]), ["embed.x", "qkv.q", "qkv.k", "qkv.v", "rope_store.q"]);
        let some = columns(|stage, _| stage == Stage::ExpertsDown);
        assert_eq!(names(&some), ["experts_down.down", "experts_down.x"]);
    }
}
