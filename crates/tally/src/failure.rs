//! How a command fails: one line that says what is wrong, a hint where one helps, and an exit code.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use gguf::ErrorKind;

/// Bad input, a missing file, a full disk: whatever is not listed below.
const FAILED: u8 = 1;
/// The command line asks for nothing that could be done; clap's own code for that.
const USAGE: u8 = 2;
/// The model computed something that is not a number.
const NUMERIC: u8 = 3;
/// Two runs that should agree do not.
const MISMATCH: u8 = 4;
/// The reader of standard output went away: 128 + SIGPIPE, as a shell would report it.
const CLOSED: u8 = 141;

/// A command's failure.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// A failure that says `message` and exits with 1.
    pub(crate) fn new(message: impl Display) -> Failure {
        Failure { message: message.to_string(), hint: None, code: FAILED }
    }

    /// Wrong usage that clap cannot find by itself; exits with 2.
    pub(crate) fn usage(message: impl Display) -> Failure {
        Failure { code: USAGE, ..Failure::new(message) }
    }

    /// Something computed is not a number; exits with 3.
    pub(crate) fn numeric(message: impl Display) -> Failure {
        Failure { code: NUMERIC, ..Failure::new(message) }
    }

    /// Two runs do not agree; exits with 4.
    pub(crate) fn mismatch(message: impl Display) -> Failure {
        Failure { code: MISMATCH, ..Failure::new(message) }
    }

    /// What is wrong, for who has another way of saying it.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Adds what to do about it.
    pub(crate) fn hint(self, hint: impl Display) -> Failure {
        Failure { hint: Some(hint.to_string()), ..self }
    }

    /// The same in a command that names sides, not a device.
    pub(crate) fn of_a_side(self) -> Failure {
        let sides =
            "a side without a GPU: cpu-scalar, oracle, or emulated, which runs the GPU's kernels on the CPU";
        let hint = self.hint.map(|hint| hint.replace("--device cpu", sides));
        Failure { hint, ..self }
    }

    /// Says what the failure is about, a file perhaps.
    pub(crate) fn at(self, place: impl Display) -> Failure {
        Failure { message: format!("{place}: {}", self.message), ..self }
    }

    /// Prints the failure and gives its exit code. That standard error is closed as well is no further failure.
    pub(crate) fn report(self) -> ExitCode {
        let mut err = io::stderr().lock();
        let _ = writeln!(err, "error: {}", self.message);
        if let Some(hint) = self.hint {
            let _ = writeln!(err, " hint: {hint}");
        }
        ExitCode::from(self.code)
    }
}

impl From<io::Error> for Failure {
    /// Errors of writing to standard output; files have errors of their own that name the path.
    fn from(error: io::Error) -> Failure {
        if error.kind() == io::ErrorKind::BrokenPipe {
            let failure = Failure::new("standard output was closed before the command was done");
            return Failure { code: CLOSED, ..failure };
        }
        Failure::new(format!("cannot write to standard output: {error}"))
    }
}

impl From<gguf::Error> for Failure {
    fn from(error: gguf::Error) -> Failure {
        let hint = match error.kind() {
            ErrorKind::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => "is the path right?",
            ErrorKind::Directory => "name the model file in it, such as model.gguf",
            ErrorKind::DiskFull { .. } => "make room, or write to another disk",
            ErrorKind::Truncated { .. }
            | ErrorKind::Count { .. }
            | ErrorKind::OutOfBounds { .. }
            | ErrorKind::Empty => {
                "a download that was cut short, perhaps: compare its size, or fetch it again"
            }
            ErrorKind::ShardMissing { .. } => "all shards of a split model lie in one directory",
            _ => return Failure::new(error),
        };
        Failure::new(&error).hint(hint)
    }
}

impl From<model::ModelError> for Failure {
    fn from(error: model::ModelError) -> Failure {
        match error {
            model::ModelError::Missing(_) => Failure::new(error).hint(
                "without all its weights a model can be inspected, and its vocabulary used, but not run",
            ),
            _ => Failure::new(error),
        }
    }
}

impl From<engine::TokenizerError> for Failure {
    fn from(error: engine::TokenizerError) -> Failure {
        Failure::new(error)
    }
}

impl From<engine::ChatError> for Failure {
    fn from(error: engine::ChatError) -> Failure {
        Failure::new(error)
    }
}

impl From<cpu::BuildError> for Failure {
    fn from(error: cpu::BuildError) -> Failure {
        Failure::new(error).hint("try fewer --threads")
    }
}

impl From<model::Fault> for Failure {
    fn from(fault: model::Fault) -> Failure {
        match fault {
            model::Fault::Lost { .. } => Failure::new(fault).hint(crate::device::LOST),
            model::Fault::Device { .. } => Failure::new(fault).hint("`nvidia-smi` tells how the GPU is"),
            _ => Failure::new(fault),
        }
    }
}

impl From<engine::EngineError> for Failure {
    fn from(error: engine::EngineError) -> Failure {
        match error {
            engine::EngineError::Fault(fault) => fault.into(),
            engine::EngineError::Sampler(engine::SamplerError::NonFinite { .. }) => {
                Failure::numeric(format!("the model computed no numbers: {error}"))
                    .hint("`tally inspect --check` tells whether it has bad weights")
            }
            _ => Failure::new(error),
        }
    }
}
