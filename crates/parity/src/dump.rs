//! A trace on the disk: `manifest.json` and one safetensors file a step, in a directory of their own.
//!
//! The format is open: whoever can write safetensors can stand in for a side of a comparison. Each step's file holds the
//! tensors that the manifest lists, named `blk.6.experts_down.x` or `embed.x` ([`Place::key`]), row-major, F32 (F16 and
//! BF16 are read as well). A reader trusts nothing: what is missing, cut short, of another model or of another prompt is
//! an error that says where.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

use model::{Buffer, Config, Model, Row, Step};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::fingerprint;
use crate::place::Place;
use crate::report::LayerTypes;
use crate::trace::{Entry, Summary, Trace, per_expert};

/// What `format` says.
pub const FORMAT: &str = "tally-trace";
/// The version that is written, and the only one read.
pub const VERSION: u32 = 1;
/// The manifest's name in its directory.
pub const MANIFEST: &str = "manifest.json";
/// What `tally report` writes beside it.
pub const PAGE: &str = "report.html";

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
    /// [`fingerprint()`] of the model; another program may not know it.
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

/// One buffer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EntryRecord {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// Of the whole buffer; the tensor has as many values unless `lines` are given.
    pub shape: Vec<usize>,
    /// The lines that were kept; see [`Entry::lines`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines: Option<Vec<usize>>,
    /// Statistics of what was kept; another program may leave them out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<Summary>,
}

/// Why a trace cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The system.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Not what a trace is.
    #[error("{path}: {why}", path = path.display())]
    Bad {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Made with other weights.
    #[error("{path}: a trace of another model: {found}, where {want} is run", path = path.display())]
    OtherModel {
        /// The directory.
        path: PathBuf,
        /// The trace's.
        found: String,
        /// The model's.
        want: String,
    },
    /// Made from another prompt.
    #[error("{path}: a trace of another prompt: {why}", path = path.display())]
    OtherPrompt {
        /// The directory.
        path: PathBuf,
        /// Where the two part.
        why: String,
    },
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> DumpError {
    let path = path.to_owned();
    move |source| DumpError::Io { path, source }
}

/// Writes `trace` into `dir`, which is made if need be; an earlier trace there is replaced, anything else is refused.
pub fn write(dir: &Path, trace: &Trace, origin: Origin, prompt_ids: &[u32]) -> Result<Manifest, DumpError> {
    fs::create_dir_all(dir).map_err(io_at(dir))?;
    let strange = fs::read_dir(dir).map_err(io_at(dir))?.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        !(name == MANIFEST || name == PAGE || name.starts_with("step-") && name.ends_with(".safetensors"))
    });
    if strange {
        let why = "not empty, and more than a trace is in it: name a new directory".into();
        return Err(DumpError::Bad { path: dir.to_owned(), why });
    }
    let manifest_path = dir.join(MANIFEST);
    // Without its manifest, what is half written is no trace.
    match fs::remove_file(&manifest_path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_at(&manifest_path)(error)),
        _ => {}
    }
    let steps = trace.steps.iter().enumerate().map(|(index, step)| step_record(dir, trace, index, step));
    let manifest = Manifest {
        format: FORMAT.into(),
        version: VERSION,
        origin,
        prompt_ids: prompt_ids.to_vec(),
        steps: steps.collect::<Result<_, _>>()?,
        inside: trace.inside,
        types: trace.types.clone(),
        entries: trace.entries.iter().map(entry_record).collect(),
    };
    let text = serde_json::to_string_pretty(&manifest).expect("names, numbers and lists are JSON");
    fs::write(&manifest_path, text + "\n").map_err(io_at(&manifest_path))?;
    Ok(manifest)
}

fn entry_record(entry: &Entry) -> EntryRecord {
    EntryRecord {
        place: entry.place,
        shape: entry.shape.clone(),
        lines: entry.lines.clone(),
        stats: Some(entry.summary),
    }
}

