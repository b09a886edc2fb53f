//! The checks that contracts can name: one row each.

use contract::{
    CheckCall, CheckSpec, Checks, Kind, Miss, ParameterSpec, Parameters, Part, PlantedFault, Provenance,
    Verdict,
};

use super::lab::Lab;
use super::{agreement, faults, forward, gpu, quantised, reader};

type Function = fn(&mut Lab, &Parameters, Option<&str>) -> Verdict;

const fn needed(name: &'static str, kind: Kind, about: &'static str) -> ParameterSpec {
    ParameterSpec { name, kind, about, required: true }
}

const fn optional(name: &'static str, kind: Kind, about: &'static str) -> ParameterSpec {
    ParameterSpec { name, kind, about, required: false }
}

const DEVICE: ParameterSpec =
    optional("device", Kind::Text, "cpu, cpu-scalar, oracle, or gpu: that of --device [default: cpu]");
const TOKENS: ParameterSpec = needed("tokens", Kind::Integer, "length of the prompt");
const LENGTHS: ParameterSpec = needed("tokens", Kind::Integers, "lengths of prompts");
const SHAPE: ParameterSpec = optional("shape", Kind::Text, "only for a model of this named shape");
const COSINE: ParameterSpec =
    optional("cosine_at_least", Kind::Number, "of a row of logits [default: 0.9999]");
const ERROR: ParameterSpec = optional("error_at_most", Kind::Number, "of a logit, in deviations of its row");

const fn fault(name: &'static str, about: &'static str) -> PlantedFault {
    PlantedFault { name, about }
}

const ROPE: PlantedFault = fault("rope-base", "the rotary base is a hundredth too large");
const COMPANY: PlantedFault = fault("company", "activations are off by a bit in steps of several sequences");
const MISREAD: PlantedFault =
    fault("type-misread", "a layer's down projection is read as the type that the layer before has");

/// Evidence of a run of the model at hand.
const OF_RUN: &[Part] = &[Part::Model, Part::Arithmetic];
/// Evidence about a GPU and the model on it.
const OF_GPU: &[Part] = &[Part::Kernels, Part::Model];

