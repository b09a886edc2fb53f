//! The binary as a process: what it prints, how it exits, and directories to run it in.
#![allow(dead_code, reason = "each test file uses a part")]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::ops::Deref;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Exit code; `None` where a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Standard output of a run that succeeded without a word on standard error.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self.stdout
    }

    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json(self) -> serde_json::Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Asserts that the error comes with a hint.
    #[track_caller]
    pub(crate) fn hinted(self) -> Outcome {
        assert!(self.stderr.contains("\n hint: "), "no hint: {self:?}");
        self
    }

    /// Asserts a failure with `code`, nothing on standard output, and an error of one line that contains `message`;
    /// a hint may follow.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, message: &str) {
        let mut lines = self.stderr.lines();
        let first = lines.next().unwrap_or_default();
        assert_eq!((self.code, self.stdout.as_str()), (Some(code), ""), "{self:?}");
        assert!(first.starts_with("error: ") && first.contains(message), "{message:?} not in {self:?}");
        // clap's own errors explain themselves over several lines.
        let hints = lines.filter(|line| !line.starts_with(" hint: ")).count();
        assert!(hints == 0 || code == 2, "more than one line: {self:?}");
    }
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Outcome {
        let text = |bytes| String::from_utf8(bytes).expect("tally prints UTF-8");
        Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// The binary, to be given arguments. Signals end it whoever runs the tests: in the background of a shell, or under `nohup`,
/// they are told to ignore some, which the binary would go on doing.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tally"));
    // SAFETY: setting signals to their defaults is allowed between fork and exec, and nothing else is done.
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
    command
}

/// Runs the binary without input.
pub(crate) fn tally<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Outcome {
    tally_with(args, b"")
}

/// Runs the binary with `input` on standard input.
pub(crate) fn tally_with<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, input: &[u8]) -> Outcome {
    let mut command = command();
    command.args(on_the_cpu(args)).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary was built");
    // A command that needs no input may be gone by now.
    let _ = child.stdin.take().expect("piped").write_all(input);
    child.wait_with_output().expect("the binary runs").into()
}

/// Arguments with `--device cpu` where a command computes and they do not say on what: what a test finds must not depend
/// on the GPUs of the machine.
pub(crate) fn on_the_cpu<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Vec<OsString> {
    const COMPUTING: [&str; 4] = ["run", "chat", "bench", "perplexity"];
    let mut args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    if args.first().is_some_and(|name| COMPUTING.iter().any(|c| name == c))
        && !args.iter().any(|arg| arg == "--device")
    {
        args.extend(["--device", "cpu"].map(OsString::from));
    }
    args
}

/// A directory that is removed with its contents at the end of a test.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Directory {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tally-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path).expect("cargo's directory for tests can be written");
        Directory(path)
    }

    /// A path in it, as an argument.
    pub(crate) fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("cargo's directory is UTF-8").to_owned()
    }

    /// The names in it, hidden ones too, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).expect("it exists");
        let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("readable").file_name();
        let mut names: Vec<_> = entries.map(|entry| name(entry).into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }

    /// Writes a synthetic model of a small shape into it: `args` after the shape and the path.
    #[track_caller]
    pub(crate) fn synth(&self, name: &str, shape: &str, args: &[&str]) -> String {
        let path = self.file(name);
        tally(["synth", shape, &path].iter().chain(args)).ok();
        path
    }
}

impl Deref for Directory {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
