//! The time of each stage of a step on a GPU and of its kernels, beside the bytes that it must read: where a token's time
//! goes.
//!
//! Attention is timed over a cache that nothing was stored in: zeros take as long as anything.

use std::io::{self, Write};

use cuda::{Cuda, KernelTime, StageTime};
use model::{BLOCK, FfnWeights, LayerWeights, Model, Row, Stage, Step};
use serde_json::{Value, json};

use super::traffic::{Traffic, bytes};
use crate::failure::Failure;
use crate::output;
use crate::table::{Align, Table};

/// A step to take apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Sequences.
    pub(super) streams: usize,
    /// New tokens of each.
    pub(super) tokens: usize,
    /// Tokens that each has in its cache.
    pub(super) depth: usize,
}

impl Shape {
    /// Every row a token of the vocabulary, spread over it; each sequence's last row has its logits.
    fn step(self, vocab: usize) -> Step {
        let blocks = (self.depth + self.tokens).div_ceil(BLOCK);
        let mut step = Step::default();
        // Rows, positions and blocks of a step are far below 2^32.
        for sequence in 0..self.streams {
            step.tables.push((0..blocks).map(|block| (sequence * blocks + block) as u32).collect());
            for position in self.depth..self.depth + self.tokens {
                let token = (step.rows.len() * 7919 % vocab) as u32;
                step.rows.push(Row { token, position: position as u32, sequence: sequence as u32 });
            }
            step.logits.push(step.rows.len() as u32 - 1);
        }
        step
    }

    fn rows(self) -> usize {
        self.streams * self.tokens
    }
}

/// The stages of one step.
pub(super) struct Stages {
    shape: Shape,
    /// With the bytes that all of the step's runs of it read.
    times: Vec<(StageTime, f64)>,
}

impl Stages {
    /// Times the stages of a step on `cuda`, the median of `repeats`.
    pub(super) fn measure(
        cuda: &mut Cuda,
        model: &Model,
        shape: Shape,
        repeats: usize,
    ) -> Result<Stages, Failure> {
        let times = cuda.profile(&shape.step(model.config.vocab), repeats)?;
        let with_bytes = |time: StageTime| {
            let bytes = stage_bytes(model, time.stage, shape);
            (time, bytes)
        };
        Ok(Stages { shape, times: times.into_iter().map(with_bytes).collect() })
    }

    fn table(&self, bound: f64) -> Table {
        let mut table = Table::new(&[
            ("stage, kernel", Align::Left),
            ("times", Align::Right),
            ("µs each", Align::Right),
            ("µs a step", Align::Right),
            ("MB a step", Align::Right),
            ("GB/s", Align::Right),
            ("of bandwidth", Align::Right),
        ]);
        let mut add = |name: String, count: String, each: String, micros: f64, bytes: Option<f64>| {
            let rate = |bytes: f64| bytes / (micros * 1e-6);
            let cells = [
                bytes.map(|bytes| format!("{:.1}", bytes / 1e6)),
                bytes.map(|bytes| format!("{:.0}", rate(bytes) / 1e9)),
                bytes.map(|bytes| format!("{:.0}%", 100.0 * rate(bytes) / bound)),
            ];
            let cells = cells.map(Option::unwrap_or_default);
            table.row([name, count, each, format!("{micros:.1}")].into_iter().chain(cells));
        };
        for (time, bytes) in &self.times {
            let each = format!("{:.2}", time.micros);
            add(time.stage.name().into(), time.count.to_string(), each, total(time), Some(*bytes));
            for kernel in &time.kernels {
                let (count, each) = (kernel.count.to_string(), format!("{:.2}", kernel.micros));
                let all = kernel.micros * kernel.count as f64;
                add(format!("  {}", kernel.name), count, each, all, kernel_bytes(time, kernel, *bytes));
            }
        }
        let sum = |of: &dyn Fn(&(StageTime, f64)) -> f64| self.times.iter().map(of).sum();
        let (micros, bytes) = (sum(&|(time, _)| total(time)), sum(&|&(_, bytes)| bytes));
        add("all".into(), String::new(), String::new(), micros, Some(bytes));
        table
    }

