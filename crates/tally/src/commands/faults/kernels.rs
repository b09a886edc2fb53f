//! Faults in the GPU's kernels: a text of a kernel's source, what stands there instead, and what the debugger must say of
//! a GPU that runs it. Plants by writing the edited files into a folder (`--kernels`); knows no device.

use std::fs;
use std::path::Path;

use model::Stage;
use parity::Scenario;
use parity::faults::{Expected, Kind};

/// A fault in the kernels.
#[derive(Clone, Copy)]
pub(super) struct KernelFault {
    pub(super) name: &'static str,
    /// What is wrong.
    pub(super) what: &'static str,
    /// The kernels' file; where the fault was met is its business.
    pub(super) file: &'static str,
    /// What stands there, at least once; the first is replaced.
    right: &'static str,
    wrong: &'static str,
    pub(super) expected: Expected,
}

impl KernelFault {
    /// Writes the edited file into `folder`, on top of what other faults wrote there.
    pub(super) fn write(&self, folder: &Path) -> Result<(), String> {
        let Self { name, file, right, wrong, .. } = *self;
        let path = folder.join(file);
        let text = match fs::read_to_string(&path) {
            Ok(edited) => edited,
            Err(_) => built_in(file).ok_or_else(|| format!("{name}: there are no kernels `{file}`"))?,
        };
        if !text.contains(right) {
            return Err(format!("{name}: {file} has no `{right}` any more: plant the fault elsewhere"));
        }
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&path, text.replacen(right, wrong, 1)))
            .map_err(|error| format!("{}: {error}", path.display()))
    }
}

fn built_in(file: &str) -> Option<String> {
    cuda::kernel_sources().into_iter().find(|(name, _)| *name == file).map(|(_, text)| text)
}

/// On the left's inputs the stage errs.
const fn local(stage: Stage, layer: usize, tensors: &'static [&'static str]) -> Expected {
    Expected::new(stage, Some(layer), Kind::Local, tensors)
}

/// Right as long as somebody looks on: then other kernels run, which keep what goes on inside the experts.
const UNOBSERVED: Expected = Expected::new(Stage::Head, None, Kind::State(Scenario::Unobserved), &[]);

