//! The failing stage cut out: one small file with its inputs, the weights concerned, what was expected and what came.
//!
//! The file is safetensors. Its metadata holds [`Head`] as JSON under the key `tally`; tensors are `weight/NAME` (the
//! bytes of the model file's blocks, U8), `input/BUFFER`, `past/k` and `past/v` (of attention: the positions before),
//! `expected/BUFFER` and `got/BUFFER` (F32). [`replay`] makes a model of one layer of it, whose weights are zero but for those: only rows, heads and experts that the wrong values
//! need are kept, since each output is computed from its own row.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use gguf::Tensor;
use model::{Backend, Buffer, Fault, Ffn, Model, Site, Stage, specs};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::bench::{Values, from, run_stage};
use crate::dump::{Arithmetic, bytes};
use crate::fingerprint;
use crate::judge::Judge;
use crate::localise::Localised;
use crate::pair::Capture;
use crate::place::{Place, key};
use crate::report::Figures;
use crate::stats::Comparison;

mod cut;
mod shape;

use cut::{Cut, weights_of};
pub use shape::{Rope, Shape};

/// What `format` says.
pub const FORMAT: &str = "tally-reproduction";
/// The version that is written; the one before, whose steps all begin at position 0, is read as well.
pub const VERSION: u32 = 2;

/// What a reproduction says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Fingerprint of the model that it was cut from.
    pub model: String,
    /// Where it went wrong there.
    pub place: Place,
    /// The rules of the side that was held to be right.
    pub arithmetic: Arithmetic,
    /// The error that is allowed, relative to a line's root mean square; none if bits must agree.
    pub limit: Option<f64>,
    /// The model of one layer.
    pub shape: Shape,
    /// Its weights that are in the file.
    pub weights: Vec<Weight>,
    /// Token ids of the step's rows.
    pub tokens: Vec<u32>,
    /// The position of the first of them.
    #[serde(default)]
    pub start: u32,
}

/// A weight in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weight {
    /// GGUF name in the cut model.
    pub name: String,
    /// Type.
    pub dtype: String,
    /// Dimensions in GGUF order.
    pub dims: Vec<usize>,
}

/// A stage that can be run alone.
#[derive(Debug, Clone)]
pub struct Reproduction {
    /// What it says of itself.
    pub head: Head,
    weights: Vec<Tensor>,
    inputs: Values,
    /// Keys and values of the positions before the step.
    past: Values,
    buffer: Buffer,
    expected: Vec<f32>,
    got: Vec<f32>,
}

/// Why a reproduction cannot be written or run.
#[derive(Debug, thiserror::Error)]
pub enum ReproductionError {
    /// The system.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: String,
        /// What it said.
        source: io::Error,
    },
    /// Not what a reproduction is.
    #[error("{path}: {why}")]
    Bad {
        /// Where.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// The backend failed.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// There is no backend.
    #[error("{0}")]
    Build(String),
}

/// What a replay came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// The stage in the model that it was cut from.
    pub place: Place,
    /// Expected, on the left, and what the backend computes.
    pub figures: Figures,
    /// Values that are wrong.
    pub wrong: usize,
    /// Whether it is, in every bit, what came then.
    pub as_then: bool,
    /// Of the stage alone.
    pub elapsed: Duration,
}

impl Reproduction {
    /// Cuts the stage out of `model`; none where what it read is not all known.
    pub(crate) fn cut(
        model: &Model,
        judge: &Judge,
        arithmetic: &Arithmetic,
        capture: &Capture,
        at: &Localised,
    ) -> Option<Reproduction> {
        let cut = Cut::new(model, capture, at)?;
        let stage = capture.site.stage;
        let layer = capture.site.layer;
        let mut weights = Vec::new();
        for stem in weights_of(stage, matches!(model.config.ffn, Ffn::Moe(_))) {
            let name = layer.map_or(format!("{stem}.weight"), |layer| format!("blk.{layer}.{stem}.weight"));
            let tied = &model.weights.output;
            let tensor = model.weights.named(&name).or((*stem == "output").then_some(tied))?;
            weights.push(cut.weight(stage, stem, tensor));
        }
        let config = &model.config;
        let of = |values: &[f32], buffer: Buffer| cut.values(config, capture, stage, buffer, values);
        let inputs = capture.inputs.iter().map(|(&buffer, values)| (buffer, of(values, buffer))).collect();
        let buffer = at.buffer;
        let describe = |w: &Tensor| Weight {
            name: w.name.to_string(),
            dtype: w.dtype.to_string(),
            dims: w.dims.clone(),
        };
        Some(Reproduction {
            head: Head {
                format: FORMAT.into(),
                version: VERSION,
                model: fingerprint(model),
                place: Place { step: capture.index, site: capture.site, buffer },
                arithmetic: arithmetic.clone(),
                limit: judge.limit(stage, buffer, 0),
                shape: Shape::of(&cut.config),
                weights: weights.iter().map(describe).collect(),
                tokens: cut.tokens.clone(),
                start: cut.start,
            },
            inputs,
            past: cut.past.clone(),
            expected: of(&capture.left[&buffer], buffer),
            got: of(&capture.right[&buffer], buffer),
            buffer,
            weights,
        })
    }

