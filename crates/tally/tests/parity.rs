//! `tally parity`: exit codes by verdict, the counts of finite logits before any of them, the first difference by its
//! bits.

mod models;
mod process;

use models::{break_a_scale, tiny};
use process::{Directory, Outcome, tally, tally_with};
use serde_json::Value;

fn parity(args: &[&str]) -> Outcome {
    tally(["parity"].iter().chain(args))
}

/// The report of a run that ends with `code`, whatever it says on standard error.
#[track_caller]
fn record(args: &[&str], code: i32) -> Value {
    let outcome = parity(&[args, &["--json"]].concat());
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:?}"))
}

const SCALAR: [&str; 4] = ["--left", "cpu", "--right", "cpu-scalar"];
const ORACLE: [&str; 4] = ["--left", "cpu", "--right", "oracle"];

#[test]
fn all_bits_agree() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let args = [&[model.as_str(), "-p", "some text", "--generate", "5"], &SCALAR[..]].concat();
    let text = parity(&args).ok();
    assert!(text.ends_with("\nall bits agree: 1,800 logits of 6 steps\n"), "{text}");
    for side in ["cpu", "cpu-scalar"] {
        let block = format!("  {side:<10}  total 300, finite 300, nan 0, inf 0, finite_min -");
        assert_eq!(text.matches(&block).count(), 1, "{text}");
    }
    let report = record(&args, 0);
    assert_eq!(
        (&report["verdict"], &report["prompt_ids"].as_array().map(Vec::len)),
        (&"equal".into(), &Some(9))
    );
    let steps = report["steps"].as_array().expect("steps");
    assert_eq!(steps.len(), 6);
    // Each step feeds what the left held for the likeliest.
    for pair in steps.windows(2) {
        assert_eq!(pair[1]["token"], pair[0]["left"]["top"]["id"]);
    }
    let equal = |step: &Value| {
        step["bits_equal"] == true && step["differing"] == 0 && step["max_abs"]["value"] == 0.0
    };
    assert!(steps.iter().all(equal), "{report:#}");
    assert_eq!(
        (&report["left"]["device"], &report["right"]["facts"]["isa"]),
        (&"cpu".into(), &"scalar".into())
    );
}

#[test]
fn a_mismatch_has_its_place_and_its_size() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let args = [&[model.as_str(), "--ids", "1,2,3"], &ORACLE[..]].concat();
    let outcome = parity(&args);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(
        outcome.stderr.starts_with("error: prompt: ")
            && outcome.stderr.contains("of 300 logits differ between cpu and oracle")
    );
    let report = record(&args, 4);
    assert_eq!(report["verdict"], "mismatch");
    let step = &report["steps"][0];
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} is no number"));
    assert!(
        number(&step["cosine"]) > 0.9999 && number(&step["nmse"]) < 1e-6 && number(&step["kl"]) < 1e-6,
        "{step:#}"
    );
    let first = &step["first"];
    let bits =
        |key: &str| u32::from_str_radix(first[key].as_str().expect("hexadecimal"), 16).expect("hexadecimal");
    for (value, bits) in [("left", bits("left_bits")), ("right", bits("right_bits"))] {
        assert_eq!(number(&first[value]) as f32, f32::from_bits(bits), "{first}");
    }
    let line = format!("the first at {}: ", first["index"]);
    assert!(
        outcome.stdout.contains(&line) && outcome.stdout.contains(first["left_bits"].as_str().expect("text"))
    );
}

#[test]
fn numbers_that_are_none_are_counted_before_the_verdict() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    break_a_scale(&model);
    // Both are the same NaNs, which is no success.
    for sides in [SCALAR, ORACLE] {
        let args = [&[model.as_str(), "--ids", "1,2,3", "--generate", "4"], &sides[..]].concat();
        let outcome = parity(&args);
        assert_eq!(outcome.code, Some(3), "{outcome:?}");
        let block = "total 300, finite 0, nan 300 (first at 0), inf 0, finite_min none, finite_max none";
        assert_eq!(outcome.stdout.matches(block).count(), 2, "{outcome:?}");
        let verdict = "error: prompt: 300 of 300 logits of cpu and 300 of ";
        assert!(outcome.stderr.starts_with(verdict), "{outcome:?}");
        let report = record(&args, 3);
        assert_eq!(
            (&report["verdict"], &report["steps"][0]["left"]["nan_first"]),
            (&"non-finite".into(), &0.into())
        );
        // Nothing can follow a prompt without a number.
        assert_eq!(report["steps"].as_array().map(Vec::len), Some(1));
    }
}

