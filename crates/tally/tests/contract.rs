//! `tally contract`: the repository's own contracts, executed as CI does, and everything that must not pass.

mod process;

use std::fs;

use process::{Directory, Outcome, tally};
use serde_json::Value;

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn contract(args: &[&str]) -> Outcome {
    tally([&["contract"], args].concat())
}

/// With the repository's contracts, and evidence in a folder of the test.
fn executed(evidence: &str, args: &[&str]) -> Outcome {
    let place = ["--root", ROOT, "--evidence", evidence];
    contract(&[&args[..1], &place, &args[1..]].concat())
}

#[test]
fn the_committed_contracts_are_valid() {
    let out = contract(&["validate", "--root", ROOT]).ok();
    assert!(out.lines().last().is_some_and(|line| line.starts_with("0 errors, ")), "{out}");
    // `tally contract schema > contracts/contract.schema.json` writes it anew.
    let schema = contract(&["schema"]).json();
    let committed =
        fs::read_to_string(format!("{ROOT}/contracts/contract.schema.json")).expect("it is there");
    assert_eq!(
        serde_json::from_str::<Value>(&committed).expect("JSON"),
        schema,
        "contracts/contract.schema.json is old"
    );
}

/// Evidence that is committed was written by `tally contract run`, and what needs no GPU is there.
#[test]
fn the_committed_evidence_is_as_it_was_written() {
    let status = contract(&["status", "--root", ROOT, "--json"]).json();
    let contracts = status["contracts"].as_array().expect("a list");
    let falsifiers = contracts.iter().flat_map(|contract| contract["falsifiers"].as_array().expect("a list"));
    for falsifier in falsifiers.filter(|falsifier| falsifier["at_most"] == "algorithm-level") {
        assert_eq!(falsifier["status"], "algorithm-level", "`tally contract run` again? {falsifier:#}");
    }
}

/// What CI claims: everything that needs no GPU holds, and each of it was seen to fail. In half a minute of one processor.
#[test]
fn everything_that_needs_no_gpu_holds_and_can_fail() {
    let directory = Directory::new();
    let evidence = directory.file("evidence");
    let held = executed(&evidence, &["run"]).ok();
    let seconds = processor_seconds();
    assert!(seconds < 30.0, "{seconds} s");
    assert!(
        held.contains(" held, 0 refuted, ") && held.contains("-GPU-PARITY-001: not run: needs a GPU"),
        "{held}"
    );
    let noticed = executed(&evidence, &["run", "--planted"]).ok();
    assert!(noticed.contains(" noticed, 0 overlooked, "), "{noticed}");

    let status = executed(&evidence, &["status", "--json"]).json();
    let of = |id: &str| {
        let all = status["contracts"].as_array().expect("a list");
        all.iter()
            .find(|contract| contract["id"] == id)
            .unwrap_or_else(|| panic!("{id} is not there"))
            .clone()
    };
    for id in ["qwen3-moe-forward-v1", "gguf-reader-v1", "quantised-types-v1"] {
        let known = of(id);
        assert_eq!(known["status"], "algorithm-level", "{known:#}");
        let falsifiers = known["falsifiers"].as_array().expect("a list");
        assert!(falsifiers.iter().all(|falsifier| falsifier["seen_to_fail"].is_string()), "{known:#}");
        assert!(
            known["stages"].as_array().expect("a list").iter().all(|stage| stage[1] == true),
            "{known:#}"
        );
    }
    // Nothing is known of a GPU here, and that is what is said.
    let gpu = of("qwen3-moe-forward-gpu-v1");
    assert_eq!(gpu["status"], "proposed");
    assert!(gpu["falsifiers"].as_array().expect("a list").iter().all(|f| f["because"] == "never executed"));

    let ledger = executed(&evidence, &["status", "--md"]).ok();
    assert!(
        ledger.contains("## gguf-reader-v1: algorithm-level\n") && ledger.contains("- [x] hostile files"),
        "{ledger}"
    );
    assert!(ledger.contains("- [ ] bits"), "{ledger}");

    tampered_with(&evidence);
}

/// Processor time of all processes that this one waited for: unlike time on the wall it does not depend on who else works
/// on the machine.
fn processor_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: writes one `rusage`; all zeros is one, should it fail.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Evidence that somebody edited, and evidence of another arithmetic.
fn tampered_with(evidence: &str) {
    let file = format!("{evidence}/quantised-types-v1/FALSIFY-QUANT-DOT-001.ci.json");
    let text = fs::read_to_string(&file).expect("it was written");
    let known = |id: &str| -> Outcome { executed(evidence, &["status", id]) };
    fs::write(&file, text.replace("\"outcome\": \"passed\"", "\"outcome\": \"failed\"")).expect("writable");
    let outcome = known("quantised-types-v1");
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(
        outcome.stderr.contains("FALSIFY-QUANT-DOT-001.ci.json: edited since it was written"),
        "{outcome:?}"
    );
    assert!(outcome.stdout.starts_with("quantised-types-v1 (version 1): proposed\n"), "{outcome:?}");
    // Whoever computes the hash anew is believed: a seal is no signature. This is how evidence of other code looks.
    let other = sealed(&text, |record| record["arithmetic"] = "a16:0".into());
    fs::write(&file, other).expect("writable");
    let out = known("quantised-types-v1").ok();
    assert!(out.contains("stale") && out.contains("of another arithmetic, a16:0"), "{out}");
    fs::write(&file, sealed(&text, |record| record["outcome"] = "failed".into())).expect("writable");
    let out = known("quantised-types-v1").ok();
    assert!(out.starts_with("quantised-types-v1 (version 1): refuted\n"), "{out}");
}

