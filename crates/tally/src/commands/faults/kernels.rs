//! Faults in the GPU's kernels: a text of a kernel's source, what stands there instead, and what the debugger must say of
//! a GPU that runs it. Plants by writing the edited files into a folder (`--kernels`); knows no device.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs};

use model::Stage;
use parity::Scenario;
use parity::faults::{Expected, Kind};

use crate::failure::Failure;

/// A fault in the kernels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KernelFault {
    pub(crate) name: &'static str,
    /// What is wrong.
    pub(crate) what: &'static str,
    /// Where it is made. Several where several kernels do the same: which of them runs is for the host to choose.
    edits: &'static [Edit],
    pub(crate) expected: Expected,
}

/// A text in a file of kernels that stands there at least once; the first is replaced.
#[derive(Debug)]
struct Edit {
    file: &'static str,
    right: &'static str,
    wrong: &'static str,
}

const fn edit(file: &'static str, right: &'static str, wrong: &'static str) -> Edit {
    Edit { file, right, wrong }
}

impl KernelFault {
    /// The first file that has it.
    pub(crate) fn file(&self) -> &'static str {
        self.edits[0].file
    }

    /// Writes the edited files into `folder`, on top of what other faults wrote there.
    pub(crate) fn write(&self, folder: &Path) -> Result<(), String> {
        let name = self.name;
        for &Edit { file, right, wrong } in self.edits {
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
                .map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(())
    }
}

/// A folder of edited kernels, removed when dropped.
pub(crate) struct Edited(pub(crate) PathBuf);

impl Edited {
    pub(crate) fn new() -> Result<Edited, Failure> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tally-edited-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        fs::create_dir_all(&path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        Ok(Edited(path))
    }
}

