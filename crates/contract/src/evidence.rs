//! What was seen when a falsifier was executed: one JSON file each, sealed by a hash of its own text.
//!
//! The seal is no signature: who wants to lie can compute it. It notices what happens without intent, a figure corrected
//! by hand or a merge that took half of each side.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Figures;

/// What stands before the hash; the hash is of everything before this.
const SEAL: &str = ",\n  \"hash\": \"";

/// How an execution ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The prediction held.
    Passed,
    /// It did not.
    Failed,
}

/// Where it was executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ground {
    /// On a CPU, as CI does.
    Ci,
    /// The GPU's kernels on a CPU.
    Emulated,
    /// On a real GPU.
    Gpu,
}

impl Ground {
    /// As evidence spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Ground::Ci => "ci",
            Ground::Emulated => "emulated",
            Ground::Gpu => "gpu",
        }
    }
}

/// Where and of what evidence is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Where.
    pub r#where: Ground,
    /// The GPU's name.
    pub gpu: Option<String>,
    /// CUDA version of its driver.
    pub driver: Option<String>,
    /// Version of the kernels' compiler.
    pub nvrtc: Option<String>,
    /// Hash of the kernels' sources.
    pub kernel_hash: String,
    /// What the model is called; none where the check makes its own.
    pub model: Option<String>,
    /// Its fingerprint.
    pub model_hash: Option<String>,
    /// The named shape that it has, if any.
    pub shape: Option<String>,
    /// The arithmetic, by the bits that it gives.
    pub arithmetic: String,
}

/// A record of one execution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The prediction.
    pub what: String,
    /// The contract, by id.
    pub contract: String,
    /// Its version.
    pub version: u32,
    /// The falsifier, by id.
    pub falsifier: String,
    /// The check with its parameters ([`crate::CheckCall::signature`]).
    pub check: String,
    /// The fault that was planted, if one was: then it had to fail.
    pub planted: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// What was seen instead of the prediction.
    pub why: Option<String>,
    /// Where and of what.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// What was executed.
    pub command: String,
    /// When, `YYYY-MM-DD`.
    pub date: String,
    /// How long, in seconds.
    pub seconds: f64,
    /// What was measured.
    pub figures: Figures,
}

/// Why a file is no evidence.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It does not end in a hash.
    #[error("{path}: no `hash` at its end: not written by `tally contract run`")]
    Unsealed {
        /// The file.
        path: PathBuf,
    },
    /// The hash is that of another text.
    #[error("{path}: edited since it was written: its hash is {found}, its text's is {computed}")]
    Edited {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What it should say.
        computed: String,
    },
    /// It is sealed and yet no record.
    #[error("{path}: {source}")]
    Record {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
}

impl Evidence {
    /// The file's name: one for each falsifier, place and named shape, another for what was planted.
    pub fn file_name(&self) -> String {
        let ground = self.provenance.r#where.name();
        let shape = self.provenance.shape.as_ref().map_or(String::new(), |shape| format!(".{shape}"));
        let planted = if self.planted.is_some() { ".planted" } else { "" };
        format!("{}.{ground}{shape}{planted}.json", self.falsifier)
    }

    /// The text of a file, sealed.
    fn seal(&self) -> String {
        let text = serde_json::to_string_pretty(self)
            .expect("a record has text for keys and numbers that are finite");
        let body = text.strip_suffix("\n}").expect("an object of several lines ends so");
        format!("{body}{SEAL}{}\"\n}}\n", hash(body))
    }

    /// Writes it below `folder`, in a folder of the contract's name, and returns where.
    pub fn store(&self, folder: &Path) -> Result<PathBuf, EvidenceError> {
        let folder = folder.join(&self.contract);
        let path = folder.join(self.file_name());
        let written = fs::create_dir_all(&folder).and_then(|()| fs::write(&path, self.seal()));
        written.map_err(|source| EvidenceError::Io { path: path.clone(), source })?;
        Ok(path)
    }

    /// Reads the text of a file that is at `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Evidence, EvidenceError> {
        let path = || path.to_owned();
        let (body, rest) = text.rsplit_once(SEAL).ok_or_else(|| EvidenceError::Unsealed { path: path() })?;
        let found = rest.strip_suffix("\"\n}\n").unwrap_or(rest).to_owned();
        let computed = hash(body);
        if found != computed {
            return Err(EvidenceError::Edited { path: path(), found: found.trim().to_owned(), computed });
        }
        serde_json::from_str(text).map_err(|source| EvidenceError::Record { path: path(), source })
    }

    /// Everything that is kept below `folder` for `contract`, and what there is no evidence but pretends to be.
    pub fn load(folder: &Path, contract: &str) -> (Vec<Evidence>, Vec<EvidenceError>) {
        let folder = folder.join(contract);
        let Ok(entries) = fs::read_dir(&folder) else { return (Vec::new(), Vec::new()) };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        let (mut records, mut errors) = (Vec::new(), Vec::new());
        for path in paths {
            let text =
                fs::read_to_string(&path).map_err(|source| EvidenceError::Io { path: path.clone(), source });
            match text.and_then(|text| Evidence::parse(&path, &text)) {
                Ok(record) => records.push(record),
                Err(error) => errors.push(error),
            }
        }
        (records, errors)
    }
}

fn hash(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}
