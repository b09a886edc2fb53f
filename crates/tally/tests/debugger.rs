//! `tally trace`, `bisect`, `replay` and `faults`: what they write, what they name, exit codes by verdict.

mod models;
mod process;

use std::fs;

use models::{break_a_scale, tiny};
use process::{Directory, tally};
use serde_json::{Value, json};

const PROMPT: [&str; 2] = ["--ids", "1,2,3,4,5"];

#[test]
fn a_trace_and_what_is_compared_with_it() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let trace = directory.file("trace");
    let run = |command: &str, model: &str, rest: &[&str]| {
        tally([command, model].into_iter().chain(PROMPT).chain(rest.iter().copied()))
    };
    let text = run("trace", &model, &["--out", &trace]).ok();
    assert!(text.contains("buffers of 1 step"), "{text}");
    let manifest = fs::read_to_string(format!("{trace}/manifest.json")).unwrap();
    let value: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!((&value["format"], &value["inside"]), (&"tally-trace".into(), &true.into()));
    assert_eq!(value["prompt_ids"], serde_json::json!([1, 2, 3, 4, 5]));

    let dump = format!("dump:{trace}");
    let sides = |right: &str| ["--left".to_owned(), "cpu-scalar".into(), "--right".into(), right.into()];
    let against = |model: &str, right: &str, more: &[&str]| {
        let sides = sides(right);
        let rest: Vec<&str> = sides.iter().map(String::as_str).chain(more.iter().copied()).collect();
        run("bisect", model, &rest)
    };
    for right in ["cpu", dump.as_str(), "oracle"] {
        let text = against(&model, right, &[]).ok();
        assert!(text.contains(&format!("cpu-scalar and {right} agree in all")), "{text}");
    }

    // Weights that are no numbers: another model, until the dump does not say so.
    let broken = tiny(&directory, "broken.gguf", false);
    break_a_scale(&broken);
    let refused = against(&broken, &dump, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("a trace of another model") && refused.stderr.contains("hint:"),
        "{refused:?}"
    );
    let anonymous: String = manifest.lines().filter(|line| !line.contains("\"fingerprint\"")).collect();
    fs::write(format!("{trace}/manifest.json"), anonymous).unwrap();
    let out = directory.file("out");
    let found = against(&broken, &dump, &["--out", &out]);
    assert_eq!(found.code, Some(3), "{found:?}");
    let report: Value =
        serde_json::from_str(&fs::read_to_string(format!("{out}/report.json")).unwrap()).unwrap();
    assert_eq!(
        (&report["outcome"], &report["finding"]["class"]["kind"]),
        (&"non_finite".into(), &"local".into())
    );
    assert!(
        report["command"].as_str().is_some_and(|c| c.starts_with("tally bisect ")),
        "{}",
        report["command"]
    );
    assert!(found.stdout.contains("NaN left"), "{found:?}");
}

#[test]
fn filters_and_statistics() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let trace = directory.file("trace");
    let run = |rest: &[&str]| {
        tally(
            ["trace", model.as_str(), "--out", trace.as_str()]
                .into_iter()
                .chain(PROMPT)
                .chain(rest.iter().copied()),
        )
    };
    run(&["--stats", "--layers", "0", "--stages", "moe_router,moe_ffn_out"]).ok();
    let manifest: Value =
        serde_json::from_str(&fs::read_to_string(format!("{trace}/manifest.json")).unwrap()).unwrap();
    let entries = manifest["entries"].as_array().unwrap();
    // What the router writes, and what the down projection does, its inside first.
    assert_eq!(entries.len(), 4 + 2, "{entries:?}");
    assert!(entries.iter().all(|e| e["layer"] == 0 && e["stats"]["nan"] == 0), "{entries:?}");
    assert!(manifest["steps"][0].get("file").is_none());
    // Under the names, too, by which they were asked for.
    let aliases: Vec<&Value> = entries.iter().filter_map(|e| e["aliases"].as_array()).flatten().collect();
    assert!(["moe_router", "moe_ffn_out"].iter().all(|name| aliases.contains(&&json!(name))), "{aliases:?}");
    for beyond in [["--layers", "0,99"], ["--positions", "5"], ["--experts", "0-99"]] {
        let refused = run(&beyond);
        assert!(refused.code == Some(2) && refused.stderr.contains("there is no"), "{refused:?}");
    }
    assert_eq!(
        run(&["--layers", "0", "--experts", "0", "--positions", "4", "--stages", "qkv"]).code,
        Some(0)
    );
    assert_eq!(run(&["--stages", "kqv"]).code, Some(2));
    // Statistics cannot stand in for a side.
    run(&["--stats"]).ok();
    let dump = format!("dump:{trace}");
    let bisect = ["bisect", model.as_str(), "--left", "cpu", "--right", dump.as_str()];
    let refused = tally(bisect.into_iter().chain(PROMPT));
    assert!(refused.code == Some(1) && refused.stderr.contains("statistics alone"), "{refused:?}");
}

