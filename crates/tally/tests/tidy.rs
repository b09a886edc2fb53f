//! What the documents claim to have evidence for: the file is there, it tells of a success, and the kernels are still the
//! ones that it was made with.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
const DOCUMENTS: [&str; 3] = ["README.md", "BENCH.md", "ARCHITECTURE.md"];
/// Where evidence lies, as documents name it.
const FOLDER: &str = "evidence/";

/// The evidence that a document names, by file name.
fn named(document: &str) -> BTreeSet<&str> {
    let of_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let after = document.split(FOLDER).skip(1);
    let names = after.map(|rest| &rest[..rest.find(|c| !of_name(c)).unwrap_or(rest.len())]);
    names.filter(|name| name.ends_with(".json")).collect()
}

/// What is wrong with the evidence that `document` names, a line each.
fn complaints(document: &str, folder: &Path, kernels: &str) -> Vec<String> {
    let check =
        |name: &&str| complaint(&folder.join(name), kernels).map(|why| format!("{FOLDER}{name}: {why}"));
    named(document).iter().filter_map(check).collect()
}

fn complaint(file: &Path, kernels: &str) -> Option<String> {
    let Ok(text) = fs::read_to_string(file) else { return Some("there is no such file".into()) };
    let Ok(record) = serde_json::from_str::<Value>(&text) else { return Some("not JSON".into()) };
    let of_text = ["what", "outcome", "command", "gpu", "driver", "nvrtc", "kernel_hash", "date"];
    if let Some(key) = of_text.iter().find(|&&key| !record[key].is_string()) {
        return Some(format!("no `{key}`"));
    }
    if !record["figures"].is_object() || record.get("model_hash").is_none() {
        return Some("no `figures`, or no `model_hash`".into());
    }
    if record["outcome"] != "passed" {
        return Some(format!("the run {}", record["outcome"]));
    }
    // What ran without a GPU does not depend on kernels.
    let stale = record["gpu"] != "none" && record["kernel_hash"] != kernels;
    stale.then(|| "was made with other kernels: run tools/gpu/session.sh again".into())
}

#[test]
fn claims_have_evidence() {
    let folder = Path::new(ROOT).join(FOLDER);
    for name in DOCUMENTS {
        let document = fs::read_to_string(Path::new(ROOT).join(name)).expect("the document is there");
        let complaints = complaints(&document, &folder, &cuda::source_hash());
        assert!(complaints.is_empty(), "{name}:\n{}", complaints.join("\n"));
    }
}

#[test]
fn names_in_a_document() {
    let check = |document: &str, want: &[&str]| {
        assert_eq!(named(document), want.iter().copied().collect(), "{document}")
    };
    check("", &[]);
    check("see evidence/README.md and the folder evidence/", &[]);
    check("[so](evidence/gpu-tests.json), `evidence/a_1.json`.", &["gpu-tests.json", "a_1.json"]);
    check("evidence/x.json", &["x.json"]);
    check("../evidence/x.json evidence/x.json", &["x.json"]);
}

#[test]
fn bad_evidence_is_noticed() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tidy-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("cargo's directory for tests can be written");
    let good = json!({
        "what": "w", "outcome": "passed", "command": "c", "gpu": "g", "driver": "13.0", "nvrtc": "13.0",
        "kernel_hash": "k", "model_hash": null, "date": "d", "figures": {},
    });
    let check = |key: &str, value: Value, want: &str| {
        let mut record = good.clone();
        record[key] = value;
        fs::write(folder.join("e.json"), record.to_string()).expect("writable");
        let found = complaints("a claim (evidence/e.json)", &folder, "k");
        assert!(
            if want.is_empty() { found.is_empty() } else { found.len() == 1 && found[0].contains(want) },
            "{found:?}"
        );
    };
    check("what", "another".into(), "");
    check("kernel_hash", "old".into(), "other kernels");
    check("gpu", "none".into(), "");
    check("outcome", "failed".into(), "the run \"failed\"");
    check("gpu", Value::Null, "no `gpu`");
    check("figures", Value::Null, "no `figures`");
    fs::write(folder.join("e.json"), "{").expect("writable");
    assert_eq!(complaints("evidence/e.json", &folder, "k"), ["evidence/e.json: not JSON"]);
    assert_eq!(complaints("evidence/none.json", &folder, "k"), ["evidence/none.json: there is no such file"]);
    let _ = fs::remove_dir_all(folder);
}
