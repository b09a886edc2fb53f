//! Faults around stages: what a kernel, a launch or a scheduler does wrong when its weights are right.

use model::{Backend, Buffer, Fault, Ffn, Hook, Model, Row, Site, Stage, Step};

use super::weights::{NO_EXPERTS, usual_layer};
use super::{restore, save};

/// Runs a stage in place of the backend.
pub(super) type Run = fn(&mut dyn Backend, &Step, Site) -> Result<(), Fault>;

/// A hook for a model, or what the model lacks.
pub(super) type Made = Result<Box<dyn Hook>, String>;

/// Where a fault of a stage is: in the layer that most faults are planted in.
pub(super) fn site(model: &Model, stage: Stage) -> Result<Site, String> {
    let site = Site { stage, layer: Some(usual_layer(model)) };
    if site.exists(&model.config) { Ok(site) } else { Err(NO_EXPERTS.into()) }
}

/// Runs one stage in its own way; every other stage as it should be.
struct Around {
    site: Site,
    run: Run,
}

impl Hook for Around {
    fn run(&mut self, inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
        if site == self.site { (self.run)(inner, step, site) } else { inner.run(site) }
    }
}

/// Runs `stage` of one layer by `run`.
pub(super) fn around(model: &Model, stage: Stage, run: Run) -> Made {
    Ok(Box::new(Around { site: site(model, stage)?, run }))
}

/// Changes a buffer after the stage.
pub(super) fn after(
    inner: &mut dyn Backend,
    site: Site,
    buffer: Buffer,
    change: impl FnOnce(&mut [f32]),
) -> Result<(), Fault> {
    inner.run(site)?;
    let mut values = inner.read(buffer)?;
    change(&mut values);
    inner.write(buffer, &values)
}

/// Lets the stage see another buffer than there is.
pub(super) fn seeing(
    inner: &mut dyn Backend,
    site: Site,
    buffer: Buffer,
    change: impl FnOnce(&mut [f32]),
) -> Result<(), Fault> {
    let saved = save(inner, &[buffer])?;
    let mut values = saved[&buffer].clone();
    change(&mut values);
    inner.write(buffer, &values)?;
    inner.run(site)?;
    restore(inner, &saved)
}

/// Lets the stage see another step than there is; what it writes are the rows of the changed step.
fn in_step(
    inner: &mut dyn Backend,
    step: &Step,
    site: Site,
    other: &Step,
    from: usize,
) -> Result<Vec<f32>, Fault> {
    let saved = save(inner, &[Buffer::X, Buffer::Q, Buffer::K, Buffer::V])?;
    inner.begin(other)?;
    let q = &saved[&Buffer::Q];
    inner.write(Buffer::Q, &q[from * q.len() / step.rows.len()..])?;
    inner.run(site)?;
    let attn = inner.read(Buffer::Attn)?;
    inner.begin(step)?;
    restore(inner, &saved)?;
    Ok(attn)
}

fn f16_overflow(v: f32) -> bool {
    v.abs() > 65504.0
}

/// 8-bit sums of activations kept in f16.
pub(super) fn sums_in_f16(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    seeing(inner, site, Buffer::Hidden, |hidden| {
        for block in hidden.chunks_mut(32) {
            if f16_overflow(block.iter().sum()) {
                block[0] = f32::INFINITY;
            }
        }
    })
}

/// Activations kept in f16 before the down projection.
pub(super) fn activations_in_f16(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    seeing(inner, site, Buffer::Hidden, |hidden| {
        hidden.iter_mut().filter(|v| f16_overflow(**v)).for_each(|v| *v *= f32::INFINITY);
    })
}

/// Ten bits of mantissa, as an f16 has.
pub(super) fn attention_in_f16(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    after(inner, site, Buffer::Attn, |attn| {
        attn.iter_mut().for_each(|v| *v = f32::from_bits(v.to_bits() & !0x1fff))
    })
}

/// Rows of a buffer at positions that `of` picks.
fn rows_at(step: &Step, values: &mut [f32], of: impl Fn(usize) -> bool, change: impl Fn(&mut [f32])) {
    let len = values.len() / step.rows.len();
    for (row, values) in step.rows.iter().zip(values.chunks_mut(len)) {
        if of(row.position as usize) {
            change(values);
        }
    }
}

/// A tile whose every key is masked: infinity from infinity.
pub(super) fn masked_tile(inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
    after(inner, site, Buffer::Attn, |attn| {
        rows_at(step, attn, |p| p > 0 && p % 64 == 0, |row| row.fill(f32::NAN));
    })
}

