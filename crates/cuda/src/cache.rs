//! The key/value cache on the GPU: blocks of 64 positions in the fixed point of rule 5, in the layout of
//! `kernels/cache.cuh`. Knows where bytes lie; kernels write and read them.

use std::sync::Arc;

use model::{BLOCK, Config};

use crate::Error;
use crate::driver::{Device, Memory, Ptr};
use crate::step::DeviceStep;

/// All KV blocks of a model.
pub(crate) struct Cache {
    /// `[layers, blocks, KH]` tiles.
    tiles: Memory<u8>,
    layout: Layout,
    kv_heads: usize,
    layers: usize,
    blocks: usize,
    /// The layer that this step has stored last.
    stored: Option<usize>,
}

impl Cache {
    /// Zeroed: slots that nothing was stored in are never used, but kernels load them with their neighbours.
    pub(crate) fn new(device: &Arc<Device>, config: &Config, blocks: usize) -> Result<Cache, Error> {
        let Config { layers, kv_heads, head_dim, .. } = *config;
        let layout = Layout { head_dim };
        Ok(Cache {
            tiles: device.zeros(layers * blocks * kv_heads * layout.tile_bytes())?,
            layout,
            kv_heads,
            layers,
            blocks,
            stored: None,
        })
    }

    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    fn block_bytes(&self) -> usize {
        self.kv_heads * self.layout.tile_bytes()
    }

    /// Where a layer's blocks begin.
    pub(crate) fn layer(&self, layer: usize) -> Ptr {
        self.tiles.at(layer * self.blocks * self.block_bytes())
    }

    /// A new step begins: it has stored nothing.
    pub(crate) fn begin(&mut self) {
        self.stored = None;
    }

    /// This step's rows of `layer` have been stored.
    pub(crate) fn set_stored(&mut self, layer: usize) {
        self.stored = Some(layer);
    }

    /// The whole forward has run, as a recording.
    pub(crate) fn set_all_stored(&mut self) {
        self.stored = Some(self.layers - 1);
    }

    /// The step's rows of the layer stored last, keys and values, `[T, KH, HD]` each: what attention sees.
    pub(crate) fn rows(&self, step: &DeviceStep) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let layer = self.stored.ok_or(Error::NothingStored)?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut tiles = vec![0; self.block_bytes()];
        let mut held = None;
        for row in &step.host.rows {
            let position = row.position as usize;
            let block = step.host.tables[row.sequence as usize][position / BLOCK] as usize;
            // Neighbouring rows share a block.
            if held.replace(block) != Some(block) {
                self.tiles.read((layer * self.blocks + block) * self.block_bytes(), &mut tiles)?;
            }
            for tile in tiles.chunks_exact(self.layout.tile_bytes()) {
                keys.extend(self.layout.key(tile, position % BLOCK));
                values.extend(self.layout.value(tile, position % BLOCK));
            }
        }
        Ok((keys, values))
    }
}

/// Bytes of an atom: 8 rows by 64 places.
const ATOM: usize = 512;

/// The twin of `kernels/cache.cuh`: where things lie in a tile.
#[derive(Debug, Clone, Copy)]
struct Layout {
    head_dim: usize,
}

impl Layout {
    fn plane(self) -> usize {
        BLOCK * self.head_dim
    }

    fn scales_at(self) -> usize {
        2 * self.plane()
    }

    fn values_at(self) -> usize {
        self.scales_at() + 2 * BLOCK * size_of::<f32>()
    }

    fn tile_bytes(self) -> usize {
        self.values_at() + 2 * self.plane()
    }

    /// Offset of dimension `d` of key `i`, high plane.
    fn key_at(self, i: usize, d: usize) -> usize {
        i / 8 * (8 * self.head_dim) + byte_at(i % 8, d, self.head_dim)
    }

    /// Offset of dimension `d` of value `i`, high plane.
    fn value_at(self, i: usize, d: usize) -> usize {
        self.values_at() + d / 8 * (8 * BLOCK) + byte_at(d % 8, place_of_key(i), BLOCK)
    }

    fn key(self, tile: &[u8], i: usize) -> impl Iterator<Item = f32> {
        self.row(tile, i, move |d| self.key_at(i, d))
    }

    fn value(self, tile: &[u8], i: usize) -> impl Iterator<Item = f32> {
        self.row(tile, BLOCK + i, move |d| self.value_at(i, d))
    }

    /// A row of `HD` values, as `cpu::Cache::load` joins them.
    fn row(self, tile: &[u8], scale: usize, at: impl Fn(usize) -> usize) -> impl Iterator<Item = f32> {
        let bytes = &tile[self.scales_at() + scale * size_of::<f32>()..][..size_of::<f32>()];
        let scale = f32::from_le_bytes(bytes.try_into().expect("a slice of four"));
        (0..self.head_dim).map(move |d| {
            let [hi, lo] = [0, self.plane()].map(|plane| i32::from(tile[at(d) + plane].cast_signed()));
            scale * (256 * hi + lo) as f32 // below 2^24
        })
    }
}

/// Byte of (row, place) in eight rows of `places`.
fn byte_at(row: usize, place: usize, places: usize) -> usize {
    let (atom, rest) = (place / 64, place % 64);
    // The last atom of a row that is no multiple of 64 is narrower, and not permuted.
    let narrow = places - atom * 64 < 64;
    atom * ATOM
        + if narrow { row * 32 + rest } else { row * 64 + ((rest / 16) ^ (row / 2)) % 4 * 16 + rest % 16 }
}

/// The place of key `k` (of 64) in a row of values.
fn place_of_key(k: usize) -> usize {
    k / 16 * 16 + k % 8 / 2 * 4 + k % 16 / 8 * 2 + k % 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_tile_has_one_place() {
        for head_dim in (32..=256).step_by(32) {
            let layout = Layout { head_dim };
            let mut seen = vec![false; layout.tile_bytes()];
            seen[layout.scales_at()..layout.values_at()].fill(true);
            for (i, d) in (0..BLOCK).flat_map(|i| (0..head_dim).map(move |d| (i, d))) {
                for at in [layout.key_at(i, d), layout.value_at(i, d)] {
                    for plane in [0, layout.plane()] {
                        assert!(
                            !std::mem::replace(&mut seen[at + plane], true),
                            "HD {head_dim}: byte {at} twice"
                        );
                    }
                }
            }
            assert!(seen.iter().all(|&s| s), "HD {head_dim}: a byte is never used");
        }
    }

    #[test]
    fn a_tile_is_as_large_as_the_plan_says() {
        let config = synth::Shape::named("qwen3-30b-a3b").expect("a shape of the list").config;
        let tiles = config.layers * config.kv_heads * Layout { head_dim: config.head_dim }.tile_bytes();
        assert_eq!(tiles, BLOCK * config.kv_bytes_per_position());
    }
}
