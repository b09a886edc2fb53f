//! `tally bench`: every row with every sample, figures that follow from the samples, memory that is the model's own.

mod process;

use process::{Directory, command, tally};
use serde_json::Value;

/// Runs with `args` after the model and parses what it prints.
fn bench(model: &str, args: &[&str]) -> Value {
    tally(["bench", model, "--json"].iter().chain(args)).json()
}

/// Equal up to the last digits, which serde_json does not read exactly.
#[track_caller]
fn near(found: &Value, want: f64) {
    let value = found.as_f64().expect("a number");
    assert!((value - want).abs() <= 1e-14 * want, "{value} is not {want}");
}

fn floats(values: &Value) -> Vec<f64> {
    values.as_array().expect("an array").iter().map(|value| value.as_f64().expect("a number")).collect()
}

#[test]
fn rows_and_samples() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-moe", &[]);
    let check = |args: &[&str], repeats: usize, want: &[(&str, u64, u64)]| {
        let report = bench(&model, args);
        let rows = report["rows"].as_array().expect("rows");
        let key = |row: &Value| {
            let number = |key: &str| row[key].as_u64().expect("a number");
            (row["test"].as_str().expect("a name").to_owned(), number("tokens"), number("depth"))
        };
        let found: Vec<_> = rows.iter().map(key).collect();
        let want: Vec<_> =
            want.iter().map(|&(test, tokens, depth)| (test.to_owned(), tokens, depth)).collect();
        assert_eq!(found, want, "{args:?}");
        for row in rows {
            check_row(row, repeats, &report);
        }
        // Before each row, and after the last.
        assert_eq!(floats(&report["bandwidth"]["passes"]).len(), 8 * (want.len() + 1));
    };
    let twice = ["--repeat", "2"];
    let sweep = ["--prompt", "8,3", "--generate", "5", "--depth", "70,0,70"];
    check(
        &[&sweep[..], &twice].concat(),
        2,
        &[("prompt", 8, 0), ("prompt", 3, 0), ("generate", 5, 0)]
            .into_iter()
            .chain([("prompt", 8, 70), ("prompt", 3, 70), ("generate", 5, 70)])
            .collect::<Vec<_>>(),
    );
    check(
        &["--prompt", "0", "--generate", "1,2", "--depth", "0", "--repeat", "1"],
        1,
        &[("generate", 1, 0), ("generate", 2, 0)],
    );
    check(
        &["--prompt", "4", "--generate", "0", "--depth", "1", "--repeat", "3", "--activations", "a8"],
        3,
        &[("prompt", 4, 1)],
    );
}

#[test]
fn streams_generate_together() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-dense", &["--layers", "1"]);
    let args = ["--prompt", "3", "--generate", "2", "--batch", "5,1,5", "--depth", "65,0", "--repeat", "2"];
    let report = bench(&model, &args);
    let rows = report["rows"].as_array().expect("rows");
    let found: Vec<_> = rows.iter().map(|row| (&row["test"], &row["batch"], &row["depth"])).collect();
    let want = |depth: u64| [("prompt", 1, depth), ("generate", 1, depth), ("generate", 5, depth)];
    let want: Vec<(Value, Value, Value)> =
        [0, 65].into_iter().flat_map(want).map(|(t, b, d)| (t.into(), b.into(), d.into())).collect();
    assert_eq!(found, want.iter().map(|(t, b, d)| (t, b, d)).collect::<Vec<_>>());
    rows.iter().for_each(|row| check_row(row, 2, &report));
    let per_token = |row: &Value| row["bandwidth"]["bytes_per_token"].as_f64().expect("a number");
    // A dense model's weights are read once for all five; each reads its own keys and values, and its embedding's row.
    let (one, five) = (per_token(&rows[1]), per_token(&rows[2]));
    let own = report["model"]["kv_bytes_per_position"].as_f64().expect("a number") * 1.5;
    assert!(five > own + (one - own) / 5.0 && five < one / 4.0, "{one} {five}");
}

#[test]
fn where_it_ran_and_how_long_it_loaded() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-dense", &["--layers", "1"]);
    let report = bench(
        &model,
        &["--prompt", "1", "--generate", "0", "--depth", "0", "--repeat", "1", "--threads", "2"],
    );
    assert_eq!((&report["device"], &report["machine"]["threads"]), (&"cpu".into(), &2.into()), "{report:#}");
    let seconds = report["load_seconds"].as_f64().expect("a number");
    assert!((1e-6..60.0).contains(&seconds), "{seconds}");
}

