//! The faults, as a table: what is wrong, where it was met, and what must be said of it. Issue numbers are llama.cpp's
//! unless another project is named.

use model::{BLOCK, Stage};

use super::stages;
use super::state::{self, ChunkBorder, OnlyUnobserved};
use super::weights::{self, LAYER};
use super::{Expected, Host, Kind, Planted, Way};
use crate::scenario::Scenario;

const fn expect(stage: Stage, layer: usize, kind: Kind, tensors: &'static [&'static str]) -> Expected {
    Expected::new(stage, Some(layer), kind, tensors)
}

const fn local(stage: Stage, layer: usize, tensors: &'static [&'static str]) -> Expected {
    expect(stage, layer, Kind::Local, tensors)
}

const fn planted(
    name: &'static str,
    what: &'static str,
    source: &'static str,
    way: Way,
    expected: Expected,
) -> Planted {
    Planted { name, what, source, host: Host::Mixed, expected, tokens: 1, base: None, way }
}

impl Planted {
    /// Not in fewer tokens.
    const fn shows_in(self, tokens: usize) -> Planted {
        Planted { tokens, ..self }
    }

    /// Made for another host.
    const fn on(self, host: Host) -> Planted {
        Planted { host, ..self }
    }

    /// Of weights that `base` gives both sides.
    const fn given(self, base: fn(&mut model::Model) -> weights::Fit) -> Planted {
        Planted { base: Some(base), ..self }
    }
}

/// Every fault, the story that began it all first.
pub fn all() -> Vec<Planted> {
    [in_weights(), in_sizes(), in_stages(), in_state()].concat()
}

/// The weights, or how they are read.
fn in_weights() -> Vec<Planted> {
    use Way::Model;
    let top = |stage, tensors| Expected { layer: None, ..local(stage, 0, tensors) };
    vec![
        planted(
            "one-kernel-for-all-types",
            "`ffn_down_exps` read as Q6_K in every layer, where the types part in layer 2: the layer-6 story",
            "aprender-serve, layer 6 of Qwen3-Coder-30B-A3B; #27899",
            Model(weights::one_kernel_for_all_types),
            Expected {
                feature: Some("type of ffn_down_exps = Q4_K"),
                ..local(Stage::ExpertsDown, 2, &["ffn_down_exps"])
            },
        ),
        planted(
            "values-read-as-q4-k",
            "`attn_v` read as Q4_K where it is Q6_K",
            "the same, the other way round",
            Model(weights::one_kernel_for_values),
            Expected { feature: Some("type of attn_v = Q6_K"), ..local(Stage::Qkv, 0, &["attn_v"]) },
        ),
        planted(
            "scales-without-high-bits",
            "Q4_K scales 4 to 7 without the two bits that live in bytes 0 to 3",
            "2-arithmetic.md",
            Model(weights::scales_without_high_bits),
            Expected {
                feature: Some("second half of the block"),
                ..local(Stage::ExpertsUp, LAYER, &["ffn_gate_exps"])
            },
        ),
        planted(
            "minima-without-high-bits",
            "Q4_K minima 4 to 7 without the two bits that live in bytes 4 to 7",
            "2-arithmetic.md",
            Model(weights::minima_without_high_bits),
            Expected { feature: Some("second half of the block"), ..local(Stage::Qkv, LAYER, &["attn_q"]) },
        ),
        planted(
            "scales-without-sign",
            "Q6_K scales without their sign",
            "2-arithmetic.md",
            Model(weights::scales_without_sign),
            local(Stage::Qkv, 1, &["attn_v"]),
        ),
        planted(
            "quants-off-by-one",
            "Q6_K quants biased by 31, not 32",
            "2-arithmetic.md",
            Model(weights::quants_off_by_one),
            top(Stage::Head, &["output"]),
        ),
        planted(
            "subnormal-scales-flushed",
            "an f16 scale below 2^-14 taken for zero",
            "2-arithmetic.md",
            Model(weights::subnormal_scales_flushed),
            Expected { row: Some(5), block: Some(1), ..local(Stage::Qkv, LAYER, &["attn_k"]) },
        )
        .given(weights::with_subnormal_scale),
        planted(
            "tail-beyond-the-tensor",
            "the last block of the last expert taken from beyond the tensor",
            "#27044",
            Model(weights::tail_beyond_the_tensor),
            Expected {
                expert: Some(5),
                row: Some(255),
                block: Some(1),
                ..local(Stage::ExpertsUp, LAYER, &["ffn_up_exps"])
            },
        ),
        planted(
            "expert-off-by-one",
            "the up projection of the next expert",
            "2-arithmetic.md",
            Model(weights::expert_off_by_one),
            local(Stage::ExpertsUp, LAYER, &["ffn_up_exps"]),
        ),
        planted(
            "gate-and-up-swapped",
            "gate taken for up and up for gate",
            "2-arithmetic.md",
            Model(weights::gate_and_up_swapped),
            local(Stage::ExpertsUp, LAYER, &["ffn_gate_exps", "ffn_up_exps"]),
        ),
        planted(
            "lane-dropped",
            "the partial sum of lane 5 of 32 left out of the router's product",
            "2-arithmetic.md",
            Model(weights::lane_dropped),
            Expected {
                element: Some(5),
                feature: Some("element % 32 = 5"),
                ..local(Stage::Route, LAYER, &["ffn_gate_inp"])
            },
        ),
        planted(
            "norm-element-doubled",
            "one weight of a norm doubled",
            "a bit flip in memory",
            Model(weights::norm_element_doubled),
            Expected { element: Some(300), ..local(Stage::Qkv, 1, &["attn_norm"]) },
        ),
        planted(
            "scale-is-nan",
            "a NaN for the scale of one block",
            "#6957, #19683",
            Model(weights::scale_is_nan),
            Expected { row: Some(7), block: Some(0), ..local(Stage::AttnOut, 3, &["attn_output"]) },
        ),
        planted(
            "tokens-off-by-one",
            "each token given the next one's embedding",
            "2-arithmetic.md",
            Model(weights::tokens_off_by_one),
            top(Stage::Embed, &["token_embd"]),
        ),
        planted(
            "stride-of-whole-blocks",
            "rows of 288 weights stepped over as if they were padded to 512",
            "2-arithmetic.md",
            Model(weights::stride_of_whole_blocks),
            local(Stage::ExpertsDown, LAYER, &["ffn_down_exps"]),
        )
        .on(Host::Ragged),
        planted(
            "aligned-loads",
            "the first codes of a row of 306 bytes read from the next lower multiple of 16 bytes",
            "made for the debugger: in Q8_0 and Q6_K no load of 16 bytes need be aligned",
            Model(weights::aligned_loads),
            Expected {
                block: Some(0),
                feature: Some("the tensor's row begins at no multiple of 16 bytes"),
                ..local(Stage::ExpertsDown, LAYER, &["ffn_down_exps"])
            },
        )
        .on(Host::Ragged),
    ]
}

