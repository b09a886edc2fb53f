//! Reports of bisections that never ran: small buffers of random values, with a fault from some layer on.

use model::{Buffer, Config, Site, Stage};
use parity::dump::{Arithmetic, StepRecord};
use parity::report::{
    Cell, Class, Count, FORMAT, Feature, Figures, Finding, LayerTypes, Location, Outcome, Report, RunFacts,
    SideFacts, Status, TensorPlace, VERSION,
};
use parity::{Comparison, Number, Place, Scenario, distribution::Distributions, routing::Routing};

/// What is wrong with the right side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// The down projection of this layer is no number, and so is all that follows.
    NonFinite(usize),
    /// The down projection of this layer is a little off, and all that follows is more so.
    Off(usize),
}

const TOKENS: [u32; 3] = [9707, 1879, 0];
const EXPERTS: usize = 16;
const USED: usize = 4;

/// A model of `layers` layers in the shape of a mixture of experts.
pub(crate) fn report(layers: usize, fault: Fault) -> Report {
    let config = config(layers);
    let mut cells = Vec::new();
    let mut routing = Vec::new();
    let mut random = Random(7);
    for site in sites(layers) {
        let mut kept = Vec::new();
        for &buffer in site.stage.inside().iter().chain(site.stage.writes()) {
            let len = buffer.shape(&config, TOKENS.len(), 1).iter().product::<usize>();
            let left = values(buffer, len, &mut random);
            let right = spoiled(&left, site, buffer, fault, &mut random);
            cells.push(cell(Place { step: 0, site, buffer }, &left, &right));
            kept.push((buffer, left, right));
        }
        if let (Stage::Route, Some(layer)) = (site.stage, site.layer) {
            let of = |wanted: Buffer| kept.iter().find(|k| k.0 == wanted).expect("a router writes it");
            let (experts, logits) = (of(Buffer::Experts), of(Buffer::RouterLogits));
            let (left, right) = ([&experts.1[..], &logits.1], [&experts.2[..], &logits.2]);
            routing.push(Routing::of(0, layer, TOKENS.len(), left, right));
        }
    }
    let first_divergence = cells.iter().position(|cell| cell.status != Status::Match);
    let first_non_finite = cells.iter().position(|cell| cell.status == Status::NanRight);
    let step = StepRecord {
        file: None,
        sha256: None,
        tokens: TOKENS.into(),
        positions: vec![0, 1, 2],
        sequences: Vec::new(),
        logits: vec![2],
    };
    let finding = first_divergence.map(|i| finding(cells[i].place));
    let outcome = match (first_divergence, first_non_finite) {
        (None, _) => Outcome::Agree,
        (_, None) => Outcome::Diverge,
        _ => Outcome::NonFinite,
    };
    let run = RunFacts {
        scenario: Scenario::Whole,
        steps: vec![step],
        forced: false,
        cells,
        routing,
        first_divergence,
        first_non_finite,
    };
    let side = |name: &str| SideFacts {
        name: name.into(),
        arithmetic: Arithmetic::Tally { activations: "a16".into() },
        dump: false,
    };
    Report {
        format: FORMAT.into(),
        version: VERSION,
        model: format!("sampled-sha256:{}", "0123456789abcdef".repeat(4)),
        command: Some("tally bisect model.gguf -p hello --left cpu --right cuda:0 --out DIR".into()),
        prompt_ids: TOKENS.into(),
        sides: [side("cpu"), side("cuda:0")],
        judge: "bits: both follow one arithmetic".into(),
        types: types(layers),
        runs: vec![run],
        skipped: Vec::new(),
        reading: match finding {
            Some(_) => {
                vec!["The router is finite and the experts are not: look at the expert kernels.".into()]
            }
            None => Vec::new(),
        },
        verdict: match finding {
            Some(_) => {
                "`cuda:0` first parts from `cpu` after `experts_down`. The fault is that stage's own.".into()
            }
            None => "Every bit of every buffer agrees. Nothing is wrong.".into(),
        },
        finding,
        outcome,
    }
}

fn config(layers: usize) -> Config {
    let mut config = synth::Shape::named("tiny-moe").expect("a shape of the list").config;
    let moe = model::Moe { experts: EXPERTS, used: USED, width: 64, renormalise: true, scale: 1.0 };
    config.ffn = model::Ffn::Moe(moe);
    (config.layers, config.hidden, config.vocab) = (layers, 128, 300);
    config
}

fn sites(layers: usize) -> Vec<Site> {
    let layered = [
        Stage::Qkv,
        Stage::RopeStore,
        Stage::Attend,
        Stage::AttnOut,
        Stage::Route,
        Stage::ExpertsUp,
        Stage::ExpertsDown,
    ];
    let outside = |stage| [Site { stage, layer: None }];
    let inside = (0..layers).flat_map(|layer| layered.map(|stage| Site { stage, layer: Some(layer) }));
    outside(Stage::Embed).into_iter().chain(inside).chain(outside(Stage::Head)).collect()
}

/// A generator of one line: Lehmer's.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0 * 48271 % 0x7fff_ffff;
        self.0 as usize % n
    }

    /// Nearly normal.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.below(10_000) as f32 / 1e4).sum::<f32>() - 6.0
    }
}

