//! File mixes: which type each tensor gets when a model is quantised.
//!
//! Owns the choice alone; [`quantise`](crate::quantise) does the work. The rules are those of llama.cpp
//! (`llama_tensor_get_type` and `tensor_allows_quantization` in src/llama-quant.cpp) for `qwen3` and `qwen3moe`
//! without an importance matrix, so that a file made here has the type map that users of published files expect.

use gguf::Dtype;
use std::fmt;
use std::str::FromStr;

/// What a quantised file is called: one type, or a named mix of types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mix {
    /// Everything as binary32.
    F32,
    /// Matrices as binary16.
    F16,
    /// Matrices as bfloat16.
    BF16,
    /// Matrices as Q8_0.
    Q8_0,
    /// Matrices as Q6_K.
    Q6K,
    /// Q5_K; the value and down projections of sensitive layers and the output as Q6_K.
    Q5KM,
    /// Q4_K; the value and down projections of sensitive layers and the output as Q6_K.
    Q4KM,
    /// Q4_K; the value and down projections of the first layers as Q5_K and the output as Q6_K.
    Q4KS,
}

/// What the choice depends on beside the tensor itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixContext {
    /// Layers of the model (`block_count`).
    pub n_layers: usize,
    /// Experts of a layer; 0 for a dense model.
    pub n_experts: usize,
    /// No `output.weight` of its own: `token_embd.weight` is the output head too.
    pub tied: bool,
}

impl Mix {
    /// Every mix, in the order in which they are listed to users: from the largest file to the smallest.
    pub const ALL: [Mix; 8] =
        [Mix::F32, Mix::F16, Mix::BF16, Mix::Q8_0, Mix::Q6K, Mix::Q5KM, Mix::Q4KM, Mix::Q4KS];

    /// The name as the field writes it, such as `Q4_K_M`.
    pub const fn name(self) -> &'static str {
        match self {
            Mix::F32 => "F32",
            Mix::F16 => "F16",
            Mix::BF16 => "BF16",
            Mix::Q8_0 => "Q8_0",
            Mix::Q6K => "Q6_K",
            Mix::Q5KM => "Q5_K_M",
            Mix::Q4KM => "Q4_K_M",
            Mix::Q4KS => "Q4_K_S",
        }
    }

    /// The number for `general.file_type` (`enum llama_ftype` in llama.h).
    pub const fn file_type(self) -> u32 {
        match self {
            Mix::F32 => 0,
            Mix::F16 => 1,
            Mix::Q8_0 => 7,
            Mix::Q4KS => 14,
            Mix::Q4KM => 15,
            Mix::Q5KM => 17,
            Mix::Q6K => 18,
            Mix::BF16 => 32,
        }
    }

    /// The type of a matrix to which no special rule applies.
    pub const fn base(self) -> Dtype {
        match self {
            Mix::F32 => Dtype::F32,
            Mix::F16 => Dtype::F16,
            Mix::BF16 => Dtype::BF16,
            Mix::Q8_0 => Dtype::Q8_0,
            Mix::Q6K => Dtype::Q6K,
            Mix::Q5KM => Dtype::Q5K,
            Mix::Q4KM | Mix::Q4KS => Dtype::Q4K,
        }
    }

    /// The type that the tensor `name` gets. `dims[0]` is the row length K, as in the file.
    ///
    /// Vectors, norms and the router (`ffn_gate_inp`) stay F32: they are small and everything hangs on them. Where K
    /// is no multiple of the chosen type's block the next larger type with blocks of 32 is taken, then F16.
    pub fn tensor_type(self, context: &MixContext, name: &str, dims: &[usize]) -> Dtype {
        if !is_matrix(name, dims) {
            return Dtype::F32;
        }
        let row_len = dims[0];
        let head = name == "output.weight" || context.tied && name == "token_embd.weight";
        let chosen = match self.base() {
            base @ (Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::Q8_0) => base,
            base if head && !fits(base, row_len) => Dtype::Q8_0,
            _ if head => Dtype::Q6K,
            base => self.layer_type(context, name).unwrap_or(base),
        };
        fallback(chosen, row_len)
    }

    /// The type of a tensor of a layer where it is not the mix's base.
    fn layer_type(self, context: &MixContext, name: &str) -> Option<Dtype> {
        let (layer, kind) = layer_and_kind(name)?;
        let n_layers = context.n_layers;
        // Eight experts mark Mixtral in the reference, whose attention is cheap beside them; it asks only for the number.
        let eight_experts = context.n_experts == 8;
        match (kind, self) {
            ("attn_v" | "attn_k", _) if eight_experts => Some(Dtype::Q8_0),
            ("attn_output", Mix::Q4KM | Mix::Q4KS) if eight_experts => Some(Dtype::Q5K),
            ("attn_v" | "ffn_down" | "ffn_down_exps", Mix::Q4KM | Mix::Q5KM)
                if more_bits(layer, n_layers) =>
            {
                Some(Dtype::Q6K)
            }
            ("attn_v", Mix::Q4KS) if layer < 4 => Some(Dtype::Q5K),
            ("ffn_down" | "ffn_down_exps", Mix::Q4KS) if layer < n_layers / 8 => Some(Dtype::Q5K),
            _ => None,
        }
    }
}

/// Layers that the `_M` mixes give more bits: the first and last eighth, and every third between.
fn more_bits(layer: usize, n_layers: usize) -> bool {
    let eighth = n_layers / 8;
    layer < eighth || layer >= 7 * n_layers / 8 || (layer - eighth) % 3 == 2
}

/// Whether the tensor is a matrix that a mix may store in its own types.
fn is_matrix(name: &str, dims: &[usize]) -> bool {
    // Trailing dimensions of 1 do not count: a file may write a vector with them.
    let rank = dims.iter().rposition(|&dim| dim != 1).map_or(0, |last| last + 1);
    rank >= 2
        && name.ends_with("weight")
        && !name.ends_with("_norm.weight")
        && !name.ends_with("ffn_gate_inp.weight")
}

/// `blk.7.attn_v.weight` is layer 7, `attn_v`.
fn layer_and_kind(name: &str) -> Option<(usize, &str)> {
    let (layer, kind) = name.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')?;
    Some((layer.parse().ok()?, kind))
}

fn fits(dtype: Dtype, row_len: usize) -> bool {
    row_len.is_multiple_of(dtype.block_len())
}

/// The type for rows that are no multiple of `chosen`'s block.
fn fallback(chosen: Dtype, row_len: usize) -> Dtype {
    if fits(chosen, row_len) {
        return chosen;
    }
    let smaller_block = match chosen {
        Dtype::Q4K => Dtype::Q5_0,
        Dtype::Q5K => Dtype::Q5_1,
        _ => Dtype::Q8_0,
    };
    if fits(smaller_block, row_len) { smaller_block } else { Dtype::F16 }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no [`Mix`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown file type `{0}`; supported are {list}", list = Mix::ALL.map(Mix::name).join(", "))]
pub struct UnknownMix(pub String);

impl FromStr for Mix {
    type Err = UnknownMix;

    /// Case is ignored. `Q4_K` and `Q5_K` mean their `_M` mixes, as users of llama.cpp are used to.
    fn from_str(name: &str) -> Result<Self, UnknownMix> {
        let wanted = match name.to_ascii_uppercase().as_str() {
            "Q4_K" => "Q4_K_M".to_owned(),
            "Q5_K" => "Q5_K_M".to_owned(),
            other => other.to_owned(),
        };
        Self::ALL.into_iter().find(|mix| mix.name() == wanted).ok_or_else(|| UnknownMix(name.to_owned()))
    }
}
