//! A model's weights on the GPU: uploaded once, block-quantised matrices in tiles (`layout.rs`), norms as `f32`.

use std::sync::Arc;

use gguf::{Dtype, Tensor};
use model::{FfnWeights, Model};

use crate::Error;
use crate::driver::{Argument, Arguments, Device, Function, Memory, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::layout::{self, Piece};

pub(crate) const UNIT: UnitOf = ("repack.cu", &["repack"]);

/// A matrix as kernels see it (`Matrix` in prelude.cuh).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct MatrixArg {
    pub(crate) data: Ptr,
    pub(crate) dtype: u32,
    pub(crate) rows: u32,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for MatrixArg {}

/// A matrix of `[experts][rows][k]` on the GPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    data: Ptr,
    pub(crate) dtype: Dtype,
    pub(crate) k: usize,
    /// Rows of one expert.
    pub(crate) rows: usize,
}

impl Matrix {
    pub(crate) fn arg(&self) -> MatrixArg {
        MatrixArg { data: self.data, dtype: self.dtype.id(), rows: size(self.rows) }
    }
}

/// The feed-forward matrices of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ffn {
    Dense { gate: Matrix, up: Matrix, down: Matrix },
    Moe { router: Matrix, gate: Matrix, up: Matrix, down: Matrix },
}

/// The weights of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer {
    /// `[D]`.
    pub(crate) attn_norm: Ptr,
    /// `[HD]`.
    pub(crate) q_norm: Ptr,
    /// `[HD]`.
    pub(crate) k_norm: Ptr,
    /// `[D]`.
    pub(crate) ffn_norm: Ptr,
    pub(crate) q: Matrix,
    pub(crate) k: Matrix,
    pub(crate) v: Matrix,
    pub(crate) out: Matrix,
    pub(crate) ffn: Ffn,
}

/// All weights; they live in one allocation.
pub(crate) struct Weights {
    pub(crate) embedding: Matrix,
    pub(crate) layers: Vec<Layer>,
    /// `[D]`.
    pub(crate) output_norm: Ptr,
    pub(crate) head: Matrix,
    _arena: Memory<u8>,
}

/// Alignment of a tensor in the arena: a line of the L2 cache.
const ALIGN: usize = 256;

/// Every matrix of a model; a tied head appears once.
pub(crate) fn matrices(model: &Model) -> Vec<&Tensor> {
    let w = &model.weights;
    let mut list = vec![&w.token_embd];
    for layer in &w.layers {
        list.extend([&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output]);
        match &layer.ffn {
            FfnWeights::Dense { gate, up, down } => list.extend([gate, up, down]),
            FfnWeights::Moe { gate_inp, gate, up, down } => list.extend([gate_inp, gate, up, down]),
        }
    }
    if !is_tied(model) {
        list.push(&w.output);
    }
    list
}

/// Every type has its kernels; what they all want of a shape is whole blocks of 32.
pub(crate) fn check(model: &Model) -> Result<(), Error> {
    match matrices(model).into_iter().find(|t| !t.row_len().is_multiple_of(32)) {
        Some(tensor) => Err(Error::Rows { tensor: tensor.name.to_string(), found: tensor.row_len() }),
        None => Ok(()),
    }
}

fn is_tied(model: &Model) -> bool {
    model.weights.output.name == model.weights.token_embd.name
}

fn norms(model: &Model) -> impl Iterator<Item = &Tensor> {
    let layers = model.weights.layers.iter();
    layers
        .flat_map(|l| [&l.attn_norm, &l.attn_q_norm, &l.attn_k_norm, &l.ffn_norm])
        .chain([&model.weights.output_norm])
}

fn experts(tensor: &Tensor) -> usize {
    tensor.dims.get(2).copied().unwrap_or(1)
}

/// Rows of one expert.
fn rows(tensor: &Tensor) -> usize {
    tensor.dims[1]
}

fn matrix_bytes(tensor: &Tensor) -> usize {
    layout::device_bytes(tensor.dtype, tensor.row_len(), rows(tensor), experts(tensor))
        .next_multiple_of(ALIGN)
}

/// Bytes that the weights of `model` take on the GPU.
pub(crate) fn bytes(model: &Model) -> usize {
    let matrices: usize = matrices(model).into_iter().map(matrix_bytes).sum();
    let norms: usize = norms(model).map(|t| (t.row_len() * 4).next_multiple_of(ALIGN)).sum();
    matrices + norms
}

/// Bytes sent at a time: enough to hide the latency of a copy, little beside the weights.
pub(crate) const STAGE: usize = 64 << 20;

