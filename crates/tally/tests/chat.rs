//! `tally chat` on a pipe: turns over one cache are what fresh runs would be, and nothing ends it before its input.

mod models;
mod process;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};

use models::{ENDLESS_SHIPPED, ENDLESS_TINY, break_a_scale, tiny};
use process::{Directory, Outcome, command, tally, tally_with};

/// `tally chat` with `args` and lines to say; answers end with the line, so that each is one.
fn chat(args: &[&str], lines: &str) -> Outcome {
    tally_with([&["chat", "--stop", "\n"], args].concat(), lines.as_bytes())
}

/// The answers of a chat that succeeded, and what it said besides.
fn answers(outcome: Outcome) -> (Vec<String>, String) {
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    (outcome.stdout.lines().map(str::to_owned).collect(), outcome.stderr)
}

/// A chat with pipes that stay open.
fn spawn(args: &[&str]) -> Child {
    let mut command = command();
    command
        .args(process::on_the_cpu([&["chat"], args].concat()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().expect("the binary was built")
}

fn say(child: &mut Child, line: &str) {
    child.stdin.as_mut().expect("piped").write_all(line.as_bytes()).expect("it is listening");
}

#[test]
fn a_later_turn_is_what_a_fresh_run_would_be() {
    let args = ["--temp", "1.2", "--max-tokens", "12", "--seed", "3"];
    let (said, _) = answers(chat(&args, "What is a String?\nfn main() {\nAnd a slice?\n"));
    assert_eq!(said.len(), 3, "{said:?}");
    // The template of the model that ships is ChatML, spelled out here; with --raw control tokens are parsed.
    let turn = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
    let prompt = [
        turn("user", "What is a String?"),
        turn("assistant", &said[0]),
        turn("user", "fn main() {"),
        turn("assistant", &said[1]),
        turn("user", "And a slice?"),
        "<|im_start|>assistant\n".to_owned(),
    ];
    let fresh =
        tally([&["run", "--raw", "--quiet", "--stop", "\n", "-p", &prompt.concat()][..], &args].concat());
    assert_eq!(fresh.ok(), said[2]);
    // Threads share the work otherwise, and change nothing.
    let (one, _) = answers(chat(
        &[&args[..], &["--threads", "1"]].concat(),
        "What is a String?\nfn main() {\nAnd a slice?\n",
    ));
    assert_eq!(one, said);
}

#[test]
fn the_beginning_is_computed_once_and_forgotten_on_demand() {
    let (said, notes) =
        answers(chat(&["--max-tokens", "6"], "Hello\n/stats\nHello\n/stats\n/reset\n/stats\nHello\n"));
    assert_eq!(said.len(), 3);
    assert_eq!(said[0], said[2], "a new conversation begins like the first");
    let figures: Vec<_> = notes.lines().filter(|line| line.starts_with("last answer: ")).collect();
    assert_eq!(figures.len(), 2, "{notes}");
    assert!(!figures[0].contains("cached") && figures[1].contains(" cached), "), "{figures:?}");
    let turns: Vec<_> =
        notes.lines().filter_map(|line| line.split_once(';')).map(|(turns, _)| turns).collect();
    for want in ["turns 1", "turns 2", "turns 0"] {
        assert!(turns.contains(&want), "{want}: {notes}");
    }
}

#[test]
fn messages_of_many_lines_and_commands() {
    let check = |lines: &str, same_as: &str| {
        let args = ["--system", "Answer briefly.", "--max-tokens", "8"];
        assert_eq!(answers(chat(&args, lines)).0, answers(chat(&args, same_as)).0, "{lines:?}");
    };
    check("fn main() {\\\n}\n", "\"\"\"\nfn main() {\n}\n\"\"\"\n");
    check("fn main() {\\\n}", "\"\"\"fn main() {\n}");
    check("\n\nHello\n/exit\nHello\n", "Hello\n");
    let (said, notes) = answers(chat(&["--max-tokens", "2"], "/help\n/nothing\n"));
    assert!(said.is_empty() && notes.contains("/reset  forget the conversation"), "{notes}");
    assert!(notes.contains("there is no command \"/nothing\""), "{notes}");
}

#[test]
fn a_full_context_is_said_and_survived() {
    let long = format!("{}\n", "word ".repeat(80));
    let (said, notes) = answers(chat(&["--ctx", "64", "--max-tokens", "4"], &format!("{long}Hello\n")));
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        notes.contains("not sent: with this message the conversation has ") && notes.contains("/reset"),
        "{notes}"
    );
    assert_eq!(said, answers(chat(&["--max-tokens", "4"], "Hello\n")).0, "as if it had not been said");

    let endless = tally_with([&["chat", "--ctx", "64"][..], &ENDLESS_SHIPPED].concat(), b"Hello\n");
    assert!(endless.stderr.contains("the context of 64 positions is full; /reset"), "{endless:?}");
}

#[test]
fn what_cannot_be_talked_to() {
    let directory = Directory::new();
    let check = |model: &str, code, want| tally_with(["chat", model], b"Hello\n").fails(code, want);
    check(&directory.file("none.gguf"), 1, "cannot open: No such file");
    check(&tiny(&directory, "raw.gguf", false), 1, "there is no chat template in the file");
    let model = tiny(&directory, "m.gguf", true);
    break_a_scale(&model);
    check(&model, 3, "the model computed no numbers");
    models::edit(&model, &[("tokenizer.chat_template", "{{ raise_exception('no users') }}")], |_, _| {});
    check(&model, 1, "the chat template refuses the conversation: no users");
    models::edit(&model, &[("tokenizer.chat_template", "{% if %}")], |_, _| {});
    check(&model, 1, "m.gguf: chat template: ");
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let mut child = spawn(&ENDLESS_SHIPPED);
    say(&mut child, "Hello\n");
    child.stdout.as_mut().expect("piped").read_exact(&mut [0; 10]).expect("the answer has begun");
    // SAFETY: a signal to a child that was not waited for yet, so the id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    say(&mut child, "/stats\n");
    let outcome = Outcome::from(child.wait_with_output().expect("the binary runs"));
    let notes: Vec<_> = outcome.stderr.lines().collect();
    assert_eq!((outcome.code, notes[0]), (Some(0), "interrupted"), "{outcome:?}");
    assert!(notes[1].starts_with("turns 1; "), "{outcome:?}");
}

#[test]
fn a_model_cut_short_in_use_is_one_line() {
    let directory = Directory::new();
    let model = tiny(&directory, "m.gguf", true);
    let mut child = spawn(&[&[model.as_str(), "--max-tokens", "2"][..], &ENDLESS_TINY].concat());
    say(&mut child, "Hello\n");
    // The first answer is out: the file is open and mapped.
    BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut String::new()).expect("an answer");
    OpenOptions::new().write(true).open(&model).and_then(|file| file.set_len(4096)).expect("cut");
    say(&mut child, "Hello again\n");
    let outcome = Outcome::from(child.wait_with_output().expect("the binary runs"));
    assert_eq!(outcome.code, Some(74), "{outcome:?}");
    let lines: Vec<_> = outcome.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(lines.len() == 1 && lines[0].contains("cut short"), "{outcome:?}");
}