/// Every fault, the layer-6 story first. Made for [`parity::faults::Host::Mixed`], whose tensors part in layer 2.
pub(super) const ALL: &[KernelFault] = &[
    KernelFault {
        name: "kernel-down-read-as-q6-k",
        what: "`ffn_down_exps` multiplied as Q6_K in every layer, where the types part in layer 2: the layer-6 story",
        file: "product.cu",
        right: "    tile.type = w.type;",
        wrong: "    tile.type = job.share == 1 ? (u32)T_Q6K : w.type;",
        expected: Expected {
            feature: Some("type of ffn_down_exps = Q4_K"),
            ..local(Stage::ExpertsDown, 2, &["ffn_down_exps"])
        },
    },
    KernelFault {
        name: "kernel-scales-without-high-bits",
        what: "Q4_K scales 4 to 7 without their high bits, in prompts",
        file: "product_open.cuh",
        right: "(head.w & 0x0f0f0f0f) | (head.y >> 2 & 0x30303030), 0);",
        wrong: "(head.w & 0x0f0f0f0f), 0);",
        expected: local(Stage::Qkv, 0, &["attn_q", "attn_k"]),
    },
    KernelFault {
        name: "kernel-minima-added",
        what: "minima added where they are to be subtracted, in prompts",
        file: "product_blocks.cuh",
        right: "if constexpr (HAS_MINIMUM<T>) term = __fsub_rn(term,",
        wrong: "if constexpr (HAS_MINIMUM<T>) term = __fadd_rn(term,",
        expected: local(Stage::Qkv, 0, &["attn_q", "attn_k"]),
    },
    KernelFault {
        name: "kernel-quants-off-by-one",
        what: "Q6_K quants biased by 31, not 32, in prompts",
        file: "product_open.cuh",
        right: "BIAS = T == T_Q6K ? 32",
        wrong: "BIAS = T == T_Q6K ? 31",
        expected: Expected { feature: Some("type of attn_v = Q6_K"), ..local(Stage::Qkv, 0, &["attn_v"]) },
    },
    KernelFault {
        name: "kernel-scales-without-sign",
        what: "Q6_K scales without their sign where single weights are read",
        file: "open.cuh",
        right: "const i32 scale = (i8)unit(column, L::SCALES, row)[i / 16];",
        wrong: "const i32 scale = unit(column, L::SCALES, row)[i / 16];",
        expected: Expected::new(Stage::Embed, None, Kind::Local, &["token_embd"]),
    },
    KernelFault {
        name: "kernel-repacked-by-one",
        what: "weights repacked with two rows of every tile exchanged",
        file: "repack.cu",
        right: "*(u16*)(to + (row % 32) * size + b)",
        wrong: "*(u16*)(to + (row % 32 < 2 ? 1 - row % 32 : row % 32) * size + b)",
        expected: Expected::new(Stage::Embed, None, Kind::Local, &["token_embd"]),
    },
    KernelFault {
        name: "kernel-wrong-epsilon",
        what: "norms with an epsilon of 1e-3, not the model's",
        file: "fixed.cu",
        right: "__fadd_rn(mean, __int_as_float(RMS_EPS))",
        wrong: "__fadd_rn(mean, 1e-3f)",
        expected: local(Stage::Qkv, 0, &["attn_norm"]),
    },
    KernelFault {
        name: "kernel-rotated-backwards",
        what: "rotation by the opposite angle",
        file: "rope_store.cu",
        right: "head[i] = __fmaf_rn(a, cs.x, -__fmul_rn(b, cs.y));",
        wrong: "head[i] = __fmaf_rn(a, cs.x, __fmul_rn(b, cs.y));",
        expected: local(Stage::RopeStore, 0, &[]),
    },
    KernelFault {
        name: "kernel-mask-off-by-one",
        what: "each row of a prompt sees one key too few",
        file: "attend_stream.cu",
        right: "> limit[c / 2]) p[j][c] = none;",
        wrong: ">= limit[c / 2]) p[j][c] = none;",
        expected: local(Stage::Attend, 0, &[]),
    },
    KernelFault {
        name: "kernel-key-forgotten",
        what: "few rows at a time see one key too few",
        file: "attend_split.cu",
        right: "item.keys = min(keys - item.span * SPAN, SPAN);",
        wrong: "item.keys = min(keys - item.span * SPAN, SPAN) - (keys > 1);",
        expected: local(Stage::Attend, 0, &[]),
    },
    KernelFault {
        name: "kernel-router-lane-dropped",
        what: "the last 32 values left out of the router's product, in prompts",
        file: "float_product.cu",
        right: "sums[r][c] = __fmaf_rn(a[s][r], b[s][c], sums[r][c]);",
        wrong: "sums[r][c] = step + s == HIDDEN / 32 - 1 ? sums[r][c] : __fmaf_rn(a[s][r], b[s][c], sums[r][c]);",
        expected: local(Stage::Route, 0, &["ffn_gate_inp"]),
    },
    KernelFault {
        name: "kernel-not-renormalised",
        what: "the chosen experts' weights not divided by their sum",
        file: "choose.cuh",
        right: "if constexpr (RENORMALISE) weight = __fdiv_rn(weight, divisor);",
        wrong: "",
        expected: local(Stage::Route, 0, &[]),
    },
    KernelFault {
        name: "kernel-combined-backwards",
        what: "experts summed from the last rank to the first",
        file: "combine.cu",
        right: "for (u32 rank = 0; rank < USED; rank++) {",
        wrong: "for (u32 i = 0, rank = USED - 1; i < USED; i++, rank--) {",
        expected: local(Stage::ExpertsDown, 0, &[]),
    },
    KernelFault {
        name: "kernel-gate-and-up-swapped",
        what: "SwiGLU of up and gate, not of gate and up, where both are made at once",
        file: "product.cu",
        right: "__fmul_rn(silu(sums[i]), here[i * 32])",
        wrong: "__fmul_rn(silu(here[i * 32]), sums[i])",
        expected: UNOBSERVED,
    },
    KernelFault {
        name: "kernel-decode-gate-and-up-swapped",
        what: "the same for a single row",
        file: "decode_ffn.cu",
        right: "__fmul_rn(silu(g), u)",
        wrong: "__fmul_rn(silu(u), g)",
        expected: UNOBSERVED,
    },
    KernelFault {
        name: "kernel-decode-scale-of-the-next",
        what: "Q4_K and Q5_K sub-blocks with the scale of the next one, for a single row",
        file: "dot.cuh",
        right: "= s0 * even.v[i * 2] +",
        wrong: "= s1 * even.v[i * 2] +",
        expected: local(Stage::Qkv, 0, &["attn_q", "attn_k"]),
    },
    KernelFault {
        name: "kernel-head-one-ulp-high",
        what: "the logits of a single row one unit in the last place too large",
        file: "decode_head.cu",
        right: "f32 v = sum_terms(terms, COLUMNS, w.type);",
        wrong: "f32 v = __fmul_rn(sum_terms(terms, COLUMNS, w.type), 1.0000001f);",
        expected: Expected::new(Stage::Head, None, Kind::Local, &["output"]),
    },
    KernelFault {
        name: "kernel-router-of-few-rows",
        what: "the router's scores of few rows half as large again",
        file: "route_few.cu",
        right: "if (threadIdx.x % 32 == 0) job.logits[(u64)t * EXPERTS + first + r] = v;",
        wrong: "if (threadIdx.x % 32 == 0) job.logits[(u64)t * EXPERTS + first + r] = __fmul_rn(v, 1.5f);",
        expected: local(Stage::Route, 0, &["ffn_gate_inp"]),
    },
];

/// Two that are planted together, of which the first hides the second.
pub(super) const TWO: [&str; 2] = ["kernel-not-renormalised", "kernel-head-one-ulp-high"];

pub(super) fn named(name: &str) -> Option<KernelFault> {
    ALL.iter().find(|fault| fault.name == name).copied()
}
