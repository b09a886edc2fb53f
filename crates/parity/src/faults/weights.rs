//! Models as a faulty kernel sees them: the right bytes read the wrong way.

use gguf::{Dtype, Tensor};
use half::f16;
use model::{Ffn, FfnWeights, Model};
use quant::{SuperBlock, close_super, open_super};

/// The layer that most faults are planted in: neither the first nor the last.
pub(super) const LAYER: usize = 2;

fn experts(model: &mut Model, layer: usize) -> [&mut Tensor; 4] {
    match &mut model.weights.layers[layer].ffn {
        FfnWeights::Moe { gate_inp, gate, up, down } => [gate_inp, gate, up, down],
        FfnWeights::Dense { .. } => unreachable!("hosts are mixtures of experts"),
    }
}

fn edit(tensor: &mut Tensor, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = tensor.data.to_vec();
    change(&mut bytes);
    tensor.data = bytes.into();
}

/// Opens every super-block of a tensor, changes it and closes it again.
fn each_block(tensor: &mut Tensor, change: impl Fn(&mut SuperBlock)) {
    let dtype = tensor.dtype;
    edit(tensor, |bytes| {
        let mut open = SuperBlock::default();
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            open_super(dtype, block, &mut open);
            change(&mut open);
            close_super(dtype, &open, block);
        }
    });
}

/// The bytes of one block.
fn block(tensor: &mut Tensor, row: usize, block: usize, change: impl FnOnce(&mut [u8])) {
    let (size, bytes) = (tensor.row_bytes(), tensor.dtype.block_bytes());
    edit(tensor, |data| change(&mut data[row * size + block * bytes..][..bytes]));
}

/// A tensor's bytes taken for another type's; beyond the end lies what comes next in memory, here the start again.
fn misread(tensor: &mut Tensor, as_type: Dtype) {
    let size = as_type.row_bytes(tensor.row_len()).expect("both types have super-blocks") * tensor.rows();
    let data: Vec<u8> = tensor.data.iter().copied().cycle().take(size).collect();
    (tensor.dtype, tensor.data) = (as_type, data.into());
}

pub(super) fn one_kernel_for_all_types(model: &mut Model) {
    for layer in 0..model.config.layers {
        let [.., down] = experts(model, layer);
        if down.dtype == Dtype::Q4K {
            misread(down, Dtype::Q6K);
        }
    }
}

pub(super) fn one_kernel_for_values(model: &mut Model) {
    for layer in &mut model.weights.layers {
        if layer.attn_v.dtype == Dtype::Q6K {
            misread(&mut layer.attn_v, Dtype::Q4K);
        }
    }
}

pub(super) fn scales_without_high_bits(model: &mut Model) {
    let [_, gate, ..] = experts(model, LAYER);
    each_block(gate, |open| open.scale[8..].iter_mut().for_each(|scale| *scale &= 15));
}

pub(super) fn minima_without_high_bits(model: &mut Model) {
    each_block(&mut model.weights.layers[LAYER].attn_q, |open| {
        open.min[8..].iter_mut().for_each(|min| *min &= 15);
    });
}

pub(super) fn scales_without_sign(model: &mut Model) {
    each_block(&mut model.weights.layers[1].attn_v, |open| {
        open.scale.iter_mut().for_each(|scale| *scale &= 0x7f);
    });
}

pub(super) fn quants_off_by_one(model: &mut Model) {
    each_block(&mut model.weights.output, |open| {
        open.codes.iter_mut().for_each(|code| *code = (*code + 1).min(63));
    });
}

/// Both sides: one block whose scale is subnormal.
pub(super) fn with_subnormal_scale(model: &mut Model) {
    block(&mut model.weights.layers[LAYER].attn_k, 5, 1, |block| {
        block[..2].copy_from_slice(&f16::from_bits(0x0155).to_le_bytes());
    });
}

pub(super) fn subnormal_scales_flushed(model: &mut Model) {
    each_block(&mut model.weights.layers[LAYER].attn_k, |open| {
        if open.d.abs() < f16::MIN_POSITIVE.to_f32() {
            open.d = 0.0;
        }
    });
}

