//! Norms, rounding, the embedding, the choice of experts, and pairs by expert.

use std::sync::Arc;

use gguf::Dtype;
use model::{Backend, Buffer, Ffn, Model, Row, Site, Spec, Stage, Step};
use quant::fixed::{Activations, Fixed, SUB};

use super::{NEEDS, cuda, model, normal, random, same, shape};
use crate::buffers;

/// A step of `rows` rows, 256 to a sequence.
pub(super) fn step(rows: usize, vocab: usize) -> Step {
    let token = |t: usize| (random(3, t) % vocab as u64) as u32;
    Step {
        rows: (0..rows)
            .map(|t| Row { token: token(t), position: t as u32 % 256, sequence: t as u32 / 256 })
            .collect(),
        tables: (0..rows.div_ceil(256) as u32).map(|s| (4 * s..4 * s + 4).rev().collect()).collect(),
        logits: vec![],
    }
}

/// Rows that meet every branch of the rounding: usual values, NaN, infinities, all zeros, subnormal scales, extremes.
pub(super) fn rows(rows: usize, k: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..rows * k).map(|i| normal(7, i) * 3.0).collect();
    for (t, row) in x.chunks_exact_mut(k).enumerate() {
        let at = random(8, t) as usize % k;
        match t % 8 {
            1 => row[at] = f32::NAN,
            2 => row[at] = f32::NEG_INFINITY,
            3 => row.fill(0.0),
            4 => row.iter_mut().for_each(|v| *v *= 1e-37),
            5 => row.iter_mut().for_each(|v| *v *= 1e18),
            6 => row[at] = 3e4,
            _ => {}
        }
    }
    x
}

/// Rule 3 as ARCHITECTURE.md has it.
fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut sums = [0f32; 256];
    for (k, v) in x.iter().enumerate() {
        sums[k % 256] = v.mul_add(*v, sums[k % 256]);
    }
    for w in [128, 64, 32, 16, 8, 4, 2, 1] {
        (0..w).for_each(|p| sums[p] += sums[p + w]);
    }
    let r = 1.0 / (sums[0] / x.len() as f32 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| (x * r) * w).collect()
}

