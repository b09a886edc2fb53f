//! What is wrong with a contract's text, and where.

use std::fmt;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The contract cannot be run as it stands.
    Error,
    /// It can, and claims less than it seems to.
    Warning,
}

/// Something wrong, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// The file, as it was named.
    pub file: String,
    /// Line, from 1; 0 where there is none, as of a file that cannot be read.
    pub line: u64,
    /// Column in characters, from 1.
    pub column: u64,
    /// What.
    pub message: String,
}

impl fmt::Display for Finding {
    /// `FILE:LINE:COLUMN: error: MESSAGE`, as compilers do and editors understand.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, ": {severity}: {}", self.message)
    }
}