/// An offset that wraps far into the context: one head reads another's rows.
pub(super) fn wrapped_offset(inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
    let hd = inner.model().config.head_dim;
    after(inner, site, Buffer::Attn, |attn| {
        rows_at(step, attn, |p| p >= 64, |row| row.copy_within(..hd, hd));
    })
}

/// Padding that is read: the last row of a step that is no whole tile.
pub(super) fn nan_in_padding(inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
    let rows = step.rows.len();
    after(inner, site, Buffer::X, |x| {
        if !rows.is_multiple_of(32) {
            let start = x.len() / rows * (rows - 1);
            x[start..].fill(f32::NAN);
        }
    })
}

/// NaN scores that choose the same expert again and again.
pub(super) fn nan_in_router(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    after(inner, site, Buffer::RouterLogits, |scores| scores.fill(f32::NAN))?;
    for (buffer, value) in [(Buffer::Experts, 0.0), (Buffer::ExpertWeights, f32::NAN)] {
        let values = vec![value; inner.read(buffer)?.len()];
        inner.write(buffer, &values)?;
    }
    Ok(())
}

/// Weights divided by a sum of zero.
pub(super) fn zero_by_zero(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    after(inner, site, Buffer::ExpertWeights, |weights| weights[..2].fill(f32::NAN))
}

/// Another stream writes into the residual stream meanwhile.
pub(super) fn shared_buffer(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    inner.run(site)?;
    let normed = inner.read(Buffer::Normed)?;
    let mut x = inner.read(Buffer::X)?;
    x[..64].copy_from_slice(&normed[..64]);
    inner.write(Buffer::X, &x)
}

pub(super) fn residual_twice(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    let before = inner.read(Buffer::X)?;
    after(inner, site, Buffer::X, |x| x.iter_mut().zip(before).for_each(|(x, b)| *x += b))
}

pub(super) fn residual_never(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    let before = inner.read(Buffer::X)?;
    after(inner, site, Buffer::X, |x| x.iter_mut().zip(before).for_each(|(x, b)| *x -= b))
}

pub(super) fn unscaled_attention(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    let scale = (inner.model().config.head_dim as f32).sqrt();
    seeing(inner, site, Buffer::Q, |q| q.iter_mut().for_each(|v| *v *= scale))
}

/// Each row sees one key fewer than it should, its own.
pub(super) fn mask_off_by_one(inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
    let shifted = |rows: &[Row]| -> Vec<Row> {
        rows.iter().map(|row| Row { position: row.position - 1, ..*row }).collect()
    };
    let from = usize::from(step.rows[0].position == 0);
    if step.rows.len() == from || step.rows[from..].iter().any(|row| row.position == 0) {
        return inner.run(site);
    }
    inner.run(site)?;
    let right = inner.read(Buffer::Attn)?;
    let other = Step { rows: shifted(&step.rows[from..]), logits: Vec::new(), ..step.clone() };
    let rest = in_step(inner, step, site, &other, from)?;
    let first = right.len() - rest.len();
    inner.write(Buffer::Attn, &[&right[..first], &rest].concat())
}

/// Query head `h` reads key/value head `h % KH`, not `h / (H / KH)`.
pub(super) fn wrong_kv_head(model: &Model) -> Made {
    let (heads, kv_heads) = (model.config.heads, model.config.kv_heads);
    if kv_heads == 1 || kv_heads == heads {
        return Err(format!("of {kv_heads} key/value heads for {heads} heads, both rules choose the same"));
    }
    around(model, Stage::Attend, by_wrong_kv_head)
}

fn by_wrong_kv_head(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    let config = inner.model().config;
    let (hd, heads, group) = (config.head_dim, config.heads, config.heads / config.kv_heads);
    // The head that stands in for slot `s`: the next of those whose wrong key/value head is the slot's right one.
    let slots: Vec<usize> = (0..heads).map(|s| s / group + s % group * config.kv_heads).collect();
    let permuted = |values: &[f32], back: bool| -> Vec<f32> {
        let mut out = vec![0.0; values.len()];
        for (from, to) in values.chunks(heads * hd).zip(out.chunks_mut(heads * hd)) {
            for (slot, &head) in slots.iter().enumerate() {
                let (a, b) = if back { (slot, head) } else { (head, slot) };
                to[b * hd..][..hd].copy_from_slice(&from[a * hd..][..hd]);
            }
        }
        out
    };
    let saved = save(inner, &[Buffer::Q])?;
    inner.write(Buffer::Q, &permuted(&saved[&Buffer::Q], false))?;
    inner.run(site)?;
    restore(inner, &saved)?;
    let attn = inner.read(Buffer::Attn)?;
    inner.write(Buffer::Attn, &permuted(&attn, true))
}

