//! The hyperparameters of a model, read from a file's metadata and checked once.

use gguf::Metadata;

use crate::rope::{Rope, Scaling};

/// The architectures this engine knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// Qwen3, dense.
    Qwen3,
    /// Qwen3, mixture of experts.
    Qwen3Moe,
}

impl Arch {
    /// Every architecture, for messages that list what is supported.
    pub const ALL: [Arch; 2] = [Arch::Qwen3, Arch::Qwen3Moe];

    /// The value of `general.architecture`, also the prefix of the architecture's keys.
    pub const fn name(self) -> &'static str {
        match self {
            Arch::Qwen3 => "qwen3",
            Arch::Qwen3Moe => "qwen3moe",
        }
    }
}

/// The mixture of experts of every layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moe {
    /// `E`, experts.
    pub experts: usize,
    /// `K`, experts chosen for a token.
    pub used: usize,
    /// `F`, width of one expert.
    pub width: usize,
    /// Whether the chosen experts' probabilities are divided by their sum (`norm_topk_prob`).
    pub renormalise: bool,
    /// Factor on the experts' weights; 1 unless the file says otherwise.
    pub scale: f32,
}

/// The feed-forward part of every layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ffn {
    /// One network of width `F`.
    Dense {
        /// `F`.
        width: usize,
    },
    /// A router and experts.
    Moe(Moe),
}

/// A model's hyperparameters. Symbols as in [`crate::Stage`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// Architecture.
    pub arch: Arch,
    /// Layers.
    pub layers: usize,
    /// `D`, hidden size.
    pub hidden: usize,
    /// `H`, query heads.
    pub heads: usize,
    /// `KH`, key/value heads; divides `H`.
    pub kv_heads: usize,
    /// `HD`, size of a head; a multiple of 32 up to 256.
    pub head_dim: usize,
    /// `V`, rows of the embedding.
    pub vocab: usize,
    /// Positions the model was trained for.
    pub context: usize,
    /// Added to the mean square in every norm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Feed-forward part.
    pub ffn: Ffn,
}

/// Why a file's metadata is not a model this engine runs.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A key is missing or of the wrong type.
    #[error(transparent)]
    Metadata(#[from] gguf::Error),
    /// Another architecture.
    #[error("architecture `{0}` is not supported (supported: {list})", list = Arch::ALL.map(Arch::name).join(", "))]
    Arch(String),
    /// Another way of stretching the context.
    #[error("key `{key}`: RoPE scaling `{found}` is not supported (supported: none, linear, yarn)")]
    RopeScaling {
        /// The key.
        key: String,
        /// Its value.
        found: String,
    },
    /// A value outside what makes sense.
    #[error("key `{key}`: {found} is out of range ({want})")]
    Range {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        want: &'static str,
    },
}

impl Config {
    /// Reads the keys of llama.cpp's `qwen3` and `qwen3moe` conversions. `vocab` is the embedding's row count: the
    /// token list may be shorter (padding) and is the tokenizer's concern.
    pub fn from_metadata(meta: &Metadata, vocab: usize) -> Result<Config, ConfigError> {
        let name = meta.str("general.architecture")?;
        let arch = Arch::ALL
            .into_iter()
            .find(|a| a.name() == name)
            .ok_or_else(|| ConfigError::Arch(name.chars().take(64).collect()))?;
        let keys = Keys { meta, prefix: arch.name() };

        let hidden = keys.count("embedding_length", 1 << 20)?;
        let heads = keys.count("attention.head_count", 1 << 12)?;
        let head_dim = match keys.opt_count("attention.key_length", 256)? {
            Some(d) => d,
            None => hidden / heads,
        };
        keys.require(
            "attention.key_length",
            head_dim,
            head_dim > 0 && head_dim.is_multiple_of(32) && head_dim <= 256,
            "a multiple of 32 up to 256",
        )?;
        let value_dim = keys.opt_count("attention.value_length", 256)?.unwrap_or(head_dim);
        keys.require("attention.value_length", value_dim, value_dim == head_dim, "equal to the key length")?;
        let kv_heads = keys.opt_count("attention.head_count_kv", 1 << 12)?.unwrap_or(heads);
        keys.require(
            "attention.head_count_kv",
            kv_heads,
            heads.is_multiple_of(kv_heads),
            "a divisor of the head count",
        )?;

        let ffn = match arch {
            Arch::Qwen3 => Ffn::Dense { width: keys.count("feed_forward_length", 1 << 20)? },
            Arch::Qwen3Moe => Ffn::Moe(keys.moe()?),
        };
        let context = keys.count("context_length", 1 << 24)?;
        Ok(Config {
            arch,
            layers: keys.count("block_count", 1 << 12)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context,
            rms_eps: keys.positive("attention.layer_norm_rms_epsilon", None)?,
            rope: keys.rope(context)?,
            ffn,
        })
    }