    /// Prints the table under a line that says of what; `bound` is the memory bandwidth in bytes a second.
    pub(super) fn print(&self, markdown: bool, bound: f64) -> Result<(), Failure> {
        let Shape { streams, tokens, depth } = self.shape;
        let mut out = io::BufWriter::new(io::stdout().lock());
        let plural = |n: usize| if n == 1 { "" } else { "s" };
        writeln!(
            out,
            "\n{streams} stream{} of {tokens} token{} at depth {depth}\n",
            plural(streams),
            plural(tokens)
        )?;
        let table = self.table(bound);
        if markdown {
            table.markdown(&mut out)?
        } else {
            table.text("", &mut out)?
        }
        Ok(out.flush()?)
    }

    /// Seconds and bytes.
    pub(super) fn json(&self) -> Value {
        let stage = |(time, bytes): &(StageTime, f64)| {
            let kernel = |kernel: &KernelTime| {
                json!({
                    "kernel": kernel.name, "count": kernel.count, "seconds_each": kernel.micros * 1e-6,
                    "bytes": kernel_bytes(time, kernel, *bytes),
                })
            };
            json!({
                "stage": time.stage.name(), "count": time.count, "seconds_each": time.micros * 1e-6,
                "bytes": bytes, "bytes_per_second": bytes / (total(time) * 1e-6),
                "kernels": time.kernels.iter().map(kernel).collect::<Vec<_>>(),
            })
        };
        let Shape { streams, tokens, depth } = self.shape;
        let stages: Vec<_> = self.times.iter().map(stage).collect();
        json!({ "batch": streams, "tokens": tokens, "depth": depth, "stages": stages })
    }
}

/// Microseconds of all of a step's runs of a stage.
fn total(time: &StageTime) -> f64 {
    time.micros * time.count as f64
}

/// Of the `bytes` of weights, keys and values that a stage reads, those of one of its kernels: all, if it is the only one that
/// reads any. Nothing where that is not so; the others move activations.
fn kernel_bytes(stage: &StageTime, kernel: &KernelTime, bytes: f64) -> Option<f64> {
    let reads = |name: &str| {
        let readers = ["product", "float", "attend", "decode", "route_few", "embed"];
        readers.iter().any(|reader| name.starts_with(reader))
    };
    let readers = stage.kernels.iter().filter(|kernel| reads(kernel.name)).count();
    (stage.kernels.len() == 1 || reads(kernel.name) && readers == 1).then_some(bytes)
}

/// Bytes that a stage reads at least, over all layers: weights, as in [`Traffic`], and keys and values.
fn stage_bytes(model: &Model, stage: Stage, shape: Shape) -> f64 {
    let traffic = Traffic::of(model);
    let met = traffic.experts_met(shape.rows());
    let weights = &model.weights;
    let layers = |of: &dyn Fn(&LayerWeights) -> f64| weights.layers.iter().map(of).sum::<f64>();
    let experts = |of: fn(&FfnWeights) -> u64| {
        layers(&|layer| of(&layer.ffn) as f64) * met / traffic.experts().max(1.0)
    };
    match stage {
        Stage::Embed => shape.rows() as f64 * weights.token_embd.row_bytes() as f64,
        Stage::Qkv => {
            layers(&|l| [&l.attn_norm, &l.attn_q, &l.attn_k, &l.attn_v].map(bytes).iter().sum::<u64>() as f64)
        }
        Stage::RopeStore => layers(&|l| (bytes(&l.attn_q_norm) + bytes(&l.attn_k_norm)) as f64),
        Stage::Attend => (shape.streams * (shape.depth + shape.tokens)) as f64 * traffic.position as f64,
        Stage::AttnOut => layers(&|l| bytes(&l.attn_output) as f64),
        Stage::Route => layers(&|l| match &l.ffn {
            FfnWeights::Moe { gate_inp, .. } => (bytes(&l.ffn_norm) + bytes(gate_inp)) as f64,
            FfnWeights::Dense { .. } => 0.0,
        }),
        Stage::ExpertsUp => experts(|ffn| match ffn {
            FfnWeights::Moe { gate, up, .. } => bytes(gate) + bytes(up),
            FfnWeights::Dense { .. } => 0,
        }),
        Stage::ExpertsDown => experts(|ffn| match ffn {
            FfnWeights::Moe { down, .. } => bytes(down),
            FfnWeights::Dense { .. } => 0,
        }),
        Stage::FeedForward => layers(&|l| match &l.ffn {
            FfnWeights::Dense { gate, up, down } => {
                (bytes(&l.ffn_norm) + bytes(gate) + bytes(up) + bytes(down)) as f64
            }
            FfnWeights::Moe { .. } => 0.0,
        }),
        Stage::Head => (bytes(&weights.output_norm) + bytes(&weights.output)) as f64,
    }
}

