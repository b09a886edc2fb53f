//! Bisections of small models, whose right side has a fault.

use std::sync::Arc;

use cpu::Cpu;
use gguf::Dtype;
use model::{Backend, Ffn, Model, Moe};
use parity::{Options, Report, Scenario, Side, bisect, faults};
use quant::{Mix, MixContext};
use synth::Shape;

/// What is wrong with the right side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// `ffn_down_exps` read as Q6_K in every layer: no numbers from the first that is Q4_K on.
    Story,
    /// A scale of this layer's `attn_output` is a little off.
    Off(usize),
}

/// The prompt of [`report`].
pub(crate) const PROMPT: [u32; 3] = [9, 187, 31];

/// A bisection of a narrow mixture of experts of `layers` layers in Q4_K_M.
pub(crate) fn report(layers: usize, fault: Fault) -> Report {
    report_of(layers, fault, &[Scenario::Whole])
}

/// The same, run in these ways.
pub(crate) fn report_of(layers: usize, fault: Fault, scenarios: &[Scenario]) -> Report {
    let model = model(layers);
    let mut left = build(Arc::new(model.clone())).expect("it builds");
    let story = faults::all()[0];
    let right = match fault {
        Fault::None => build(Arc::new(model.clone())),
        Fault::Story => story.plant(&Arc::new(model.clone()), &build).map_err(|error| error.to_string()),
        Fault::Off(layer) => build(Arc::new(off(&model, layer))),
    };
    let mut right = right.expect("it builds");
    let mut sides = [Side::live("cpu", "a16", &mut left), Side::live("faulty", "a16", &mut right)];
    let options = Options { scenarios: scenarios.into(), detail: true, ..Options::default() };
    let mut report = bisect(&model, &mut sides, &PROMPT, &options).expect("it runs").report;
    report.command = Some("tally bisect narrow.gguf --left cpu --right faulty --ids 9,187,31".into());
    report
}

fn model(layers: usize) -> Model {
    let mut shape = Shape::named("tiny-moe").expect("a shape of the list");
    let moe = Moe { experts: 6, used: 2, width: 256, renormalise: true, scale: 1.0 };
    let config = &mut shape.config;
    (config.layers, config.hidden, config.vocab, config.ffn) = (layers, 256, 300, Ffn::Moe(moe));
    (config.heads, config.kv_heads, config.head_dim) = (4, 2, 64);
    let context = MixContext { n_layers: layers, n_experts: 6, tied: false };
    synth::model(&shape, 7, |spec| Mix::Q4KM.tensor_type(&context, &spec.name, &spec.dims))
}

fn build(model: Arc<Model>) -> Result<Box<dyn Backend>, String> {
    let options = cpu::Options { threads: 1, ..cpu::Options::for_context(64) };
    Ok(Box::new(Cpu::new(model, &options).map_err(|error| error.to_string())?))
}

/// The first block's scale has another last bit.
fn off(model: &Model, layer: usize) -> Model {
    let mut model = model.clone();
    let tensor = &mut model.weights.layers[layer].attn_output;
    assert_eq!(tensor.dtype, Dtype::Q4K, "its blocks begin with their scale");
    let mut bytes = tensor.data.to_vec();
    bytes[0] ^= 1;
    tensor.data = bytes.into();
    model
}
