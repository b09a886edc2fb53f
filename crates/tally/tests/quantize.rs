//! `tally quantize`: types by the mix, the same bytes whatever the threads, errors that name the weight.

mod process;

use std::fs;

use gguf::{Dtype, File, Metadata, TensorSpec};
use process::{Directory, Outcome, tally};
use serde_json::json;

const SHAPE: [&str; 6] = ["--layers", "8", "--vocab", "300", "--experts", "4"];

fn float_model(directory: &Directory, mix: &str) -> String {
    directory.synth("in.gguf", "tiny-moe", &[&SHAPE[..], &["--type", mix]].concat())
}

fn quantize(input: &str, out: &str, mix: &str, args: &[&str]) -> Outcome {
    tally(["quantize", input, out, mix].iter().chain(args))
}

/// The file `path` again, with the value of one weight changed; returns the tensor's name.
fn with_weight(path: &str, tensor: usize, element: usize, value: f32) -> String {
    let file = File::open(path.as_ref()).expect("a model");
    let spec =
        |t: &gguf::Tensor| TensorSpec { name: t.name.to_string(), dtype: t.dtype, dims: t.dims.clone() };
    let specs: Vec<_> = file.tensors().iter().map(spec).collect();
    assert_eq!(specs[tensor].dtype, Dtype::F32);
    gguf::write(path.as_ref(), file.metadata(), &specs, |i, out| {
        let mut bytes = file.tensors()[i].data.to_vec();
        if i == tensor {
            bytes[4 * element..][..4].copy_from_slice(&value.to_le_bytes());
        }
        out.write_all(&bytes)
    })
    .expect("written");
    specs[tensor].name.clone()
}

