//! Opening a trace, and reading it a step at a time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use model::{Config, Model, Row, Step};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::manifest::{FORMAT, Manifest, StepRecord, VERSION, check};
use super::{DumpError, MANIFEST, hex, io_at, kept_shape};
use crate::fingerprint;
use crate::trace::{Entry, Summary};

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
