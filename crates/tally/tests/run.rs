//! `tally run`: the same text each time, why it ends, where what goes, and one line for whatever is wrong.

mod models;
mod process;

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use models::{ENDLESS_SHIPPED, break_a_scale, tiny};
use process::{Directory, Outcome, command, on_the_cpu, tally, tally_with};
use serde_json::Value;

/// `tally run` with `args`.
fn run(args: &[&str]) -> Outcome {
    tally(["run"].iter().chain(args))
}

/// The object that `tally run --json` prints with `args`.
fn record(args: &[&str]) -> Value {
    run(&[&["--json", "--quiet"], args].concat()).json()
}

/// The text of a run that succeeded, and the last line of standard error.
fn text(outcome: Outcome) -> (String, String) {
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let figures = outcome.stderr.lines().last().unwrap_or_default().to_owned();
    (outcome.stdout, figures)
}

#[test]
fn wrong_usage_names_the_range() {
    let check = |args: &[&str], want: &str| run(&[&["-p", "x"], args].concat()).fails(2, want);
    check(&["--temp", "-1"], "'-1' for '--temp <T>': it must be from 0 to 100");
    check(&["--temperature", "101"], "from 0 to 100");
    check(&["--temp", "NaN"], "from 0 to 100");
    check(&["--temp", "hot"], "not a number; it must be from 0 to 100");
    check(&["--top-p", "0"], "above 0 and at most 1");
    check(&["--min-p", "1"], "at least 0 and below 1");
    check(&["--top-k", "-1"], "'--top-k <K>'");
    check(&["--repeat-penalty", "0"], "above 0 and finite");
    check(&["--presence-penalty", "inf"], "finite");
    check(&["--seed", "18446744073709551616"], "it must be from 0 to 18446744073709551615, or `random`");
    check(&["--seed", "-1"], "it must be from 0 to 18446744073709551615, or `random`");
    check(&["--logit-bias", "5"], "write ID=VALUE");
    check(&["--max-tokens", "0"], "'0' for '--max-tokens <N>'");
    check(&["--ctx", "0"], "'0' for '--ctx <N>'");
    check(&["--stop", ""], "'--stop <STR>'");
    check(&["--activations", "a4"], "'--activations <KIND>'");
    check(&["--greedy", "--temp", "1"], "cannot be used with");
    check(&["--file", "x"], "cannot be used with");
    run(&[]).fails(2, "there is no prompt");
}

#[test]
fn bad_prompts() {
    let directory = Directory::new();
    let check = |args: &[&str], want: &str| run(args).hinted().fails(1, want);
    let (empty, latin) = (directory.file("empty"), directory.file("latin"));
    fs::write(&empty, "").expect("written");
    fs::write(&latin, b"caf\xe9").expect("written");
    check(&["-p", ""], "the prompt is empty");
    check(&["-"], "the prompt is empty");
    check(&["--file", &empty], "the prompt is empty");
    check(&["--file", &latin], "not UTF-8: byte 3");
    check(&["--file", &directory.file("none")], "cannot read the text: No such file");
    check(&["--file", directory.to_str().expect("UTF-8")], "a directory, not a text");
    tally_with(["run", "-"], b"ab\xff").fails(1, "standard input is not UTF-8: byte 2");
    // Too long for the context that was asked for, and for any that the model has.
    check(&["--raw", "--ctx", "3", "-p", "0 1 2 3 4 5 6 7 8 9"], "tokens, the context 3 positions");
    check(&["--raw", "-p", &"0 1 2 3 4 5 6 7 8 9 ".repeat(500)], "tokens, the context 2048 positions");
    check(
        &["--ctx", "2049", "-p", "x"],
        "--ctx 2049: the model that ships was made for at most 2048 positions",
    );
    check(&["--logit-bias", "4096=1", "-p", "x"], "token id 4096 is outside the vocabulary of 4096 tokens");
}

#[test]
fn bad_models() {
    let directory = Directory::new();
    let check = |model: &str, want: &str| run(&[model, "-p", "x"]).fails(1, want);
    check(&directory.file("none.gguf"), "cannot open: No such file");
    check(directory.to_str().expect("UTF-8"), "a directory, not a model file");
    let model = tiny(&directory, "m.gguf", true);
    let bytes = fs::read(&model).expect("just written");
    let cut = directory.file("cut.gguf");
    for (length, want) in
        [(0, "empty"), (3, "cut.gguf"), (bytes.len() / 2, "cut.gguf"), (bytes.len() - 64, "cut.gguf")]
    {
        fs::write(&cut, &bytes[..length]).expect("written");
        check(&cut, want);
    }
    models::edit(&model, &[("general.architecture", "llama")], |_, _| {});
    check(&model, "architecture `llama` is not supported (supported: qwen3, qwen3moe)");
}