    /// Writes it.
    pub fn write(&self, path: &Path) -> Result<(), ReproductionError> {
        let name = path.display().to_string();
        let bad = |why: String| ReproductionError::Bad { path: name.clone(), why };
        let mut parts: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for weight in &self.weights {
            let data = weight.data.to_vec();
            parts.push((format!("weight/{}", weight.name), Dtype::U8, vec![data.len()], data));
        }
        let mut floats = |what: &str, buffer: Buffer, values: &[f32]| {
            parts.push((format!("{what}/{buffer}"), Dtype::F32, vec![values.len()], bytes(values)));
        };
        self.inputs.iter().for_each(|(&buffer, values)| floats("input", buffer, values));
        self.past.iter().for_each(|(&buffer, values)| floats("past", buffer, values));
        floats("expected", self.buffer, &self.expected);
        floats("got", self.buffer, &self.got);
        let views = parts
            .iter()
            .map(|(name, dtype, shape, data)| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|error| bad(error.to_string()))?;
        let head = serde_json::to_string(&self.head).expect("names, numbers and lists are JSON");
        let metadata = [("tally".to_owned(), head)].into();
        let file = safetensors::serialize(views, Some(metadata)).map_err(|error| bad(error.to_string()))?;
        fs::write(path, file).map_err(|source| ReproductionError::Io { path: name, source })
    }

    /// Reads one, checking everything.
    pub fn read(path: &Path) -> Result<Reproduction, ReproductionError> {
        let name = path.display().to_string();
        let content =
            fs::read(path).map_err(|source| ReproductionError::Io { path: name.clone(), source })?;
        Self::parse(&content).map_err(|why| ReproductionError::Bad { path: name, why })
    }

    fn parse(content: &[u8]) -> Result<Reproduction, String> {
        let text = |error: safetensors::SafeTensorError| error.to_string();
        let (_, metadata) = SafeTensors::read_metadata(content).map_err(text)?;
        let tensors = SafeTensors::deserialize(content).map_err(text)?;
        let json = metadata.metadata().as_ref().and_then(|map| map.get("tally"));
        let json = json.ok_or("not a reproduction: its metadata has no key `tally`")?;
        let value: serde_json::Value = serde_json::from_str(json).map_err(|error| error.to_string())?;
        match (value["format"].as_str(), value["version"].as_u64()) {
            (Some(FORMAT), Some(1 | 2)) => {}
            (Some(FORMAT), Some(version)) => {
                return Err(format!("version {version}, where {VERSION} is known"));
            }
            _ => return Err(format!("not a reproduction: `format` is not \"{FORMAT}\"")),
        }
        let head: Head = serde_json::from_value(value).map_err(|error| error.to_string())?;
        let data = |name: String, dtype: Dtype| {
            let tensor = tensors.tensor(&name).map_err(|_| format!("there is no tensor `{name}`"))?;
            if tensor.dtype() != dtype {
                return Err(format!("`{name}` is {:?}, not {dtype:?}", tensor.dtype()));
            }
            Ok(tensor.data())
        };
        let floats = |what: &str, buffer: Buffer| {
            let data = data(format!("{what}/{buffer}"), Dtype::F32)?;
            Ok::<Vec<f32>, String>(data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
        };
        let mut weights = Vec::new();
        for weight in &head.weights {
            let dtype: gguf::Dtype = weight.dtype.parse().map_err(|e: gguf::UnknownDtype| e.to_string())?;
            let bytes = data(format!("weight/{}", weight.name), Dtype::U8)?;
            let k = *weight.dims.first().ok_or_else(|| format!("`{}` has no dimension", weight.name))?;
            let rows = weight.dims[1..].iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            let size = dtype.row_bytes(k).zip(rows).and_then(|(row, rows)| row.checked_mul(rows));
            if size != Some(bytes.len()) {
                return Err(format!("`weight/{}`: {} bytes are not its shape", weight.name, bytes.len()));
            }
            let (name, dims) = (weight.name.as_str().into(), weight.dims.clone());
            weights.push(Tensor { name, dtype, dims, data: bytes.to_vec().into() });
        }
        let stage = head.place.site.stage;
        let mut inputs = Values::new();
        let stored: &[Buffer] = if stage == Stage::Attend { &[Buffer::K, Buffer::V] } else { &[] };
        for &buffer in stage.reads().iter().chain(stored) {
            inputs.insert(buffer, floats("input", buffer)?);
        }
        let mut past = Values::new();
        if stage == Stage::Attend && head.start > 0 {
            for buffer in [Buffer::K, Buffer::V] {
                past.insert(buffer, floats("past", buffer)?);
            }
        }
        if head.start > MOST_POSITIONS {
            return Err(format!("it begins at position {}, beyond {MOST_POSITIONS}", head.start));
        }
        let buffer = head.place.buffer;
        let (expected, got) = (floats("expected", buffer)?, floats("got", buffer)?);
        if expected.len() != got.len() || expected.is_empty() || head.tokens.is_empty() {
            return Err("no values, or not as many that came as were expected".into());
        }
        Ok(Reproduction { head, weights, inputs, past, buffer, expected, got })
    }

    /// The model of one layer.
    pub fn model(&self) -> Result<Arc<Model>, ReproductionError> {
        let bad = |why: String| ReproductionError::Bad { path: "the reproduction's model".into(), why };
        let config = self.head.shape.config().map_err(bad)?;
        let mut given: BTreeMap<&str, &Tensor> = self.weights.iter().map(|w| (&*w.name, w)).collect();
        let mut all = Vec::new();
        for spec in specs(&config) {
            if let Some(tensor) = given.remove(spec.name.as_str()) {
                all.push(tensor.clone());
                continue;
            }
            let len = spec.dims.iter().try_fold(4usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= MEMORY);
            let len = len.ok_or_else(|| bad(format!("`{}` would be too large", spec.name)))?;
            let data = vec![0; len].into();
            all.push(Tensor { name: spec.name.into(), dtype: gguf::Dtype::F32, dims: spec.dims, data });
        }
        if let Some(name) = given.into_keys().next() {
            return Err(bad(format!("a weight `{}` that no such model has", name.escape_debug())));
        }
        Model::from_tensors(config, &all).map(Arc::new).map_err(|error| bad(error.to_string()))
    }

    /// Runs it on the backend that `build` makes of its model.
    pub fn replay(
        &self,
        build: impl FnOnce(Arc<Model>) -> Result<Box<dyn Backend>, String>,
    ) -> Result<Replay, ReproductionError> {
        let mut backend = build(self.model()?).map_err(ReproductionError::Build)?;
        backend.observe(true);
        let place = self.head.place;
        let site = Site { stage: place.site.stage, layer: place.site.layer.map(|_| 0) };
        let step = from(self.head.start, &self.head.tokens);
        self.store_past(&mut *backend, site)?;
        let start = Instant::now();
        let mut outputs = run_stage(&mut *backend, &step, site, &self.inputs, &[self.buffer])?;
        let elapsed = start.elapsed();
        let values = outputs.remove(&self.buffer).unwrap_or_default();
        if values.len() != self.expected.len() {
            let why = format!("{} values, where {} were expected", values.len(), self.expected.len());
            return Err(ReproductionError::Bad { path: key(place.site, place.buffer), why });
        }
        let shape = self.buffer.shape(&backend.model().config, step.rows.len(), step.rows.len());
        let line = *shape.last().expect("every buffer has a dimension");
        // The judge of bits if there is no limit; its bounds are not asked for when there is one.
        let wrong = Judge::Bits.wrong(&self.expected, &values, line, self.head.limit);
        Ok(Replay {
            place,
            figures: Figures::from(&Comparison::of(&self.expected, &values)),
            wrong: wrong.len(),
            as_then: Comparison::of(&self.got, &values).bits_equal(),
            elapsed,
        })
    }
}

impl Reproduction {
    /// Positions that the backend must have room for.
    pub fn context(&self) -> usize {
        self.head.start as usize + self.head.tokens.len() // `usize` is no narrower than u32
    }