/// Every check.
const CHECKS: &[(CheckSpec, Function)] = &[
    (
        CheckSpec {
            name: "forward.finite",
            about: "Runs a prompt: every buffer of every stage has its shape, and nothing but numbers in it.",
            parameters: &[DEVICE, TOKENS],
            faults: &[fault("nan", "a NaN in the experts' hidden values of layer 1")],
            parts: OF_RUN,
        },
        forward::finite,
    ),
    (
        CheckSpec {
            name: "forward.router",
            about: "Runs a prompt: in every layer the chosen experts of every row are distinct and the best, and their weights sum to 1.",
            parameters: &[DEVICE, TOKENS, optional("sum_within", Kind::Number, "of 1 [default: 1e-6]")],
            faults: &[
                fault("weights-too-large", "the weights of layer 1 are a thousandth too large"),
                fault("expert-twice", "an expert of layer 1 is chosen twice"),
            ],
            parts: OF_RUN,
        },
        forward::router,
    ),
    (
        CheckSpec {
            name: "forward.transformers",
            about: "Runs models that Hugging Face transformers ran, and compares all logits with its.",
            parameters: &[
                DEVICE,
                needed("fixtures", Kind::Texts, "paths without .gguf and .safetensors"),
                COSINE,
                ERROR,
            ],
            faults: &[ROPE],
            parts: &[Part::Arithmetic],
        },
        forward::transformers,
    ),
    (
        CheckSpec {
            name: "forward.oracle",
            about: "Runs a prompt, and compares the last token's logits with those of the same forward in f64.",
            parameters: &[DEVICE, TOKENS, COSINE, ERROR],
            faults: &[fault(
                "not-renormalised",
                "the experts' weights are renormalised where they should not be, or not where they should",
            )],
            parts: OF_RUN,
        },
        forward::oracle,
    ),
    (
        CheckSpec {
            name: "agreement.devices",
            about: "Runs prompts and generates from them on two devices: all bits of all logits are equal.",
            parameters: &[
                needed("left", Kind::Text, "a device, as in `device`"),
                needed("right", Kind::Text, "another"),
                LENGTHS,
                optional("generate", Kind::Integer, "tokens after each prompt [default: 0]"),
            ],
            faults: &[fault("ulp", "activations after layer 0 are off by a bit on the right"), MISREAD],
            parts: OF_RUN,
        },
        agreement::same_bits,
    ),
    (
        CheckSpec {
            name: "agreement.ways",
            about: "Runs a prompt whole, in chunks, token by token and beside another sequence: the same bits.",
            parameters: &[DEVICE, TOKENS],
            faults: &[COMPANY],
            parts: OF_RUN,
        },
        agreement::ways,
    ),
    (
        CheckSpec {
            name: "agreement.batch",
            about: "Decodes sequences alone and together: the same bits.",
            parameters: &[DEVICE, TOKENS, needed("streams", Kind::Integers, "sequences in a step")],
            faults: &[COMPANY],
            parts: OF_RUN,
        },
        agreement::batch,
    ),
    (
        CheckSpec {
            name: "agreement.repeats",
            about: "Runs the same steps again and again: the same bits.",
            parameters: &[DEVICE, LENGTHS, needed("repeats", Kind::Integer, "runs of each")],
            faults: &[fault("third-time", "activations are off by a bit in the third step alone")],
            parts: OF_RUN,
        },
        agreement::repeats,
    ),
    (
        CheckSpec {
            name: "agreement.types",
            about: "Makes models of the widths of the one at hand in which any two of some types meet within a layer, and compares a device with the CPU: the same bits.",
            parameters: &[DEVICE, TOKENS, needed("types", Kind::Texts, "tensor types")],
            faults: &[MISREAD],
            parts: OF_RUN,
        },
        agreement::types,
    ),
    (
        CheckSpec {
            name: "trace.observed",
            about: "Runs a prompt plain and observed: every stage is captured, and no bit of the logits changes.",
            parameters: &[
                DEVICE,
                TOKENS,
                SHAPE,
                optional("seconds_at_most", Kind::Number, "of the observed run"),
            ],
            faults: &[
                fault("disturbed", "looking at the residual stream changes a bit of it"),
                fault("stage-missed", "the harness does not look at `attend`"),
            ],
            parts: OF_RUN,
        },
        agreement::observed,
    ),
    (
        CheckSpec {
            name: "faults.named",
            about: "Plants every fault of the debugger's table (`tally faults`): each is named exactly.",
            parameters: &[DEVICE, optional("at_least", Kind::Integer, "faults that must be in the table")],
            faults: &[fault("mistaken", "the debugger takes each fault for the next one of the table")],
            parts: &[Part::Arithmetic],
        },
        faults::named,
    ),
    (
        CheckSpec {
            name: "faults.accountable",
            about: "Holds fixes to the table of faults: each names its fault's place, and planted again the fault is named.",
            parameters: &[
                DEVICE,
                needed("fixes", Kind::Texts, "`FAULT: STAGE LAYER TENSOR`, `-` where there is none"),
            ],
            faults: &[fault("another-tensor", "the fixes blame ffn_gate_exps for what ffn_down_exps had")],
            parts: &[Part::Arithmetic],
        },
        faults::accountable,
    ),
    (
        CheckSpec {
            name: "gpu.memory",
            about: "Puts the model on the GPU and runs a token: how much of the card's memory is in use.",
            parameters: &[
                needed("context", Kind::Integer, "positions that the cache has room for"),
                SHAPE,
                optional("percent_at_most", Kind::Number, "of the card's memory [default: 95]"),
            ],
            faults: &[fault("all-in-use", "the card has nothing free")],
            parts: OF_GPU,
        },
        gpu::memory,
    ),
    (
        CheckSpec {
            name: "gpu.throughput",
            about: "Generates one sequence: its speed as a part of what reading the weights at the memory's bandwidth allows.",
            parameters: &[TOKENS, SHAPE, needed("of_bound_at_least", Kind::Number, "the part")],
            faults: &[fault("slow", "every step takes a hundred milliseconds longer")],
            parts: OF_GPU,
        },
        gpu::throughput,
    ),
    (
        CheckSpec {
            name: "gguf.truncated",
            about: "Reads every beginning of a valid file: all are refused.",
            parameters: &[needed("file", Kind::Text, "path of a small valid file")],
            faults: &[fault("zeros", "what lies beyond the end is taken for zeros")],
            parts: &[],
        },
        reader::truncated,
    ),
    (
        CheckSpec {
            name: "gguf.flipped",
            about: "Reads a valid file with each byte changed in six ways: refused, or accepted and usable.",
            parameters: &[needed("file", Kind::Text, "path of a small valid file")],
            faults: &[fault("short", "the last byte of every tensor is lost")],
            parts: &[],
        },
        reader::flipped,
    ),
    (
        CheckSpec {
            name: "gguf.hostile",
            about: "Reads a folder of hostile files: each is refused in one readable line.",
            parameters: &[
                needed("corpus", Kind::Text, "path of the folder"),
                optional("at_least", Kind::Integer, "hostile files that must be there"),
            ],
            faults: &[fault("lenient", "valid files are among those that must be refused")],
            parts: &[],
        },
        reader::hostile,
    ),
    (
        CheckSpec {
            name: "quant.dequantise",
            about: "Dequantises blocks of every type: the bits of the `gguf` Python package.",
            parameters: &[needed("fixture", Kind::Text, "path of blocks and their weights")],
            faults: &[fault("ulp", "one weight of each type is off by a bit")],
            parts: &[],
        },
        quantised::dequantise,
    ),
    (
        CheckSpec {
            name: "quant.dot",
            about: "Multiplies rows of each type with activations: within the error of rounding those to fixed point.",
            parameters: &[
                DEVICE,
                needed("types", Kind::Texts, "tensor types"),
                needed("lengths", Kind::Integers, "values of a row"),
            ],
            faults: &[fault("a8", "activations are rounded to 8 bits, not to 16")],
            parts: &[Part::Arithmetic],
        },
        quantised::dot,
    ),
];

/// What contracts can name.
pub(super) fn specs() -> Vec<CheckSpec> {
    CHECKS.iter().map(|(spec, _)| *spec).collect()
}

impl Checks for Lab {
    fn specs(&self) -> Vec<CheckSpec> {
        specs()
    }

    fn run(&mut self, spec: &CheckSpec, parameters: &Parameters, fault: Option<&str>) -> Verdict {
        match CHECKS.iter().find(|(known, _)| known.name == spec.name) {
            Some((_, function)) => function(self, parameters, fault),
            None => Err(Miss::unable(format!("there is no check `{}`", spec.name))),
        }
    }

    fn provenance(&mut self, spec: &CheckSpec, call: &CheckCall) -> Result<Provenance, Miss> {
        Lab::provenance(self, spec.depends_on(call, Part::Kernels), spec.depends_on(call, Part::Model))
    }
}
