//! Random-weight models: a shape, a type for each tensor and a seed give the same bytes on every machine.
//!
//! Used to measure shapes whose weights are too large to ship, and by every test that needs a model of its own. All
//! randomness is a hash of (seed, tensor, index), so any thread can write any part.

mod fill;
mod shape;
mod vocabulary;

use std::path::Path;
use std::sync::Arc;

use gguf::{Dtype, Tensor, TensorSpec, Writer};
use model::{Model, Spec, specs};
use rayon::prelude::*;

pub use fill::fill;
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

/// Writes a model file on all threads of the current pool; `progress` is told the bytes of each finished part.
pub fn write(
    path: &Path,
    shape: &Shape,
    seed: u64,
    file_type: Option<u32>,
    dtype: impl Fn(&Spec) -> Dtype,
    progress: impl Fn(u64) + Sync,
) -> Result<(), gguf::Error> {
    let specs = tensors(shape, dtype);
    let mut meta = metadata(shape, seed);
    if let Some(id) = file_type {
        meta.set("general.file_type", id);
    }
    let writer = Writer::create(path, &meta, &specs)?;
    let parts: Vec<_> = specs.iter().enumerate().flat_map(|(i, spec)| parts(i, spec)).collect();
    parts.par_iter().try_for_each_init(Vec::new, |buffer: &mut Vec<u8>, &(i, first, blocks)| {
        let spec = &specs[i];
        let size = spec.dtype.block_bytes();
        buffer.resize(blocks * size, 0);
        fill(seed, spec, first, buffer);
        progress(buffer.len() as u64);
        writer.write_at(i, (first * size) as u64, buffer)
    })?;
    writer.finish()
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
        fill(seed, &spec, 0, &mut bytes);
        Tensor { name: Arc::from(spec.name), dtype: spec.dtype, dims: spec.dims, data: bytes.into() }
    };
    let tensors: Vec<_> = tensors(shape, dtype).into_iter().map(tensor).collect();
    Model::from_tensors(shape.config, &tensors).expect("the tensors were made for this configuration")
}
