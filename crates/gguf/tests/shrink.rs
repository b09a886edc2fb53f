//! A file cut short under its map: the process says so and exits with 74. This test has its own `main`, since
//! it must see a process die.

mod raw;

use std::fs;
use std::path::Path;
use std::process::Command;

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("--guarded") => {
            gguf::exit_on_shrink().unwrap();
            read_beyond_the_end("guarded.gguf");
        }
        Some("--bare") => read_beyond_the_end("bare.gguf"),
        // The arguments of the test runner, a filter among them, change nothing about the one test here.
        _ => check(),
    }
}

/// Opens a file with a tensor a few pages long, cuts it to its first page, and reads on.
fn read_beyond_the_end(name: &str) {
    let floats = 1 << 16;
    let mut bytes = raw::file(3, &[], &[raw::tensor("t", &[floats], raw::F32, 0)], 1);
    bytes.resize(bytes.len() + 4 * (1 << 16), 0);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, bytes).unwrap();

    let file = gguf::File::open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    file.check_unchanged().expect_err("the length has changed");
    let data = &file.tensors()[0].data;
    println!("read {:?}", data.last());
}

fn check() {
    let run = |argument| Command::new(std::env::current_exe().unwrap()).arg(argument).output().unwrap();

    let guarded = run("--guarded");
    assert_eq!(guarded.status.code(), Some(74), "{guarded:?}");
    assert_eq!(
        String::from_utf8_lossy(&guarded.stderr),
        "error: a mapped model file was cut short, or its disk failed, while it was in use; restore it and retry\n"
    );
    assert_eq!(guarded.stdout, b"");

    // Without the guard the same read must kill the process, or the above shows nothing.
    let bare = run("--bare");
    assert_eq!(bare.status.code(), None, "{bare:?}");
    println!("a file cut short under its map: ok");
}