impl Drop for Edited {
    fn drop(&mut self) {
        // What is left behind in a temporary directory does no harm.
        let _ = fs::remove_dir_all(&self.0);
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

/// How a block's minima enter a term, rightly and wrongly.
const MINIMA: [&str; 2] = [
    "if constexpr (HAS_MINIMUM<T>) term = __fsub_rn(term,",
    "if constexpr (HAS_MINIMUM<T>) term = __fadd_rn(term,",
];

/// Every fault, the layer-6 story first. Made for [`parity::faults::Host::Mixed`], whose tensors part in layer 2.
pub(crate) const ALL: &[KernelFault] = &[
    KernelFault {
        name: "kernel-down-read-as-q6-k",
        what: "`ffn_down_exps` multiplied as Q6_K in every layer, where the types part in layer 2: the layer-6 story",
        // Pairs with rows of F values: nothing but the down projection.
        edits: &[
            edit(
                "product.cu",
                "    tile.type = w.type;",
                "    tile.type = job.share > 0 && job.k == WIDTH ? (u32)T_Q6K : w.type;",
            ),
            edit(
                "product_many.cu",
                "switch (item.type) {",
                "switch (job.share > 0 && job.k == WIDTH ? (u32)T_Q6K : item.type) {",
            ),
            edit(
                "product_stream.cu",
                "multiply<NARROW>(job.w[matrix].type,",
                "multiply<NARROW>(job.experts && job.k == WIDTH ? (u32)T_Q6K : job.w[matrix].type,",
            ),
        ],
        expected: Expected {
            feature: Some("type of ffn_down_exps = Q4_K"),
            ..local(Stage::ExpertsDown, 2, &["ffn_down_exps"])
        },
    },
    KernelFault {
        name: "kernel-scales-without-high-bits",
        what: "Q4_K scales 4 to 7 without their high bits, in prompts",
        edits: &[edit(
            "product_open.cuh",
            "(head.w & 0x0f0f0f0f) | (head.y >> 2 & 0x30303030), 0);",
            "(head.w & 0x0f0f0f0f), 0);",
        )],
        expected: local(Stage::Qkv, 0, &["attn_q", "attn_k"]),
    },
    KernelFault {
        name: "kernel-minima-added",
        what: "minima added where they are to be subtracted, in prompts",
        edits: &[
            edit("product_blocks.cuh", MINIMA[0], MINIMA[1]),
            edit("product_few.cuh", MINIMA[0], MINIMA[1]),
            edit("product_many.cu", MINIMA[0], MINIMA[1]),
        ],
        expected: local(Stage::Qkv, 0, &["attn_q", "attn_k"]),
    },
    KernelFault {
        name: "kernel-quants-off-by-one",
        what: "Q6_K quants biased by 31, not 32, in prompts",
        edits: &[edit("product_open.cuh", "BIAS = T == T_Q6K ? 32", "BIAS = T == T_Q6K ? 31")],
        expected: Expected { feature: Some("type of attn_v = Q6_K"), ..local(Stage::Qkv, 0, &["attn_v"]) },
    },
    KernelFault {
        name: "kernel-scales-without-sign",
        what: "Q6_K scales without their sign where single weights are read",
        edits: &[edit(
            "open.cuh",
            "const i32 scale = (i8)unit(band, L::SCALES, row)[i / 16];",
            "const i32 scale = unit(band, L::SCALES, row)[i / 16];",
        )],
        expected: Expected::new(Stage::Embed, None, Kind::Local, &["token_embd"]),
    },
    KernelFault {
        name: "kernel-repacked-by-one",
        what: "weights repacked with two rows of every tile exchanged",
        edits: &[edit(
            "repack.cu",
            "*(u16*)(to + row % BAND * size + b)",
            "*(u16*)(to + (row % 32 < 2 ? 1 - row % 32 : row % BAND) * size + b)",
        )],
        expected: Expected::new(Stage::Embed, None, Kind::Local, &["token_embd"]),
    },
    KernelFault {
        name: "kernel-wrong-epsilon",
        what: "norms with an epsilon of 1e-3, not the model's",
        edits: &[edit("norm.cuh", "__fadd_rn(mean, __int_as_float(RMS_EPS))", "__fadd_rn(mean, 1e-3f)")],
        expected: local(Stage::Qkv, 0, &["attn_norm"]),
    },
    KernelFault {
        name: "kernel-rotated-backwards",
        what: "rotation by the opposite angle",
        edits: &[edit(
            "rope_store.cu",
            "rotate(head[i], head[i + HALF], turn[i]);",
            "rotate(head[i + HALF], head[i], turn[i]);",
        )],
        expected: local(Stage::RopeStore, 0, &[]),
    },
    KernelFault {
        name: "kernel-mask-off-by-one",
        what: "rows of a prompt at even positions do not see themselves",
        edits: &[edit(
            "stream.cuh",
            "(i32)(j * 8 + quad * 2) > limit[i])",
            "(i32)(j * 8 + quad * 2) >= limit[i])",
        )],
        expected: local(Stage::Attend, 0, &[]),
    },
    KernelFault {
        name: "kernel-key-forgotten",
        what: "few rows at a time see one key too few",
        edits: &[edit(
            "attend_split.cu",
            "item.keys = min(keys - item.span * SPAN, SPAN);",
            "item.keys = min(keys - item.span * SPAN, SPAN) - (keys > 1);",
        )],
        expected: local(Stage::Attend, 0, &[]),
    },
    KernelFault {
        name: "kernel-router-lane-dropped",
        what: "the partial sum of lane 5 of 32 left out of the router's product, in prompts",
        edits: &[
            edit(
                "float_product.cu",
                "sums[r][c] = __fmaf_rn(",
                "sums[r][c] = threadIdx.x % 32 == 5 ? sums[r][c] : __fmaf_rn(",
            ),
            edit(
                "float_tile.cu",
                "sums[c * S::R + r] = __fmaf_rn(",
                "sums[c * S::R + r] = threadIdx.x % 32 == 5 ? sums[c * S::R + r] : __fmaf_rn(",
            ),
        ],
        expected: Expected { feature: Some("element % 32 = 5"), ..local(Stage::Route, 0, &["ffn_gate_inp"]) },
    },
    KernelFault {
        name: "kernel-not-renormalised",
        what: "the chosen experts' weights not divided by their sum",
        edits: &[edit("choose.cuh", "if constexpr (RENORMALISE) weight = __fdiv_rn(weight, divisor);", "")],
        expected: local(Stage::Route, 0, &[]),
    },
    KernelFault {
        name: "kernel-combined-backwards",
        what: "experts summed from the last rank to the first",
        edits: &[edit(
            "combine.cu",
            "for (u32 rank = 0; rank < USED; rank++) {",
            "for (u32 i = 0, rank = USED - 1; i < USED; i++, rank--) {",
        )],
        expected: local(Stage::ExpertsDown, 0, &[]),
    },
    KernelFault {
        name: "kernel-gate-without-silu",
        what: "the gate taken as it is, without SiLU, where gate and up are made at once",
        edits: &[
            edit("product.cu", "__fmul_rn(silu(sums[i]), here", "__fmul_rn(sums[i], here"),
            edit(
                "product_many.cu",
                "(EPILOGUE == SWIGLU) v = __fmul_rn(silu(v),",
                "(EPILOGUE == SWIGLU) v = __fmul_rn(v,",
            ),
            edit(
                "product_stream.cu",
                "(job.epilogue == SWIGLU) *out = __fmul_rn(silu(v),",
                "(job.epilogue == SWIGLU) *out = __fmul_rn(v,",
            ),
        ],
        expected: UNOBSERVED,
    },
    KernelFault {
        name: "kernel-decode-gate-and-up-swapped",
        what: "SwiGLU of up and gate, not of gate and up, for a single row",
        edits: &[edit("decode_ffn.cu", "__fmul_rn(silu(g), u)", "__fmul_rn(silu(u), g)")],
        expected: UNOBSERVED,
    },
    KernelFault {
        name: "kernel-decode-scale-of-the-next",
        what: "Q4_K and Q5_K sub-blocks with the scale of the next one, for a single row",
        edits: &[edit("dot.cuh", "h[i] = s0 * even.v[i * 2]", "h[i] = s1 * even.v[i * 2]")],
        expected: local(Stage::Qkv, 0, &["attn_q", "attn_k"]),
    },
    KernelFault {
        name: "kernel-head-one-ulp-high",
        what: "the logits of a single row one unit in the last place too large",
        edits: &[edit(
            "decode_head.cu",
            "logits[id] = sum_terms(terms, COLUMNS, w.type);",
            "logits[id] = __fmul_rn(sum_terms(terms, COLUMNS, w.type), 1.0000001f);",
        )],
        expected: Expected::new(Stage::Head, None, Kind::Local, &["output"]),
    },
    KernelFault {
        name: "kernel-router-of-few-rows",
        what: "the router's scores of few rows half as large again",
        edits: &[edit(
            "route_few.cu",
            "if (threadIdx.x % 32 == 0) job.logits[(u64)t * EXPERTS + first + r] = v;",
            "if (threadIdx.x % 32 == 0) job.logits[(u64)t * EXPERTS + first + r] = __fmul_rn(v, 1.5f);",
        )],
        expected: local(Stage::Route, 0, &["ffn_gate_inp"]),
    },
];

/// Two that are planted together, of which the first hides the second.
pub(crate) const TWO: [&str; 2] = ["kernel-not-renormalised", "kernel-head-one-ulp-high"];

pub(crate) fn named(name: &str) -> Option<KernelFault> {
    ALL.iter().find(|fault| fault.name == name).copied()
}
