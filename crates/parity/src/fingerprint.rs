//! Which model this is: a hash of what it says of itself, of its tensor table, and of a sample of every tensor.
//!
//! A model of 18 GB takes half a minute to hash and two to be made sure of; a trace must not cost that. So bytes are
//! sampled: the first and last [`EDGE`] of each tensor and [`PROBES`] runs of [`RUN`] spread over it. Two models that
//! differ in a few bytes elsewhere have the same fingerprint; two files, two quantisations or two trainings never do.

use std::fmt::Write as _;

use model::{Config, Ffn, Model};
use sha2::{Digest, Sha256};

/// Bytes taken from either end of a tensor.
const EDGE: usize = 4096;
/// Places between them.
const PROBES: usize = 64;
/// Bytes at each.
const RUN: usize = 64;

/// `sampled-sha256:` and 64 hexadecimal digits.
pub fn fingerprint(model: &Model) -> String {
    let mut hash = Sha256::new();
    hash.update(configuration(&model.config));
    for tensor in model.weights.tensors() {
        hash.update(format!("{} {} {:?} {}\n", tensor.name, tensor.dtype, tensor.dims, tensor.data.len()));
        let bytes = &tensor.data[..];
        if bytes.len() <= 2 * EDGE + PROBES * RUN {
            hash.update(bytes);
            continue;
        }
        hash.update(&bytes[..EDGE]);
        let step = (bytes.len() - 2 * EDGE) / PROBES;
        (0..PROBES).for_each(|i| hash.update(&bytes[EDGE + i * step..][..RUN]));
        hash.update(&bytes[bytes.len() - EDGE..]);
    }
    hash.finalize().iter().fold("sampled-sha256:".to_owned(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What decides the numbers, floats by their bits. The context length does not: it only says how far to go.
fn configuration(config: &Config) -> String {
    let Config { arch, layers, hidden, heads, kv_heads, head_dim, vocab, rms_eps, rope, ffn, context: _ } =
        config;
    let arch = arch.name();
    let ffn = match ffn {
        Ffn::Dense { width } => format!("dense {width}"),
        Ffn::Moe(moe) => {
            let scale = moe.scale.to_bits();
            format!("moe {} {} {} {} {scale:x}", moe.experts, moe.used, moe.width, moe.renormalise)
        }
    };
    let (eps, base) = (rms_eps.to_bits(), rope.base.to_bits());
    format!(
        "{arch} {layers} {hidden} {heads} {kv_heads} {head_dim} {vocab} {eps:x} {base:x} {:?} {ffn}\n",
        rope.scaling
    )
}

#[cfg(test)]
mod tests {
    use gguf::Dtype;
    use synth::Shape;

    use super::*;

    #[test]
    fn other_models_have_other_fingerprints() {
        let shape = Shape::named("tiny-moe").expect("a shape of the list");
        let of = |seed, dtype| {
            synth::model(&shape, seed, move |s| if s.dims.len() == 1 { Dtype::F32 } else { dtype })
        };
        let model = of(1, Dtype::Q4K);
        let print = fingerprint(&model);
        assert!(print.len() == 15 + 64 && print == fingerprint(&of(1, Dtype::Q4K)), "{print}");
        assert_ne!(print, fingerprint(&of(2, Dtype::Q4K)));
        assert_ne!(print, fingerprint(&of(1, Dtype::Q6K)));
        let mut other = model.clone();
        other.config.rope.base = 1e4;
        assert_ne!(print, fingerprint(&other));
        let mut other = model.clone();
        other.config.context += 1;
        assert_eq!(print, fingerprint(&other));
        // A single byte of the last row of the last tensor.
        let mut other = model;
        let mut bytes = other.weights.output.data.to_vec();
        *bytes.last_mut().expect("a head has rows") ^= 1;
        other.weights.output.data = bytes.into();
        assert_ne!(print, fingerprint(&other));
    }
}