impl Weights {
    /// Uploads everything; `progress` hears how many bytes have been sent.
    pub(crate) fn upload(
        device: &Arc<Device>,
        repack: Function,
        model: &Model,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Weights, Error> {
        let mut uploader = Uploader::new(device, repack, bytes(model), progress)?;
        let w = &model.weights;
        let embedding = uploader.matrix(&w.token_embd)?;
        let mut layers = Vec::with_capacity(w.layers.len());
        for layer in &w.layers {
            layers.push(Layer {
                attn_norm: uploader.norm(&layer.attn_norm)?,
                q_norm: uploader.norm(&layer.attn_q_norm)?,
                k_norm: uploader.norm(&layer.attn_k_norm)?,
                ffn_norm: uploader.norm(&layer.ffn_norm)?,
                q: uploader.matrix(&layer.attn_q)?,
                k: uploader.matrix(&layer.attn_k)?,
                v: uploader.matrix(&layer.attn_v)?,
                out: uploader.matrix(&layer.attn_output)?,
                ffn: match &layer.ffn {
                    FfnWeights::Dense { gate, up, down } => Ffn::Dense {
                        gate: uploader.matrix(gate)?,
                        up: uploader.matrix(up)?,
                        down: uploader.matrix(down)?,
                    },
                    FfnWeights::Moe { gate_inp, gate, up, down } => Ffn::Moe {
                        router: uploader.matrix(gate_inp)?,
                        gate: uploader.matrix(gate)?,
                        up: uploader.matrix(up)?,
                        down: uploader.matrix(down)?,
                    },
                },
            });
        }
        let output_norm = uploader.norm(&w.output_norm)?;
        let head = if is_tied(model) { embedding } else { uploader.matrix(&w.output)? };
        device.synchronize()?;
        Ok(Weights { embedding, layers, output_norm, head, _arena: uploader.arena })
    }
}

struct Uploader<'a> {
    device: &'a Arc<Device>,
    repack: Function,
    arena: Memory<u8>,
    used: usize,
    /// Where the file's bytes land before they are repacked.
    stage: Memory<u8>,
    progress: &'a mut dyn FnMut(usize),
    sent: usize,
}

impl<'a> Uploader<'a> {
    fn new(
        device: &'a Arc<Device>,
        repack: Function,
        bytes: usize,
        progress: &'a mut dyn FnMut(usize),
    ) -> Result<Uploader<'a>, Error> {
        let (arena, stage) = (device.alloc(bytes)?, device.alloc(STAGE)?);
        Ok(Uploader { device, repack, arena, used: 0, stage, progress, sent: 0 })
    }

    fn place(&mut self, bytes: usize) -> usize {
        let at = self.used;
        self.used = (at + bytes).next_multiple_of(ALIGN);
        assert!(self.used <= self.arena.len(), "the plan of the weights' memory is too small");
        at
    }

    fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        (self.progress)(self.sent);
    }

    /// A norm's weights as `f32`.
    fn norm(&mut self, tensor: &Tensor) -> Result<Ptr, Error> {
        let mut values = vec![0f32; tensor.row_len()];
        quant::dequantise_row(tensor.dtype, &tensor.data, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let at = self.place(bytes.len());
        self.arena.write(at, &bytes)?;
        self.sent(tensor.data.len());
        Ok(self.arena.at(at))
    }

    fn matrix(&mut self, tensor: &Tensor) -> Result<Matrix, Error> {
        let (k, rows) = (tensor.row_len(), rows(tensor));
        let at = self.place(matrix_bytes(tensor));
        let pieces = layout::pieces(tensor.dtype);
        if pieces.is_empty() {
            for (i, part) in tensor.data.chunks(STAGE).enumerate() {
                self.arena.write(at + i * STAGE, part)?;
                self.sent(part.len());
            }
        } else {
            self.tiles(tensor, k, rows, at, &pieces)?;
        }
        Ok(Matrix { data: self.arena.at(at), dtype: tensor.dtype, k, rows })
    }

    /// Sends whole tiles at a time and repacks each batch on the GPU.
    fn tiles(
        &mut self,
        tensor: &Tensor,
        k: usize,
        rows: usize,
        at: usize,
        pieces: &[Piece],
    ) -> Result<(), Error> {
        let row = tensor.row_bytes();
        let tile_rows = (STAGE / row / layout::TILE).max(1) * layout::TILE;
        assert!(layout::TILE * row <= STAGE, "a tile of {} fits the staging buffer", tensor.name);
        let expert_bytes = layout::device_bytes(tensor.dtype, k, rows, 1);
        for (e, expert) in tensor.data.chunks(rows * row).enumerate() {
            for (i, part) in expert.chunks(tile_rows * row).enumerate() {
                let (count, to) = (part.len() / row, at + e * expert_bytes + i * tile_rows * row);
                self.stage.write(0, part)?;
                let padded = count.next_multiple_of(layout::TILE);
                let blocks = k / tensor.dtype.block_len();
                let arguments = Arguments::default()
                    .push(self.stage.ptr())
                    .push(self.arena.at(to))
                    .push(size(count))
                    .push(size(padded))
                    .push(size(blocks))
                    .push(size(tensor.dtype.block_bytes()))
                    .push(Pieces::new(pieces));
                let shape = Shape { dependent: false, ..Shape::new((padded * blocks).div_ceil(256), 256) };
                self.repack.launch(self.device, shape, arguments)?;
                self.sent(part.len());
            }
        }
        Ok(())
    }
}

/// A block's pieces as the kernel takes them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Pieces {
    count: u32,
    /// Offset and size.
    list: [[u16; 2]; 15],
}
// SAFETY: `repr(C)`, the fields of the twin in repack.cu.
unsafe impl Argument for Pieces {}

impl Pieces {
    fn new(pieces: &[Piece]) -> Pieces {
        let mut list = [[0; 2]; 15];
        for (to, piece) in list.iter_mut().zip(pieces) {
            // A block has fewer than 2^16 bytes.
            *to = [piece.offset as u16, piece.size as u16];
        }
        assert!(pieces.len() <= list.len(), "a block of {} pieces", pieces.len());
        Pieces { count: size(pieces.len()), list }
    }
}