/// Another sequence's blocks, where there is another sequence.
pub(super) fn tables_mixed_up(inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
    if step.tables.len() < 2 {
        return inner.run(site);
    }
    let mut other = step.clone();
    other.tables.rotate_left(1);
    let attn = in_step(inner, step, site, &other, 0)?;
    inner.write(Buffer::Attn, &attn)
}

fn head_norm(model: &Model, layer: usize) -> Vec<f32> {
    let norm = &model.weights.layers[layer].attn_q_norm;
    let mut weights = vec![0.0; norm.row_len()];
    quant::dequantise_row(norm.dtype, &norm.data, &mut weights);
    weights
}

/// Queries rotated without having been normalised.
pub(super) fn no_head_norm(inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
    let mut q = inner.read(Buffer::Q)?;
    inner.run(site)?;
    let config = inner.model().config;
    let positions = step.rows.iter().map(|row| row.position as usize + 1).max().unwrap_or(1);
    let table = config.rope.table(config.head_dim, positions);
    for (row, q) in step.rows.iter().zip(q.chunks_mut(config.heads * config.head_dim)) {
        for head in q.chunks_mut(config.head_dim) {
            let (a, b) = head.split_at_mut(config.head_dim / 2);
            for ((a, b), [cos, sin]) in a.iter_mut().zip(b).zip(table.at(row.position as usize)) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
    inner.write(Buffer::Q, &q)
}

/// Queries rotated in neighbouring pairs, as GPT-J has it. Normalised by ARCHITECTURE.md's rule 3, so that nothing but
/// the rotation differs.
pub(super) fn interleaved_rope(inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
    let mut q = inner.read(Buffer::Q)?;
    inner.run(site)?;
    let config = inner.model().config;
    let weight = head_norm(inner.model(), site.layer.unwrap_or(0));
    let positions = step.rows.iter().map(|row| row.position as usize + 1).max().unwrap_or(1);
    let table = config.rope.table(config.head_dim, positions);
    for (row, q) in step.rows.iter().zip(q.chunks_mut(config.heads * config.head_dim)) {
        for head in q.chunks_mut(config.head_dim) {
            let mut sums = [0f32; 32];
            head.iter().enumerate().for_each(|(k, v)| sums[k % 32] = v.mul_add(*v, sums[k % 32]));
            for w in [16, 8, 4, 2, 1] {
                (0..w).for_each(|p| sums[p] += sums[p + w]);
            }
            let r = 1.0 / (sums[0] / config.head_dim as f32 + config.rms_eps).sqrt();
            head.iter_mut().zip(&weight).for_each(|(v, w)| *v = (*v * r) * w);
            let pairs = head.as_chunks_mut::<2>().0;
            for ([a, b], [cos, sin]) in pairs.iter_mut().zip(table.at(row.position as usize)) {
                (*a, *b) = (a.mul_add(*cos, -(*b * sin)), b.mul_add(*cos, *a * sin));
            }
        }
    }
    inner.write(Buffer::Q, &q)
}

/// Experts combined in another order than that of their ranks.
pub(super) fn combined_in_another_order(inner: &mut dyn Backend, _: &Step, site: Site) -> Result<(), Fault> {
    let Ffn::Moe(moe) = inner.model().config.ffn else { return inner.run(site) };
    let buffers = [Buffer::Hidden, Buffer::Experts, Buffer::ExpertWeights];
    let saved = save(inner, &buffers)?;
    let rows = saved[&Buffer::Experts].len() / moe.used;
    let before = inner.read(Buffer::X)?;
    inner.run(site)?;
    let right = inner.read(Buffer::X)?;
    inner.write(Buffer::X, &before)?;
    for (&buffer, values) in &saved {
        let line = values.len() / rows / moe.used;
        let reversed: Vec<f32> = values
            .chunks(line * moe.used)
            .flat_map(|row| row.chunks(line).rev().flatten().copied().collect::<Vec<_>>())
            .collect();
        inner.write(buffer, &reversed)?;
    }
    inner.run(site)?;
    let mut x = inner.read(Buffer::X)?;
    restore(inner, &saved)?;
    // What is kept of the inside is that of the order that was asked for, as a kernel's would be.
    inner.write(Buffer::X, &before)?;
    inner.run(site)?;
    if x == right {
        x[0] = x[0].next_up();
    }
    inner.write(Buffer::X, &x)
}
