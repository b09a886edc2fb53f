//! `tally synth`: the same bytes whatever the threads, shapes as asked for, nothing left behind.

mod process;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use process::{Directory, command, tally};
use serde_json::{Value, json};

/// FNV-1a in 64 bits.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[test]
fn one_file_for_a_seed() {
    let directory = Directory::new();
    let make = |args: &[&str]| {
        let path = directory.synth("model.gguf", "tiny-moe", args);
        fs::read(path).expect("written")
    };
    let [one, two, nine] = ["1", "2", "9"].map(|threads| make(&["--threads", threads]));
    assert!(one == two && one == nine, "the number of threads shows");
    // The bytes of crates/synth/tests/fill.rs in a file: a change here changes every synthetic model in use.
    assert_eq!(format!("{:#018x}", hash(&one)), "0x991994741012e9da");
    assert!(one != make(&["--seed", "2"]), "the seed does not show");
    assert_eq!(directory.names(), ["model.gguf"]);
}

#[test]
fn shapes_as_asked_for() {
    let directory = Directory::new();
    let check = |shape, args: &[&str], want: Value| {
        let path = directory.synth("model.gguf", shape, args);
        let report = tally(["inspect", "--json", &path]).json();
        for (key, value) in want.as_object().expect("a table") {
            let found = report.get(key).unwrap_or(&report["config"][key]);
            assert_eq!(found, value, "{shape} {args:?}: {key} of {report:#}");
        }
    };
    let sizes: Vec<&str> =
        "--layers 3 --hidden 64 --heads 2 --kv-heads 1 --head-dim 32 --vocab 300 --context 128"
            .split(' ')
            .collect();
    let want = json!({ "layers": 3, "hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "vocab": 300,
                       "context": 128, "file_type": "Q4_K_M", "architecture": "qwen3moe" });
    check("qwen3-30b-a3b", &[&sizes[..], &["--experts", "4", "--experts-used", "2"]].concat(), want);
    check(
        "tiny-moe",
        &["--experts-used", "3"],
        json!({ "experts": 8, "experts_used": 3, "expert_width": 256 }),
    );
    check("tiny-dense", &["--width", "96", "--type", "q8_0"], json!({ "width": 96, "file_type": "Q8_0" }));
    check("tiny-dense", &["--type", "BF16"], json!({ "file_type": "BF16", "architecture": "qwen3" }));
}

#[test]
fn bad_shapes() {
    let directory = Directory::new();
    let out = directory.file("model.gguf");
    let check = |args: &[&str], code, message| {
        tally(["synth", args[0], &out].iter().chain(&args[1..])).fails(code, message);
        assert_eq!(directory.names(), [""; 0], "{args:?}");
    };
    check(&["tiny"], 2, "'tiny'");
    check(&["tiny-moe", "--type", "Q9"], 2, "'Q9'");
    check(&["tiny-moe", "--seed", "-1"], 2, "'-1'");
    check(&["tiny-moe", "--threads", "0"], 2, "0 is not in 1..=1024");
    check(&["tiny-moe", "--vocab", "4000000000"], 2, "4000000000 is not in 1..=16777216");
    check(&["tiny-moe", "--layers", "0"], 1, "`qwen3moe.block_count`: 0 is out of range");
    check(&["tiny-moe", "--head-dim", "48"], 1, "a multiple of 32 up to 256");
    check(&["tiny-moe", "--kv-heads", "3"], 1, "a divisor of the head count");
    check(&["tiny-moe", "--experts-used", "9"], 1, "no more than the expert count");
    check(&["tiny-moe", "--width", "64"], 1, "--width does not apply: the shape is a mixture of experts");
    check(&["tiny-dense", "--experts", "8"], 1, "--experts does not apply: the shape is dense");
}

#[test]
fn bad_places() {
    let directory = Directory::new();
    fs::write(directory.join("file"), "kept").expect("writable");
    let check = |out: &str, code, message| {
        tally(["synth", "tiny-moe", out]).fails(code, message);
        assert_eq!(directory.names(), ["file"], "{out}");
    };
    check(&directory.file(""), 1, "a directory");
    check(&directory.file("nowhere/model.gguf"), 1, "cannot create: No such file or directory");
    check(&directory.file("file/model.gguf"), 1, "cannot create: Not a directory");
    check("/dev/null", 1, "not a regular file");
    check("/proc/model.gguf", 1, "cannot create");
    assert_eq!(fs::read(directory.join("file")).expect("still there"), b"kept");
}

/// A limit on the size of files stands in for a full disk; the old file stays.
#[test]
fn no_room() {
    let directory = Directory::new();
    let out = directory.file("model.gguf");
    fs::write(&out, "kept").expect("writable");
    let script = format!("ulimit -f 100 && exec '{}' synth tiny-moe '{out}'", env!("CARGO_BIN_EXE_tally"));
    let outcome = Command::new("sh").args(["-c", &script]).output().expect("there is a shell");
    process::Outcome::from(outcome).fails(1, "File too large");
    assert_eq!(directory.names(), ["model.gguf"]);
    assert_eq!(fs::read(&out).expect("still there"), b"kept");
}

#[test]
fn interrupted() {
    for (name, signal) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        let directory = Directory::new();
        // Three gigabytes: more than gets written until the signal arrives.
        let mut child = command()
            .args(["synth", "qwen3-30b-a3b", &directory.file("model.gguf"), "--layers", "8"])
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary was built");
        let start = Instant::now();
        while directory.names().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(60), "nothing is being written");
            std::thread::sleep(Duration::from_millis(1));
        }
        let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status();
        assert!(sent.expect("there is a kill").success());
        let status = child.wait().expect("it ends");
        assert_eq!((status.signal(), directory.names()), (Some(signal), vec![]), "{name}");
    }
}