/// Rows in fixed point on the GPU against `quant`'s.
fn check_fixed(what: &str, x: &[f32], got: &buffers::Fixed, activations: Activations) {
    let mut want = Fixed::default();
    let n = x.len() / got.k;
    want.reset(n, got.k, activations);
    want.rows_mut().zip(x.chunks_exact(got.k)).for_each(|(mut row, x)| row.fill(x));
    let planes = got.read(n).expect(NEEDS);
    let a16 = activations == Activations::A16;
    for t in 0..n {
        let row = want.row(t);
        assert_eq!(row.hi, &planes.hi[t * got.k..][..got.k], "{what}: high plane of row {t}");
        assert!(!a16 || row.lo == &planes.lo[t * got.k..][..got.k], "{what}: low plane of row {t}");
        let (subs, blocks) = (got.k / SUB, row.scale.len());
        let sum = |s: usize| match a16 {
            true => 256 * i32::from(row.sum_hi[s]) + i32::from(row.sum_lo[s]),
            false => i32::from(row.sum_hi[s]),
        };
        let sums: Vec<i32> = (0..subs).map(sum).collect();
        assert_eq!(sums, &planes.sum[t * subs..][..subs], "{what}: sums of row {t}");
        same(&format!("{what}: scales of row {t}"), row.scale, &planes.scale[t * blocks..][..blocks]);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn norms_and_fixed_point() {
    // One pass of a block of threads, part of one, several, and rows whose fixed-point blocks are of 32.
    for (hidden, activations) in [
        (2048, Activations::A16),
        (160, Activations::A16),
        (256, Activations::A8),
        (2336, Activations::A8),
        (6144, Activations::A16),
    ] {
        let what = format!("{hidden} {activations:?}");
        let model = model(&shape(hidden, 64, 0, 0), Dtype::F32);
        let mut cuda = cuda(&model, activations, 40);
        let x = rows(40, hidden);
        let mut weight = vec![0.0; hidden];
        let norm = &model.weights.layers[0].ffn_norm;
        quant::dequantise_row(norm.dtype, &norm.data, &mut weight);
        let want: Vec<f32> = x.chunks_exact(hidden).flat_map(|x| rms_norm(x, &weight, 1e-6)).collect();

        cuda.buffers.x.write(0, &x).expect(NEEDS);
        let (from, to, by) =
            (cuda.buffers.x.ptr(), cuda.buffers.normed.ptr(), cuda.weights.layers[0].ffn_norm);
        cuda.normalise(from, None, 40, by, Some(to), true).expect(NEEDS);
        let mut got = vec![0.0; want.len()];
        cuda.buffers.normed.read(0, &mut got).expect(NEEDS);
        same(&what, &want, &got);
        check_fixed(&what, &want, &cuda.buffers.normed_fixed, activations);

        let picks: Vec<u32> = vec![5, 39, 0, 5];
        let picked: Vec<f32> =
            picks.iter().flat_map(|&p| &want[p as usize * hidden..][..hidden]).copied().collect();
        let on_device = cuda.device.upload(&picks).expect(NEEDS);
        cuda.normalise(from, Some(on_device.ptr()), 4, by, None, true).expect(NEEDS);
        check_fixed(&format!("{what}, picked"), &picked, &cuda.buffers.normed_fixed, activations);

        // The rows as they are, without a norm.
        cuda.fix(from, 40, &cuda.buffers.normed_fixed).expect(NEEDS);
        check_fixed(&format!("{what}, rounded"), &x, &cuda.buffers.normed_fixed, activations);
        let k = cuda.buffers.hidden_fixed.k;
        let hidden_rows = rows(33, k);
        cuda.buffers.hidden.write(0, &hidden_rows).expect(NEEDS);
        cuda.fix(cuda.buffers.hidden.ptr(), 33, &cuda.buffers.hidden_fixed).expect(NEEDS);
        check_fixed(&format!("{what}, F = {k}"), &hidden_rows, &cuda.buffers.hidden_fixed, activations);
        assert!(cuda.read(Buffer::X).is_ok(), "{what}: the GPU is well");
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn the_embedding_of_every_type() {
    for dtype in Dtype::ALL {
        let hidden = if dtype.block_len() == 256 { 512 } else { 160 };
        // The last tile is not full. Every bit is random: scales of any size and sign, infinite and NaN too.
        let mut model = Model::clone(&model(&shape(hidden, 1003, 0, 0), dtype));
        let bytes = (0..model.weights.token_embd.data.len()).map(|i| random(6, i) as u8);
        model.weights.token_embd.data = bytes.collect::<Vec<u8>>().into();
        let model = Arc::new(model);
        let mut cuda = cuda(&model, Activations::A16, 128);
        let mut step = step(100, 1003);
        (step.rows[0].token, step.rows[1].token) = (0, 1002);
        let table = &model.weights.token_embd;
        let row = table.row_bytes();
        let mut want = vec![0.0; 100 * hidden];
        for (x, r) in want.chunks_exact_mut(hidden).zip(&step.rows) {
            quant::dequantise_row(dtype, &table.data[r.token as usize * row..][..row], x);
        }
        cuda.begin(&step).expect(NEEDS);
        cuda.run(Site { stage: Stage::Embed, layer: None }).expect(NEEDS);
        same(dtype.name(), &want, &cuda.read(Buffer::X).expect(NEEDS));
    }
}

/// Rule 6 as ARCHITECTURE.md has it: ids and weights in rank order.
fn route(logits: &[f32], used: usize, scale: f32) -> (Vec<u32>, Vec<f32>) {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
    let p: Vec<f32> = logits.iter().map(|l| model::math::exp(l - max)).collect();
    let mut sums = [0f32; 32];
    p.iter().enumerate().for_each(|(e, v)| sums[e % 32] += v);
    for w in [16, 8, 4, 2, 1] {
        (0..w).for_each(|i| sums[i] += sums[i + w]);
    }
    let p: Vec<f32> = p.iter().map(|v| v / sums[0]).collect();
    let mut ids: Vec<u32> = (0..p.len() as u32).collect();
    let rank = |id: &u32| if p[*id as usize].is_nan() { f32::NEG_INFINITY } else { p[*id as usize] };
    // Stable: of equals the lower index first.
    ids.sort_by(|a, b| rank(b).total_cmp(&rank(a)));
    ids.truncate(used);
    let total = ids.iter().fold(0f32, |s, &id| s + p[id as usize]);
    let floor = 2f32.powi(-14);
    let divisor = if total > floor { total } else { floor };
    let weights = ids.iter().map(|&id| p[id as usize] / divisor * scale).collect();
    (ids, weights)
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn experts_are_chosen_as_on_the_cpu() {
    for (experts, used) in [(128, 8), (6, 2), (1, 1), (33, 33), (520, 40), (4096, 256)] {
        let model = model(&shape(32, 64, experts, used), Dtype::F32);
        let Ffn::Moe(moe) = model.config.ffn else { unreachable!("a mixture of experts") };
        let mut cuda = cuda(&model, Activations::A16, 37);
        let mut logits: Vec<f32> = (0..37 * experts).map(|i| normal(11, i) * 2.0).collect();
        for (t, row) in logits.chunks_exact_mut(experts).enumerate() {
            match t % 7 {
                1 => row.iter_mut().for_each(|v| *v = (*v * 2.0).round() / 2.0), // ties
                2 => row.fill(-0.0),
                3 => row[random(1, t) as usize % experts] = f32::NAN,
                4 => row[random(2, t) as usize % experts] = f32::INFINITY,
                5 => row.iter_mut().step_by(2).for_each(|v| *v = f32::NEG_INFINITY),
                6 => row.iter_mut().for_each(|v| *v *= 1e4),
                _ => {}
            }
        }
        cuda.begin(&step(37, 64)).expect(NEEDS);
        cuda.write(Buffer::RouterLogits, &logits).expect(NEEDS);
        cuda.choose().expect(NEEDS);
        cuda.held.ran(Stage::Route, false);
        let ids = cuda.read(Buffer::Experts).expect(NEEDS);
        let weights = cuda.read(Buffer::ExpertWeights).expect(NEEDS);
        for (t, row) in logits.chunks_exact(experts).enumerate() {
            let what = format!("{used} of {experts}, row {t}");
            let (want_ids, want_weights) = route(row, used, moe.scale);
            let got: Vec<u32> = ids[t * used..][..used].iter().map(|&id| id as u32).collect();
            assert_eq!(want_ids, got, "{what}");
            same(&what, &want_weights, &weights[t * used..][..used]);
        }
    }
}

/// Rule 2: 32 partial sums.
fn dot(w: &[f32], x: &[f32]) -> f32 {
    let mut sums = [0f32; 32];
    w.iter().zip(x).enumerate().for_each(|(k, (w, x))| sums[k % 32] = w.mul_add(*x, sums[k % 32]));
    for w in [16, 8, 4, 2, 1] {
        (0..w).for_each(|p| sums[p] += sums[p + w]);
    }
    sums[0]
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn few_rows_are_routed_in_one_launch() {
    // Blocks with several router rows, a last one with fewer, more blocks than a row has fixed-point blocks and fewer.
    for (hidden, experts, used, t, dtype) in [
        (2048, 128, 8, 64, Dtype::F32),
        (256, 6, 2, 3, Dtype::F32),
        (768, 33, 33, 40, Dtype::BF16),
        (4096, 7, 1, 17, Dtype::F16),
    ] {
        let what = format!("{t} rows of {hidden}, {used} of {experts}, {dtype}");
        let dtypes = |s: &Spec| if s.name.contains("gate_inp") { dtype } else { Dtype::F32 };
        let model = Arc::new(synth::model(&shape(hidden, 64, experts, used), 5, dtypes));
        let layer = &model.weights.layers[0];
        let Ffn::Moe(moe) = model.config.ffn else { unreachable!("a mixture of experts") };
        let model::FfnWeights::Moe { gate_inp: router, .. } = &layer.ffn else {
            unreachable!("a mixture of experts")
        };
        let floats = |tensor: &gguf::Tensor, rows: usize| {
            let mut values = vec![0.0; rows * hidden];
            let (row, data) = (tensor.row_bytes(), &tensor.data);
            let each = values.chunks_exact_mut(hidden).zip(data.chunks_exact(row));
            each.for_each(|(to, from)| quant::dequantise_row(tensor.dtype, from, to));
            values
        };
        let (norm, router) = (floats(&layer.ffn_norm, 1), floats(router, experts));
        let x = rows(t, hidden);
        let normed: Vec<f32> = x.chunks_exact(hidden).flat_map(|x| rms_norm(x, &norm, 1e-6)).collect();
        let logits: Vec<f32> = normed
            .chunks_exact(hidden)
            .flat_map(|x| router.chunks_exact(hidden).map(move |w| dot(w, x)))
            .collect();

        let mut cuda = cuda(&model, Activations::A16, t);
        // Twice: the count of blocks that have arrived goes back to zero.
        for _ in 0..2 {
            cuda.begin(&step(t, 64)).expect(NEEDS);
            cuda.write(Buffer::X, &x).expect(NEEDS);
            cuda.run(Site { stage: Stage::Route, layer: Some(0) }).expect(NEEDS);
            same(&format!("{what}: normed"), &normed, &cuda.read(Buffer::Normed).expect(NEEDS));
            check_fixed(&what, &normed, &cuda.buffers.normed_fixed, Activations::A16);
            same(&format!("{what}: logits"), &logits, &cuda.read(Buffer::RouterLogits).expect(NEEDS));
            let ids = cuda.read(Buffer::Experts).expect(NEEDS);
            let weights = cuda.read(Buffer::ExpertWeights).expect(NEEDS);
            for (r, row) in logits.chunks_exact(experts).enumerate() {
                let (want_ids, want_weights) = route(row, used, moe.scale);
                let got: Vec<u32> = ids[r * used..][..used].iter().map(|&id| id as u32).collect();
                assert_eq!(want_ids, got, "{what}, row {r}");
                same(&format!("{what}, row {r}"), &want_weights, &weights[r * used..][..used]);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn pairs_by_expert() {
    for (experts, used, t, columns) in [
        (128, 8, 2048, 64),
        (128, 8, 64, 8),
        (128, 8, 1, 8),
        (6, 2, 333, 16),
        (33, 33, 7, 1),
        (4096, 3, 1025, 8),
        (8, 1, 2047, 128),
    ] {
        let what = format!("{t} rows, {used} of {experts}, tiles of {columns}");
        let model = model(&shape(32, 64, experts, used), Dtype::F32);
        let mut cuda = cuda(&model, Activations::A16, t);
        // Distinct within a row; some experts popular, some nobody's.
        let first = |t: usize| (random(4, t) % experts as u64).min(random(5, t) % experts as u64) as usize;
        let ids: Vec<u32> = (0..t * used).map(|i| ((first(i / used) + i % used) % experts) as u32).collect();
        cuda.begin(&step(t, 64)).expect(NEEDS);
        let floats: Vec<f32> = ids.iter().map(|&id| id as f32).collect();
        cuda.write(Buffer::Experts, &floats).expect(NEEDS);
        cuda.group(columns).expect(NEEDS);
        let got = cuda.buffers.groups.read(ids.len()).expect(NEEDS);

        let mut pairs: Vec<u32> = (0..ids.len() as u32).collect();
        pairs.sort_by_key(|&p| ids[p as usize]);
        assert_eq!(got.pairs, pairs, "{what}");
        let start = |e: usize| pairs.partition_point(|&p| (ids[p as usize] as usize) < e) as u32;
        let starts: Vec<u32> = (0..=experts).map(start).collect();
        assert_eq!(got.starts, starts, "{what}");
        let tiles: Vec<[u32; 3]> = (0..experts)
            .flat_map(|e| {
                let (first, end) = (starts[e], starts[e + 1]);
                let columns = columns as u32;
                (first..end).step_by(columns as usize).map(move |at| [e as u32, at, columns.min(end - at)])
            })
            .collect();
        assert_eq!(got.tiles, tiles, "{what}");
        assert!(
            tiles.len() <= crate::launch::group::Groups::max_tiles(ids.len(), experts, columns),
            "{what}"
        );
    }
}
