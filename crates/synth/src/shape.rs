//! Named shapes, and the metadata that describes them.

use gguf::{Metadata, Value};
use model::rope::{Rope, Scaling};
use model::{Arch, Config, Ffn, Moe};

use crate::vocabulary;

/// A model's shape: configuration and whether the head is tied to the embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Hyperparameters.
    pub config: Config,
    /// Whether the head reuses the embedding.
    pub tied: bool,
}

impl Shape {
    /// Names that [`Shape::named`] knows.
    pub const NAMES: [&'static str; 4] = ["qwen3-30b-a3b", "qwen3-0.6b", "tiny-moe", "tiny-dense"];

    /// A shape by name. The first two are those of the published models' config.json.
    pub fn named(name: &str) -> Option<Shape> {
        let moe =
            |experts, used, width| Ffn::Moe(Moe { experts, used, width, renormalise: true, scale: 1.0 });
        let rope = |base| Rope { base, scaling: Scaling::None };
        let config = Config {
            arch: Arch::Qwen3Moe,
            layers: 48,
            hidden: 2048,
            heads: 32,
            kv_heads: 4,
            head_dim: 128,
            vocab: 151_936,
            context: 262_144,
            rms_eps: 1e-6,
            rope: rope(1e7),
            ffn: moe(128, 8, 768),
        };
        let tiny = Config {
            layers: 6,
            hidden: 256,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            vocab: 1024,
            context: 8192,
            rope: rope(1e6),
            ffn: moe(8, 2, 256),
            ..config
        };
        Some(match name {
            "qwen3-30b-a3b" => Shape { config, tied: false },
            "qwen3-0.6b" => Shape {
                config: Config {
                    arch: Arch::Qwen3,
                    layers: 28,
                    hidden: 1024,
                    heads: 16,
                    kv_heads: 8,
                    context: 40_960,
                    rope: rope(1e6),
                    ffn: Ffn::Dense { width: 3072 },
                    ..config
                },
                tied: true,
            },
            "tiny-moe" => Shape { config: tiny, tied: false },
            "tiny-dense" => Shape {
                config: Config { arch: Arch::Qwen3, ffn: Ffn::Dense { width: 512 }, ..tiny },
                tied: true,
            },
            _ => return None,
        })
    }
}

/// The metadata of a shape: what [`Config::from_metadata`] reads, and a byte-level vocabulary. RoPE scaling is not
/// written: no shape that can be named or given on the command line has one.
pub fn metadata(shape: &Shape, seed: u64) -> Metadata {
    let Shape { config, .. } = shape;
    let arch = config.arch.name();
    let mut meta = Metadata::new();
    let mut set = |key: &str, value: Value| meta.set(&key.replace("{arch}", arch), value);
    // Counts of a shape are far below u32's range: `Config` refuses larger ones when it reads them back.
    let count = |n: usize| Value::U32(n as u32);
    set("general.architecture", Value::String(arch.into()));
    set("general.name", Value::String(format!("random weights, seed {seed}")));
    set("{arch}.block_count", count(config.layers));
    set("{arch}.context_length", count(config.context));
    set("{arch}.embedding_length", count(config.hidden));
    set("{arch}.attention.head_count", count(config.heads));
    set("{arch}.attention.head_count_kv", count(config.kv_heads));
    set("{arch}.attention.key_length", count(config.head_dim));
    set("{arch}.attention.value_length", count(config.head_dim));
    set("{arch}.attention.layer_norm_rms_epsilon", Value::F32(config.rms_eps));
    set("{arch}.rope.freq_base", Value::F32(config.rope.base as f32));
    match config.ffn {
        Ffn::Dense { width } => {
            set("{arch}.feed_forward_length", count(width));
        }
        Ffn::Moe(moe) => {
            set("{arch}.feed_forward_length", count(moe.width));
            set("{arch}.expert_count", count(moe.experts));
            set("{arch}.expert_used_count", count(moe.used));
            set("{arch}.expert_feed_forward_length", count(moe.width));
            set("{arch}.expert_weights_norm", Value::Bool(moe.renormalise));
        }
    }
    vocabulary::describe(config.vocab, |key, value: Value| {
        set(key, value);
    });
    meta
}