fn values(buffer: Buffer, len: usize, random: &mut Random) -> Vec<f32> {
    match buffer {
        Buffer::Experts => {
            let row = |random: &mut Random| {
                let mut ids: Vec<usize> = (0..EXPERTS).collect();
                (0..USED).map(|_| ids.remove(random.below(ids.len())) as f32).collect::<Vec<_>>()
            };
            (0..len / USED).flat_map(|_| row(random)).collect()
        }
        _ => (0..len).map(|_| random.normal()).collect(),
    }
}

fn spoiled(left: &[f32], site: Site, buffer: Buffer, fault: Fault, random: &mut Random) -> Vec<f32> {
    let starts = |at: usize| match site.layer {
        Some(layer) => layer > at || layer == at && site.stage == Stage::ExpertsDown,
        None => site.stage == Stage::Head,
    };
    match (fault, buffer) {
        // Experts of a spoiled router are experts all the same.
        (Fault::NonFinite(at), Buffer::Experts) if starts(at) => left.iter().rev().copied().collect(),
        (Fault::NonFinite(at), _) if starts(at) => {
            let part = if site.layer == Some(at) { 3 } else { 1 };
            left.iter().enumerate().map(|(i, &v)| if i % part == 0 { f32::NAN } else { v * 40.0 }).collect()
        }
        (Fault::Off(at), Buffer::Experts) if starts(at) => left.to_vec(),
        (Fault::Off(at), _) if starts(at) => {
            let size = 10f32.powi(site.layer.map_or(0, |layer| layer as i32 - at as i32 - 5)).min(0.3);
            left.iter().map(|&v| v + size * random.normal()).collect()
        }
        _ => left.to_vec(),
    }
}

fn cell(place: Place, left: &[f32], right: &[f32]) -> Cell {
    let comparison = Comparison::of(left, right);
    let status = match (comparison.left.all(), comparison.right.all()) {
        (true, true) if comparison.bits_equal() => Status::Match,
        (true, true) => Status::Diverge,
        _ => Status::NanRight,
    };
    Cell {
        place,
        status,
        figures: Figures::from(&comparison),
        distributions: Some(Distributions::of(left, right)),
        bound: None,
        near_ties: Vec::new(),
    }
}

/// Q4_K_M's mix.
fn types(layers: usize) -> Vec<LayerTypes> {
    let kinds = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_q_norm",
        "attn_k_norm",
        "attn_output",
        "ffn_norm",
        "ffn_gate_inp",
        "ffn_gate_exps",
        "ffn_up_exps",
        "ffn_down_exps",
    ];
    let of = |layer: usize, kind: &str| {
        let more = layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
        match kind {
            _ if kind.ends_with("norm") || kind.ends_with("inp") => "F32",
            "attn_v" | "ffn_down_exps" if more => "Q6_K",
            _ => "Q4_K",
        }
    };
    let layer = |layer| LayerTypes {
        layer: Some(layer),
        tensors: kinds.map(|kind| (format!("{kind}.weight"), of(layer, kind).to_owned())).into(),
    };
    let outside = [("token_embd.weight", "Q4_K"), ("output_norm.weight", "F32"), ("output.weight", "Q6_K")];
    let outside = outside.map(|(name, dtype)| (name.to_owned(), dtype.to_owned()));
    (0..layers).map(layer).chain([LayerTypes { layer: None, tensors: outside.into() }]).collect()
}

fn finding(place: Place) -> Finding {
    let layer = place.site.layer.expect("the fault is in a layer");
    let all = Count { of: 128, total: 128 };
    let tensor = TensorPlace {
        name: format!("blk.{layer}.ffn_down_exps.weight"),
        dtype: "Q4_K".into(),
        expert: Some(3),
        experts: vec![3, 7, 9],
        row: Some(0),
        rows: all,
        block: Some(0),
        block_len: 256,
        blocks: Some(Count { of: 1, total: 1 }),
        element: Some(0),
        elements: Some(Count { of: 171, total: 256 }),
        contribution: Some([Number(0.0625), Number(f32::NAN)]),
    };
    let feature = |text: &str, passing_with, lift| Feature {
        among: "layers".into(),
        text: text.into(),
        failing_with: 1,
        failing: 1,
        passing_with,
        passing: layer,
        lift,
    };
    Finding {
        scenario: Scenario::Whole,
        place,
        class: Class::Local,
        evidence: "given the left's inputs, the right still errs".into(),
        location: Some(Location {
            buffer: "down".into(),
            index: vec![0, 0, 0],
            row: 0,
            token: TOKENS[0],
            position: 0,
            left: Number(0.5),
            right: Number(f32::NAN),
            wrong: 512,
            total: 1536,
            tensors: vec![tensor],
            notes: vec!["the same weights in the left's layout are right".into()],
        }),
        features: vec![
            feature("type of ffn_down_exps = Q4_K", 0, layer as f64 + 1.0),
            feature("layer >= 1", layer.saturating_sub(1), 1.2),
        ],
        reproduction: Some("layer-6-experts_down.repro".into()),
    }
}
