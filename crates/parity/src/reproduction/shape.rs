//! The dimensions of a cut model, as a reproduction's file has them. Checked when they are read: they come from elsewhere.

use model::rope::Scaling;
use model::{Arch, Config, Ffn, Moe};
use serde::{Deserialize, Serialize};

/// The cut model's dimensions; symbols as in [`model::Config`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// `D`.
    pub hidden: usize,
    /// `H`.
    pub heads: usize,
    /// `KH`.
    pub kv_heads: usize,
    /// `HD`.
    pub head_dim: usize,
    /// `V`.
    pub vocab: usize,
    /// `E`; 0 of a dense model.
    pub experts: usize,
    /// `K`; 0 of a dense model.
    pub used: usize,
    /// `F`.
    pub width: usize,
    /// Whether the experts' weights are renormalised.
    pub renormalise: bool,
    /// Factor on them, its bits.
    pub scale_bits: u32,
    /// Epsilon of the norms, its bits.
    pub eps_bits: u32,
    /// Frequencies of the rotation by the pair, radians a position, their bits: whatever scaling made them.
    pub rope: Rope,
}

/// Rotary embedding as the model's metadata has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies, its bits.
    pub base_bits: u64,
    /// `none`, `linear` or `yarn`.
    pub scaling: String,
    /// The scaling's numbers, in the order of [`model::rope::Scaling`].
    pub numbers: Vec<f64>,
}

impl Shape {
    pub(super) fn of(config: &Config) -> Shape {
        let (scaling, numbers) = match config.rope.scaling {
            Scaling::None => ("none", vec![]),
            Scaling::Linear { factor } => ("linear", vec![factor]),
            Scaling::Yarn { factor, original_context, attention_factor, beta_fast, beta_slow } => {
                ("yarn", vec![factor, original_context, attention_factor, beta_fast, beta_slow])
            }
        };
        let rope = Rope { base_bits: config.rope.base.to_bits(), scaling: scaling.into(), numbers };
        let (experts, used, width, renormalise, scale) = match config.ffn {
            Ffn::Dense { width } => (0, 0, width, false, 1.0),
            Ffn::Moe(moe) => (moe.experts, moe.used, moe.width, moe.renormalise, moe.scale),
        };
        let Config { hidden, heads, kv_heads, head_dim, vocab, .. } = *config;
        let (scale_bits, eps_bits) = (scale.to_bits(), config.rms_eps.to_bits());
        Shape {
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab,
            experts,
            used,
            width,
            renormalise,
            scale_bits,
            eps_bits,
            rope,
        }
    }

    /// The configuration, or what makes no sense in it.
    pub(super) fn config(&self) -> Result<Config, String> {
        let Shape { hidden, heads, kv_heads, head_dim, vocab, experts, used, width, .. } = *self;
        let counts = [hidden, heads, kv_heads, head_dim, vocab, width];
        let sane = counts.iter().all(|&n| (1..=1 << 20).contains(&n))
            && heads.is_multiple_of(kv_heads)
            && head_dim.is_multiple_of(32)
            && head_dim <= 256
            && used <= experts
            && experts <= 1 << 12
            && (experts == 0) == (used == 0);
        if !sane {
            return Err("its dimensions are no model's".into());
        }
        let scaling = match (self.rope.scaling.as_str(), &self.rope.numbers[..]) {
            ("none", []) => Scaling::None,
            ("linear", &[factor]) => Scaling::Linear { factor },
            ("yarn", &[factor, original_context, attention_factor, beta_fast, beta_slow]) => {
                Scaling::Yarn { factor, original_context, attention_factor, beta_fast, beta_slow }
            }
            (other, _) => return Err(format!("RoPE scaling `{}` is not known", other.escape_debug())),
        };
        let scale = f32::from_bits(self.scale_bits);
        let ffn = match experts {
            0 => Ffn::Dense { width },
            _ => Ffn::Moe(Moe { experts, used, width, renormalise: self.renormalise, scale }),
        };
        Ok(Config {
            arch: if experts == 0 { Arch::Qwen3 } else { Arch::Qwen3Moe },
            layers: 1,
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context: 1 << 20,
            rms_eps: f32::from_bits(self.eps_bits),
            rope: model::rope::Rope { base: f64::from_bits(self.rope.base_bits), scaling },
            ffn,
        })
    }
}