/// The text of a record, changed and sealed again.
fn sealed(text: &str, change: impl FnOnce(&mut Value)) -> String {
    use sha2::{Digest, Sha256};
    let mut record: Value = serde_json::from_str(text).expect("JSON");
    change(&mut record);
    record.as_object_mut().expect("an object").shift_remove("hash");
    let pretty = serde_json::to_string_pretty(&record).expect("text");
    let body = pretty.strip_suffix("\n}").expect("an object");
    let hash: String = Sha256::digest(body.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{body},\n  \"hash\": \"{hash}\"\n}}\n")
}

/// The same checks on two devices of which one is the CPU's scalar code: what runs on a GPU is this, with another name.
#[test]
fn what_is_asked_for_by_name_must_run() {
    let directory = Directory::new();
    let evidence = directory.file("evidence");
    let outcome = executed(&evidence, &["run", "FALSIFY-QW3-MOE-GPU-PARITY-001"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stdout.contains("0 held, 0 refuted, 1 not run"), "{outcome:?}");
    assert!(
        outcome.stderr.starts_with("error: FALSIFY-QW3-MOE-GPU-PARITY-001 was not run: needs a GPU"),
        "{outcome:?}"
    );
    assert!(!fs::exists(&evidence).expect("readable"), "what did not run leaves no evidence");
    executed(&evidence, &["run", "FALSIFY-NOTHING"])
        .hinted()
        .fails(1, "there is no contract or falsifier `FALSIFY-NOTHING`");
}

const SMALL: &str = "\
id: small-v1
version: 1
governs: Something small.
invariants:
  - { id: equal, words: They are., formula: a = b }
falsifiers:
  - id: SMALL-001
    refutes: [equal]
    check: { name: agreement.types, parameters: { device: cpu-scalar, tokens: 3, types: [Q4_K, Q6_K] }, fault: type-misread }
    prediction: They are.
    if_it_fails: They are not.
  - id: SMALL-002
    refutes: [equal]
    check: { name: agreement.devices, parameters: { left: cpu, right: cpu-scalar, tokens: [5], generate: 1 }, fault: type-misread }
    prediction: They are.
    if_it_fails: They are not.
  - id: SMALL-003
    refutes: [equal]
    check: { name: agreement.repeats, parameters: { device: cpu, tokens: [1, 3], repeats: 5 }, fault: third-time }
    prediction: They are.
    if_it_fails: They are not.
  - id: SMALL-004
    refutes: [equal]
    check: { name: trace.observed, parameters: { device: cpu, tokens: 3 }, fault: disturbed }
    prediction: They are.
    if_it_fails: They are not.
";

/// A repository of one contract.
fn repository(directory: &Directory, text: &str) -> String {
    let root = directory.file("repository");
    fs::create_dir_all(format!("{root}/contracts")).expect("writable");
    fs::write(format!("{root}/contracts/small-v1.yaml"), text).expect("writable");
    root
}

/// What the GPU's falsifiers execute, here between two widths of the CPU: it holds, and notices the layer-6 story.
#[test]
fn checks_of_a_gpu_work_without_one() {
    let directory = Directory::new();
    let root = repository(&directory, SMALL);
    let held = contract(&["run", "--root", &root]).ok();
    assert!(held.contains("4 held, 0 refuted, 0 not run"), "{held}");
    let noticed = contract(&["run", "--planted", "--root", &root]).ok();
    assert!(noticed.contains("4 noticed, 0 overlooked, 0 not run"), "{noticed}");
    // A repository without evidence of something has a status all the same.
    let status = contract(&["status", "--root", &root, "--json"]).json();
    assert_eq!(status["contracts"][0]["status"], "algorithm-level");
}

#[test]
fn bad_contracts() {
    let directory = Directory::new();
    let check = |from: &str, to: &str, line: &str| {
        assert!(SMALL.contains(from), "{from}");
        let root = repository(&directory, &SMALL.replacen(from, to, 1));
        let outcome = contract(&["validate", "--root", &root]);
        assert_eq!(
            (outcome.code, outcome.stderr.as_str()),
            (Some(1), "error: 1 error, 0 warnings\n"),
            "{outcome:?}"
        );
        let want = format!("{root}/contracts/small-v1.yaml:{line}");
        assert!(
            outcome.stdout.starts_with(&want) && outcome.stdout.ends_with("\n1 error, 0 warnings\n"),
            "{want}: {outcome:?}"
        );
        // What is not valid is not run.
        contract(&["run", "--root", &root])
            .hinted()
            .fails(1, &format!("small-v1.yaml:{}", line.replacen(" error:", "", 1)));
    };
    check(
        "name: agreement.types",
        "name: agreement.tips",
        "9:20: error: unknown check `agreement.tips`; known are forward.finite",
    );
    check(
        "governs: Something small.",
        "governs: Something small.\nstatus: discharged",
        "4:1: error: a status is computed from evidence",
    );
    check(
        "tokens: 3, types",
        "tokens: -3, types",
        "9:79: error: `tokens` of check `agreement.types` is a count",
    );
    let empty = directory.file("empty");
    contract(&["validate", "--root", &empty]).hinted().fails(1, "contracts");
    fs::create_dir_all(format!("{empty}/contracts")).expect("writable");
    contract(&["run", "--root", &empty]).hinted().fails(1, "there is no contract in ");
}
