//! The bytes of a random tensor.
//!
//! Weights are uniform with mean 0 and standard deviation `1 / sqrt(K)`, so that activations keep their size; norms
//! are near 1. Words are hashes of (seed, tensor, index) and the few floats come from exact operations: no machine can
//! differ, and any part can be made by itself.
//!
//! A quantised block is `random & mask | header`: the codes take random words as they are, and one of a few headers
//! (scales, and zeros where the codes go) is laid over them. Mask and headers are found by closing blocks, so that no
//! layout is known here; per block nothing is packed, and a core makes gigabytes a second.

use gguf::{Dtype, TensorSpec};
use half::{bf16, f16};
use quant::{SmallBlock, SuperBlock, close_small, close_super};

/// Headers of a tensor: enough that neighbouring blocks differ, few enough to stay in the nearest cache.
const HEADERS: u64 = 64;

/// splitmix64's increment, the golden ratio's fraction in 64 bits.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// splitmix64's finaliser (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A sequence of random words, any of which can be had without those before it.
#[derive(Clone, Copy)]
struct Words {
    key: u64,
}

impl Words {
    /// The sequence called `name` of the sequences of `seed`.
    fn new(seed: u64, name: &str) -> Words {
        Words { key: name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte))) }
    }

    fn at(self, index: u64) -> u64 {
        mix(self.key.wrapping_add(index.wrapping_mul(GOLDEN)))
    }
}

/// Uniform in [-1, 1), a multiple of 2^-23: exact.
fn signed(word: u64) -> f32 {
    (word >> 40) as f32 * 2f32.powi(-23) - 1.0
}

/// Makes the bytes of one tensor, in any order and on any thread.
pub struct Filler {
    dtype: Dtype,
    words: Words,
    content: Content,
}

enum Content {
    /// `offset + width * u` with `u` uniform in [-1, 1).
    Floats { offset: f32, width: f32 },
    /// Blocks as words, the last one padded with zeros.
    Blocks {
        /// Set where a code's bits are.
        mask: Vec<u64>,
        /// [`HEADERS`] of them, as long as the mask.
        headers: Vec<Vec<u64>>,
    },
}

impl Filler {
    /// The tensor of this name, type and row length among those of `seed`.
    pub fn new(seed: u64, spec: &TensorSpec) -> Filler {
        // `sqrt` is IEEE, hence the same everywhere. Row lengths are far below 2^24: exact.
        let deviation = 1.0 / (spec.dims[0] as f32).sqrt();
        let content = match spec.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 if spec.dims.len() == 1 => {
                Content::Floats { offset: 1.0, width: 0.25 }
            }
            // sqrt(3): the half-width of a uniform distribution of deviation 1.
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                Content::Floats { offset: 0.0, width: 1.732_050_8 * deviation }
            }
            _ => blocks(spec.dtype, Words::new(seed, &format!("{} headers", spec.name)), deviation),
        };
        Filler { dtype: spec.dtype, words: Words::new(seed, &spec.name), content }
    }

    /// Fills `out` with blocks `first..` of the tensor.
    ///
    /// # Panics
    /// If `out` is not a whole number of blocks.
    pub fn fill(&self, first: usize, out: &mut [u8]) {
        assert!(out.len().is_multiple_of(self.dtype.block_bytes()));
        let first = first as u64; // `usize` is at most 64 bits wide
        match &self.content {
            Content::Floats { offset, width } => {
                let value = |i| offset + width * signed(self.words.at(first.wrapping_add(i)));
                match self.dtype {
                    Dtype::F32 => floats(out, |i| value(i).to_le_bytes()),
                    Dtype::F16 => floats(out, |i| f16::from_f32(value(i)).to_le_bytes()),
                    _ => floats(out, |i| bf16::from_f32(value(i)).to_le_bytes()),
                }
            }
            Content::Blocks { mask, headers } => {
                // One word more than the block has chooses the header.
                let stride = mask.len() as u64 + 1;
                for (i, block) in (first..).zip(out.chunks_exact_mut(self.dtype.block_bytes())) {
                    let base = i.wrapping_mul(stride);
                    let header = &headers[(self.words.at(base) % HEADERS) as usize];
                    let word = |w: usize| self.words.at(base + 1 + w as u64) & mask[w] | header[w];
                    let (whole, rest) = block.as_chunks_mut::<8>();
                    for (w, out) in whole.iter_mut().enumerate() {
                        *out = word(w).to_le_bytes();
                    }
                    if !rest.is_empty() {
                        rest.copy_from_slice(&word(whole.len()).to_le_bytes()[..rest.len()]);
                    }
                }
            }
        }
    }
}

