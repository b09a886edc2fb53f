//! The failing stage cut out: one small file with its inputs, the weights concerned, what was expected and what came.
//!
//! The file is safetensors. Its metadata holds [`Head`] as JSON under the key `tally`; tensors are `weight/NAME` (the
//! bytes of the model file's blocks, U8), `input/BUFFER`, `expected/BUFFER` and `got/BUFFER` (F32). [`replay`] makes a
//! model of one layer of it, whose weights are zero but for those: only rows, heads and experts that the wrong values
//! need are kept, since each output is computed from its own row.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use gguf::Tensor;
use model::{Arch, Backend, Buffer, Config, Fault, Ffn, Model, Moe, Site, Stage, specs};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::bench::{Values, fresh, run_stage};
use crate::dump::{Arithmetic, bytes};
use crate::fingerprint;
use crate::judge::Judge;
use crate::localise::Localised;
use crate::pair::Capture;
use crate::place::{Place, key};
use crate::report::Figures;
use crate::stats::Comparison;

/// What `format` says.
pub const FORMAT: &str = "tally-reproduction";
/// The version that is written, and the only one read.
pub const VERSION: u32 = 1;
/// Rows of weights and columns of outputs that are kept around a wrong one: whole tiles of any kernel.
const WINDOW: usize = 256;
/// Rows of the step that are kept, where they do not depend on each other.
const ROWS: usize = 16;

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
    /// Token ids of the step's rows, at positions from 0.
    pub tokens: Vec<u32>,
}

/// The cut model's dimensions; symbols as in [`model::Config`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// `D`.
    pub hidden: usize,
    /// `H`.
    pub heads: usize,
    /// `KH`.
    pub kv_heads: usize,
    /// `HD`.
    pub head_dim: usize,
    /// `V`.
    pub vocab: usize,
    /// `E`; 0 of a dense model.
    pub experts: usize,
    /// `K`; 0 of a dense model.
    pub used: usize,
    /// `F`.
    pub width: usize,
    /// Whether the experts' weights are renormalised.
    pub renormalise: bool,
    /// Factor on them, its bits.
    pub scale_bits: u32,
    /// Epsilon of the norms, its bits.
    pub eps_bits: u32,
    /// Frequencies of the rotation by the pair, radians a position, their bits: whatever scaling made them.
    pub rope: Rope,
}

/// Rotary embedding as the model's metadata has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies, its bits.
    pub base_bits: u64,
    /// `none`, `linear` or `yarn`.
    pub scaling: String,
    /// The scaling's numbers, in the order of [`model::rope::Scaling`].
    pub numbers: Vec<f64>,
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

/// Which parts of the model and of the step are kept.
struct Cut {
    config: Config,
    rows: Vec<usize>,
    /// Of `D` where it is the outputs' dimension, of `F`, or of `V`.
    window: std::ops::Range<usize>,
    /// First query and key/value head.
    heads: [usize; 2],
    /// Experts by their new number.
    experts: Vec<usize>,
    tokens: Vec<u32>,
}

impl Reproduction {
    /// Cuts the stage out of `model`; none where it cannot stand alone (attention or rotation beyond a sequence's first
    /// step).
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
            },
            inputs,
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
            (Some(FORMAT), Some(version)) if version == u64::from(VERSION) => {}
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
        let buffer = head.place.buffer;
        let (expected, got) = (floats("expected", buffer)?, floats("got", buffer)?);
        if expected.len() != got.len() || expected.is_empty() || head.tokens.is_empty() {
            return Err("no values, or not as many that came as were expected".into());
        }
        Ok(Reproduction { head, weights, inputs, buffer, expected, got })
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
        let step = fresh(&self.head.tokens);
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

/// Reads `path` and runs it on the backend that `build` makes.
pub fn replay(
    path: &Path,
    build: impl FnOnce(Arc<Model>) -> Result<Box<dyn Backend>, String>,
) -> Result<Replay, ReproductionError> {
    Reproduction::read(path)?.replay(build)
}

/// The most that a weight which is not in the file may take: a file from elsewhere shall not exhaust the memory.
const MEMORY: usize = 1 << 30;

/// The weights that a stage uses, by their names without layer.
fn weights_of(stage: Stage, moe: bool) -> &'static [&'static str] {
    match stage {
        Stage::Embed => &["token_embd"],
        Stage::Qkv => &["attn_norm", "attn_q", "attn_k", "attn_v"],
        Stage::RopeStore => &["attn_q_norm", "attn_k_norm"],
        // Storing the keys needs the heads' norms.
        Stage::Attend => &["attn_q_norm", "attn_k_norm"],
        Stage::AttnOut => &["attn_output"],
        Stage::Route => &["ffn_norm", "ffn_gate_inp"],
        Stage::ExpertsUp => &["ffn_gate_exps", "ffn_up_exps"],
        Stage::ExpertsDown => &["ffn_down_exps"],
        Stage::FeedForward if !moe => &["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"],
        Stage::FeedForward => &[],
        Stage::Head => &["output_norm", "output"],
    }
}

