//! The type map of a mix against the published Qwen3-Coder-30B-A3B files and the rules of llama.cpp.

use gguf::Dtype::{self, *};
use quant::{Mix, MixContext};

const CODER_30B: MixContext = MixContext { n_layers: 48, n_experts: 128, tied: false };

/// The layers whose tensor `kind` has the type `dtype`.
fn layers_of(mix: Mix, context: &MixContext, kind: &str, dims: &[usize], dtype: Dtype) -> Vec<usize> {
    (0..context.n_layers)
        .filter(|layer| mix.tensor_type(context, &format!("blk.{layer}.{kind}.weight"), dims) == dtype)
        .collect()
}

#[test]
fn sensitive_layers() {
    // The list of 1-product.md for the published Q4_K_M file: 0-5, 42-47, and every third between.
    let of_48: Vec<usize> = (0..6).chain((8..42).step_by(3)).chain(42..48).collect();
    let of_8 = vec![0, 3, 6, 7];
    let expert = [768, 2048, 128];
    let value = [2048, 512];
    let check = |mix, n_layers, more: &[usize], base, raised| {
        let context = MixContext { n_layers, ..CODER_30B };
        let rest: Vec<_> = (0..n_layers).filter(|layer| !more.contains(layer)).collect();
        for (kind, dims) in [("ffn_down_exps", &expert[..]), ("ffn_down", &value), ("attn_v", &value)] {
            assert_eq!(layers_of(mix, &context, kind, dims, raised), more, "{mix} {kind} of {n_layers}");
            assert_eq!(layers_of(mix, &context, kind, dims, base), rest, "{mix} {kind} of {n_layers}");
        }
        for kind in ["attn_q", "attn_k", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_gate", "ffn_up"]
        {
            let all = layers_of(mix, &context, kind, &expert, base);
            assert_eq!(all.len(), n_layers, "{mix} {kind} of {n_layers}: {base} in layers {all:?}");
        }
    };
    assert!(of_48.contains(&8) && of_48.contains(&41) && !of_48.contains(&6));
    check(Mix::Q4KM, 48, &of_48, Q4K, Q6K);
    check(Mix::Q4KM, 8, &of_8, Q4K, Q6K);
    check(Mix::Q5KM, 48, &of_48, Q5K, Q6K);
    check(Mix::Q6K, 48, &[], Q6K, Q8_0);
    check(Mix::Q8_0, 48, &[], Q8_0, Q6K);
    check(Mix::BF16, 8, &[], BF16, Q6K);
}

#[test]
fn first_layers_of_q4_k_s() {
    let of = |kind| layers_of(Mix::Q4KS, &CODER_30B, kind, &[2048, 512], Q5K);
    assert_eq!(of("attn_v"), [0, 1, 2, 3]);
    assert_eq!(of("ffn_down_exps"), [0, 1, 2, 3, 4, 5]);
    assert_eq!(of("attn_q"), []);
}

#[test]
fn tensors_by_name_and_shape() {
    let tied = MixContext { tied: true, ..CODER_30B };
    let eight = MixContext { n_experts: 8, ..CODER_30B };
    let rows: &[(Mix, &MixContext, &str, &[usize], Dtype)] = &[
        // Head and embedding.
        (Mix::Q4KM, &CODER_30B, "output.weight", &[2048, 151936], Q6K),
        (Mix::Q4KM, &CODER_30B, "token_embd.weight", &[2048, 151936], Q4K),
        (Mix::Q4KM, &tied, "token_embd.weight", &[2048, 151936], Q6K),
        (Mix::Q4KS, &tied, "token_embd.weight", &[2048, 151936], Q6K),
        (Mix::Q5KM, &CODER_30B, "token_embd.weight", &[2048, 151936], Q5K),
        (Mix::Q8_0, &CODER_30B, "output.weight", &[2048, 151936], Q8_0),
        (Mix::F16, &CODER_30B, "output.weight", &[2048, 151936], F16),
        // Never quantised.
        (Mix::Q4KM, &CODER_30B, "output_norm.weight", &[2048], F32),
        (Mix::Q4KM, &CODER_30B, "blk.0.attn_q_norm.weight", &[128], F32),
        (Mix::Q4KM, &CODER_30B, "blk.0.ffn_gate_inp.weight", &[2048, 128], F32),
        (Mix::F16, &CODER_30B, "blk.0.ffn_gate_inp.weight", &[2048, 128], F32),
        (Mix::Q4KM, &CODER_30B, "blk.0.attn_q.bias", &[2048], F32),
        (Mix::Q4KM, &CODER_30B, "blk.0.attn_q.weight", &[2048, 1], F32),
        (Mix::F32, &CODER_30B, "blk.0.attn_q.weight", &[2048, 4096], F32),
        // Rows that are no multiple of 256, then of 32.
        (Mix::Q4KM, &CODER_30B, "blk.6.attn_v.weight", &[96, 512], Q5_0),
        (Mix::Q4KM, &CODER_30B, "blk.5.attn_v.weight", &[96, 512], Q8_0),
        (Mix::Q5KM, &CODER_30B, "blk.6.attn_v.weight", &[96, 512], Q5_1),
        (Mix::Q6K, &CODER_30B, "blk.6.attn_v.weight", &[96, 512], Q8_0),
        (Mix::Q4KM, &CODER_30B, "output.weight", &[96, 512], Q8_0),
        (Mix::Q4KM, &CODER_30B, "blk.6.attn_v.weight", &[80, 512], F16),
        (Mix::Q8_0, &CODER_30B, "blk.6.attn_v.weight", &[80, 512], F16),
        // The reference's rule for eight experts.
        (Mix::Q4KM, &eight, "blk.6.attn_v.weight", &[2048, 512], Q8_0),
        (Mix::Q4KM, &eight, "blk.6.attn_k.weight", &[2048, 512], Q8_0),
        (Mix::Q4KS, &eight, "blk.6.attn_output.weight", &[4096, 2048], Q5K),
        (Mix::Q5KM, &eight, "blk.6.attn_output.weight", &[4096, 2048], Q5K),
        (Mix::Q4KM, &eight, "blk.6.ffn_down_exps.weight", &[768, 2048, 8], Q4K),
    ];
    for &(mix, context, name, dims, want) in rows {
        assert_eq!(mix.tensor_type(context, name, dims), want, "{mix} {name} {dims:?}");
    }
}

#[test]
fn names_and_numbers() {
    for mix in Mix::ALL {
        assert_eq!(mix.to_string().parse(), Ok(mix));
        assert_eq!(mix.name().to_lowercase().parse(), Ok(mix));
    }
    assert_eq!("q4_k".parse(), Ok(Mix::Q4KM));
    assert_eq!("Q5_K".parse(), Ok(Mix::Q5KM));
    // llama_ftype of llama.h.
    assert_eq!(Mix::ALL.map(Mix::file_type), [0, 1, 32, 7, 18, 17, 15, 14]);
    let error = "Q3_K_L".parse::<Mix>().expect_err("not supported").to_string();
    assert!(error.contains("`Q3_K_L`") && error.contains("Q4_K_M"), "{error}");
}
