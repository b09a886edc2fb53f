//! Streamed products (`product_stream.cu`) against the general ones, bit for bit, where rings go round many times.

use std::sync::Arc;

use gguf::Dtype;
use model::{Backend, Buffer, Config, Ffn, Model, Moe, Site, Spec, Stage, Step};
use quant::fixed::Activations;
use synth::Shape;

use super::small::{rows, step};
use super::{NEEDS, cuda, same};
use crate::Cuda;
use crate::launch::product::{Columns, Epilogue, Input};
use crate::weights::Ffn as Matrices;

/// Tiles of the head that come to a processor of the emulator (or of a GPU) one after the other: 38 (or 1) of 8 slices.
const VOCAB: usize = 6_000;

/// A layer with long rows, matrices of the types in turn.
fn model(types: &[Dtype]) -> Arc<Model> {
    let base = Shape::named("tiny-moe").expect("a named shape");
    let ffn = Ffn::Moe(Moe { experts: 7, used: 3, width: 768, renormalise: true, scale: 1.0 });
    let config = Config {
        layers: 1,
        hidden: 2048,
        heads: 2,
        kv_heads: 1,
        head_dim: 128,
        vocab: VOCAB,
        ffn,
        ..base.config
    };
    let dtype = |s: &Spec| match s.dims.len() {
        1 => Dtype::F32,
        _ if s.name.contains("gate_inp") => Dtype::F32,
        _ => types[s.name.len() % types.len()],
    };
    Arc::new(synth::model(&Shape { config, tied: true }, 5, dtype))
}

/// Both paths through the stages that stream, on `t` rows.
fn check(types: &[Dtype], activations: Activations, t: usize) {
    let what = format!("{types:?} {activations:?} {t} rows");
    let model = model(types);
    let mut cuda = cuda(&model, activations, t);
    let step = Step { logits: (0..t as u32).collect(), ..step(t, VOCAB) };
    cuda.begin(&step).expect(NEEDS);
    cuda.write(Buffer::X, &rows(t, 2048)).expect(NEEDS);
    let run = |cuda: &mut Cuda, stage| cuda.run(Site { stage, layer: Some(0) }).expect(NEEDS);
    let read = |cuda: &mut Cuda, buffer| cuda.read(buffer).expect(NEEDS);

    run(&mut cuda, Stage::Qkv);
    let got = [Buffer::Q, Buffer::K, Buffer::V].map(|b| read(&mut cuda, b));
    {
        let (w, b) = (&cuda.weights.layers[0], &cuda.buffers);
        let list = [(w.q, b.q.ptr()), (w.k, b.k.ptr()), (w.v, b.v.ptr())];
        let x = Input { float: b.normed.ptr(), fixed: &b.normed_fixed, columns: Columns::Rows(t) };
        cuda.quantised_products(&list, x, Epilogue::Store).expect(NEEDS);
    }
    for (got, buffer) in got.iter().zip([Buffer::Q, Buffer::K, Buffer::V]) {
        same(&format!("{what}: {buffer:?}"), &read(&mut cuda, buffer), got);
    }

    run(&mut cuda, Stage::Route);
    run(&mut cuda, Stage::ExpertsUp);
    let hidden = read(&mut cuda, Buffer::Hidden);
    let Matrices::Moe { gate, up, down, .. } = cuda.weights.layers[0].ffn else {
        unreachable!("a mixture of experts")
    };
    let count = t * 3;
    cuda.group(cuda.group_columns(count)).expect(NEEDS);
    {
        let b = &cuda.buffers;
        let x = Input {
            float: b.normed.ptr(),
            fixed: &b.normed_fixed,
            columns: Columns::Pairs { count, share: 3 },
        };
        cuda.swiglu(gate, up, x, b.hidden.ptr()).expect(NEEDS);
    }
    same(&format!("{what}: hidden"), &read(&mut cuda, Buffer::Hidden), &hidden);

    run(&mut cuda, Stage::ExpertsDown);
    let mut got = vec![0.0; count * 2048];
    cuda.buffers.delta.read(0, &mut got).expect(NEEDS);
    let b = &cuda.buffers;
    cuda.group(cuda.group_columns(count)).expect(NEEDS);
    cuda.fix(b.hidden.ptr(), count, &b.hidden_fixed).expect(NEEDS);
    let x =
        Input { float: b.hidden.ptr(), fixed: &b.hidden_fixed, columns: Columns::Pairs { count, share: 1 } };
    cuda.products(&[(down, b.delta.ptr())], x, Epilogue::Store).expect(NEEDS);
    let mut want = vec![0.0; got.len()];
    cuda.buffers.delta.read(0, &mut want).expect(NEEDS);
    same(&format!("{what}: outputs of experts"), &want, &got);

    cuda.run(Site { stage: Stage::Head, layer: None }).expect(NEEDS);
    let got = read(&mut cuda, Buffer::Logits);
    {
        let (w, b) = (&cuda.weights, &cuda.buffers);
        let x = Input { float: b.normed.ptr(), fixed: &b.normed_fixed, columns: Columns::Rows(t) };
        cuda.quantised_products(&[(w.head, b.logits.ptr())], x, Epilogue::Store).expect(NEEDS);
    }
    same(&format!("{what}: logits"), &read(&mut cuda, Buffer::Logits), &got);
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn streams_give_the_bits_of_the_general_products() {
    // Mostly up to four pairs to an expert, or mostly more; one column tile, or two.
    for t in [2, 11] {
        check(&[Dtype::Q4K, Dtype::Q6K], Activations::A16, t);
    }
    check(&[Dtype::Q4K, Dtype::Q6K], Activations::A8, 8);
    check(&[Dtype::Q5K, Dtype::Q3K, Dtype::Q2K], Activations::A16, 9);
}
