//! Models as a faulty kernel sees them: the right bytes read the wrong way. A model in which nothing would be read wrongly
//! is refused, with what it lacks.

use gguf::{Dtype, Tensor};
use half::f16;
use model::{Ffn, FfnWeights, LayerWeights, Model};
use quant::{SuperBlock, close_super, open_super};

/// Done, or what the model lacks.
pub(super) type Fit = Result<(), String>;

/// The layer that most faults are planted in: neither the first nor the last.
pub(super) const LAYER: usize = 2;

/// The same in a model that may have fewer layers.
pub(super) fn usual_layer(model: &Model) -> usize {
    LAYER.min(model.config.layers - 1)
}

/// The layer `usual` if it is one that fits; else the first that does.
fn layer_where(
    model: &Model,
    usual: usize,
    fits: impl Fn(&LayerWeights) -> bool,
    lacks: &str,
) -> Result<usize, String> {
    let layers = &model.weights.layers;
    let fitting = |&layer: &usize| layers.get(layer).is_some_and(&fits);
    [usual].into_iter().chain(0..layers.len()).find(fitting).ok_or_else(|| lacks.to_owned())
}

/// Gate, up and down of a layer: of its experts, or of its one network.
fn network(layer: &LayerWeights) -> [&Tensor; 3] {
    match &layer.ffn {
        FfnWeights::Moe { gate, up, down, .. } | FfnWeights::Dense { gate, up, down } => [gate, up, down],
    }
}

fn network_mut(model: &mut Model, layer: usize) -> [&mut Tensor; 3] {
    match &mut model.weights.layers[layer].ffn {
        FfnWeights::Moe { gate, up, down, .. } | FfnWeights::Dense { gate, up, down } => [gate, up, down],
    }
}

/// What a fault of experts lacks in a model that has none.
pub(super) const NO_EXPERTS: &str = "its feed-forward network has no experts";

/// Changes a tensor's bytes, if that changes any.
fn edit(tensor: &mut Tensor, change: impl FnOnce(&mut Vec<u8>)) -> Fit {
    let mut bytes = tensor.data.to_vec();
    change(&mut bytes);
    if bytes == tensor.data[..] {
        return Err(format!("no byte of `{}` would be another", tensor.name));
    }
    tensor.data = bytes.into();
    Ok(())
}

/// Opens every super-block of a tensor, changes it and closes it again.
fn each_block(tensor: &mut Tensor, change: impl Fn(&mut SuperBlock)) -> Fit {
    let dtype = tensor.dtype;
    edit(tensor, |bytes| {
        let mut open = SuperBlock::default();
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            open_super(dtype, block, &mut open);
            change(&mut open);
            close_super(dtype, &open, block);
        }
    })
}

/// The bytes of one block, of the last one where the row has fewer.
fn block(tensor: &mut Tensor, row: usize, block: usize, change: impl FnOnce(&mut [u8])) -> Fit {
    let (size, bytes) = (tensor.row_bytes(), tensor.dtype.block_bytes());
    let block = block.min(size / bytes - 1);
    let row = row.min(tensor.rows() - 1);
    edit(tensor, |data| change(&mut data[row * size + block * bytes..][..bytes]))
}

/// A tensor's bytes taken for another type's; beyond the end lies what comes next in memory, here the start again.
fn misread(tensor: &mut Tensor, as_type: Dtype) -> Fit {
    let row = as_type.row_bytes(tensor.row_len());
    let row = row.ok_or_else(|| format!("rows of {} are no whole blocks of {as_type}", tensor.row_len()))?;
    let data: Vec<u8> = tensor.data.iter().copied().cycle().take(row * tensor.rows()).collect();
    (tensor.dtype, tensor.data) = (as_type, data.into());
    Ok(())
}

/// Whether the scales and minima of a type's blocks are six bits wide, the high ones apart.
fn six_bit_scales(tensor: &Tensor) -> bool {
    matches!(tensor.dtype, Dtype::Q4K | Dtype::Q5K)
}

pub(super) fn one_kernel_for_all_types(model: &mut Model) -> Fit {
    let another = |layer: &LayerWeights| network(layer)[2].dtype != Dtype::Q6K;
    layer_where(model, 0, another, "its down projections are Q6_K in every layer")?;
    for layer in 0..model.config.layers {
        let [.., down] = network_mut(model, layer);
        if down.dtype != Dtype::Q6K {
            misread(down, Dtype::Q6K)?;
        }
    }
    Ok(())
}