impl Cut {
    fn new(model: &Model, capture: &Capture, at: &Localised) -> Option<Cut> {
        let (full, stage) = (&model.config, capture.site.stage);
        let step = &capture.step;
        let in_order =
            step.rows.iter().enumerate().all(|(i, row)| row.position as usize == i && row.sequence == 0);
        let rows: Vec<usize> = match stage {
            Stage::RopeStore | Stage::Attend if !in_order => return None,
            Stage::RopeStore | Stage::Attend => (0..step.rows.len()).collect(),
            Stage::Head => vec![at.location.row],
            _ => {
                let first = at.location.row.saturating_sub(ROWS - 1);
                (first..(first + ROWS).min(step.rows.len())).collect()
            }
        };
        let index = &at.location.index;
        let column = *index.last()?;
        let around = |n: usize| {
            let start = column / WINDOW * WINDOW;
            start..(start + WINDOW).min(n)
        };
        let mut config = Config { layers: 1, heads: 1, kv_heads: 1, vocab: 32, ..*full };
        let (mut window, mut heads, mut experts) = (0..0, [0, 0], Vec::new());
        let mut tokens: Vec<u32> = vec![0; rows.len()];
        match stage {
            Stage::Embed => {
                let distinct: BTreeSet<u32> = rows.iter().map(|&row| step.rows[row].token).collect();
                experts = distinct.iter().map(|&token| token as usize).collect(); // the rows that are kept
                let renumbered = |&row: &usize| distinct.iter().position(|&t| t == step.rows[row].token);
                tokens = rows.iter().filter_map(renumbered).map(|at| at as u32).collect();
                config.vocab = experts.len();
            }
            Stage::Qkv | Stage::RopeStore => {
                let head = index[1];
                heads = if at.buffer == Buffer::Q { [head, 0] } else { [0, head] };
            }
            Stage::Attend => {
                let group = full.heads / full.kv_heads;
                heads = [index[1] / group * group, index[1] / group];
                config.heads = group;
            }
            Stage::AttnOut => {
                window = around(full.hidden);
                (config.hidden, config.heads, config.kv_heads) = (window.len(), full.heads, full.kv_heads);
            }
            Stage::Head => {
                window = around(full.vocab);
                config.vocab = window.len();
            }
            _ => {}
        }
        if let Ffn::Moe(moe) = full.ffn {
            let mut cut = Moe { experts: 1, used: 1, width: 32, ..moe };
            match stage {
                Stage::Route => (cut.experts, cut.used) = (moe.experts, moe.used),
                Stage::ExpertsUp | Stage::ExpertsDown => {
                    let chosen = capture.inputs.get(&Buffer::Experts)?;
                    let kept = rows.iter().flat_map(|&row| &chosen[row * moe.used..][..moe.used]);
                    let distinct: BTreeSet<usize> = kept.map(|&e| e as usize).collect();
                    experts = distinct.into_iter().collect();
                    (cut.experts, cut.used) = (experts.len(), moe.used);
                    if stage == Stage::ExpertsUp {
                        window = around(moe.width);
                        cut.width = window.len();
                    } else {
                        window = around(full.hidden);
                        (config.hidden, cut.width) = (window.len(), moe.width);
                    }
                }
                _ => {}
            }
            config.ffn = Ffn::Moe(cut);
        } else if stage != Stage::FeedForward {
            config.ffn = Ffn::Dense { width: 32 };
        }
        Some(Cut { config, rows, window, heads, experts, tokens })
    }

    /// The rows of a weight that are kept, under the name that they have in the cut model.
    fn weight(&self, stage: Stage, stem: &str, tensor: &Tensor) -> Tensor {
        let (hd, size) = (self.config.head_dim, tensor.row_bytes());
        let heads = |first: usize, n: usize| (first * hd..(first + n) * hd).collect::<Vec<_>>();
        let within = |expert: usize| {
            let rows = tensor.dims[1];
            self.window.clone().map(move |row| expert * rows + row)
        };
        let rows: Vec<usize> = match (stage, stem) {
            (Stage::Embed, _) => self.experts.clone(),
            (Stage::Qkv, "attn_q") => heads(self.heads[0], 1),
            (Stage::Qkv, "attn_k" | "attn_v") => heads(self.heads[1], 1),
            (Stage::AttnOut, _) | (Stage::Head, "output") => self.window.clone().collect(),
            (Stage::ExpertsUp | Stage::ExpertsDown, _) => {
                self.experts.iter().flat_map(|&e| within(e)).collect()
            }
            _ => (0..tensor.rows()).collect(),
        };
        let data: Vec<u8> =
            rows.iter().flat_map(|&row| &tensor.data[row * size..][..size]).copied().collect();
        let dims = match stage {
            Stage::ExpertsUp | Stage::ExpertsDown => {
                vec![tensor.dims[0], self.window.len(), self.experts.len()]
            }
            _ if tensor.dims.len() == 1 => tensor.dims.clone(),
            _ => vec![tensor.dims[0], rows.len()],
        };
        let top = matches!(stage, Stage::Embed | Stage::Head);
        let name = if top { format!("{stem}.weight") } else { format!("blk.0.{stem}.weight") };
        Tensor { name: name.into(), dtype: tensor.dtype, dims, data: data.into() }
    }

