//! `tally inspect`: the type map, metadata, and blocks that are not finite.

mod process;

use gguf::{Dtype, Metadata, TensorSpec};
use process::{Directory, tally};
use serde_json::{Value, json};

/// 48 layers in the shape of Qwen3-30B-A3B's mix, and next to no weights.
const NARROW: &str = "--hidden 256 --heads 8 --kv-heads 1 --head-dim 32 --experts 2 --experts-used 1 \
                      --expert-width 256 --vocab 259";

fn narrow(directory: &Directory) -> String {
    directory.synth("model.gguf", "qwen3-30b-a3b", &NARROW.split_whitespace().collect::<Vec<_>>())
}

/// The line of `text` that starts with `start`, indentation apart.
#[track_caller]
fn line<'a>(text: &'a str, start: &str) -> &'a str {
    let found = text.lines().map(str::trim).find(|line| line.starts_with(start));
    found.unwrap_or_else(|| panic!("no line starts with {start:?}:\n{text}"))
}

/// The type map of Q4_K_M: layer 6 is the first whose down projection is not Q6_K.
#[test]
fn layers_at_a_glance() {
    let directory = Directory::new();
    let text = tally(["inspect", &narrow(&directory)]).ok();
    let words = |start| line(&text, start).split_whitespace().collect::<Vec<_>>().join(" ");
    let of_layers = "666666446446446446446446446446446446446446666666";
    assert_eq!(words("ffn_down_exps "), format!("ffn_down_exps {of_layers} Q4_K and Q6_K"));
    assert_eq!(words("attn_v "), format!("attn_v {of_layers} Q4_K and Q6_K"));
    assert_eq!(words("ffn_up_exps "), format!("ffn_up_exps {} Q4_K", "4".repeat(48)));
    assert_eq!(words("F F32"), "F F32 4 Q4_K 6 Q6_K");
    let mixed = text.lines().position(|l| l.trim() == "attn_v, ffn_down_exps").expect("they agree");
    let listed: Vec<_> = text.lines().skip(mixed + 1).take(2).map(str::trim).collect();
    assert_eq!(listed[0], "Q6_K in 0-5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41-47");
    assert!(listed[1].starts_with("Q4_K in 6, 7, 9, 10, 12, 13, "), "{listed:?}");
    assert!(!text.contains('\u{1b}'), "colours where there is no terminal");
}

#[test]
fn the_map_as_json() {
    let directory = Directory::new();
    let report = tally(["inspect", "--json", &narrow(&directory)]).json();
    let down = &report["type_map"]["layers"]["ffn_down_exps"];
    assert_eq!(
        down["Q4_K"].as_array().map(|layers| layers[..4].to_vec()),
        Some(vec![json!(6), json!(7), json!(9), json!(10)])
    );
    assert_eq!(report["type_map"]["layers"]["attn_norm"]["F32"].as_array().map(Vec::len), Some(48));
    assert_eq!(
        report["type_map"]["outside"],
        json!({ "token_embd": "Q4_K", "output_norm": "F32", "output": "Q6_K" })
    );
    assert_eq!(report["config"]["layers"], json!(48));
    assert_eq!(report["tensors"], Value::Null);
}

#[test]
fn metadata_shortened_or_in_full() {
    let directory = Directory::new();
    let path = directory.synth("model.gguf", "tiny-moe", &["--vocab", "300"]);
    let tokens = "tokenizer.ggml.tokens";
    let check = |args: &[&str], want: &str| {
        let text = tally(["inspect", &path].iter().chain(args)).ok();
        assert!(line(&text, tokens).ends_with(want), "{args:?}: {}", line(&text, tokens));
    };
    check(&[], ", ...]");
    check(&["--metadata"], "\"<|im_start|>\", \"<|im_end|>\"]");
    let json = |args: &[&str]| {
        tally(["inspect", "--json", &path].iter().chain(args)).json()["metadata"][tokens].clone()
    };
    assert_eq!((json(&[])["array_of"].clone(), json(&[])["length"].clone()), (json!("string"), json!(300)));
    assert_eq!(json(&["--metadata"])[299], json!("<|im_end|>"));
}

#[test]
fn every_tensor() {
    let directory = Directory::new();
    let path = directory.synth("model.gguf", "tiny-moe", &[]);
    let text = tally(["inspect", "--tensors", &path]).ok();
    let row: Vec<_> = line(&text, "blk.0.ffn_down_exps.weight").split_whitespace().collect();
    assert_eq!(row[1..], ["Q4_K", "256", "x", "256", "x", "8", "294,912"]);
    let tensors = tally(["inspect", "--tensors", "--json", &path]).json()["tensors"].clone();
    assert_eq!(tensors.as_array().map(Vec::len), Some(75));
    let first =
        json!({ "name": "token_embd.weight", "type": "Q4_K", "shape": [256, 1024], "bytes": 147_456 });
    assert_eq!(tensors[0], first);
}