#[test]
fn prompts_from_everywhere() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let file = directory.file("prompt.txt");
    std::fs::write(&file, "ab").expect("writable");
    let ids = |outcome: Outcome| outcome.json()["prompt_ids"].clone();
    let want: Value = vec![97, 98].into();
    let args = |more: &[&'static str]| [&["parity", "MODEL"], more, &SCALAR[..], &["--json"]].concat();
    let run = |more: &[&'static str], input: &[u8]| {
        let args = args(more).into_iter().map(|arg| match arg {
            "MODEL" => model.as_str(),
            "FILE" => file.as_str(),
            other => other,
        });
        ids(tally_with(args.collect::<Vec<_>>(), input))
    };
    assert_eq!(run(&["-p", "ab"], b""), want);
    assert_eq!(run(&["--ids", "97,98"], b""), want);
    assert_eq!(run(&["--file", "FILE"], b""), want);
    assert_eq!(run(&["-"], b"ab"), want);
    // Ids need no vocabulary in the file.
    let bare = directory.synth("bare.gguf", "tiny-dense", &["--vocab", "100"]);
    assert_eq!(
        record(&[&[bare.as_str(), "--ids", "99"], &SCALAR[..]].concat(), 0)["prompt_ids"],
        Value::from(vec![99])
    );
}

#[test]
fn bad_input() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-moe", &["--vocab", "300", "--context", "10"]);
    let check = |args: &[&str], code, message| {
        parity(&[&[model.as_str()], &SCALAR[..], args].concat()).fails(code, message);
    };
    check(&[], 2, "there is no prompt");
    check(&["--ids", "300"], 1, "token id 300 is outside the vocabulary of 300 tokens");
    check(&["--ids", "1,x"], 2, "'--ids <ID,..>'");
    check(&["--ids", "1", "-p", "x"], 2, "cannot be used with");
    check(
        &["--ids", "1,2", "--generate", "9"],
        1,
        "11 tokens, of a model that was made for at most 10 positions",
    );
    parity(&["nowhere.gguf", "--ids", "1"]).fails(1, "nowhere.gguf");
    parity(&[&model, "--ids", "1", "--left", "gpu"])
        .fails(2, "expected cpu, cpu-scalar, cuda, cuda:N, emulated, emulated:80 or oracle");
}

#[test]
fn layers_by_stages() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let args = [&[model.as_str(), "--ids", "1,2,3", "--layers"], &SCALAR[..]].concat();
    let text = parity(&args).ok();
    let heading = "layer  qkv           rope_store    attend        attn_out      route         experts_up    experts_down\n";
    assert!(text.contains(heading), "{text}");
    assert!(text.contains("\n1      match         match  ") && !text.contains("diverge"), "{text}");
    let report = record(&args, 0);
    let cells = report["layers"]["cells"].as_array().expect("cells");
    assert!(cells.len() > 20 && cells.iter().all(|cell| cell["status"] == "match"), "{report:#}");
    // Against double precision stages are held to bounds, and logits to bits.
    let args = [&[model.as_str(), "--ids", "1,2,3", "--layers"], &ORACLE[..]].concat();
    assert_eq!(record(&args, 4)["layers"]["first_divergence"], Value::Null);
}

#[test]
fn a_sweep_compares_in_many_ways() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let few = ["--sweep", "--longest", "9", "--streams", "3", "--repeats", "3"];
    let args = [&[model.as_str()], &few[..], &SCALAR[..]].concat();
    let text = parity(&args).ok();
    for line in
        ["length    9 tokens  ", "position  position 2  ", "batch     3 sequences  ", "cut       3 tokens  "]
    {
        assert!(text.contains(line), "{line}: {text}");
    }
    for line in
        ["cpu-scalar looked at | cpu-scalar replayed", "repeat    3 tokens 3 times", "\nall bits agree: "]
    {
        assert!(text.contains(line), "{line}: {text}");
    }
    let report = record(&args, 0);
    let trials = report["trials"].as_array().expect("trials");
    assert!(trials.iter().all(|trial| trial["figures"]["differing"] == 0), "{report:#}");
    let args = [&[model.as_str(), "--axes", "length"], &few[..], &ORACLE[..]].concat();
    let outcome = parity(&args);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.stderr.starts_with("error: length, 1 token: "), "{outcome:?}");
    assert!(outcome.stdout.contains(" DIFFER  cpu | oracle"), "{outcome:?}");
    assert_eq!(record(&args, 4)["verdict"], "mismatch");
    // What makes its own prompts takes none, and nothing compared is no success.
    assert_eq!(parity(&[&args[..], &["--ids", "1"]].concat()).code, Some(2));
    let none = [&[model.as_str(), "--axes", "cut", "--sweep", "--longest", "2"], &SCALAR[..]].concat();
    assert!(parity(&none).stderr.contains("nothing was compared"));
}
