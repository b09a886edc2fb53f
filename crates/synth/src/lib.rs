//! Random-weight models: a shape, a type for each tensor and a seed give the same bytes on every machine.
//!
//! Used to measure shapes whose weights are too large to ship, and by every test that needs a model of its own. All
//! randomness is a hash of (seed, tensor, index), so any thread can write any part.

mod fill;
mod shape;
mod vocabulary;

use std::sync::Arc;

use gguf::{Dtype, Tensor, TensorSpec, Writer};
use model::{Model, Spec, specs};
use rayon::prelude::*;

pub use fill::Filler;
pub use shape::{Shape, metadata};

/// Bytes that one task fills: large enough to write well, small enough to share evenly.
const CHUNK: usize = 4 << 20;

/// The tensors of a shape, each with the type that `dtype` gives it. A tied head has no tensor.
pub fn tensors(shape: &Shape, dtype: impl Fn(&Spec) -> Dtype) -> Vec<TensorSpec> {
    let tied = |s: &Spec| s.optional && shape.tied;
    specs(&shape.config)
        .into_iter()
        .filter(|s| !tied(s))
        .map(|s| TensorSpec { dtype: dtype(&s), name: s.name, dims: s.dims })
        .collect()
}

/// Writes every tensor of a new file on all threads of the current pool; `progress` is told the bytes of each
/// finished part.
///
/// # Panics
/// If `writer` was not created for `tensors`.
pub fn write(
    writer: &Writer,
    tensors: &[TensorSpec],
    seed: u64,
    progress: impl Fn(u64) + Sync,
) -> Result<(), gguf::Error> {
    let fillers: Vec<_> = tensors.iter().map(|spec| Filler::new(seed, spec)).collect();
    let parts: Vec<_> = tensors.iter().enumerate().flat_map(|(i, spec)| parts(i, spec)).collect();
    parts.par_iter().try_for_each_init(Vec::new, |buffer: &mut Vec<u8>, &(i, first, blocks)| {
        let size = tensors[i].dtype.block_bytes();
        buffer.resize(blocks * size, 0);
        fillers[i].fill(first, buffer);
        writer.write_at(i, (first * size) as u64, buffer)?; // `usize` is at most 64 bits wide
        progress(buffer.len() as u64);
        Ok(())
    })
}

/// `(tensor, first block, blocks)` of each task.
fn parts(i: usize, spec: &TensorSpec) -> impl Iterator<Item = (usize, usize, usize)> {
    let blocks = spec.dims.iter().product::<usize>() / spec.dtype.block_len();
    let step = (CHUNK / spec.dtype.block_bytes()).max(1);
    (0..blocks).step_by(step).map(move |first| (i, first, step.min(blocks - first)))
}

/// A model in memory, for tests.
pub fn model(shape: &Shape, seed: u64, dtype: impl Fn(&Spec) -> Dtype) -> Model {
    let tensor = |spec: TensorSpec| {
        let row = spec.dtype.row_bytes(spec.dims[0]).expect("the type's blocks divide the row");
        let mut bytes = vec![0; row * spec.dims[1..].iter().product::<usize>()];
        Filler::new(seed, &spec).fill(0, &mut bytes);
        Tensor { name: Arc::from(spec.name), dtype: spec.dtype, dims: spec.dims, data: bytes.into() }
    };
    let tensors: Vec<_> = tensors(shape, dtype).into_iter().map(tensor).collect();
    Model::from_tensors(shape.config, &tensors).expect("the tensors were made for this configuration")
}
