//! A model's tensors by their GGUF names, checked against the configuration when the model is loaded.
//!
//! Only names and shapes are looked at here. Each matrix keeps its own type: any mix within a layer is legal, and
//! every backend dispatches on the tensor, never on the layer or the projection.

use std::collections::BTreeMap;

use gguf::{Dtype, File, Tensor};

use crate::{Config, ConfigError, Ffn};

/// What a tensor must be called and how long its dimensions are, GGUF order (row length first).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// GGUF name.
    pub name: String,
    /// `[K]`, `[K, N]` or `[K, N, E]`.
    pub dims: Vec<usize>,
    /// The layer it belongs to.
    pub layer: Option<usize>,
    /// Whether a model may do without it (the head, when it is tied to the embedding).
    pub optional: bool,
}

/// Every tensor of a model of this shape, in the order in which converters write them.
pub fn specs(config: &Config) -> Vec<Spec> {
    let Config { hidden: d, heads, kv_heads, head_dim, vocab, .. } = *config;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let top = |name: &str, dims: &[usize], optional| Spec {
        name: format!("{name}.weight"),
        dims: dims.to_vec(),
        layer: None,
        optional,
    };
    let mut all = vec![top("token_embd", &[d, vocab], false)];
    for layer in 0..config.layers {
        let mut add = |name: &str, dims: &[usize]| {
            all.push(Spec {
                name: format!("blk.{layer}.{name}.weight"),
                dims: dims.to_vec(),
                layer: Some(layer),
                optional: false,
            });
        };
        add("attn_norm", &[d]);
        add("attn_q", &[d, q]);
        add("attn_k", &[d, kv]);
        add("attn_v", &[d, kv]);
        add("attn_q_norm", &[head_dim]);
        add("attn_k_norm", &[head_dim]);
        add("attn_output", &[q, d]);
        add("ffn_norm", &[d]);
        match config.ffn {
            Ffn::Dense { width } => {
                add("ffn_gate", &[d, width]);
                add("ffn_up", &[d, width]);
                add("ffn_down", &[width, d]);
            }
            Ffn::Moe(moe) => {
                add("ffn_gate_inp", &[d, moe.experts]);
                add("ffn_gate_exps", &[d, moe.width, moe.experts]);
                add("ffn_up_exps", &[d, moe.width, moe.experts]);
                add("ffn_down_exps", &[moe.width, d, moe.experts]);
            }
        }
    }
    all.push(top("output_norm", &[d], false));
    all.push(top("output", &[d, vocab], true));
    all
}

/// The feed-forward matrices of a layer.
#[derive(Clone)]
pub enum FfnWeights {
    /// Dense network.
    Dense {
        /// `[D, F]`.
        gate: Tensor,
        /// `[D, F]`.
        up: Tensor,
        /// `[F, D]`.
        down: Tensor,
    },
    /// Router and experts.
    Moe {
        /// The router, `[D, E]`.
        gate_inp: Tensor,
        /// `[D, F, E]`.
        gate: Tensor,
        /// `[D, F, E]`.
        up: Tensor,
        /// `[F, D, E]`.
        down: Tensor,
    },
}

/// The tensors of a layer; shapes in GGUF order, row length first.
#[derive(Clone)]
pub struct LayerWeights {
    /// `[D]`.
    pub attn_norm: Tensor,
    /// `[D, H * HD]`.
    pub attn_q: Tensor,
    /// `[D, KH * HD]`.
    pub attn_k: Tensor,
    /// `[D, KH * HD]`.
    pub attn_v: Tensor,
    /// `[HD]`.
    pub attn_q_norm: Tensor,
    /// `[HD]`.
    pub attn_k_norm: Tensor,
    /// `[H * HD, D]`.
    pub attn_output: Tensor,
    /// `[D]`.
    pub ffn_norm: Tensor,
    /// Router, experts or dense network.
    pub ffn: FfnWeights,
}

/// All tensors of a model.
#[derive(Clone)]
pub struct Weights {
    /// `[D, V]`.
    pub token_embd: Tensor,
    /// One entry a layer.
    pub layers: Vec<LayerWeights>,
    /// `[D]`.
    pub output_norm: Tensor,
    /// `[D, V]`; the embedding again when the head is tied.
    pub output: Tensor,
}

impl LayerWeights {
    /// Every tensor of the layer, in the order of [`specs`].
    pub fn tensors(&self) -> Vec<&Tensor> {
        let mut all = vec![
            &self.attn_norm,
            &self.attn_q,
            &self.attn_k,
            &self.attn_v,
            &self.attn_q_norm,
            &self.attn_k_norm,
            &self.attn_output,
            &self.ffn_norm,
        ];
        match &self.ffn {
            FfnWeights::Dense { gate, up, down } => all.extend([gate, up, down]),
            FfnWeights::Moe { gate_inp, gate, up, down } => all.extend([gate_inp, gate, up, down]),
        }
        all
    }
}