    /// The part of a buffer that is kept.
    fn values(
        &self,
        full: &Config,
        capture: &Capture,
        stage: Stage,
        buffer: Buffer,
        values: &[f32],
    ) -> Vec<f32> {
        let shape = buffer.shape(full, capture.step.rows.len(), capture.step.logits.len());
        let lead = shape[0];
        let rows: Vec<usize> = match buffer {
            // A row's place among those that have logits.
            Buffer::Logits => {
                let place = |row: &usize| capture.step.logits.iter().position(|&l| l as usize == *row);
                self.rows.iter().filter_map(place).collect()
            }
            _ => self.rows.clone(),
        };
        let len = values.len() / lead;
        let width = *shape.last().expect("every buffer has a dimension");
        let new = buffer.shape(&self.config, 1, 1);
        let middle = match buffer {
            Buffer::Q | Buffer::Attn => self.heads[0],
            Buffer::K | Buffer::V | Buffer::CacheK | Buffer::CacheV => self.heads[1],
            _ => 0,
        };
        let kept_middle: usize = new[1..new.len() - 1].iter().product();
        let columns = if new[new.len() - 1] < width { self.window.clone() } else { 0..width };
        let mut out = Vec::new();
        for row in rows {
            let line = &values[row * len..][..len];
            for m in middle..middle + kept_middle {
                out.extend_from_slice(&line[m * width..][..width][columns.clone()]);
            }
        }
        if buffer == Buffer::Experts && matches!(stage, Stage::ExpertsUp | Stage::ExpertsDown) {
            let renumbered = |e: &mut f32| {
                let at = self.experts.iter().position(|&old| old == *e as usize);
                *e = at.expect("every chosen expert is kept") as f32;
            };
            out.iter_mut().for_each(renumbered);
        }
        out
    }
}

impl Shape {
    fn of(config: &Config) -> Shape {
        use model::rope::Scaling;
        let (scaling, numbers) = match config.rope.scaling {
            Scaling::None => ("none", vec![]),
            Scaling::Linear { factor } => ("linear", vec![factor]),
            Scaling::Yarn { factor, original_context, attention_factor, beta_fast, beta_slow } => {
                ("yarn", vec![factor, original_context, attention_factor, beta_fast, beta_slow])
            }
        };
        let rope = Rope { base_bits: config.rope.base.to_bits(), scaling: scaling.into(), numbers };
        let (experts, used, width, renormalise, scale) = match config.ffn {
            Ffn::Dense { width } => (0, 0, width, false, 1.0),
            Ffn::Moe(moe) => (moe.experts, moe.used, moe.width, moe.renormalise, moe.scale),
        };
        let Config { hidden, heads, kv_heads, head_dim, vocab, .. } = *config;
        let (scale_bits, eps_bits) = (scale.to_bits(), config.rms_eps.to_bits());
        Shape {
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab,
            experts,
            used,
            width,
            renormalise,
            scale_bits,
            eps_bits,
            rope,
        }
    }

    /// The configuration, or what makes no sense in it.
    fn config(&self) -> Result<Config, String> {
        use model::rope::Scaling;
        let Shape { hidden, heads, kv_heads, head_dim, vocab, experts, used, width, .. } = *self;
        let counts = [hidden, heads, kv_heads, head_dim, vocab, width];
        let sane = counts.iter().all(|&n| (1..=1 << 20).contains(&n))
            && heads.is_multiple_of(kv_heads)
            && head_dim.is_multiple_of(32)
            && head_dim <= 256
            && used <= experts
            && experts <= 1 << 12
            && (experts == 0) == (used == 0);
        if !sane {
            return Err("its dimensions are no model's".into());
        }
        let scaling = match (self.rope.scaling.as_str(), &self.rope.numbers[..]) {
            ("none", []) => Scaling::None,
            ("linear", &[factor]) => Scaling::Linear { factor },
            ("yarn", &[factor, original_context, attention_factor, beta_fast, beta_slow]) => {
                Scaling::Yarn { factor, original_context, attention_factor, beta_fast, beta_slow }
            }
            (other, _) => return Err(format!("RoPE scaling `{}` is not known", other.escape_debug())),
        };
        let scale = f32::from_bits(self.scale_bits);
        let ffn = match experts {
            0 => Ffn::Dense { width },
            _ => Ffn::Moe(Moe { experts, used, width, renormalise: self.renormalise, scale }),
        };
        Ok(Config {
            arch: if experts == 0 { Arch::Qwen3 } else { Arch::Qwen3Moe },
            layers: 1,
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context: 1 << 20,
            rms_eps: f32::from_bits(self.eps_bits),
            rope: model::rope::Rope { base: f64::from_bits(self.rope.base_bits), scaling },
            ffn,
        })
    }
}
