//! `--device`: said when it was chosen, refused when it is missing, the same text wherever it computes.

mod models;
mod process;

use models::tiny;
use process::{Directory, Outcome, command, tally};

/// Runs where there is no GPU: those of this machine, if it has any, are hidden in the way that their driver offers.
fn without_gpu(args: &[&str]) -> Outcome {
    let output = command().args(args).env("CUDA_VISIBLE_DEVICES", "").output().expect("the binary runs");
    output.into()
}

#[test]
fn auto_says_what_it_chose_and_why() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let text = directory.file("text.txt");
    std::fs::write(&text, "a text of some length, twice: a text of some length").expect("writable");
    let check = |args: &[&str]| {
        let outcome = without_gpu(args);
        let first = outcome.stderr.lines().next().unwrap_or_default();
        let reasons = ["no CUDA driver", "no GPU"];
        let told = |reason: &&str| first.starts_with("device: cpu (") && first.contains(*reason);
        assert!(outcome.code == Some(0) && reasons.iter().any(told), "{outcome:?}");
        assert_eq!(outcome.stderr.matches("device:").count(), 1, "{outcome:?}");
    };
    check(&["run", &model, "--raw", "-p", "x", "--max-tokens", "1"]);
    check(&["run", &model, "--raw", "-p", "x", "--max-tokens", "1", "--device", "auto", "--json"]);
    check(&["bench", &model, "--prompt", "1", "--generate", "0", "--depth", "0", "--repeat", "1"]);
    check(&["perplexity", &model, &text, "--ctx", "8"]);
    check(&["chat"]);
    let quiet = without_gpu(&["run", &model, "--raw", "-p", "x", "--max-tokens", "1", "--quiet"]);
    assert_eq!((quiet.code, quiet.stderr.as_str()), (Some(0), ""), "{quiet:?}");
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_with_a_hint() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    for device in ["cuda", "cuda:0", "cuda:9"] {
        let outcome = without_gpu(&["run", &model, "--raw", "-p", "x", "--device", device]);
        assert!(
            outcome.stderr.contains("\n hint: ") && outcome.stderr.contains("--device cpu"),
            "{outcome:?}"
        );
        let missing = if outcome.stderr.contains("libcuda") { "no CUDA driver" } else { "there is no GPU" };
        outcome.fails(1, missing);
    }
    // Where devices are sides, there is no `--device` to advise.
    for command in [&["bisect"][..], &["parity"], &["parity", "--sweep"]] {
        let prompt: &[&str] = if command.len() == 1 { &["-p", "x"] } else { &[] };
        let outcome = without_gpu(&[command, &[&model], prompt].concat());
        assert!(outcome.stderr.contains("emulated") && !outcome.stderr.contains("--device"), "{outcome:?}");
    }
}

#[test]
fn devices_that_do_not_exist() {
    for device in ["gpu", "cuda:", "cuda:x", "oracle", ""] {
        tally(["run", "-p", "x", "--device", device])
            .fails(2, "expected auto, cpu, cuda, cuda:N or emulated");
    }
}

#[test]
fn json_names_the_device() {
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let record = tally(["run", &model, "--raw", "-p", "x", "--max-tokens", "1", "--json", "--quiet"]).json();
    assert_eq!(record["device"], "cpu");
}