/// Configuration, and the range of numbers.
fn in_sizes() -> Vec<Planted> {
    use Way::{Around, Model};
    vec![
        planted(
            "wrong-rope-base",
            "rotation by a base of 10,000, not of 1,000,000",
            "2-arithmetic.md",
            Model(weights::wrong_rope_base),
            local(Stage::RopeStore, 0, &[]),
        )
        .shows_in(2),
        planted(
            "not-renormalised",
            "the chosen experts' weights not divided by their sum",
            "2-arithmetic.md",
            Model(weights::not_renormalised),
            local(Stage::Route, 0, &[]),
        ),
        planted(
            "wrong-epsilon",
            "norms with an epsilon of 1e-3, not 1e-6",
            "a default in place of the file's",
            Model(weights::wrong_epsilon),
            local(Stage::Qkv, 0, &["attn_norm"]),
        ),
        planted(
            "sums-in-f16",
            "sums of 32 activations kept in f16, which ends at 65504",
            "#21652, #22571",
            Around(Stage::ExpertsDown, stages::sums_in_f16),
            Expected {
                feature: Some("a sum of 32 inputs in hidden beyond f16's 65504"),
                ..local(Stage::ExpertsDown, LAYER, &["ffn_down_exps"])
            },
        )
        .given(weights::beyond_f16),
        planted(
            "activations-in-f16",
            "activations kept in f16 before the down projection",
            "#26044",
            Around(Stage::ExpertsDown, stages::activations_in_f16),
            Expected {
                feature: Some("an input in hidden beyond f16's 65504"),
                ..local(Stage::ExpertsDown, LAYER, &["ffn_down_exps"])
            },
        )
        .given(weights::beyond_f16),
        planted(
            "attention-in-f16",
            "attention summed in f16",
            "#17746",
            Around(Stage::Attend, stages::attention_in_f16),
            local(Stage::Attend, LAYER, &[]),
        ),
    ]
}

