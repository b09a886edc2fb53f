//! The bytes of a random tensor.
//!
//! Weights are uniform with mean 0 and standard deviation `1 / sqrt(K)`, so that activations keep their size; norms
//! are near 1. Codes and scales are drawn as integers and the few floats by exact operations: no machine can differ.

use gguf::{Dtype, TensorSpec};
use half::{bf16, f16};
use quant::{SmallBlock, SuperBlock, close_small, close_super};

/// A counter-based generator (splitmix64's finaliser; Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The random words of one block.
struct Words {
    key: u64,
    counter: u64,
}

impl Words {
    fn new(tensor: u64, block: u64) -> Words {
        Words { key: mix(tensor ^ block.wrapping_mul(0x9e37_79b9_7f4a_7c15)), counter: 0 }
    }

    fn next(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.key ^ self.counter)
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
        out
    }

    /// Uniform in [-1, 1), a multiple of 2^-23: exact.
    fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 * 2f32.powi(-23) - 1.0
    }
}

/// Fills `out` with blocks `first..` of a tensor.
///
/// # Panics
/// If `out` is not a whole number of blocks.
pub fn fill(seed: u64, spec: &TensorSpec, first: usize, out: &mut [u8]) {
    let size = spec.dtype.block_bytes();
    assert!(out.len().is_multiple_of(size));
    // `sqrt` is IEEE, hence the same everywhere.
    let deviation = 1.0 / (spec.dims[0] as f32).sqrt();
    let norm = spec.dims.len() == 1;
    let tensor = spec.name.bytes().fold(mix(seed), |k, b| mix(k ^ u64::from(b)));
    for (i, block) in out.chunks_exact_mut(size).enumerate() {
        let mut words = Words::new(tensor, (first + i) as u64);
        match spec.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                // sqrt(3): the half-width of a uniform distribution of deviation 1.
                let value = if norm { 1.0 + 0.25 * words.signed() } else { words.signed() * 1.732_050_8 * deviation };
                store_float(spec.dtype, value, block);
            }
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 => {
                close_small(spec.dtype, &small(spec.dtype, &mut words, deviation), block);
            }
            Dtype::Q2K | Dtype::Q3K | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => {
                close_super(spec.dtype, &super_block(spec.dtype, &mut words, deviation), block);
            }
        }
    }
}

fn store_float(dtype: Dtype, value: f32, out: &mut [u8]) {
    match dtype {
        Dtype::F32 => out.copy_from_slice(&value.to_le_bytes()),
        Dtype::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        _ => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
    }
}

fn small(dtype: Dtype, words: &mut Words, deviation: f32) -> SmallBlock {
    // Codes from `low` to `low + range`; where they do not straddle zero, `m` moves their middle there.
    let (low, range) = match dtype {
        Dtype::Q4_0 => (-8, 16),
        Dtype::Q5_0 => (-16, 32),
        Dtype::Q4_1 => (0, 16),
        Dtype::Q5_1 => (0, 32),
        _ => (-127, 255),
    };
    let codes = words.bytes::<32>().map(|b| (low + i32::from(b) * range / 256) as i8);
    let d = spread(words, deviation, range as f32);
    let m = if low == 0 { -d * (range - 1) as f32 * 0.5 } else { 0.0 };
    SmallBlock { codes, d, m }
}

fn super_block(dtype: Dtype, words: &mut Words, deviation: f32) -> SuperBlock {
    // Number of codes, and the upper half of the scale's range, so that sub-blocks differ but none is flat.
    let (range, scales, bias) = match dtype {
        Dtype::Q2K => (4u32, 8..16, 0),
        Dtype::Q3K => (8, 16..32, 4),
        Dtype::Q4K => (16, 32..64, 0),
        Dtype::Q5K => (32, 32..64, 0),
        _ => (64, 64..128, 32),
    };
    let codes = words.bytes::<256>().map(|b| (u32::from(b) * range / 256) as u8);
    let wide = matches!(dtype, Dtype::Q4K | Dtype::Q5K);
    let draws = words.bytes::<16>();
    let scale: [u8; 16] = std::array::from_fn(|j| {
        let draw = draws[if wide { j / 2 * 2 } else { j }];
        scales.start + draw % (scales.end - scales.start)
    });
    let d = spread(words, deviation, range as f32) / (scales.start as f32 * 1.5);
    let (min, dmin) = if bias == 0 { (scale, d * (range - 1) as f32 * 0.5) } else { ([0; 16], 0.0) };
    // Biased types have signed scales: every other sub-block is negated.
    let sign = |j: usize| if bias != 0 && draws[j] & 0x80 != 0 { -1 } else { 1 };
    SuperBlock { codes, scale: std::array::from_fn(|j| scale[j] as i8 * sign(j)), min, bias, d, dmin }
}

/// The step between codes for which uniform codes have the wanted deviation, varied by a quarter between blocks.
fn spread(words: &mut Words, deviation: f32, range: f32) -> f32 {
    // sqrt(12) / range: a uniform distribution of that width has deviation range / sqrt(12).
    deviation * 3.464_101_6 / range * (1.0 + 0.25 * words.signed())
}