fn step_record(dir: &Path, trace: &Trace, index: usize, step: &Step) -> Result<StepRecord, DumpError> {
    let mut record = StepRecord {
        file: None,
        sha256: None,
        tokens: step.rows.iter().map(|row| row.token).collect(),
        positions: step.rows.iter().map(|row| row.position).collect(),
        sequences: step.rows.iter().map(|row| row.sequence).collect(),
        logits: step.logits.clone(),
    };
    let mut tensors = BTreeMap::new();
    for entry in trace.entries.iter().filter(|entry| entry.place.step == index) {
        let Some(values) = &entry.values else { continue };
        let shape = kept_shape(&entry.shape, entry.place.buffer, &entry.lines);
        tensors.insert(entry.place.key(), (shape, bytes(values)));
    }
    if tensors.is_empty() {
        return Ok(record);
    }
    let name = format!("step-{index:04}.safetensors");
    let path = dir.join(&name);
    let bad =
        |error: safetensors::SafeTensorError| DumpError::Bad { path: path.clone(), why: error.to_string() };
    let views = tensors
        .iter()
        .map(|(key, (shape, bytes))| {
            Ok((key, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(bad)?))
        })
        .collect::<Result<Vec<_>, DumpError>>()?;
    let file = safetensors::serialize(views, None).map_err(bad)?;
    fs::write(&path, &file).map_err(io_at(&path))?;
    record.sha256 = Some(hex(&file));
    record.file = Some(name);
    Ok(record)
}

/// Little-endian, as safetensors has it.
pub(crate) fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The shape of what is kept of a buffer.
fn kept_shape(shape: &[usize], buffer: Buffer, lines: &Option<Vec<usize>>) -> Vec<usize> {
    let Some(lines) = lines else { return shape.to_vec() };
    let rest = &shape[if per_expert(buffer) { 2 } else { 1 }..];
    [&[lines.len()], rest].concat()
}

/// A trace that was opened: the manifest is checked, tensors are read a step at a time.
#[derive(Debug, Clone)]
pub struct Dump {
    dir: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
}

impl Dump {
    /// Opens the trace in `dir`.
    pub fn open(dir: &Path) -> Result<Dump, DumpError> {
        let path = dir.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(io_at(&path))?;
        let bad = |why: String| DumpError::Bad { path: path.clone(), why };
        // The version first: a later one may have other fields.
        let head: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        match (head["format"].as_str(), head["version"].as_u64()) {
            (Some(FORMAT), Some(version)) if version == u64::from(VERSION) => {}
            (Some(FORMAT), Some(version)) => {
                return Err(bad(format!("version {version}, where {VERSION} is known")));
            }
            _ => return Err(bad(format!("not the manifest of a trace: `format` is not \"{FORMAT}\""))),
        }
        let manifest: Manifest = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        check(&manifest).map_err(bad)?;
        Ok(Dump { dir: dir.to_owned(), manifest })
    }

    /// Fails unless the trace is one of `model` and of the prompt `ids`, with buffers of the model's shapes.
    pub fn check(&self, model: &Model, ids: &[u32]) -> Result<(), DumpError> {
        let want = fingerprint(model);
        if let Some(found) = self.manifest.origin.fingerprint.as_ref().filter(|found| **found != want) {
            return Err(DumpError::OtherModel { path: self.dir.clone(), found: found.clone(), want });
        }
        let prompt = &self.manifest.prompt_ids;
        if let Some(at) = (0..prompt.len().max(ids.len())).find(|&at| prompt.get(at) != ids.get(at)) {
            let id = |ids: &[u32]| ids.get(at).map_or("no token".into(), |id| format!("token {id}"));
            let why = format!("at {at} it has {}, where {} is run", id(prompt), id(ids));
            return Err(DumpError::OtherPrompt { path: self.dir.clone(), why });
        }
        self.check_shapes(&model.config).map_err(|why| DumpError::Bad { path: self.dir.join(MANIFEST), why })
    }

    fn check_shapes(&self, config: &Config) -> Result<(), String> {
        for entry in &self.manifest.entries {
            let place = entry.place;
            let step = &self.manifest.steps[place.step]; // in range: checked when it was opened
            let want = place.buffer.shape(config, step.tokens.len(), step.logits.len());
            if entry.shape != want {
                return Err(format!("{place}: shape {:?}, where the model has {want:?}", entry.shape));
            }
            if place.site.layer.is_some_and(|layer| layer >= config.layers) {
                return Err(format!("{place}: the model has {} layers", config.layers));
            }
        }
        Ok(())
    }

