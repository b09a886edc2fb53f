//! Bad input to every command that reads a model or prints: one line, a hint, an exit code, nothing left behind.

mod process;

use std::fs;
use std::process::Stdio;

use process::{Directory, Outcome, command, tally};

/// The commands that read a model file, with what they need beside it.
const READERS: [&[&str]; 6] = [
    &["inspect", "MODEL"],
    &["inspect", "--check", "--json", "MODEL"],
    &["tokenize", "MODEL", "x"],
    &["detokenize", "MODEL", "1"],
    &["quantize", "MODEL", "OUT", "Q8_0"],
    &["quantize", "MODEL", "MODEL", "Q8_0"],
];

#[test]
fn files_that_are_no_models() {
    let directory = Directory::new();
    let whole = fs::read(directory.synth("whole.gguf", "tiny-moe", &["--layers", "1"])).expect("written");
    let model = directory.file("model.gguf");
    let out = directory.file("out.gguf");
    let check = |bytes: Option<&[u8]>, message: &str| {
        match bytes {
            Some(bytes) => fs::write(&model, bytes).expect("writable"),
            None => drop(fs::remove_file(&model)),
        }
        let before = directory.names();
        for args in READERS {
            let args = args.iter().map(|&arg| match arg {
                "MODEL" => &model,
                "OUT" => &out,
                other => other,
            });
            tally(args).fails(1, message);
            assert_eq!(directory.names(), before, "{message}");
        }
    };
    check(None, "model.gguf: cannot open: No such file or directory");
    check(Some(b""), "model.gguf: the file is empty");
    check(Some(b"GG"), "model.gguf: ");
    check(Some(b"version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer?");
    check(Some(&whole[..100]), "which the 84 bytes that follow cannot hold");
    check(Some(&whole[..whole.len() / 2]), "truncated?");
    fs::remove_file(&model).expect("there");
    fs::create_dir(&model).expect("writable");
    for args in READERS {
        let args = args.iter().map(|&arg| if arg == "MODEL" { &model } else { arg });
        tally(args.map(|arg| if arg == "OUT" { &out } else { arg }))
            .fails(1, "a directory, not a model file");
    }
}

/// Commands that print more than a line, with `MODEL` for a path.
const PRINTERS: [&[&str]; 6] = [
    &["inspect", "MODEL"],
    &["inspect", "--json", "MODEL"],
    &["tokenize", "MODEL", "text"],
    &["tokenize", "--pieces", "MODEL", "text"],
    &["detokenize", "MODEL", "104"],
    &["completions", "bash"],
];

fn print_to(stdout: impl Into<Stdio>, args: &[&str], model: &str) -> Outcome {
    let args = args.iter().map(|&arg| if arg == "MODEL" { model } else { arg });
    let mut command = command();
    command.args(args).stdin(Stdio::null()).stdout(stdout);
    command.output().expect("the binary runs").into()
}

#[test]
fn a_closed_pipe() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-moe", &["--layers", "1"]);
    for args in PRINTERS {
        let (reader, writer) = std::io::pipe().expect("pipes");
        drop(reader);
        print_to(writer, args, &model).fails(141, "standard output was closed");
    }
}

#[test]
fn a_full_disk_to_print_to() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-moe", &["--layers", "1"]);
    for args in PRINTERS {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has one");
        print_to(full, args, &model).fails(1, "cannot write to standard output: No space left on device");
    }
}

#[test]
fn usage() {
    for args in
        [&[][..], &["no-such-command"], &["inspect"], &["quantize", "a"], &["completions", "no-shell"]]
    {
        let outcome = tally(args);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{args:?}: {outcome:?}");
    }
    for command in ["inspect", "quantize", "synth", "tokenize", "detokenize", "completions"] {
        let help = tally([command, "--help"]).ok();
        assert!(help.contains("Examples:\n  tally "), "{command}: {help}");
        let wide = help.lines().find(|line| line.chars().count() > 100);
        assert_eq!(wide, None, "{command}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(tally(["completions", shell]).ok().contains("detokenize"), "{shell}");
    }
}