/// Speeds are those of the samples, and the bound is what the model's bytes make of them.
fn check_row(row: &Value, repeats: usize, report: &Value) {
    let [tokens, batch] = ["tokens", "batch"].map(|key| row[key].as_f64().expect("a number"));
    let mut speeds: Vec<_> = floats(&row["seconds"]).iter().map(|seconds| tokens * batch / seconds).collect();
    speeds.sort_unstable_by(f64::total_cmp);
    assert!(speeds.len() == repeats && speeds[0] > 0.0, "{row}");
    let median = (speeds[(repeats - 1) / 2] + speeds[repeats / 2]) / 2.0;
    for (key, want) in [("median", median), ("min", speeds[0]), ("max", speeds[repeats - 1])] {
        near(&row["tokens_per_second"][key], want);
    }
    let bound = &row["bandwidth"];
    assert_eq!(bound.is_null(), row["test"] == "prompt", "{row}");
    if !bound.is_null() {
        let of_model = |key: &str| report["model"][key].as_f64().expect("a number");
        let positions = row["depth"].as_f64().expect("a number") + (tokens + 1.0) / 2.0;
        let bytes = of_model("weight_bytes_per_token") + positions * of_model("kv_bytes_per_position");
        if batch == 1.0 {
            near(&bound["bytes_per_token"], bytes);
        }
        let bytes = bound["bytes_per_token"].as_f64().expect("a number");
        let best = floats(&report["bandwidth"]["passes"]).into_iter().fold(0.0, f64::max);
        // A compiler that drops the reading makes a pass take nanoseconds: no memory reads 100 TB/s, or 1 MB/s.
        assert!((1e6..1e14).contains(&best), "{best}");
        near(&report["bandwidth"]["bytes_per_second"], best);
        near(&bound["bytes_per_second"], bytes * median);
        near(&bound["fraction"], bytes * median / best);
    }
}

#[test]
fn memory_is_the_models_own() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-moe", &[]);
    let report = bench(&model, &["--prompt", "4", "--generate", "2", "--depth", "0", "--repeat", "1"]);
    let Some(peak) = report["peak_resident_bytes"].as_u64() else {
        eprintln!(
            "NOT RUN: this system does not tell peak memory, or cannot forget it (/proc/self/clear_refs)"
        );
        return;
    };
    let (size, buffer) = (report["model"]["bytes"].as_u64(), report["bandwidth"]["bytes_per_pass"].as_u64());
    // The weights were touched; the memory whose bandwidth was measured does not count.
    assert!(Some(peak) > size && Some(peak) < buffer.map(|bytes| bytes / 2), "{report:#}");
}

#[test]
fn for_people_and_for_documents() {
    let directory = Directory::new();
    // Without a tokenizer: random ids need none.
    let model = directory.synth("model.gguf", "tiny-dense", &["--vocab", "100"]);
    let args = ["--prompt", "2", "--generate", "2", "--depth", "0,9", "--repeat", "1", "--threads", "1"];
    let print = |format: &[&str]| tally(["bench", &model].iter().chain(&args).chain(format)).ok();
    let (text, markdown) = (print(&[]), print(&["--md"]));
    let rows = |text: &str, begin: &str| text.lines().filter(|line| line.starts_with(begin)).count();
    for begin in ["prompt ", "generate "] {
        assert_eq!(rows(&text, begin), 2, "{text}");
        assert_eq!(rows(&markdown, &format!("| {begin}")), 2, "{markdown}");
    }
    assert_eq!(rows(&markdown, "| ---"), 1, "{markdown}");
    for fact in ["tiny-dense", "1 thread,", "a16", "GB/s"] {
        let fact = if fact == "tiny-dense" { "qwen3, 6 layers, 3." } else { fact };
        assert!(text.contains(fact) && markdown.contains(fact), "{fact}: {text}{markdown}");
    }
}

#[test]
fn bad_input() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-moe", &["--context", "100"]);
    let check = |args: &[&str], code, message| tally(["bench"].iter().chain(args)).fails(code, message);
    check(&["nowhere.gguf"], 1, "nowhere.gguf");
    check(
        &[&model, "--prompt", "70", "--depth", "0,31"],
        1,
        "70 tokens at depth 31 go beyond the model's 100",
    );
    check(&[&model, "--prompt", "0,0", "--generate", "0"], 2, "nothing to measure");
    check(&[&model, "--repeat", "0"], 2, "'--repeat <N>'");
    check(&[&model, "--depth", "-1"], 2, "'-1'");
    check(&[&model, "--json", "--md"], 2, "cannot be used with");
    check(&[&model, "--batch", "0"], 2, "'--batch <N,..>'");
    let short = ["--prompt", "1", "--generate", "0", "--depth", "0"];
    check(
        &[&[model.as_str(), "--stages"], &short[..]].concat(),
        2,
        "--stages takes apart the steps of a GPU",
    );
}

#[test]
fn a_closed_pipe() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-moe", &["--layers", "1"]);
    for format in ["--md", "--json"] {
        let (reader, writer) = std::io::pipe().expect("pipes");
        drop(reader);
        let args =
            ["bench", &model, "--prompt", "1", "--generate", "0", "--depth", "0", "--repeat", "1", format];
        let output =
            command().args(process::on_the_cpu(args)).stdout(writer).output().expect("the binary runs");
        process::Outcome::from(output).fails(141, "standard output was closed");
    }
}
