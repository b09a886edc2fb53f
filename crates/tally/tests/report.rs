//! `tally report`: what a directory of a bisection or a trace is drawn into, and what it is refused for.

mod models;
mod process;

use std::fs;

use models::tiny;
use process::{Directory, Outcome, tally};
use serde_json::Value;

fn report(args: &[&str]) -> Outcome {
    tally(["report"].iter().chain(args))
}

/// A trace and a bisection against double precision, of a model of two layers.
fn both(directory: &Directory) -> [String; 2] {
    let model = tiny(directory, "model.gguf", false);
    let (trace, bisection) = (directory.file("trace"), directory.file("bisection"));
    tally(["trace", &model, "--ids", "5,6,7", "--device", "cpu", "--out", &trace]).ok();
    tally([
        "bisect",
        &model,
        "--ids",
        "5,6,7",
        "--right",
        "oracle",
        "--scenarios",
        "whole",
        "--out",
        &bisection,
    ])
    .ok();
    [trace, bisection]
}

#[test]
fn a_trace_and_a_bisection() {
    let directory = Directory::new();
    let [trace, bisection] = both(&directory);

    let text = report(&[&trace]).ok();
    assert!(text.starts_with("A run, watched\nAll "), "{text}");
    assert!(text.ends_with(&format!("\n{trace}/report.html\n")), "{text}");
    let page = fs::read_to_string(format!("{trace}/report.html")).expect("written");
    assert!(page.starts_with("<!doctype html>") && page.contains("<h1>A run, watched</h1>"), "{page:.300}");

    let text = report(&[&bisection]).ok();
    assert!(text.starts_with("No difference\ncpu and oracle agree in all "), "{text}");
    let line = |name: &str| {
        text.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_else(|| panic!("{text}"))
    };
    let heads: Vec<_> = line("layer").split_whitespace().collect();
    assert_eq!(
        &heads[..8],
        ["layer", "qkv", "rope_store", "attend", "attn_out", "route", "experts_up", "experts_down"]
    );
    // Against double precision, nothing is equal but all is within its bound.
    let cells: Vec<_> = line("0").split_whitespace().skip(1).take(7).collect();
    assert!(cells.iter().all(|cell| cell.starts_with('~')), "{cells:?}");

    // A page beside it does not keep a trace from being written anew.
    let model = directory.file("model.gguf");
    tally(["trace", &model, "--ids", "5,6", "--device", "cpu", "--out", &trace]).ok();
}

#[test]
fn json_and_no_page() {
    let directory = Directory::new();
    let [trace, bisection] = both(&directory);
    let view = report(&[&bisection, "--json", "--no-html"]).json();
    assert_eq!((&view["tone"], &view["layers"]), (&"agree".into(), &2.into()));
    let cells = view["runs"][0]["steps"][0]["cells"].as_array().expect("cells");
    assert_eq!(cells.len(), 2 * 17 + 2);
    assert!(
        cells.iter().all(|cell| cell["status"] == "match" && cell["spread"]["left"]["bins"].is_array()),
        "{view}"
    );
    let routing = &view["runs"][0]["steps"][0]["routing"];
    assert!(
        routing
            .as_array()
            .is_some_and(|layers| layers.len() == 2 && layers[1]["rows"][2]["left"]["margin"].is_f64())
    );
    let view = report(&[&trace, "--json", "--no-html"]).json();
    assert_eq!(view["sides"].as_array().map(Vec::len), Some(1));
    let values = |view: &Value| {
        view["types"]["kinds"]
            .as_array()
            .and_then(|kinds| kinds.iter().find(|row| row["kind"] == "attn_v").cloned())
    };
    assert!(
        values(&view).is_some_and(|row| row["layers"].as_array().is_some_and(|of| of.len() == 2)),
        "{view}"
    );
    for dir in [trace, bisection] {
        assert!(!fs::exists(format!("{dir}/report.html")).expect("readable"), "{dir}");
    }
}

/// What is no number survives being written down and read again, bounds that it breaks included.
#[test]
fn values_that_are_no_numbers() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    models::break_a_scale(&model);
    let check = |right: &str, code: i32, cell: &str| {
        let out = directory.file(right);
        let args =
            ["bisect", &model, "--ids", "5,6,7", "--right", right, "--scenarios", "whole", "--out", &out];
        let outcome = tally(args);
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        let text = report(&[&out]).ok();
        assert!(text.contains(cell), "{text}");
    };
    check("cpu-scalar", 3, "NaN both <");
    check("oracle", 3, "NaN both <");
    let out = directory.file("trace");
    tally(["trace", &model, "--ids", "5,6,7", "--device", "cpu", "--out", &out]);
    let text = report(&[&out]).ok();
    assert!(
        text.starts_with("Not finite\nThe first buffer that is not finite is `x` after layer 1 attn_out"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_drawn() {
    let directory = Directory::new();
    let [trace, bisection] = both(&directory);
    let path = format!("{bisection}/report.json");
    let good = fs::read_to_string(&path).expect("written");
    let check = |text: &str, message: &str| {
        fs::write(&path, text).expect("writable");
        report(&[&bisection]).hinted().fails(1, message);
    };
    check("", "report.json: EOF");
    check(&good[..good.len() / 2], "report.json: EOF");
    check("{}", "report.json: not a bisection's report");
    check(&good.replacen("\"version\":1", "\"version\":9", 1), "version 9, where 1 is known");
    check(&good.replacen("\"step\":0", "\"step\":7", 1), "step 7");
    check(
        &good.replacen("\"layer\":1,\"stage\":\"qkv\"", "\"layer\":99999,\"stage\":\"qkv\"", 1),
        "no such place",
    );
    let manifest = format!("{trace}/manifest.json");
    let text = fs::read_to_string(&manifest).expect("written").replace("\"layer\": 1,", "\"layer\": 99999,");
    fs::write(&manifest, text).expect("writable");
    report(&[&trace]).hinted().fails(1, "manifest.json: layer 99999");
    let empty = directory.file("empty");
    fs::create_dir(&empty).expect("writable");
    report(&[&empty]).hinted().fails(1, "neither a bisection nor a trace");
    report(&[&directory.file("none")]).hinted().fails(1, "none: ");
    report(&[&path]).hinted().fails(1, "report.json: ");
}
