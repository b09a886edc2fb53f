//! Rotary position embedding (Su et al. 2021), half-split as in GPT-NeoX, with linear and YaRN (Peng et al. 2023)
//! context extension.
//!
//! Angles are computed in f64 on the host and rounded once to f32; backends only look them up, so no device's `sin`
//! can change a bit. The f64 functions of the host's libm differ by far less than the rounding to f32 hides, except
//! in about one entry in 2^29; `table_is_pinned` guards against a libm for which it does not.

use std::f64::consts::TAU;

/// How a model rotates queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of frequencies (`rope_theta`).
    pub base: f64,
    /// Context extension.
    pub scaling: Scaling,
}

/// How the context is stretched beyond the original one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// Every position divided by `factor`.
    Linear {
        /// Stretch, above 0.
        factor: f64,
    },
    /// YaRN: slow frequencies interpolated, fast ones left alone, a ramp between.
    Yarn {
        /// Stretch, above 0.
        factor: f64,
        /// Positions before stretching.
        original_context: f64,
        /// Multiplies YaRN's own magnitude correction `0.1 ln(factor) + 1`.
        attention_factor: f64,
        /// Rotations over the original context above which a frequency is left alone.
        beta_fast: f64,
        /// Rotations below which it is fully interpolated.
        beta_slow: f64,
    },
}

impl Rope {
    /// The angle per position of each pair of a head of `head_dim`, radians, `[HD / 2]`.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let pairs = head_dim / 2;
        let plain = |i: usize| self.base.powf(-2.0 * i as f64 / head_dim as f64);
        match self.scaling {
            Scaling::None => (0..pairs).map(plain).collect(),
            Scaling::Linear { factor } => (0..pairs).map(|i| plain(i) / factor).collect(),
            Scaling::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
                // The pair that turns `rotations` times within the original context.
                let pair = |rotations: f64| {
                    head_dim as f64 * (original_context / (rotations * TAU)).ln() / (2.0 * self.base.ln())
                };
                let low = pair(beta_fast).floor().max(0.0);
                let high = pair(beta_slow).ceil().min(head_dim as f64 - 1.0);
                let width = if high > low { high - low } else { 0.001 };
                (0..pairs)
                    .map(|i| {
                        let interpolated = ((i as f64 - low) / width).clamp(0.0, 1.0);
                        plain(i) / factor * interpolated + plain(i) * (1.0 - interpolated)
                    })
                    .collect()
            }
        }
    }

    /// The factor on cosine and sine that keeps attention's temperature under YaRN; 1 otherwise.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { factor, attention_factor, .. } if factor > 1.0 => {
                attention_factor * (0.1 * factor.ln() + 1.0)
            }
            Scaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Cosine and sine for positions `0..positions`.
    pub fn table(&self, head_dim: usize, positions: usize) -> Table {
        let frequencies = self.frequencies(head_dim);
        let magnitude = self.magnitude();
        let entry = |p: usize| {
            frequencies.iter().map(move |f| {
                let (sin, cos) = (p as f64 * f).sin_cos();
                [(cos * magnitude) as f32, (sin * magnitude) as f32]
            })
        };
        Table { pairs: head_dim / 2, entries: (0..positions).flat_map(entry).collect() }
    }
}

/// Cosine and sine of every pair at every position.
#[derive(Debug, Clone)]
pub struct Table {
    pairs: usize,
    /// `[positions, HD / 2]` of `[cos, sin]`.
    entries: Vec<[f32; 2]>,
}

impl Table {
    /// `[cos, sin]` of each pair at `position`, `[HD / 2]`.
    pub fn at(&self, position: usize) -> &[[f32; 2]] {
        &self.entries[position * self.pairs..][..self.pairs]
    }

    /// The whole table, `[positions, HD / 2]`, for upload.
    pub fn entries(&self) -> &[[f32; 2]] {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Rope = Rope { base: 10_000.0, scaling: Scaling::None };

    fn yarn(factor: f64) -> Rope {
        Rope {
            base: 10_000.0,
            scaling: Scaling::Yarn {
                factor,
                original_context: 4096.0,
                attention_factor: 1.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
            },
        }
    }

    #[test]
    fn position_zero_does_not_rotate() {
        assert!(PLAIN.table(64, 1).at(0).iter().all(|&e| e == [1.0, 0.0]));
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_stretches_slow_ones() {
        let (plain, stretched) = (PLAIN.frequencies(128), yarn(4.0).frequencies(128));
        assert_eq!(stretched[0], plain[0]);
        assert_eq!(stretched[63], plain[63] / 4.0);
        assert!((yarn(4.0).magnitude() - 1.138_629_436_111_989).abs() < 1e-15);
        // A ramp between equal frequencies: only the f64 rounding of the blend may show.
        let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 2.0 * f64::EPSILON * b;
        assert!(yarn(1.0).frequencies(128).iter().zip(&plain).all(near));
        assert_eq!(yarn(1.0).magnitude(), 1.0);
    }

    #[test]
    fn table_is_pinned() {
        // FNV-1a over the bits: a libm that rounds any of these 65,536 angles differently is seen here, before it is
        // seen as two machines that disagree.
        let table = Rope { base: 1e6, scaling: Scaling::None }.table(128, 1024);
        let hash = table
            .entries()
            .as_flattened()
            .iter()
            .flat_map(|f| f.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        assert_eq!(hash, 0x6fba_3365_986e_a003, "{hash:#x}");
    }
}
