//! `tally tokenize` and `detokenize`: ids in every form, texts from every place, and back.

mod process;

use std::path::Path;

use process::{Directory, tally, tally_with};
use serde_json::{Value, json};

/// A vocabulary of 300 tokens whose first 256 are the bytes.
fn vocabulary(directory: &Directory) -> String {
    directory.synth("model.gguf", "tiny-moe", &["--vocab", "300", "--layers", "1"])
}

#[test]
fn forms_of_ids() {
    let directory = Directory::new();
    let model = vocabulary(&directory);
    let check = |args: &[&str], input: &str, want: &str| {
        let found = tally_with(["tokenize", &model].iter().chain(args), input.as_bytes()).ok();
        assert_eq!(found, want, "{args:?}");
    };
    check(&["hi"], "", "104 105\n");
    check(&["-"], "hi\n", "104 105 10\n");
    check(&[], "hi", "104 105\n");
    check(&[""], "", "\n");
    check(&["--json", "hi"], "", "[104,105]\n");
    check(&["--json", ""], "", "[]\n");
    check(&["a<|im_end|>"], "", "97 299\n");
    check(&["--as-text", "|<|im_end|>", "--json"], "", "[124,60,124,105,109,95,101,110,100,124,62]\n");
    check(
        &["--pieces", "é<|im_end|>\n"],
        "",
        concat!(
            " id  text\n",
            "195  \"\\xc3\"\n",
            "169  \"\\xa9\"\n",
            "299  \"<|im_end|>\"\n",
            " 10  \"\\n\"\n",
        ),
    );
    check(&["--pieces", "--json", "a"], "", "[{\"id\":97,\"text\":\"a\"}]\n");
    // A text that looks like an option.
    check(&["--", "-h"], "", "45 104\n");
}

#[test]
fn and_back() {
    let directory = Directory::new();
    let model = vocabulary(&directory);
    let check = |args: &[&str], input: &str, want: &str| {
        let found = tally_with(["detokenize", &model].iter().chain(args), input.as_bytes()).ok();
        assert_eq!(found, want, "{args:?}");
    };
    check(&["104", "105"], "", "hi");
    check(&["104 105,10"], "", "hi\n");
    check(&["-"], "[104,105]\n", "hi");
    check(&[], "299 195 169", "<|im_end|>é");
    check(&[], "", "");
    check(&["195"], "", "\u{FFFD}");
    check(&["--json", "104", "34"], "", "\"h\\\"\"\n");
}

#[test]
fn bad_ids_and_texts() {
    let directory = Directory::new();
    let model = vocabulary(&directory);
    tally(["detokenize", &model, "300"])
        .hinted()
        .fails(1, "token id 300 is outside the vocabulary of 300 tokens");
    tally(["detokenize", &model, "1", "x"]).fails(1, "`x` is no token id");
    tally(["detokenize", &model, "--", "-1"]).fails(1, "`-1` is no token id");
    tally(["detokenize", &model, "4294967296"]).fails(1, "`4294967296` is no token id");
    tally_with(["tokenize", &model, "-"], b"ab\xFF").fails(1, "standard input is not UTF-8: byte 2 ");
    let small = directory.synth("small.gguf", "tiny-moe", &["--vocab", "100", "--layers", "1"]);
    tally(["tokenize", &small, "x"]).fails(1, "small.gguf: metadata key \"tokenizer.ggml.model\" is missing");
}

/// llama.cpp's vocabulary file for Qwen2, which has no tensors, and its expected ids.
#[test]
fn a_real_vocabulary() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let read = |name| std::fs::read_to_string(data.join(name));
    let (Ok(texts), Ok(ids)) = (read("qwen2-vocab.inp"), read("qwen2-vocab.out")) else {
        eprintln!("did not run: ../shared/data is not there");
        return;
    };
    let model = data.join("qwen2-vocab.gguf").to_str().expect("UTF-8").to_owned();
    let pairs: Vec<_> = texts.split("\n__ggml_vocab_test__\n").zip(ids.lines()).collect();
    assert!(pairs.len() > 40, "{} texts", pairs.len());
    // A text a process is slow: some of all sorts.
    for (text, ids) in pairs.into_iter().step_by(8) {
        let found = tally_with(["tokenize", &model, "--as-text", "--json", "-"], text.as_bytes()).json();
        let want: Vec<u32> = ids.split_whitespace().map(|id| id.parse().expect("an id")).collect();
        assert_eq!(found, json!(want), "{text:?}");
        let back: Value = tally_with(["detokenize", &model, "--json"], ids.as_bytes()).json();
        assert_eq!(back, json!(text));
    }
}
