//! Random models in which nothing is wrong: whatever the debugger finds there is false.
//!
//! They are of few kinds, since a GPU's kernels are compiled for dimensions and for the set of types; what does not ask for
//! a compilation is random: contents, which matrix has which type, prompts, the base of the rotation.

use gguf::Dtype;
use model::rope::{Rope, Scaling};
use model::{Arch, Config, Ffn, Moe, Spec};

/// What kernels are compiled for.
struct Kind {
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn: Ffn,
    types: [Dtype; 4],
}

const fn experts(experts: usize, used: usize, width: usize) -> Ffn {
    let renormalise = experts != 16;
    Ffn::Moe(Moe { experts, used, width, renormalise, scale: if renormalise { 1.0 } else { 2.5 } })
}

/// Together they have every type, networks with experts and without, and rows that are no whole super-blocks.
const KINDS: [Kind; 4] = [
    Kind {
        hidden: 512,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        ffn: experts(6, 2, 256),
        types: [Dtype::Q4K, Dtype::Q6K, Dtype::Q5_1, Dtype::F32],
    },
    Kind {
        hidden: 512,
        heads: 8,
        kv_heads: 1,
        head_dim: 64,
        ffn: Ffn::Dense { width: 512 },
        types: [Dtype::Q5K, Dtype::Q3K, Dtype::Q8_0, Dtype::BF16],
    },
    Kind {
        hidden: 256,
        heads: 8,
        kv_heads: 4,
        head_dim: 32,
        ffn: experts(16, 4, 256),
        types: [Dtype::Q2K, Dtype::Q4K, Dtype::Q5_0, Dtype::F16],
    },
    Kind {
        hidden: 160,
        heads: 3,
        kv_heads: 3,
        head_dim: 32,
        ffn: experts(5, 3, 96),
        types: [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::F16],
    },
];

/// One of them, by its number: described, not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Random(pub u64);

impl Random {
    /// Kinds of models: as many numbers in a row are each of another.
    pub const KINDS: usize = KINDS.len();

    fn kind(self) -> &'static Kind {
        // Below four.
        &KINDS[(self.0 % KINDS.len() as u64) as usize]
    }

    /// A number that only depends on this model and `what`: FNV-1a, its halves folded.
    fn number(self, what: &str) -> usize {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let hash = self.0.to_le_bytes().into_iter().chain(what.bytes()).fold(0xcbf2_9ce4_8422_2325, step);
        (hash >> 32 ^ hash & 0xffff_ffff) as usize
    }

    /// Its configuration: two layers that run in milliseconds.
    pub fn config(self) -> Config {
        let &Kind { hidden, heads, kv_heads, head_dim, ffn, .. } = self.kind();
        let arch = if matches!(ffn, Ffn::Moe(_)) { Arch::Qwen3Moe } else { Arch::Qwen3 };
        let base = [1e4, 1e5, 1e6, 5e6][self.number("base") % 4];
        Config {
            arch,
            layers: 2,
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab: 64,
            context: 8192,
            rms_eps: 1e-6,
            rope: Rope { base, scaling: Scaling::None },
            ffn,
        }
    }

    /// The type of each of its tensors. The four matrices around attention of the first layer have one each, so that every
    /// model of a kind has the same set.
    pub fn dtype(self, spec: &Spec) -> Dtype {
        const FIRST: [&str; 4] = ["attn_q.", "attn_k.", "attn_v.", "attn_output."];
        if spec.dims.len() == 1 {
            return Dtype::F32;
        }
        let turn = FIRST.iter().position(|stem| spec.layer == Some(0) && spec.name.contains(stem));
        let number = turn.map_or_else(|| self.number(&spec.name), |turn| turn + self.number("turn"));
        self.kind().types[number % 4]
    }

    /// Its prompt: long enough for every way of running.
    pub fn prompt(self) -> Vec<u32> {
        let len = [3, 5, 9, 17, 33, 70][self.number("prompt") % 6];
        (0..len).map(|i| (self.number(&i.to_string()) % 64) as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use synth::Shape;

    use super::*;

    /// A compilation serves all models of a kind; together they have every type.
    #[test]
    fn a_kind_has_one_set_of_types() {
        let mut sets = vec![BTreeSet::new(); Random::KINDS];
        let mut mixes = BTreeSet::new();
        for n in 0..60 {
            let random = Random(n);
            let types = std::cell::RefCell::new(Vec::new());
            let pick = |spec: &Spec| {
                let dtype = random.dtype(spec);
                if spec.dims.len() > 1 {
                    types.borrow_mut().push(dtype.id());
                }
                dtype
            };
            synth::model(&Shape { config: random.config(), tied: false }, n, pick);
            let types = types.into_inner();
            sets[n as usize % Random::KINDS].insert(types.iter().copied().collect::<BTreeSet<_>>());
            mixes.insert((n as usize % Random::KINDS, types));
        }
        assert!(sets.iter().all(|sets| sets.len() == 1), "{sets:?}");
        assert!(mixes.len() > 55, "{} mixes of types", mixes.len());
        let all: BTreeSet<_> = sets.into_iter().flatten().flatten().collect();
        assert_eq!(all.len(), Dtype::ALL.len());
    }
}
