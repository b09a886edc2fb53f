//! Sequences whose numbers went wrong, written down so that `tally replay` can compute them again. Knows nothing of why.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, io};

use engine::NonFinite;
use serde_json::{Value as Json, json};

/// The most captures of a server's life: a poisoned model must not fill a disk.
const MOST: usize = 100;

/// A folder for captures.
#[derive(Debug, Clone)]
pub struct Captures {
    folder: PathBuf,
    /// What is the same in all: the model, the device, the arithmetic.
    facts: Json,
    written: Arc<AtomicUsize>,
}

impl Captures {
    /// What `format` says.
    pub const FORMAT: &str = "tally-capture";
    /// The version that is written.
    pub const VERSION: u32 = 1;

    /// Captures in `folder`, which is made when the first one comes. `facts`: an object, part of each.
    pub fn new(folder: PathBuf, facts: Json) -> Captures {
        Captures { folder, facts, written: Arc::default() }
    }

    /// Writes a sequence of the request `id` down. That it cannot be written is told in the log.
    pub(crate) fn write(&self, id: &str, tokens: &[u32], found: Option<&NonFinite>) {
        if self.written.fetch_add(1, Ordering::Relaxed) >= MOST {
            return;
        }
        let mut capture = json!({
            "format": Captures::FORMAT, "version": Captures::VERSION, "request": id, "tokens": tokens,
            "place": found.map(NonFinite::to_string),
            "found": found.map(|found| json!({
                "stage": found.site.stage.name(), "layer": found.site.layer, "buffer": found.buffer.name(),
                "from": found.from, "index": found.index, "value": found.value.to_string(),
            })),
        });
        if let (Json::Object(capture), Json::Object(facts)) = (&mut capture, &self.facts) {
            capture.extend(facts.clone());
        }
        let path = self.folder.join(format!("{id}.json"));
        match put(&self.folder, &path, &capture) {
            Ok(()) => tracing::error!(request = id, path = %path.display(), "captured"),
            Err(error) => tracing::error!(request = id, path = %path.display(), %error, "cannot capture"),
        }
    }
}

fn put(folder: &Path, path: &Path, capture: &Json) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(path, format!("{capture}\n"))
}
