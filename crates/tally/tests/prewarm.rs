//! `tally prewarm`: kernels compiled once, for architectures that this machine need not have. Needs NVRTC; says so where
//! it is not installed.

mod process;

use std::fs;

use process::{Directory, command, tally};

fn installed() -> bool {
    let found = cuda::nvrtc_version();
    if let Err(error) = &found {
        assert!(std::env::var_os("CI_NEEDS_NVRTC").is_none(), "CI has NVRTC, but: {error}");
        println!("NOT RUN: {error}");
    }
    found.is_ok()
}

#[test]
fn compiled_once_and_kept() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-dense", &["--layers", "1"]);
    let cache = directory.file("kernels");
    let args = ["prewarm", &model, "--kernel-cache", &cache, "--json", "--arch"];
    if !installed() {
        tally(args.iter().chain(&["90"])).fails(1, "no kernel compiler");
        return;
    }
    let check = |archs: &str, compiled: u64, there: u64| {
        let report = tally(args.iter().chain(&[archs])).json();
        let found = ["compiled", "already_there"].map(|key| report[key].as_u64().expect("a number"));
        assert_eq!(found, [compiled, there], "{report:#}");
    };
    let first = tally(args.iter().chain(&["90"])).json();
    let each = first["compiled"].as_u64().expect("a number");
    assert!(each > 1 && first["already_there"] == 0, "{first:#}");
    check("90", 0, each);
    check("90,80,90", each, each);
    // A kernel that was tampered with is compiled again.
    let mut entries = fs::read_dir(&cache).expect("the cache").map(|entry| entry.expect("readable").path());
    fs::write(entries.next().expect("kernels"), b"damaged").expect("writable");
    check("80,90", 1, 2 * each - 1);
    // Kept by the user's cache unless told otherwise.
    let home = directory.file("home");
    let output = command().args(["prewarm", &model, "--arch", "80"]).env("XDG_CACHE_HOME", &home).output();
    let output = output.expect("the binary runs");
    assert!(output.status.success(), "{output:?}");
    let kept = fs::read_dir(directory.join("home/tally/kernels")).expect("the user's cache").count();
    assert_eq!(kept as u64, each);
}

#[test]
fn bad_input() {
    let directory = Directory::new();
    let model = directory.synth("model.gguf", "tiny-dense", &["--layers", "1"]);
    tally(["prewarm", "nowhere.gguf", "--arch", "90"]).fails(1, "nowhere.gguf");
    tally(["prewarm", &model, "--arch", "75"]).fails(2, "'--arch <N,..>'");
    if installed() {
        // A file where the folder should be.
        tally(["prewarm", &model, "--arch", "90", "--kernel-cache", &model]).fails(1, "cannot be kept in");
        tally(["prewarm", &model, "--arch", "81"]).fails(1, "do not compile for sm_81");
    }
}