    /// The key/value bytes of one position over all layers: two int8 planes and an f32 scale for each head's key and
    /// value row.
    pub fn kv_bytes_per_position(&self) -> usize {
        self.layers * self.kv_heads * 2 * (2 * self.head_dim + 4)
    }
}

/// Typed access to the architecture's keys, with ranges.
struct Keys<'a> {
    meta: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }

    fn require(
        &self,
        suffix: &str,
        found: impl std::fmt::Display,
        holds: bool,
        want: &'static str,
    ) -> Result<(), ConfigError> {
        if holds {
            return Ok(());
        }
        Err(ConfigError::Range { key: self.key(suffix), found: found.to_string(), want })
    }

    fn opt_count(&self, suffix: &str, limit: u32) -> Result<Option<usize>, ConfigError> {
        let Some(n) = self.meta.opt_u32(&self.key(suffix))? else { return Ok(None) };
        self.require(suffix, n, (1..=limit).contains(&n), "at least 1, and not absurdly large")?;
        Ok(Some(n as usize))
    }

    fn count(&self, suffix: &str, limit: u32) -> Result<usize, ConfigError> {
        // The required getter's error names the missing key.
        self.meta.u32(&self.key(suffix))?;
        Ok(self.opt_count(suffix, limit)?.expect("the key was just read"))
    }

    /// A finite value above zero, or the default if the key may be absent.
    fn positive(&self, suffix: &str, default: Option<f32>) -> Result<f32, ConfigError> {
        let value = match (self.meta.opt_f32(&self.key(suffix))?, default) {
            (Some(v), _) | (None, Some(v)) => v,
            (None, None) => self.meta.f32(&self.key(suffix))?,
        };
        self.require(suffix, value, value.is_finite() && value > 0.0, "finite and above 0")?;
        Ok(value)
    }

    fn moe(&self) -> Result<Moe, ConfigError> {
        let experts = self.count("expert_count", 1 << 12)?;
        let used = self.count("expert_used_count", 1 << 8)?;
        self.require("expert_used_count", used, used <= experts, "no more than the expert count")?;
        Ok(Moe {
            experts,
            used,
            width: self.count("expert_feed_forward_length", 1 << 20)?,
            // Every published Qwen3-MoE renormalises; converters write the key only for architectures that vary.
            renormalise: self.meta.opt_bool(&self.key("expert_weights_norm"))?.unwrap_or(true),
            scale: self.positive("expert_weights_scale", Some(1.0))?,
        })
    }

    fn rope(&self, context: usize) -> Result<Rope, ConfigError> {
        let base = f64::from(self.positive("rope.freq_base", Some(10_000.0))?);
        let key = self.key("rope.scaling.type");
        let factor = || self.positive("rope.scaling.factor", None).map(f64::from);
        let scaling = match self.meta.opt_str(&key)?.unwrap_or("none") {
            "none" => Scaling::None,
            "linear" => Scaling::Linear { factor: factor()? },
            "yarn" => Scaling::Yarn {
                factor: factor()?,
                original_context: self
                    .opt_count("rope.scaling.original_context_length", 1 << 24)?
                    .unwrap_or(context) as f64,
                attention_factor: f64::from(self.positive("rope.scaling.attn_factor", Some(1.0))?),
                beta_fast: f64::from(self.positive("rope.scaling.yarn_beta_fast", Some(32.0))?),
                beta_slow: f64::from(self.positive("rope.scaling.yarn_beta_slow", Some(1.0))?),
            },
            other => {
                return Err(ConfigError::RopeScaling { key, found: other.chars().take(64).collect() });
            }
        };
        Ok(Rope { base, scaling })
    }
}