#[test]
fn types_and_metadata() {
    let directory = Directory::new();
    let out = directory.file("out.gguf");
    let check = |from, to, file_type, want: &[(&str, Dtype)]| {
        let input = float_model(&directory, from);
        quantize(&input, &out, to, &[]).ok();
        let (before, after) =
            (File::open(input.as_ref()).expect("in"), File::open(out.as_ref()).expect("out"));
        for (name, dtype) in want {
            let tensor = after.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!(tensor.dtype, *dtype, "{from} to {to}: {name}");
        }
        let names =
            |file: &File| file.tensors().iter().map(|t| (t.name.clone(), t.dims.clone())).collect::<Vec<_>>();
        assert_eq!(names(&before), names(&after), "{from} to {to}");
        let mut metadata: Metadata = before.metadata().clone();
        metadata.set("general.file_type", file_type);
        metadata.set("general.quantization_version", 2u32);
        assert_eq!(after.metadata(), &metadata, "{from} to {to}");
    };
    let (down_0, down_1) = ("blk.0.ffn_down_exps.weight", "blk.1.ffn_down_exps.weight");
    let (norm, router, embedding) =
        ("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "token_embd.weight");
    check("F32", "Q4_K_M", 15u32, &[(down_0, Dtype::Q6K), (down_1, Dtype::Q4K), (norm, Dtype::F32)]);
    check("F16", "q4_k", 15, &[(down_0, Dtype::Q6K), (down_1, Dtype::Q4K), (router, Dtype::F32)]);
    check("BF16", "Q5_K", 17, &[(down_0, Dtype::Q6K), (down_1, Dtype::Q5K), (embedding, Dtype::Q5K)]);
    check("BF16", "Q4_K_S", 14, &[(down_0, Dtype::Q5K), (down_1, Dtype::Q4K)]);
    check("F32", "Q6_K", 18, &[(down_0, Dtype::Q6K), (embedding, Dtype::Q6K)]);
    check("F16", "Q8_0", 7, &[(down_0, Dtype::Q8_0), (embedding, Dtype::Q8_0)]);
    check("F32", "F16", 1, &[(down_0, Dtype::F16), (norm, Dtype::F32)]);
}

#[test]
fn weights_stay_near() {
    let directory = Directory::new();
    let input = float_model(&directory, "F32");
    let out = directory.file("out.gguf");
    // Relative root mean square error of weights uniform in an interval: the width of a step over sqrt(12), and some.
    for (mix, bound) in [("F32", 0.0), ("F16", 3e-4), ("Q8_0", 0.006), ("Q6_K", 0.02), ("Q4_K_M", 0.07)] {
        quantize(&input, &out, mix, &[]).ok();
        let (before, after) =
            (File::open(input.as_ref()).expect("in"), File::open(out.as_ref()).expect("out"));
        for (before, after) in before.tensors().iter().zip(after.tensors()) {
            let values = |tensor: &gguf::Tensor| {
                let mut out = vec![0.0; tensor.len()];
                quant::dequantise_row(tensor.dtype, &tensor.data, &mut out);
                out
            };
            let (x, y) = (values(before), values(after));
            let square =
                |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let off = square(&mut x.iter().zip(&y).map(|(x, y)| x - y)) / square(&mut x.iter().copied());
            assert!(off.sqrt() <= bound, "{mix}: {} is off by {}", before.name, off.sqrt());
        }
    }
}

#[test]
fn threads_do_not_show() {
    let directory = Directory::new();
    let input = float_model(&directory, "BF16");
    let [one, two, nine] = ["1", "2", "9"].map(|threads| {
        let out = directory.file("out.gguf");
        quantize(&input, &out, "Q4_K_M", &["--threads", threads]).ok();
        fs::read(out).expect("written")
    });
    assert!(one == two && one == nine);
}

#[test]
fn over_itself() {
    let directory = Directory::new();
    let input = float_model(&directory, "F16");
    let out = directory.file("out.gguf");
    quantize(&input, &out, "Q6_K", &[]).ok();
    quantize(&input, &input, "Q6_K", &[]).ok();
    assert!(fs::read(&out).expect("written") == fs::read(&input).expect("written"));
}

#[test]
fn the_summary_counts() {
    let directory = Directory::new();
    let input = float_model(&directory, "F16");
    let report = quantize(&input, &directory.file("out.gguf"), "Q6_K", &["--json"]).json();
    // Four norms and a router in each of 8 layers, and the last norm.
    assert_eq!(report["tensors"]["F32"], json!(8 * 5 + 1));
    assert_eq!(report["bytes"], json!(fs::metadata(directory.file("out.gguf")).expect("written").len()));
    assert_eq!(report["bytes_before"], json!(fs::metadata(&input).expect("written").len()));
}

#[test]
fn weights_that_are_no_numbers() {
    let directory = Directory::new();
    let out = directory.file("out.gguf");
    fs::write(&out, "kept").expect("writable");
    for (tensor, element, value, place) in [
        // The third tensor is blk.0.attn_q, with rows of 256.
        (2, 256 * 5 + 17, f32::NAN, "element 17 of row 5 is NaN"),
        (2, 0, f32::NEG_INFINITY, "element 0 of row 0 is -inf"),
        (1, 255, f32::INFINITY, "element 255 of row 0 is inf"),
    ] {
        let input = float_model(&directory, "F32");
        let name = with_weight(&input, tensor, element, value);
        for threads in ["1", "4"] {
            let outcome = quantize(&input, &out, "Q4_K_M", &["--threads", threads]);
            outcome.fails(1, &format!("tensor `{name}`: {place}"));
        }
    }
    assert_eq!(directory.names(), ["in.gguf", "out.gguf"]);
    assert_eq!(fs::read(&out).expect("still there"), b"kept");
}

#[test]
fn bad_input() {
    let directory = Directory::new();
    let input = float_model(&directory, "F16");
    let q8 = directory.synth("q8.gguf", "tiny-moe", &[&SHAPE[..], &["--type", "Q8_0"]].concat());
    let mut other = Metadata::new();
    other.set("general.architecture", "llama");
    let llama = directory.file("llama.gguf");
    gguf::write(llama.as_ref(), &other, &[], |_, _| Ok(())).expect("written");
    let before = directory.names();
    let check = |input: &str, out: &str, mix, code, message| {
        quantize(input, out, mix, &[]).fails(code, message);
        assert_eq!(directory.names(), before, "{message}");
    };
    let out = directory.file("out.gguf");
    check(&input, &out, "Q3_K_L", 2, "'Q3_K_L'");
    check(&q8, &out, "Q4_K_M", 1, "tensor `token_embd.weight` is Q8_0 already");
    check(&llama, &out, "Q4_K_M", 1, "architecture `llama` is not supported (supported: qwen3, qwen3moe)");
    check(&directory.file("nowhere.gguf"), &out, "Q4_K_M", 1, "No such file or directory");
    check(&directory.file(""), &out, "Q4_K_M", 1, "a directory, not a model file");
    check(&input, &directory.file(""), "Q4_K_M", 1, "a directory");
    check(&input, "/dev/full", "Q4_K_M", 1, "not a regular file");
}
