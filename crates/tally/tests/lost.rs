//! A device that fails in the middle: one line that says so, a hint, exit code 1, and no hang. On the emulator, by a kernel
//! that traps at one position; `tools/gpu/lost.py` does the same on a GPU, which is then lost to the process.

mod models;
mod process;

use std::path::Path;

use models::tiny;
use process::{Directory, tally};

/// Where compiled kernels are kept from one run of the tests to the next.
const CACHE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/emulated");

/// A folder with an `embed.cu` that traps at position 6.
fn trapping(directory: &Directory) -> String {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/kernels/embed.cu");
    let right = std::fs::read_to_string(kernels).expect("a file of kernels");
    let wait = "    wait_dependencies();\n";
    let trap = format!("{wait}    if (step.position[blockIdx.y] == 6) __trap();\n");
    assert_eq!(right.matches(wait).count(), 1);
    let file = directory.file("embed.cu");
    std::fs::write(&file, right.replace(wait, &trap)).expect("writable");
    let folder = Path::new(&file).parent().expect("a file in a folder");
    folder.display().to_string()
}

#[test]
fn a_device_that_fails_in_the_middle_ends_the_command() {
    if std::process::Command::new("g++").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI_NEEDS_NVRTC").is_none(), "CI runs every kernel, but there is no g++");
        println!("did not run: there is no g++ for the emulator");
        return;
    }
    let directory = Directory::new();
    let model = tiny(&directory, "model.gguf", false);
    let kernels = trapping(&directory);
    let compiled = ["--kernels", &kernels, "--kernel-cache", CACHE];
    let check = |args: &[&str]| {
        let outcome = tally(args.iter().chain(&compiled)).hinted();
        let said: Vec<&str> = outcome.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        // What had been computed until then may have been printed.
        assert!(outcome.code == Some(1) && said.len() == 1, "{outcome:?}");
        assert!(said[0].contains("the emulator stopped"), "{outcome:?}");
    };
    // While tokens are chosen on the device, in a prompt, and while the debugger looks on.
    check(&["run", &model, "--raw", "-p", "ab", "--max-tokens", "20", "--device", "emulated"]);
    check(&["run", &model, "--raw", "-p", "abcdefghijkl", "--max-tokens", "1", "--device", "emulated"]);
    check(&["parity", &model, "--ids", "1,2,3,4,5,6,7,8", "--right", "emulated"]);
    check(&["bisect", &model, "--ids", "1,2,3,4,5,6,7,8", "--right", "emulated"]);
    // Short of that position all is well.
    let short = ["parity", &model, "--ids", "1,2,3", "--right", "emulated"];
    tally(short.iter().chain(&compiled)).ok();
}