    /// Puts the keys and values of the positions before the step into the cache.
    fn store_past(&self, backend: &mut dyn Backend, site: Site) -> Result<(), ReproductionError> {
        let config = backend.model().config;
        let line = config.kv_heads * config.head_dim;
        let (Some(k), Some(v)) = (self.past.get(&Buffer::K), self.past.get(&Buffer::V)) else {
            return Ok(());
        };
        let want = self.head.start as usize * line;
        if k.len() != want || v.len() != want {
            let why =
                format!("{} and {} values of keys and values, where {want} were stored", k.len(), v.len());
            return Err(ReproductionError::Bad { path: key(site, Buffer::K), why });
        }
        let rows = backend.max_rows();
        for (i, (k, v)) in k.chunks(rows * line).zip(v.chunks(rows * line)).enumerate() {
            // Below `start`.
            let step = from((i * rows) as u32, &vec![0; k.len() / line]);
            let inputs = Buffer::Q.shape(&config, step.rows.len(), 0).iter().product::<usize>();
            let inputs: Values =
                [(Buffer::Q, vec![0.0; inputs]), (Buffer::K, k.to_vec()), (Buffer::V, v.to_vec())].into();
            run_stage(backend, &step, Site { stage: Stage::RopeStore, ..site }, &inputs, &[])?;
        }
        Ok(())
    }
}

/// Reads `path` and runs it on the backend that `build` makes.
pub fn replay(
    path: &Path,
    build: impl FnOnce(Arc<Model>) -> Result<Box<dyn Backend>, String>,
) -> Result<Replay, ReproductionError> {
    Reproduction::read(path)?.replay(build)
}

/// Where a step may begin at most: a file from elsewhere shall not exhaust the memory by a rotary table.
const MOST_POSITIONS: u32 = 1 << 20;

/// The most that a weight which is not in the file may take: a file from elsewhere shall not exhaust the memory.
const MEMORY: usize = 1 << 30;