#[test]
fn the_story_by_its_command() {
    let text = tally(["faults", "--only", "one-kernel-for-all-types"]).ok();
    assert!(text.contains("`blk.2.ffn_down_exps.weight` (Q4_K)"), "{text}");
    assert!(text.ends_with("1 of 1 faults named exactly.\n"), "{text}");
    assert_eq!(tally(["faults", "--only", "none"]).code, Some(2));
}

/// No fault: no finding. The scalar code stands against the vectors, and a GPU's kernels, here on the emulator, against
/// the CPU; with a fault in the kernels the same command finds it in every model that it touches.
#[test]
fn without_a_fault_nothing_is_found() {
    let directory = Directory::new();
    let text = tally(["faults", "--random", "8"]).ok();
    assert!(
        text.starts_with("8 random models on cpu-scalar and cpu: ") && text.ends_with(" 0 findings\n"),
        "{text}"
    );
    for conflict in [["--only", "nan-in-router"], ["--random", "0"]] {
        assert_eq!(tally(["faults", "--random", "1"].into_iter().chain(conflict)).code, Some(2));
    }
    if !emulator() {
        return;
    }
    let run = |count: &str, rest: &[&str]| {
        let all = ["faults", "--random", count, "--device", "emulated", "--json", "--kernel-cache", CACHE];
        tally(all.into_iter().chain(rest.iter().copied()))
    };
    let clean: Value = serde_json::from_str(&run("2", &[]).ok()).expect("JSON");
    assert_eq!(
        (&clean["models"], &clean["kinds"], &clean["ways"], &clean["findings"]),
        (&json!(2), &json!(2), &json!(12), &json!([])),
        "{clean}"
    );
    let edited = directory.file("edited");
    tally(["faults", "--in-kernels", "--only", "kernel-rotated-backwards", "--write", &edited]).ok();
    let found = run("1", &["--kernels", &edited]);
    assert_eq!(found.code, Some(4), "{found:?}");
    let found: Value = serde_json::from_str(&found.stdout).expect("JSON");
    let verdict = found["findings"][0]["verdict"].as_str();
    assert!(verdict.is_some_and(|text| text.contains("rope_store")), "{found}");

    // How to see it again names the kernels that it takes.
    let (model, out) = (tiny(&directory, "model.gguf", false), directory.file("found"));
    let with = ["--kernels", edited.as_str(), "--kernel-cache", CACHE];
    let bisect = ["bisect", &model, "--right", "emulated", "--scenarios", "whole", "--out", &out];
    assert_eq!(tally(bisect.into_iter().chain(with).chain(PROMPT)).code, Some(4));
    let report = tally(["report", out.as_str()]).ok();
    assert!(
        report.contains(&format!("reproduction.safetensors --device emulated --kernels {edited}")),
        "{report}"
    );
    let reproduction = format!("{out}/reproduction.safetensors");
    let replay = |rest: &[&str]| {
        tally(["replay", &reproduction, "--device", "emulated"].into_iter().chain(rest.iter().copied())).code
    };
    assert_eq!((replay(&with), replay(&with[2..])), (Some(4), Some(0)));
}

/// Where tests of the emulator keep what was compiled.
const CACHE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/emulated");

/// Whether the emulator's compiler is there.
fn emulator() -> bool {
    let there = std::process::Command::new("g++").arg("--version").output().is_ok();
    if !there {
        assert!(std::env::var_os("CI_NEEDS_NVRTC").is_none(), "CI runs every kernel, but there is no g++");
        println!("did not run: there is no g++ for the emulator");
    }
    there
}

/// Faults in the kernels themselves, on the emulator: the story, and one that shows in logits alone.
#[test]
fn faults_in_kernels_are_named() {
    if !emulator() {
        return;
    }
    let only = "kernel-down-read-as-q6-k,kernel-head-one-ulp-high";
    let text =
        tally(["faults", "--in-kernels", "--device", "emulated", "--only", only, "--kernel-cache", CACHE])
            .ok();
    assert!(
        text.contains("`blk.2.ffn_down_exps.weight` (Q4_K)") && text.contains("`output.weight`"),
        "{text}"
    );
    assert!(text.ends_with("2 of 2 faults named exactly.\n"), "{text}");
    // One of them as a side, on a model of its own.
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let side = "faulty:kernel-rotated-backwards@emulated";
    let bisect = ["bisect", &model, "--right", side, "--scenarios", "whole", "--kernel-cache", CACHE];
    let found = tally(bisect.into_iter().chain(PROMPT));
    assert!(found.code == Some(4) && found.stderr.contains("layer 0 rope_store"), "{found:?}");
    // Kernels need a device that has them, and a fault is in kernels or it is not.
    tally(["faults", "--in-kernels"]).fails(2, "faults in kernels need kernels");
    tally(["faults", "--only", only]).fails(2, "add --in-kernels");
}

#[test]
fn replay_refuses_what_is_no_reproduction() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    for path in [model, directory.file("absent")] {
        let refused = tally(["replay", path.as_str()]);
        assert!(refused.code == Some(1) && refused.stderr.contains(&path), "{refused:?}");
    }
}
