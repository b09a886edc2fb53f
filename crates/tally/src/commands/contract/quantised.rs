//! Checks of quantised types: what their bytes mean, and products with them.

use std::sync::Arc;

use contract::{Figures, Miss, Parameters, Verdict};
use gguf::Dtype;
use model::{Buffer, Config, Ffn, FfnWeights, Model, Site, Stage, Step};
use quant::fixed::{Activations, block_len};
use synth::Shape;

use super::forward::device;
use super::lab::{Lab, Room, broke};

/// Every type's blocks against what the `gguf` Python package makes of them (tools/fixtures/dequant.py, which says how
/// the fixture is laid out), bit for bit.
pub(super) fn dequantise(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let name = parameters.text("fixture").ok_or_else(|| Miss::unable("no `fixture`"))?;
    let bytes = lab.bytes(name)?;
    let mut rest = &bytes[..];
    let mut take = |n: usize| rest.split_off(..n).ok_or_else(|| Miss::failed(format!("{name} is cut short")));
    let (mut types, mut weights) = (0, 0);
    for _ in Dtype::ALL {
        let len = take(1)?[0];
        let dtype = str::from_utf8(take(len.into())?).ok().and_then(|name| name.parse::<Dtype>().ok());
        let dtype = dtype.ok_or_else(|| Miss::failed(format!("{name}: a type that is not known")))?;
        let word =
            |bytes: &[u8]| bytes.as_chunks().0.first().map_or(0, |&bytes| u32::from_le_bytes(bytes) as usize);
        let (blocks, count) = (word(take(4)?), word(take(4)?));
        let blocks = take(blocks * dtype.block_bytes())?;
        let want = take(count * 4)?.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
        let mut got = vec![0.0f32; count];
        quant::dequantise_row(dtype, blocks, &mut got);
        if fault.is_some() {
            got[count / 2] = got[count / 2].next_up();
        }
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            if parity::canonical(*got) != parity::canonical(want) {
                let block = i / dtype.block_len();
                return Err(Miss::failed(format!(
                    "{dtype} weight {i} (block {block}): {got:e} for {want:e}"
                )));
            }
        }
        types += 1;
        weights += count;
    }
    Ok(Figures::from_iter([("types".into(), types.into()), ("weights".into(), weights.into())]))
}

/// Rows of activations of a product.
const ROWS: usize = 3;

/// Products with every type against sums in f64, within the error of rounding activations to fixed point.
///
/// The router of a model is the matrix: `route` writes both its input (`Normed`) and the products (`RouterLogits`).
pub(super) fn dot(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let names = parameters.texts("types");
    let types: Result<Vec<Dtype>, _> = names.iter().map(|name| name.parse::<Dtype>()).collect();
    let activations = if fault.is_some() { Activations::A8 } else { Activations::A16 };
    let (mut products, mut worst) = (0, 0f64);
    for dtype in types.map_err(|error| Miss::unable(error.to_string()))? {
        for hidden in parameters.integers("lengths") {
            let hidden = hidden.clamp(32, 8192) as usize;
            if !hidden.is_multiple_of(dtype.block_len()) {
                continue;
            }
            let model = with_router(dtype, hidden);
            let mut backend = lab.place_with(&model, device(parameters), Room::of(64), activations)?.backend;
            backend.begin(&Step::prefill(&[1; ROWS], 0, vec![0])).map_err(broke)?;
            backend.write(Buffer::X, &activations_of(hidden)).map_err(broke)?;
            backend.run(Site { stage: Stage::Route, layer: Some(0) }).map_err(broke)?;
            let x = backend.read(Buffer::Normed).map_err(broke)?;
            let got = backend.read(Buffer::RouterLogits).map_err(broke)?;
            let FfnWeights::Moe { gate_inp: router, .. } = &model.weights.layers[0].ffn else {
                return Err(Miss::failed("a mixture of experts has a router"));
            };
            let mut row = vec![0.0; hidden];
            for n in 0..router.rows() {
                quant::dequantise_row(
                    dtype,
                    &router.data[n * router.row_bytes()..][..router.row_bytes()],
                    &mut row,
                );
                for t in 0..ROWS {
                    let (want, bound) = product(dtype, &row, &x[t * hidden..][..hidden]);
                    let got = got[t * router.rows() + n];
                    let error = (f64::from(got) - want).abs();
                    if error.is_nan() || error > bound {
                        let why = format!(
                            "{dtype}, {hidden} values: {got} for {want}, off by more than {bound:.1e}"
                        );
                        return Err(Miss::failed(why));
                    }
                    worst = worst.max(error / bound);
                    products += 1;
                }
            }
        }
    }
    if products == 0 {
        return Err(Miss::failed("no length is a whole number of blocks of any type"));
    }
    Ok(Figures::from_iter([
        ("products".into(), products.into()),
        ("largest_error_of_bound".into(), worst.into()),
    ]))
}

/// The product in f64, and how far from it A16 may be: half a step of each activation times its weight, and the rounding
/// of a sum of as many terms as there are blocks.
fn product(dtype: Dtype, w: &[f32], x: &[f32]) -> (f64, f64) {
    let terms = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
    let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
    let rounding = magnitude * f64::from(f32::EPSILON) * 16.0;
    if matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return (sum, rounding);
    }
    let len = block_len(x.len());
    let blocks = w.chunks(len).zip(x.chunks(len));
    let steps = blocks.map(|(w, x)| {
        let amax = x.iter().fold(0.0, |max: f64, &x| max.max(f64::from(x).abs()));
        amax / 32639.0 / 2.0 * w.iter().map(|&w| f64::from(w).abs()).sum::<f64>()
    });
    (sum, rounding + 1.01 * steps.sum::<f64>())
}

/// Rows of values whose magnitudes differ by the factors that activations differ by.
fn activations_of(hidden: usize) -> Vec<f32> {
    let value = |i: usize| {
        let draw = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let uniform = draw as f32 / (1u32 << 23) as f32 - 1.0; // 24 bits are exact
        if i.is_multiple_of(97) { uniform * 20.0 } else { uniform }
    };
    (0..ROWS * hidden).map(value).collect()
}

/// One layer of `hidden` values whose router is of `dtype`.
fn with_router(dtype: Dtype, hidden: usize) -> Arc<Model> {
    let base = Shape::named("tiny-moe").expect("a shape of the list");
    let Ffn::Moe(moe) = base.config.ffn else { unreachable!("tiny-moe is a mixture of experts") };
    let ffn = Ffn::Moe(model::Moe { experts: 16, width: 32, ..moe });
    let shape = Shape { config: Config { layers: 1, hidden, vocab: 64, ffn, ..base.config }, ..base };
    Arc::new(synth::model(&shape, 5, |spec| if spec.name.contains("gate_inp") { dtype } else { Dtype::F32 }))
}