pub(super) fn one_kernel_for_values(model: &mut Model) -> Fit {
    let sensitive = |layer: &LayerWeights| layer.attn_v.dtype == Dtype::Q6K;
    layer_where(model, 0, sensitive, "it has no `attn_v` of Q6_K")?;
    let values = model.weights.layers.iter_mut().filter(|layer| sensitive(layer));
    values.map(|layer| &mut layer.attn_v).try_for_each(|tensor| misread(tensor, Dtype::Q4K))
}

pub(super) fn scales_without_high_bits(model: &mut Model) -> Fit {
    let lacks = "it has no gate projection of Q4_K or Q5_K";
    let layer = layer_where(model, LAYER, |layer| six_bit_scales(network(layer)[0]), lacks)?;
    let [gate, ..] = network_mut(model, layer);
    each_block(gate, |open| open.scale[8..].iter_mut().for_each(|scale| *scale &= 15))
}

pub(super) fn minima_without_high_bits(model: &mut Model) -> Fit {
    let lacks = "it has no `attn_q` of Q4_K or Q5_K";
    let layer = layer_where(model, LAYER, |layer| six_bit_scales(&layer.attn_q), lacks)?;
    each_block(&mut model.weights.layers[layer].attn_q, |open| {
        open.min[8..].iter_mut().for_each(|min| *min &= 15);
    })
}

pub(super) fn scales_without_sign(model: &mut Model) -> Fit {
    let lacks = "it has no `attn_v` of Q6_K";
    let layer = layer_where(model, 1, |layer| layer.attn_v.dtype == Dtype::Q6K, lacks)?;
    each_block(&mut model.weights.layers[layer].attn_v, |open| {
        open.scale.iter_mut().for_each(|scale| *scale &= 0x7f);
    })
}

pub(super) fn quants_off_by_one(model: &mut Model) -> Fit {
    let output = &mut model.weights.output;
    if output.dtype != Dtype::Q6K {
        return Err(format!("its output matrix is {}, not Q6_K", output.dtype));
    }
    each_block(output, |open| {
        open.codes.iter_mut().for_each(|code| *code = (*code + 1).min(63));
    })
}

/// Both sides: one block whose scale is subnormal.
pub(super) fn with_subnormal_scale(model: &mut Model) -> Fit {
    block(&mut model.weights.layers[LAYER].attn_k, 5, 1, |block| {
        block[..2].copy_from_slice(&f16::from_bits(0x0155).to_le_bytes());
    })
}

pub(super) fn subnormal_scales_flushed(model: &mut Model) -> Fit {
    let layer = layer_where(
        model,
        LAYER,
        |layer| layer.attn_k.dtype.block_len() == 256,
        "it has no `attn_k` of super-blocks",
    )?;
    each_block(&mut model.weights.layers[layer].attn_k, |open| {
        if open.d.abs() < f16::MIN_POSITIVE.to_f32() {
            open.d = 0.0;
        }
    })
}

/// Both sides: an up projection so large that what it feeds leaves the range of f16.
pub(super) fn beyond_f16(model: &mut Model) -> Fit {
    let [_, up, _] = network_mut(model, LAYER);
    let loud = 2f32.powi(14);
    each_block(up, |open| (open.d, open.dmin) = (open.d * loud, open.dmin * loud))
}

pub(super) fn tail_beyond_the_tensor(model: &mut Model) -> Fit {
    let layer = usual_layer(model);
    let [_, up, _] = network_mut(model, layer);
    // Behind what a block of most types begins with, its scales.
    block(up, usize::MAX, usize::MAX, |block| {
        let codes = block.len().min(32) / 2;
        block[codes..].fill(0x5a);
    })
}

pub(super) fn expert_off_by_one(model: &mut Model) -> Fit {
    if !matches!(model.config.ffn, Ffn::Moe(_)) {
        return Err(NO_EXPERTS.into());
    }
    let layer = usual_layer(model);
    let [_, up, _] = network_mut(model, layer);
    let size = up.data.len() / up.dims[2];
    edit(up, |bytes| bytes.rotate_left(size))
}

pub(super) fn gate_and_up_swapped(model: &mut Model) -> Fit {
    let layer = usual_layer(model);
    let [gate, up, _] = network_mut(model, layer);
    std::mem::swap(&mut gate.data, &mut up.data);
    std::mem::swap(&mut gate.dtype, &mut up.dtype);
    Ok(())
}

