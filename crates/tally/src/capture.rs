//! Requests that a server wrote down because their numbers went wrong, computed again. Knows the file; where numbers go wrong
//! is the engine's to find.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use engine::first_non_finite;
use model::BLOCK;
use serde_json::{Value, json};
use server::Captures;

use crate::failure::Failure;
use crate::live::Live;
use crate::load::Loaded;
use crate::output;
use crate::prompted::ComputeArgs;

/// The largest capture that is read: a context of a million tokens takes some 8 MB.
const LARGEST: u64 = 64 << 20;

/// A capture that was read.
pub(crate) struct Capture {
    path: String,
    tokens: Vec<u32>,
    /// Where the server saw numbers go wrong, if it looked.
    place: Option<String>,
}

impl Capture {
    /// Reads the file at `path`, if it is a capture: those are JSON, as reproductions are not.
    pub(crate) fn read(path: &Path) -> Result<Option<Capture>, Failure> {
        let shown = path.display().to_string();
        let cannot = |error: std::io::Error| Failure::new(error).at(&shown);
        let mut file = fs::File::open(path).map_err(cannot)?;
        let mut first = [0];
        if file.read(&mut first).map_err(cannot)? == 0 || first != *b"{" {
            return Ok(None);
        }
        let wrong = |what: &str| Failure::new(format!("{shown}: {what}"));
        let mut text = String::from("{");
        file.take(LARGEST).read_to_string(&mut text).map_err(cannot)?;
        let value: Value =
            serde_json::from_str(&text).map_err(|error| wrong(&format!("no JSON: {error}")))?;
        if value["format"] != Captures::FORMAT || value["version"] != Captures::VERSION {
            let (format, version) = (Captures::FORMAT, Captures::VERSION);
            return Err(wrong(&format!("`format` and `version` are not {format:?} and {version}")));
        }
        let id = |token: &Value| u32::try_from(token.as_u64()?).ok();
        let tokens =
            value["tokens"].as_array().and_then(|tokens| tokens.iter().map(id).collect::<Option<Vec<_>>>());
        let tokens =
            tokens.filter(|tokens| !tokens.is_empty()).ok_or_else(|| wrong("`tokens` are no token ids"))?;
        Ok(Some(Capture { path: shown, tokens, place: value["place"].as_str().map(String::from) }))
    }

    /// Computes the request again on `side`, and says where the first value is that is no number.
    pub(crate) fn replay(
        &self,
        model: &Option<PathBuf>,
        compute: &ComputeArgs,
        side: &Live,
        json: bool,
    ) -> Result<(), Failure> {
        let loaded = Loaded::open(model)?;
        let (tokens, context) = (self.tokens.len(), loaded.context());
        if tokens > context {
            let message =
                format!("{}: {tokens} tokens; {} was made for at most {context}", self.path, loaded.name);
            return Err(Failure::new(message).hint("--model names the model that the request was of"));
        }
        let mut placed = compute.place(loaded.model(), side, tokens, 1)?;
        // A context has fewer than 2^32 blocks.
        let table: Vec<u32> = (0..tokens.div_ceil(BLOCK) as u32).collect();
        let found = first_non_finite(&mut placed.backend, &self.tokens, &table)?;
        let as_then = found.as_ref().map(ToString::to_string) == self.place;
        if json {
            let value = json!({
                "tokens": tokens, "device": side.to_string(), "then": self.place, "as_then": as_then,
                "place": found.as_ref().map(ToString::to_string),
                "from": found.as_ref().map(|found| found.from), "index": found.as_ref().map(|found| found.index),
            });
            output::json(&value)?;
        }
        let then = self.place.as_deref().unwrap_or("not looked for");
        let Some(found) = found else {
            if !json {
                output::line(format_args!(
                    "{tokens} tokens on {side}: all values are numbers (then: {then})"
                ))?;
            }
            return Ok(());
        };
        let message = format!(
            "{side}: {found} has {} at index {} in the step from position {} (then: {then})",
            found.value, found.index, found.from
        );
        Err(Failure::numeric(message)
            .hint("`tally bisect` finds the weight; `tally inspect --check` looks at all"))
    }
}