/// Writes a file of another architecture with one tensor `t` of 3 experts of 5 rows of 512, its bytes made by `spoil`
/// from zeros.
fn spoiled(directory: &Directory, dtype: Dtype, spoil: impl Fn(&mut [u8])) -> String {
    let path = directory.file("spoiled.gguf");
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", "other");
    let spec = TensorSpec { name: "t".into(), dtype, dims: vec![512, 5, 3] };
    let mut bytes = vec![0; 15 * dtype.row_bytes(512).expect("whole blocks")];
    spoil(&mut bytes);
    gguf::write(path.as_ref(), &metadata, &[spec], |_, out| out.write_all(&bytes)).expect("written");
    path
}

#[test]
fn blocks_that_are_not_finite() {
    const NAN: [u8; 2] = [0x01, 0x7E];
    const INFINITY: [u8; 2] = [0x00, 0xFC];
    let directory = Directory::new();
    // The offset of the float in a block of each type, as drawn in crates/quant/src/block/mod.rs.
    for (dtype, offset, field) in [
        (Dtype::Q8_0, 0, "d"),
        (Dtype::Q4_0, 0, "d"),
        (Dtype::Q4_1, 2, "m"),
        (Dtype::Q5_0, 0, "d"),
        (Dtype::Q5_1, 2, "m"),
        (Dtype::Q2K, 80, "d"),
        (Dtype::Q2K, 82, "dmin"),
        (Dtype::Q3K, 108, "d"),
        (Dtype::Q4K, 2, "dmin"),
        (Dtype::Q5K, 0, "d"),
        (Dtype::Q6K, 208, "d"),
        (Dtype::F16, 0, "value"),
    ] {
        let per_row = 512 / dtype.block_len();
        // Expert 1, row 2, block 1; and the last block of all.
        let (middle, last) = (7 * per_row + 1, 15 * per_row - 1);
        let path = spoiled(&directory, dtype, |bytes| {
            bytes[middle * dtype.block_bytes() + offset..][..2].copy_from_slice(&NAN);
            bytes[last * dtype.block_bytes() + offset..][..2].copy_from_slice(&INFINITY);
        });
        let outcome = tally(["inspect", "--check", &path]);
        let unit = if field == "value" { "element" } else { "block" };
        for want in [
            format!("t ({dtype}): expert 1, row 2, {unit} 1: {field} is NaN"),
            format!("t ({dtype}): expert 2, row 4, {unit} {}: {field} is -inf", per_row - 1),
        ] {
            assert!(outcome.stdout.contains(&want), "{want}: {outcome:?}");
        }
        assert!(outcome.stderr.starts_with("error: 2 blocks in 1 tensors hold a NaN"), "{outcome:?}");
        assert_eq!(outcome.code, Some(1));
    }
}

#[test]
fn all_are_counted_and_the_first_are_shown() {
    let directory = Directory::new();
    let path = spoiled(&directory, Dtype::F32, |bytes| bytes.fill(0xFF));
    let outcome = tally(["inspect", "--check", "--json", "--threads", "3", &path]);
    let report: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    assert_eq!(outcome.code, Some(1));
    assert_eq!(report["check"]["bad_blocks"], json!(512 * 15));
    assert_eq!(report["check"]["bad_tensors"], json!({ "t": 512 * 15 }));
    let first = report["check"]["first"].as_array().expect("an array");
    let elements: Vec<_> = first.iter().map(|finding| finding["block"].as_u64().expect("a number")).collect();
    assert_eq!(elements, (0..20).collect::<Vec<_>>());
}

#[test]
fn files_that_cannot_be_run() {
    let directory = Directory::new();
    let path = spoiled(&directory, Dtype::Q4K, |_| ());
    let text = tally(["inspect", "--check", &path]).ok();
    assert!(
        line(&text, "cannot be run")
            .ends_with("architecture `other` is not supported (supported: qwen3, qwen3moe)")
    );
    assert!(line(&text, "Check").contains("30 blocks of 1 tensors, every scale and weight finite"));
    let empty = directory.file("empty.gguf");
    gguf::write(empty.as_ref(), &Metadata::new(), &[], |_, _| Ok(())).expect("written");
    assert!(line(&tally(["inspect", &empty]).ok(), "weights").contains("none"));
    tally(["inspect", "--json", &empty]).json();
}

/// Names and values of a file must not reach the terminal as they are.
#[test]
fn nothing_for_the_terminal_to_obey() {
    let directory = Directory::new();
    let path = directory.file("model.gguf");
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", "\u{1b}[31m");
    metadata.set("\u{1b}[2Jkey", "value\u{1b}]0;title\u{7}");
    let spec = |name: &str| TensorSpec { name: name.into(), dtype: Dtype::F32, dims: vec![1] };
    let specs = [spec("blk.0.\u{1b}[8m.weight"), spec("\u{9b}1m"), spec("blk.1.other")];
    gguf::write(path.as_ref(), &metadata, &specs, |_, out| out.write_all(&f32::NAN.to_le_bytes()))
        .expect("written");
    let outcome = tally(["inspect", "--tensors", "--metadata", "--check", &path]);
    let bad = |c: char| c.is_control() && c != '\n';
    assert!(!outcome.stdout.contains(bad) && !outcome.stderr.contains(bad), "{outcome:?}");
}