fn floats<const N: usize>(out: &mut [u8], value: impl Fn(u64) -> [u8; N]) {
    for (i, out) in (0..).zip(out.as_chunks_mut::<N>().0) {
        *out = value(i);
    }
}

/// Mask and headers of a quantised type, found by closing blocks.
fn blocks(dtype: Dtype, words: Words, deviation: f32) -> Content {
    let close: &dyn Fn(u64, u8) -> Vec<u64> = if dtype.block_len() == 256 {
        &|i, code| {
            closed(dtype, |out| close_super(dtype, &super_block(dtype, words, i, deviation, code), out))
        }
    } else {
        &|i, code| closed(dtype, |out| close_small(dtype, &small(dtype, words, i, deviation, code), out))
    };
    // The bits that differ between the lowest and the highest code are those of the codes.
    let mask = close(0, 0).iter().zip(close(0, u8::MAX)).map(|(low, high)| low ^ high).collect::<Vec<_>>();
    let headers =
        (0..HEADERS).map(|i| close(i, 0).iter().zip(&mask).map(|(word, mask)| word & !mask).collect());
    Content::Blocks { headers: headers.collect(), mask }
}

/// The block that `close` writes, as words.
fn closed(dtype: Dtype, close: impl FnOnce(&mut [u8])) -> Vec<u64> {
    let mut block = vec![0; dtype.block_bytes()];
    close(&mut block);
    block.resize(block.len().next_multiple_of(8), 0);
    block.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect()
}

/// Header `i`, with every bit of the codes as in `code`.
fn small(dtype: Dtype, words: Words, i: u64, deviation: f32, code: u8) -> SmallBlock {
    let (range, has_minimum) = match dtype {
        Dtype::Q4_0 => (16.0, false),
        Dtype::Q5_0 => (32.0, false),
        Dtype::Q4_1 => (16.0, true),
        Dtype::Q5_1 => (32.0, true),
        _ => (256.0, false),
    };
    let d = spread(words.at(i), deviation, range);
    // The middle of the codes goes to zero: by the minimum, or half a step off it and on either side in turn.
    let (d, m) = match (has_minimum, i % 2) {
        (true, _) => (d, -d * (range - 1.0) * 0.5),
        (false, 0) => (d, 0.0),
        (false, _) => (-d, 0.0),
    };
    SmallBlock { codes: [code as i8; 32], d, m }
}

/// Header `i`, with every bit of the codes as in `code`.
fn super_block(dtype: Dtype, words: Words, i: u64, deviation: f32, code: u8) -> SuperBlock {
    // Number of codes, and the upper half of the scales' range, so that sub-blocks differ but none is flat.
    let (range, scales, bias) = match dtype {
        Dtype::Q2K => (4u8, 8..16, 0),
        Dtype::Q3K => (8, 16..32, 4),
        Dtype::Q4K => (16, 32..64, 0),
        Dtype::Q5K => (32, 32..64, 0),
        _ => (64, 64..128, 32),
    };
    let wide = matches!(dtype, Dtype::Q4K | Dtype::Q5K);
    let draws: [u8; 16] = std::array::from_fn(|j| {
        // Sub-blocks of 32 have their scale twice. The lowest byte of a word is as random as any.
        let j = if wide { j / 2 * 2 } else { j };
        words.at(HEADERS + i * 16 + j as u64) as u8
    });
    let scale = draws.map(|draw| scales.start + draw % (scales.end - scales.start));
    let d = spread(words.at(i), deviation, f32::from(range)) / (f32::from(scales.start) * 1.5);
    let (min, dmin) = if bias == 0 { (scale, d * f32::from(range - 1) * 0.5) } else { ([0; 16], 0.0) };
    // Biased types have signed scales: about every other sub-block is negated.
    let sign = |j: usize| if bias != 0 && draws[j] & 0x80 != 0 { -1 } else { 1 };
    let scale = std::array::from_fn(|j| scale[j] as i8 * sign(j)); // below 128
    SuperBlock { codes: [code & (range - 1); 256], scale, min, bias, d, dmin }
}

/// The step between codes for which uniform codes have the wanted deviation, varied by a quarter between headers.
fn spread(word: u64, deviation: f32, range: f32) -> f32 {
    // sqrt(12) / range: a uniform distribution of that width has deviation range / sqrt(12).
    deviation * 3.464_101_6 / range * (1.0 + 0.25 * signed(word))
}