#[test]
fn a_prompt_from_anywhere() {
    let directory = Directory::new();
    let file = directory.file("prompt");
    fs::write(&file, "fn main").expect("written");
    let end = ["--quiet", "--max-tokens", "8"];
    let want = run(&[&["-p", "fn main"], &end[..]].concat()).ok();
    assert!(!want.is_empty());
    assert_eq!(run(&[&["--file", &file], &end[..]].concat()).ok(), want);
    let piped = |args: &[&str]| tally_with([&["run"], args, &end[..]].concat(), b"fn main").ok();
    assert_eq!(piped(&["-"]), want);
    assert_eq!(piped(&["--prompt", "-"]), want, "-p - is standard input too");
}

#[test]
fn the_same_command_gives_the_same_text() {
    let prompt = ["--raw", "-p", "impl Iterator", "--temp", "1.5", "--max-tokens", "24"];
    let ids = |args: &[&str]| record(&[&prompt[..], args].concat())["ids"].clone();
    let want = ids(&[]);
    assert_eq!(want.as_array().map(Vec::len), Some(24), "{want}");
    for args in [&[][..], &["--seed", "0"], &["--threads", "1"], &["--threads", "3"], &["--ctx", "100"]] {
        assert_eq!(ids(args), want, "{args:?}");
    }
    for args in [&["--seed", "1"][..], &["--activations", "a8", "--seed", "1"], &["--top-k", "1"]] {
        assert_ne!(ids(args), want, "{args:?}");
    }
    assert_eq!(
        ids(&["--top-k", "1"]),
        record(&["--raw", "-p", "impl Iterator", "--greedy", "--max-tokens", "24"])["ids"]
    );
}

#[test]
fn why_a_text_ends() {
    let prompt = ["--raw", "--greedy", "-p", "//! This module"];
    let whole = record(&[&prompt[..], &ENDLESS_SHIPPED, &["--max-tokens", "24"]].concat());
    let check = |args: &[&str], end: &str, stop: Value| {
        let record = record(&[&prompt[..], args].concat());
        assert_eq!((&record["end"], &record["stop_string"]), (&end.into(), &stop), "{args:?}: {record}");
        record["text"].as_str().expect("a string").to_owned()
    };
    let text = check(&[&ENDLESS_SHIPPED[..], &["--max-tokens", "24"]].concat(), "max_tokens", Value::Null);
    assert_eq!(whole["text"], text);

    // Four characters from the middle, which may be there earlier; one string that never is.
    let middle: String = text.chars().skip(text.chars().count() / 2).take(4).collect();
    let before = text.split(&middle).next().expect("at least one part");
    let stopped = check(&["--stop", "\u{1}", "--stop", &middle], "stop_string", middle.as_str().into());
    assert_eq!(stopped, before);

    // Whatever comes third ends the text if nothing else may come.
    check(&["--logit-bias", "4095=1e9"], "end_of_text", Value::Null);
    let positions = whole["prompt_ids"].as_array().expect("an array").len() + 3;
    let positions = positions.to_string();
    let args = [&ENDLESS_SHIPPED[..], &["--ctx", &positions]].concat();
    let full = check(&args, "context_full", Value::Null);
    assert!(text.starts_with(&full) && !full.is_empty(), "{full:?}");
}