    /// The steps, each with KV blocks of its own for every sequence.
    pub fn steps(&self) -> Vec<Step> {
        let sequences =
            self.manifest.steps.iter().flat_map(|step| &step.sequences).max().map_or(1, |&s| s + 1);
        let longest = self.manifest.steps.iter().flat_map(|step| &step.positions).max().map_or(1, |&p| p + 1);
        // Positions are u32, so blocks are.
        let blocks = (longest as usize).div_ceil(model::BLOCK) as u32;
        let tables: Vec<Vec<u32>> =
            (0..sequences).map(|s| (s * blocks..(s + 1) * blocks).collect()).collect();
        let step = |record: &StepRecord| {
            let rows =
                record.tokens.iter().zip(&record.positions).enumerate().map(|(i, (&token, &position))| Row {
                    token,
                    position,
                    sequence: record.sequences.get(i).copied().unwrap_or(0),
                });
            Step { rows: rows.collect(), tables: tables.clone(), logits: record.logits.clone() }
        };
        self.manifest.steps.iter().map(step).collect()
    }

    /// The buffers of step `index`, in the order of execution.
    pub fn read_step(&self, index: usize) -> Result<Vec<Entry>, DumpError> {
        let record = &self.manifest.steps[index];
        let entries = self.manifest.entries.iter().filter(|entry| entry.place.step == index);
        let Some(file) = &record.file else {
            let why = format!("step {index}: statistics alone; trace again without --stats to compare");
            return Err(DumpError::Bad { path: self.dir.join(MANIFEST), why });
        };
        let path = self.dir.join(file);
        let bad = |why: String| DumpError::Bad { path: path.clone(), why };
        let content = fs::read(&path).map_err(io_at(&path))?;
        if record.sha256.as_ref().is_some_and(|want| *want != hex(&content)) {
            return Err(bad("its SHA-256 is not the manifest's: cut short, or changed since".into()));
        }
        let tensors = SafeTensors::deserialize(&content).map_err(|error| bad(error.to_string()))?;
        let mut known = BTreeSet::new();
        let entries = entries
            .map(|entry| {
                let key = entry.place.key();
                let tensor = tensors.tensor(&key).map_err(|_| bad(format!("there is no tensor `{key}`")))?;
                let shape = kept_shape(&entry.shape, entry.place.buffer, &entry.lines);
                if tensor.shape() != shape {
                    return Err(bad(format!("`{key}` is {:?}, not {shape:?}", tensor.shape())));
                }
                let values = floats(&tensor).map_err(|why| bad(format!("`{key}`: {why}")))?;
                known.insert(key);
                let (place, shape, lines) = (entry.place, entry.shape.clone(), entry.lines.clone());
                Ok(Entry { place, shape, lines, summary: Summary::of(&values), values: Some(values) })
            })
            .collect::<Result<Vec<_>, DumpError>>()?;
        let mut names = tensors.names();
        names.sort_unstable();
        match names.into_iter().find(|name| !known.contains(*name)) {
            Some(name) => Err(bad(format!("the tensor `{}` is not in the manifest", name.escape_debug()))),
            None => Ok(entries),
        }
    }
}

/// A tensor's values; half floats are widened, which is exact.
fn floats(tensor: &TensorView<'_>) -> Result<Vec<f32>, String> {
    let data = tensor.data();
    Ok(match tensor.dtype() {
        Dtype::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::F16 => widened(gguf::Dtype::F16, data),
        Dtype::BF16 => widened(gguf::Dtype::BF16, data),
        other => return Err(format!("{other:?} is not F32, F16 or BF16")),
    })
}

fn widened(dtype: gguf::Dtype, data: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; data.len() / 2];
    quant::dequantise_row(dtype, data, &mut out);
    out
}

/// Sequences of a trace, and positions of a sequence, at most: their KV blocks are counted in u32.
const MAX_SEQUENCES: usize = 4096;
const MAX_POSITIONS: u32 = 1 << 24;

/// What a manifest must be in itself, whatever the model.
fn check(manifest: &Manifest) -> Result<(), String> {
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
        let lead: usize = entry.shape[..if per_expert(entry.place.buffer) { 2 } else { 1 }].iter().product();
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
