//! The key/value cache: blocks of 64 positions, each one attention tile, in the fixed point of rule 5.
//!
//! A tile keeps the two planes of 64 key rows and 64 value rows of one head, as bytes biased by 128, in the order in
//! which the products consume them: keys `[HD / 4][64][4]` (a lane is a key), values `[64 / 4][HD][4]` (a lane is a
//! dimension). With the scales that is the size of f16.

use model::{BLOCK, Config};
use quant::fixed::{Activations, round_block, split};

/// All KV blocks of a model.
pub(crate) struct Cache {
    head_dim: usize,
    kv_heads: usize,
    blocks: usize,
    /// `[layers, blocks, KH]` tiles of four planes.
    planes: Vec<u8>,
    /// `[layers, blocks, KH]` tiles of 64 key scales and 64 value scales.
    scales: Vec<f32>,
}

/// One head's tile of 64 positions. Slots that no position has been stored in hold leftovers: their scales are never
/// read, and their planes only meet probabilities of integer zero.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub(crate) key_hi: &'a [u8],
    pub(crate) key_lo: &'a [u8],
    pub(crate) value_hi: &'a [u8],
    pub(crate) value_lo: &'a [u8],
    pub(crate) key_scale: &'a [f32; BLOCK],
    pub(crate) value_scale: &'a [f32; BLOCK],
}

/// Where a position's rows live.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) layer: usize,
    pub(crate) block: usize,
    pub(crate) head: usize,
    /// Position modulo [`BLOCK`].
    pub(crate) index: usize,
}

impl Cache {
    /// Zeroed, which the operating system does lazily: a block costs memory when it is first used.
    pub(crate) fn new(config: &Config, blocks: usize) -> Cache {
        let tiles = config.layers * blocks * config.kv_heads;
        Cache {
            head_dim: config.head_dim,
            kv_heads: config.kv_heads,
            blocks,
            planes: vec![0; tiles * 4 * BLOCK * config.head_dim],
            scales: vec![0.0; tiles * 2 * BLOCK],
        }
    }

    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    fn tile_index(&self, slot: Slot) -> usize {
        (slot.layer * self.blocks + slot.block) * self.kv_heads + slot.head
    }

    pub(crate) fn tile(&self, slot: Slot) -> Tile<'_> {
        let plane = BLOCK * self.head_dim;
        let tile = self.tile_index(slot);
        let planes = &self.planes[tile * 4 * plane..][..4 * plane];
        let scales = &self.scales[tile * 2 * BLOCK..][..2 * BLOCK];
        let scales = |half: usize| scales[half * BLOCK..][..BLOCK].try_into().expect("a slice of a block");
        Tile {
            key_hi: &planes[..plane],
            key_lo: &planes[plane..2 * plane],
            value_hi: &planes[2 * plane..3 * plane],
            value_lo: &planes[3 * plane..],
            key_scale: scales(0),
            value_scale: scales(1),
        }
    }

    /// Rounds a head's key and value row (`[HD]` each) to fixed point and stores them.
    pub(crate) fn store(&mut self, slot: Slot, key: &[f32], value: &[f32]) {
        let (head_dim, plane, tile) = (self.head_dim, BLOCK * self.head_dim, self.tile_index(slot));
        let planes = &mut self.planes[tile * 4 * plane..][..4 * plane];
        let (keys, values) = planes.split_at_mut(2 * plane);
        let scales = &mut self.scales[tile * 2 * BLOCK..][..2 * BLOCK];
        scales[slot.index] = put(key, keys, |d| key_at(slot.index, d));
        scales[BLOCK + slot.index] = put(value, values, |d| value_at(head_dim, slot.index, d));
    }

    /// A stored key and value row as `f32`, `[HD]` each: what attention sees.
    pub(crate) fn load(&self, slot: Slot) -> (Vec<f32>, Vec<f32>) {
        let tile = self.tile(slot);
        let row = |hi: &[u8], lo: &[u8], scale: f32, at: &dyn Fn(usize) -> usize| -> Vec<f32> {
            let join = |d: usize| (i32::from(hi[at(d)]) - 128) * 256 + i32::from(lo[at(d)]) - 128;
            (0..self.head_dim).map(|d| scale * join(d) as f32).collect()
        };
        let i = slot.index;
        (
            row(tile.key_hi, tile.key_lo, tile.key_scale[i], &|d| key_at(i, d)),
            row(tile.value_hi, tile.value_lo, tile.value_scale[i], &|d| value_at(self.head_dim, i, d)),
        )
    }
}

/// Offset of dimension `d` of the `i`-th key in a plane.
fn key_at(i: usize, d: usize) -> usize {
    (d / 4 * BLOCK + i) * 4 + d % 4
}

/// Offset of dimension `d` of the `i`-th value in a plane.
fn value_at(head_dim: usize, i: usize, d: usize) -> usize {
    (i / 4 * head_dim + d) * 4 + i % 4
}

/// Rounds a row into two planes that lie one after the other, and returns its scale.
fn put(row: &[f32], planes: &mut [u8], at: impl Fn(usize) -> usize) -> f32 {
    let (hi, lo) = planes.split_at_mut(planes.len() / 2);
    round_block(row, Activations::A16, |d, q| {
        let [h, l] = split(q);
        hi[at(d)] = (h as u8) ^ 0x80;
        lo[at(d)] = (l as u8) ^ 0x80;
    })
}