#[test]
fn text_on_one_side_figures_on_the_other() {
    let args = ["--raw", "-p", "fn main", "--max-tokens", "5"];
    let (printed, figures) = text(run(&args));
    let record = record(&args);
    assert_eq!(record["text"], printed);
    let prompt = record["prompt_ids"].as_array().expect("an array").len();
    for part in [
        &format!("prompt {prompt} tokens, "),
        "generated 5 tokens, ",
        " tok/s",
        "first token after ",
        "peak memory ",
        "seed 0",
        "stopped at --max-tokens",
    ] {
        assert!(figures.contains(part), "{part:?} not in {figures:?}");
    }
    let numbers = &record["figures"];
    assert_eq!((&numbers["prompt_tokens"], &numbers["generated_tokens"]), (&prompt.into(), &5.into()));
    assert!(numbers["peak_resident_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{numbers}");
    assert_eq!(record["sampling"]["temperature"], 0.7);
    assert_eq!(run(&[&args[..], &["--quiet"]].concat()).ok(), printed, "quiet on standard error, too");
    let (_, figures) = text(run(&[&args[..], &["--greedy"]].concat()));
    assert!(figures.contains("; greedy; "), "{figures:?}");
}

#[test]
fn a_model_without_template_says_so() {
    let directory = Directory::new();
    let model = tiny(&directory, "m.gguf", false);
    let args = [&model, "-p", "ab", "--max-tokens", "3"];
    let raw = record(&[&args[..], &["--raw"]].concat());
    assert_eq!(raw["prompt_ids"], serde_json::json!([97, 98]));
    assert_eq!(record(&args)["ids"], raw["ids"]);
    let outcome = run(&args);
    assert!(
        outcome.stderr.starts_with("note: ") && outcome.stderr.contains("has no chat template"),
        "{outcome:?}"
    );
    run(&[&args[..], &["--system", "be brief"]].concat()).fails(1, "there is no chat template");
}

#[test]
fn the_file_recommends_and_the_command_decides() {
    let directory = Directory::new();
    let model = tiny(&directory, "m.gguf", false);
    let file = gguf::File::open(model.as_ref()).expect("a model");
    let mut metadata = file.metadata().clone();
    metadata.set("general.sampling.temp", 0.25f32);
    metadata.set("general.sampling.top_k", 7i32);
    let check = |args: &[&str], name: &str, want: Value| {
        let record = record(&[&[&model, "--raw", "-p", "a", "--max-tokens", "1"], args].concat());
        assert_eq!(record["sampling"][name], want, "{args:?}");
    };
    check(&[], "temperature", 0.7.into());
    models::write_metadata(&model, &metadata);
    check(&[], "temperature", 0.25.into());
    check(&[], "top_k", 7.into());
    check(&[], "top_p", 0.8.into());
    check(&["--temp", "2"], "temperature", 2.0.into());
    check(&["--greedy"], "temperature", 0.0.into());
    metadata.set("general.sampling.temp", f32::NAN);
    models::write_metadata(&model, &metadata);
    run(&[&model, "--raw", "-p", "a"]).fails(1, "temperature is NaN; it must be from 0 to 100");
}

#[test]
fn weights_that_are_no_numbers() {
    let directory = Directory::new();
    let model = tiny(&directory, "m.gguf", true);
    break_a_scale(&model);
    let outcome = run(&[&model, "-p", "x"]);
    assert!(outcome.stderr.contains(" hint: `tally inspect --check`"), "{outcome:?}");
    outcome.fails(3, "the model computed no numbers: 300 NaN and 0 infinite among 300 logits");
}

#[test]
fn a_closed_pipe_ends_the_text() {
    let args = [&["run", "--raw", "-p", "fn main"][..], &ENDLESS_SHIPPED].concat();
    let mut child = command()
        .args(on_the_cpu(args))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary was built");
    let mut first = [0; 10];
    // Reading some of it, as `head -c 10` does, and leaving.
    child.stdout.take().expect("piped").read_exact(&mut first).expect("ten bytes of text");
    let outcome = Outcome::from(child.wait_with_output().expect("the binary runs"));
    outcome.fails(141, "standard output was closed");
}

#[test]
fn ctrl_c_ends_the_text_and_prints_its_figures() {
    let args = [&["run", "--raw", "-p", "fn main"][..], &ENDLESS_SHIPPED].concat();
    let mut child = command()
        .args(on_the_cpu(args))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary was built");
    child.stdout.as_mut().expect("piped").read_exact(&mut [0; 10]).expect("ten bytes of text");
    // SAFETY: a signal to a child that was not waited for yet, so the id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    let output = child.wait_with_output().expect("the binary runs");
    // Of the signal itself, which a shell calls exit code 130.
    assert_eq!(output.status.signal(), Some(libc::SIGINT), "{output:?}");
    let outcome = Outcome::from(output);
    let figures = outcome.stderr.lines().last().unwrap_or_default();
    assert!(figures.starts_with("prompt ") && figures.ends_with("; interrupted"), "{outcome:?}");
}