/// Both sides: an up projection so large that what it feeds leaves the range of f16, `2^shift` times.
fn loud(model: &mut Model, shift: i32) {
    let [_, _, up, _] = experts(model, LAYER);
    each_block(up, |open| (open.d, open.dmin) = (open.d * 2f32.powi(shift), open.dmin * 2f32.powi(shift)));
}

pub(super) fn with_large_activations(model: &mut Model) {
    loud(model, 14);
}

pub(super) fn with_large_sums(model: &mut Model) {
    loud(model, 14);
}

pub(super) fn tail_beyond_the_tensor(model: &mut Model) {
    let [_, _, up, _] = experts(model, LAYER);
    let (last_row, last_block) = (up.rows() - 1, up.row_len() / 256 - 1);
    block(up, last_row, last_block, |block| block[16..].fill(0x5a));
}

pub(super) fn expert_off_by_one(model: &mut Model) {
    let [_, _, up, _] = experts(model, LAYER);
    let size = up.data.len() / up.dims[2];
    edit(up, |bytes| bytes.rotate_left(size));
}

pub(super) fn gate_and_up_swapped(model: &mut Model) {
    let [_, gate, up, _] = experts(model, LAYER);
    std::mem::swap(&mut gate.data, &mut up.data);
}

/// Rows laid out as if they were padded to whole super-blocks.
pub(super) fn stride_of_whole_blocks(model: &mut Model) {
    let [.., down] = experts(model, LAYER);
    let (rows, size) = (down.rows(), down.row_bytes());
    let stride = down.row_len().next_multiple_of(256) / 32 * down.dtype.block_bytes();
    edit(down, |bytes| {
        let read: Vec<u8> = (0..rows)
            .flat_map(|row| (0..size).map(move |i| row * stride + i))
            .map(|at| bytes[at % bytes.len()])
            .collect();
        *bytes = read;
    });
}

/// The first codes of a row read where the next lower multiple of 16 bytes lies.
pub(super) fn aligned_loads(model: &mut Model) {
    let [.., down] = experts(model, LAYER);
    let (rows, size) = (down.rows(), down.row_bytes());
    edit(down, |bytes| {
        let right = bytes.clone();
        for start in (0..rows).map(|row| row * size) {
            // Behind the scale, which has two bytes.
            let read = start / 16 * 16 + 2;
            bytes[start + 2..start + 16].copy_from_slice(&right[read..read + 14]);
        }
    });
}

pub(super) fn lane_dropped(model: &mut Model) {
    let [router, ..] = experts(model, LAYER);
    let k = router.row_len();
    edit(router, |bytes| {
        for (i, weight) in bytes.chunks_exact_mut(4).enumerate() {
            if i % k % 32 == 5 {
                weight.fill(0);
            }
        }
    });
}

pub(super) fn norm_element_doubled(model: &mut Model) {
    edit(&mut model.weights.layers[1].attn_norm, |bytes| {
        let weight = &mut bytes[4 * 300..][..4];
        let value = f32::from_le_bytes([weight[0], weight[1], weight[2], weight[3]]);
        weight.copy_from_slice(&(2.0 * value).to_le_bytes());
    });
}

pub(super) fn scale_is_nan(model: &mut Model) {
    block(&mut model.weights.layers[3].attn_output, 7, 0, |block| {
        block[..2].copy_from_slice(&f16::NAN.to_le_bytes());
    });
}

pub(super) fn tokens_off_by_one(model: &mut Model) {
    let size = model.weights.token_embd.row_bytes();
    edit(&mut model.weights.token_embd, |bytes| bytes.rotate_left(size));
}

pub(super) fn wrong_rope_base(model: &mut Model) {
    model.config.rope.base = 1e4;
}

pub(super) fn not_renormalised(model: &mut Model) {
    if let Ffn::Moe(moe) = &mut model.config.ffn {
        moe.renormalise = false;
    }
}

pub(super) fn wrong_epsilon(model: &mut Model) {
    model.config.rms_eps = 1e-3;
}
