//! What `manifest.json` says, and what it must be in itself, whatever the model. Reads and writes no file.

use std::collections::BTreeSet;
use std::path::Path;

use model::Step;
use serde::{Deserialize, Serialize};

use crate::names::aliases;
use crate::place::Place;
use crate::trace::{Entry, Summary, per_expert};
use crate::types::LayerTypes;

/// What `format` says.
pub const FORMAT: &str = "tally-trace";
/// The version that is written, and the only one read.
pub const VERSION: u32 = 1;

/// By which rules the numbers came about; decides by what they may be judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "rules")]
pub enum Arithmetic {
    /// Tally's (ARCHITECTURE.md): two such runs agree in every bit.
    Tally {
        /// Precision of activations: `a16` or `a8`.
        activations: String,
    },
    /// Floats of another engine: two such runs are near each other.
    Float {
        /// The precision of its matrix products: `f64`, `f32`, `f16` or `bf16`.
        precision: String,
    },
}

/// Who made a trace, and on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Program and version.
    pub producer: String,
    /// A name for people.
    pub model: String,
    /// [`crate::fingerprint()`] of the model; another program may not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// Rules.
    pub arithmetic: Arithmetic,
    /// The device's name, such as `cuda:0`.
    pub device: String,
    /// What else is known of it.
    #[serde(default)]
    pub facts: serde_json::Value,
    /// Hash of the kernels' sources, on a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_hash: Option<String>,
}

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Who, of what, on what.
    #[serde(flatten)]
    pub origin: Origin,
    /// The prompt.
    pub prompt_ids: Vec<u32>,
    /// Steps in order.
    pub steps: Vec<StepRecord>,
    /// Whether the inside of the experts is there.
    #[serde(default)]
    pub inside: bool,
    /// The model's tensors by layer and type, beside which a report draws the stages; another program may leave them out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<LayerTypes>,
    /// What is there, in the order of execution.
    pub entries: Vec<EntryRecord>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Its safetensors file in the directory; none where statistics alone were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// SHA-256 of that file, in hexadecimal; checked if it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Token ids of the rows.
    pub tokens: Vec<u32>,
    /// Their positions.
    pub positions: Vec<u32>,
    /// Their sequences; all 0 if left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sequences: Vec<u32>,
    /// The rows that have logits.
    pub logits: Vec<u32>,
}

impl StepRecord {
    /// Of a step of which nothing is kept in a file.
    pub fn of(step: &Step) -> StepRecord {
        StepRecord {
            file: None,
            sha256: None,
            tokens: step.rows.iter().map(|row| row.token).collect(),
            positions: step.rows.iter().map(|row| row.position).collect(),
            sequences: step.rows.iter().map(|row| row.sequence).collect(),
            logits: step.logits.clone(),
        }
    }
}

/// One buffer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EntryRecord {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// What others call it, for people: [`crate::names::aliases`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Of the whole buffer; the tensor has as many values unless `lines` are given.
    pub shape: Vec<usize>,
    /// The lines that were kept; see [`Entry::lines`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines: Option<Vec<usize>>,
    /// Statistics of what was kept; another program may leave them out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<Summary>,
}

impl EntryRecord {
    /// Of what was kept.
    pub fn of(entry: &Entry) -> EntryRecord {
        EntryRecord {
            place: entry.place,
            aliases: aliases(entry.place.site.stage, entry.place.buffer).iter().map(|&a| a.into()).collect(),
            shape: entry.shape.clone(),
            lines: entry.lines.clone(),
            stats: Some(entry.summary),
        }
    }
}

/// Sequences of a trace, and positions of a sequence, at most: their KV blocks are counted in u32.
const MAX_SEQUENCES: usize = 4096;
const MAX_POSITIONS: u32 = 1 << 24;

/// What a manifest must be in itself, whatever the model.
pub(super) fn check(manifest: &Manifest) -> Result<(), String> {
    for (index, step) in manifest.steps.iter().enumerate() {
        let rows = step.tokens.len();
        if rows == 0
            || step.positions.len() != rows
            || !matches!(step.sequences.len(), n if n == 0 || n == rows)
        {
            return Err(format!("step {index}: {rows} tokens do not go with its positions or sequences"));
        }
        if step.sequences.iter().any(|&s| s as usize >= rows.min(MAX_SEQUENCES)) {
            return Err(format!(
                "step {index}: a sequence beyond its {rows} rows, or beyond {MAX_SEQUENCES}"
            ));
        }
        if step.positions.iter().any(|&p| p >= MAX_POSITIONS) {
            return Err(format!("step {index}: a position beyond any context"));
        }
        if step.logits.iter().any(|&row| row as usize >= rows) {
            return Err(format!("step {index}: logits of a row beyond its {rows}"));
        }
        // A file beside the manifest, never elsewhere.
        let plain = |name: &String| Path::new(name).file_name().is_some_and(|base| base == name.as_str());
        if let Some(name) = step.file.as_ref().filter(|name| !plain(name)) {
            return Err(format!(
                "step {index}: `{}` is not the name of a file beside it",
                name.escape_debug()
            ));
        }
    }
    let mut seen = BTreeSet::new();
    for entry in &manifest.entries {
        let Some(_) = manifest.steps.get(entry.place.step) else {
            return Err(format!("{}: there are {} steps", entry.place, manifest.steps.len()));
        };
        let site = entry.place.site;
        let listed = site.stage.inside().contains(&entry.place.buffer)
            || site.stage.writes().contains(&entry.place.buffer);
        let layered = !matches!(site.stage, model::Stage::Embed | model::Stage::Head);
        if !listed || layered != site.layer.is_some() {
            return Err(format!("{}: no such place in a forward", entry.place));
        }
        if entry.shape.len() < if per_expert(entry.place.buffer) { 3 } else { 2 } {
            return Err(format!("{}: shape {:?} is too short", entry.place, entry.shape));
        }
        let lead = &entry.shape[..if per_expert(entry.place.buffer) { 2 } else { 1 }];
        let lead =
            lead.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or("a shape beyond any memory")?;
        if entry.lines.iter().flatten().any(|&line| line >= lead) {
            return Err(format!("{}: a line beyond its {lead}", entry.place));
        }
        if !seen.insert(entry.place) {
            return Err(format!("{}: listed twice", entry.place));
        }
    }
    if manifest.entries.is_empty() {
        return Err("it lists no stage".into());
    }
    Ok(())
}