/// Kernels, and what is between them.
fn in_stages() -> Vec<Planted> {
    let stage = |name, what, source, stage, run: stages::Run| {
        planted(name, what, source, Way::Around(stage, run), local(stage, LAYER, &[]))
    };
    use Stage::{Attend, AttnOut, ExpertsDown, RopeStore, Route};
    vec![
        stage(
            "masked-tile",
            "a fully masked tile: infinity from infinity",
            "#6438",
            Attend,
            stages::masked_tile,
        )
        .shows_in(BLOCK + 1),
        stage(
            "wrapped-offset",
            "an offset of 32 bits that wraps from position 64 on",
            "#14840, #23610",
            Attend,
            stages::wrapped_offset,
        )
        .shows_in(BLOCK + 1),
        stage(
            "unscaled-attention",
            "scores not divided by the root of the head's size",
            "2-arithmetic.md",
            Attend,
            stages::unscaled_attention,
        ),
        stage(
            "mask-off-by-one",
            "each row sees one key too few",
            "2-arithmetic.md",
            Attend,
            stages::mask_off_by_one,
        )
        .shows_in(2),
        planted(
            "wrong-kv-head",
            "query head h reads key/value head h % KH",
            "2-arithmetic.md",
            Way::Hook(stages::wrong_kv_head),
            local(Attend, LAYER, &[]),
        ),
        stage(
            "nan-in-padding",
            "NaN times zero in the padding of a step's last tile",
            "#8572, #13320",
            AttnOut,
            stages::nan_in_padding,
        ),
        stage(
            "residual-twice",
            "the residual stream added twice",
            "2-arithmetic.md",
            AttnOut,
            stages::residual_twice,
        ),
        stage(
            "residual-never",
            "the residual stream not added",
            "2-arithmetic.md",
            AttnOut,
            stages::residual_never,
        ),
        Planted {
            expected: local(Route, LAYER, &["ffn_gate_inp"]),
            ..stage(
                "nan-in-router",
                "NaN scores, one expert chosen again and again",
                "#19659, vLLM #39391",
                Route,
                stages::nan_in_router,
            )
        },
        stage(
            "zero-by-zero",
            "the experts' weights divided by a sum of zero",
            "vLLM #47367",
            Route,
            stages::zero_by_zero,
        ),
        Planted {
            expected: local(RopeStore, LAYER, &["attn_q_norm"]),
            ..stage(
                "no-head-norm",
                "queries rotated without their norm",
                "aprender-serve; realizar",
                RopeStore,
                stages::no_head_norm,
            )
        },
        stage(
            "interleaved-rope",
            "neighbouring pairs rotated, not halves",
            "2-arithmetic.md",
            RopeStore,
            stages::interleaved_rope,
        )
        .shows_in(2),
        stage(
            "combined-in-another-order",
            "experts summed in another order than their ranks'",
            "float atomics",
            ExpertsDown,
            stages::combined_in_another_order,
        ),
        planted(
            "early-load",
            "a load hoisted above the wait for the stage that writes it",
            "#24030",
            Way::Hook(state::early_load),
            local(Stage::ExpertsUp, LAYER, &[]),
        ),
    ]
}

/// What is left behind, shared or cut.
fn in_state() -> Vec<Planted> {
    // What is cut or in company, and what goes on in silence, takes two tokens to show.
    let state = |name, what, source, way, stage, layer, scenario| {
        planted(name, what, source, way, expect(stage, layer, Kind::State(scenario), &[])).shows_in(2)
    };
    vec![
        planted(
            "shared-buffer",
            "another stream writes into `x` while the router runs",
            "#21897",
            Way::Around(Stage::Route, stages::shared_buffer),
            expect(Stage::ExpertsDown, LAYER, Kind::Inherited(Stage::Route), &[]),
        ),
        state(
            "stale-row",
            "the first key and value of a chunk not stored",
            "2-arithmetic.md",
            Way::Hook(state::stale_row),
            Stage::RopeStore,
            LAYER,
            Scenario::Chunked,
        ),
        state(
            "position-at-chunk-border",
            "positions one too far after a chunk's border",
            "2-arithmetic.md",
            Way::Hook(|_| Ok(Box::new(ChunkBorder))),
            Stage::RopeStore,
            0,
            Scenario::Chunked,
        ),
        state(
            "tables-mixed-up",
            "attention over another sequence's blocks",
            "buffers shared between requests",
            Way::Around(Stage::Attend, stages::tables_mixed_up),
            Stage::Attend,
            LAYER,
            Scenario::Batch,
        ),
        state(
            "missing-wait",
            "a missing wait, that shows when the same launch is made again",
            "#23690",
            Way::Hook(state::missing_wait),
            Stage::Attend,
            LAYER,
            Scenario::Repeat,
        )
        .shows_in(1),
        Planted {
            expected: Expected {
                layer: None,
                ..expect(Stage::Head, 0, Kind::State(Scenario::Unobserved), &[])
            },
            ..state(
                "only-unobserved",
                "right whenever a buffer is read between the stages",
                "Polygraphy: marking outputs hides the fault",
                Way::Hook(|_| Ok(Box::new(OnlyUnobserved))),
                Stage::Head,
                0,
                Scenario::Unobserved,
            )
        },
    ]
}