impl Weights {
    /// Every tensor, in the order of [`specs`]; a tied head is the embedding once more.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let layers = self.layers.iter().flat_map(LayerWeights::tensors);
        std::iter::once(&self.token_embd).chain(layers).chain([&self.output_norm, &self.output]).collect()
    }

    /// The tensor of this GGUF name, such as `blk.6.ffn_down_exps.weight`.
    pub fn named(&self, name: &str) -> Option<&Tensor> {
        self.tensors().into_iter().find(|tensor| &*tensor.name == name)
    }
}

/// A model: configuration and weights. Cloning shares the bytes.
#[derive(Clone)]
pub struct Model {
    /// Hyperparameters.
    pub config: Config,
    /// Tensors.
    pub weights: Weights,
}

/// Why a file is not a model this engine runs.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The metadata.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A tensor is not there.
    #[error("tensor `{0}` is missing")]
    Missing(String),
    /// A tensor has another shape than the metadata implies.
    #[error("tensor `{name}`: shape {found:?} does not fit the metadata, which implies {want:?}")]
    Shape {
        /// Tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The expected shape.
        want: Vec<usize>,
    },
    /// A norm's weights must be floats.
    #[error("tensor `{name}`: a norm cannot be stored as {dtype} (supported: F32, F16, BF16)")]
    NormType {
        /// Tensor.
        name: String,
        /// Its type.
        dtype: Dtype,
    },
    /// A tensor that the forward would silently ignore, such as a bias.
    #[error("tensor `{0}` has no place in this architecture; without it the answers would be wrong")]
    Unknown(String),
}

impl Model {
    /// Reads the configuration and finds every tensor. No weight is copied.
    pub fn load(file: &File) -> Result<Model, ModelError> {
        let name = "token_embd.weight";
        let embedding = file.tensor(name).map(|t| t.dims.get(1).copied().unwrap_or(0));
        // The architecture is named before anything is said about tensors: a vocabulary-only or foreign file gets
        // the error that explains it.
        let config = Config::from_metadata(file.metadata(), embedding.unwrap_or(0))?;
        Model::from_tensors(config, file.tensors())
    }

    /// A model of this configuration from these tensors, in any order.
    pub fn from_tensors(config: Config, tensors: &[Tensor]) -> Result<Model, ModelError> {
        let mut by_name: BTreeMap<&str, &Tensor> = tensors.iter().map(|t| (&*t.name, t)).collect();
        let mut found = BTreeMap::new();
        for spec in specs(&config) {
            match by_name.remove(&*spec.name) {
                Some(tensor) => {
                    check(&spec, tensor)?;
                    found.insert(spec.name, tensor.clone());
                }
                None if spec.optional => {}
                None => return Err(ModelError::Missing(spec.name)),
            }
        }
        // A bias, say, that the forward would silently ignore.
        if let Some(name) = by_name.into_keys().next() {
            return Err(ModelError::Unknown(name.into()));
        }
        let mut take = |name: String| found.remove(&name);
        let mut layer =
            |i: usize| load_layer(&config, |name| take(format!("blk.{i}.{name}.weight")).expect(CHECKED));
        let layers = (0..config.layers).map(&mut layer).collect();
        let token_embd = take("token_embd.weight".into()).expect(CHECKED);
        let output = take("output.weight".into()).unwrap_or_else(|| token_embd.clone());
        let output_norm = take("output_norm.weight".into()).expect(CHECKED);
        Ok(Model { config, weights: Weights { token_embd, layers, output_norm, output } })
    }
}

const CHECKED: &str = "every required tensor was found before";

/// The tensor has the shape that the metadata implies, and a norm is stored as floats.
fn check(spec: &Spec, tensor: &Tensor) -> Result<(), ModelError> {
    let name = || spec.name.clone();
    if tensor.dims != spec.dims {
        return Err(ModelError::Shape { name: name(), found: tensor.dims.clone(), want: spec.dims.clone() });
    }
    if spec.dims.len() == 1 && !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(ModelError::NormType { name: name(), dtype: tensor.dtype });
    }
    Ok(())
}

fn load_layer(config: &Config, mut tensor: impl FnMut(&str) -> Tensor) -> LayerWeights {
    LayerWeights {
        attn_norm: tensor("attn_norm"),
        attn_q: tensor("attn_q"),
        attn_k: tensor("attn_k"),
        attn_v: tensor("attn_v"),
        attn_q_norm: tensor("attn_q_norm"),
        attn_k_norm: tensor("attn_k_norm"),
        attn_output: tensor("attn_output"),
        ffn_norm: tensor("ffn_norm"),
        ffn: match config.ffn {
            Ffn::Dense { .. } => {
                FfnWeights::Dense { gate: tensor("ffn_gate"), up: tensor("ffn_up"), down: tensor("ffn_down") }
            }
            Ffn::Moe(_) => FfnWeights::Moe {
                gate_inp: tensor("ffn_gate_inp"),
                gate: tensor("ffn_gate_exps"),
                up: tensor("ffn_up_exps"),
                down: tensor("ffn_down_exps"),
            },
        },
    }
}