/// All that is printed of a profile.
pub(super) fn print(stages: &[Stages], bound: f64, format: super::Format) -> Result<(), Failure> {
    if format == super::Format::Json {
        let steps: Vec<_> = stages.iter().map(Stages::json).collect();
        return output::json(&json!({ "bandwidth_bytes_per_second": bound, "steps": steps }));
    }
    stages.iter().try_for_each(|stages| stages.print(format == super::Format::Markdown, bound))
}

#[cfg(test)]
mod tests {
    use gguf::Dtype;

    use super::*;

    #[test]
    fn stages_read_what_a_token_reads() {
        let check = |name: &str, streams: usize, depth: usize| {
            let shape = synth::Shape::named(name).expect("a shape of the list");
            let model = synth::model(&shape, 1, |_| Dtype::F32);
            let one = Shape { streams, tokens: 1, depth };
            let of_stages: f64 = Stage::ALL.into_iter().map(|stage| stage_bytes(&model, stage, one)).sum();
            let of_tokens = Traffic::of(&model).per_token(depth, 1, streams) * streams as f64;
            assert!((of_stages - of_tokens).abs() < 1.0, "{name} {streams}: {of_stages} {of_tokens}");
        };
        check("tiny-moe", 1, 0);
        check("tiny-moe", 5, 100);
        check("tiny-dense", 1, 7);
        check("tiny-dense", 64, 0);
    }

    #[test]
    fn bytes_are_those_of_the_only_kernel_that_reads_weights() {
        let kernel = |name| KernelTime { name, count: 1, micros: 1.0 };
        let stage = |names: &[&'static str]| StageTime {
            stage: Stage::Route,
            count: 1,
            micros: 1.0,
            kernels: names.iter().copied().map(kernel).collect(),
        };
        let bytes = |names: &[&'static str]| -> Vec<Option<f64>> {
            let stage = stage(names);
            stage.kernels.iter().map(|kernel| kernel_bytes(&stage, kernel, 8.0)).collect()
        };
        assert_eq!(bytes(&["normalise", "float_tile", "choose"]), [None, Some(8.0), None]);
        assert_eq!(bytes(&["product_many", "product_64"]), [None, None]);
        assert_eq!(bytes(&["rope_store"]), [Some(8.0)]);
    }

    #[test]
    fn steps_are_well_formed() {
        let shape = synth::Shape::named("tiny-moe").expect("a shape of the list");
        let check = |streams, tokens, depth| {
            let step = Shape { streams, tokens, depth }.step(shape.config.vocab);
            step.check(&shape.config).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((step.rows.len(), step.logits.len()), (streams * tokens, streams));
        };
        check(1, 1, 0);
        check(64, 1, 4096);
        check(1, 512, 63);
        check(3, 65, 64);
    }
}