/// Rows laid out as if they were padded to whole super-blocks.
pub(super) fn stride_of_whole_blocks(model: &mut Model) -> Fit {
    let layer = usual_layer(model);
    let [.., down] = network_mut(model, layer);
    let (rows, size, len) = (down.rows(), down.row_bytes(), down.row_len());
    if len.is_multiple_of(256) {
        return Err(format!("rows of {len} weights, as of `{}`, are whole super-blocks", down.name));
    }
    let stride = len.next_multiple_of(256) / down.dtype.block_len() * down.dtype.block_bytes();
    edit(down, |bytes| {
        let read: Vec<u8> = (0..rows)
            .flat_map(|row| (0..size).map(move |i| row * stride + i))
            .map(|at| bytes[at % bytes.len()])
            .collect();
        *bytes = read;
    })
}

/// The first codes of a row read where the next lower multiple of 16 bytes lies.
pub(super) fn aligned_loads(model: &mut Model) -> Fit {
    let layer = usual_layer(model);
    let [.., down] = network_mut(model, layer);
    let (rows, size) = (down.rows(), down.row_bytes());
    if size.is_multiple_of(16) {
        return Err(format!("rows of {size} bytes, as of `{}`, all begin at multiples of 16", down.name));
    }
    edit(down, |bytes| {
        let right = bytes.clone();
        for start in (0..rows).map(|row| row * size) {
            // Behind the scale, which has two bytes.
            let read = start / 16 * 16 + 2;
            bytes[start + 2..start + 16].copy_from_slice(&right[read..read + 14]);
        }
    })
}

pub(super) fn lane_dropped(model: &mut Model) -> Fit {
    let layer = usual_layer(model);
    let FfnWeights::Moe { gate_inp: router, .. } = &mut model.weights.layers[layer].ffn else {
        return Err(NO_EXPERTS.into());
    };
    let (k, weight) = (router.row_len(), router.dtype.block_bytes());
    if router.dtype.block_len() != 1 {
        return Err(format!("`{}` is {}: its products have no 32 partial sums", router.name, router.dtype));
    }
    edit(router, |bytes| {
        for (i, weight) in bytes.chunks_exact_mut(weight).enumerate() {
            if i % k % 32 == 5 {
                weight.fill(0);
            }
        }
    })
}

pub(super) fn norm_element_doubled(model: &mut Model) -> Fit {
    let layer = 1.min(model.config.layers - 1);
    let norm = &mut model.weights.layers[layer].attn_norm;
    if norm.dtype != Dtype::F32 {
        return Err(format!("`{}` is {}, not F32", norm.name, norm.dtype));
    }
    let element = 300.min(norm.row_len() - 1);
    edit(norm, |bytes| {
        let weight = &mut bytes[4 * element..][..4];
        let value = f32::from_le_bytes([weight[0], weight[1], weight[2], weight[3]]);
        weight.copy_from_slice(&(2.0 * value).to_le_bytes());
    })
}

pub(super) fn scale_is_nan(model: &mut Model) -> Fit {
    let layer = 3.min(model.config.layers - 1);
    let tensor = &mut model.weights.layers[layer].attn_output;
    let dtype = tensor.dtype;
    block(tensor, 7, 0, |block| match dtype.block_len() {
        256 => {
            let mut open = SuperBlock::default();
            open_super(dtype, block, &mut open);
            open.d = f32::NAN;
            close_super(dtype, &open, block);
        }
        // All ones are a NaN of any type: of a float, and of the scale with which a small block begins.
        _ => block[..if dtype == Dtype::F32 { 4 } else { 2 }].fill(0xff),
    })
}

pub(super) fn tokens_off_by_one(model: &mut Model) -> Fit {
    let size = model.weights.token_embd.row_bytes();
    edit(&mut model.weights.token_embd, |bytes| bytes.rotate_left(size))
}

pub(super) fn wrong_rope_base(model: &mut Model) -> Fit {
    let base = &mut model.config.rope.base;
    // Which of the two is usual depends on the model.
    *base = if *base == 1e4 { 1e6 } else { 1e4 };
    Ok(())
}

pub(super) fn not_renormalised(model: &mut Model) -> Fit {
    match &mut model.config.ffn {
        Ffn::Moe(moe) if moe.renormalise => moe.renormalise = false,
        Ffn::Moe(_) => return Err("its experts' weights are not to be divided by their sum".into()),
        Ffn::Dense { .. } => return Err(NO_EXPERTS.into()),
    }
    Ok(())
}

pub(super) fn wrong_epsilon(model: &mut Model) -> Fit {
    if model.config.rms_eps == 1e-3 {
        return Err("its epsilon is 1e-3 as it is".into());
    }
    model.config.rms_eps = 1e-3;
    Ok(())
}
