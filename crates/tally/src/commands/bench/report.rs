//! The figures of a bench for people, for programs and for BENCH.md. Measures nothing.

use std::io::{self, Write};

use indicatif::DecimalBytes;
use serde_json::{Value, json};

use super::bandwidth::Bandwidth;
use super::measure::{Row, SEED, Test};
use super::traffic::Traffic;
use crate::device::Device;
use crate::failure::Failure;
use crate::output;
use crate::table::{Align, Table};

/// Everything that was found out.
pub(super) struct Report {
    pub(super) model: ModelFacts,
    pub(super) machine: Machine,
    /// From the model's file to a device that can start, all weights read.
    pub(super) load_seconds: f64,
    pub(super) bandwidth: Bandwidth,
    pub(super) traffic: Traffic,
    pub(super) rows: Vec<Row>,
    /// Bytes resident at most, those of the mapped file included.
    pub(super) peak: Option<u64>,
}

/// What was run.
pub(super) struct ModelFacts {
    /// As named in messages.
    pub(super) name: String,
    pub(super) arch: &'static str,
    pub(super) layers: usize,
    pub(super) parameters: u64,
    /// Of the file.
    pub(super) bytes: u64,
}

/// Where and how it was run.
pub(super) struct Machine {
    pub(super) device: Device,
    pub(super) hardware: Hardware,
    pub(super) activations: &'static str,
}

/// What a device is.
pub(super) enum Hardware {
    Cpu {
        processor: Option<String>,
        /// Bytes of the last-level caches.
        cache: Option<usize>,
        isa: &'static str,
        threads: usize,
    },
    Gpu {
        gpu: cuda::Gpu,
        nvrtc: String,
        kernel_hash: String,
        plan: cuda::Plan,
        /// Bytes in use on the GPU that are not weights: caches, buffers, the driver's own.
        beyond_weights: u64,
    },
}

impl Hardware {
    /// In words.
    fn describe(&self) -> String {
        match self {
            Hardware::Cpu { processor, isa, threads, .. } => {
                let processor = processor.as_deref().unwrap_or(std::env::consts::ARCH);
                format!("{processor}, {isa}, {threads} thread{}", if *threads == 1 { "" } else { "s" })
            }
            Hardware::Gpu { gpu, nvrtc, .. } => {
                let driver = format!("{}.{}", gpu.driver / 1000, gpu.driver % 1000 / 10);
                format!("{}, sm_{}, driver for CUDA {driver}, NVRTC {nvrtc}", gpu.name, gpu.arch)
            }
        }
    }

    fn json(&self) -> Value {
        match self {
            Hardware::Cpu { processor, cache, isa, threads } => {
                json!({ "processor": processor, "cache_bytes": cache, "isa": isa, "threads": threads })
            }
            Hardware::Gpu { gpu, nvrtc, kernel_hash, plan, beyond_weights } => json!({
                "gpu": gpu.name, "arch": gpu.arch, "processors": gpu.processors, "driver": gpu.driver, "nvrtc": nvrtc,
                "kernel_hash": kernel_hash, "memory_bytes": gpu.memory,
                "weight_bytes": plan.weights, "kv_bytes": plan.kv, "workspace_bytes": plan.workspace,
                "bytes_beyond_weights": beyond_weights,
            }),
        }
    }
}

/// Median and range of some samples.
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// Of at least one sample.
    fn of(samples: &[f64]) -> Spread {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (n, last) = (sorted.len(), sorted.len() - 1);
        Spread { median: (sorted[last / 2] + sorted[n / 2]) / 2.0, min: sorted[0], max: sorted[last] }
    }
}

/// What bandwidth has to do with a row of generation.
struct Bound {
    /// Bytes that a token must read.
    bytes: f64,
    /// Bytes a second, at the median speed.
    rate: f64,
    /// Of the device's bandwidth.
    fraction: f64,
}

impl Report {
    fn bound(&self, row: &Row) -> Option<Bound> {
        let Test::Generate { tokens, streams } = row.test else { return None };
        let bytes = self.traffic.per_token(row.depth, tokens, streams);
        let rate = bytes * Spread::of(&row.speeds()).median;
        Some(Bound { bytes, rate, fraction: rate / self.bandwidth.bound() })
    }

    /// Whether a token's bytes fit into the last-level cache, where memory does not bound anything.
    fn cached(&self) -> bool {
        // A few megabytes more or less do not matter.
        let Hardware::Cpu { cache: Some(cache), .. } = self.machine.hardware else { return false };
        self.traffic.per_token(0, 1, 1) < cache as f64
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            ("test", Align::Left),
            ("tokens", Align::Right),
            ("depth", Align::Right),
            ("batch", Align::Right),
            ("tokens/s", Align::Right),
            ("min..max", Align::Right),
            ("bytes/token", Align::Right),
            ("GB/s", Align::Right),
            ("of bandwidth", Align::Right),
        ]);
        for row in &self.rows {
            let Spread { median, min, max } = Spread::of(&row.speeds());
            let [bytes, rate, fraction] = match self.bound(row) {
                Some(bound) => [
                    size(bound.bytes),
                    format!("{:.1}", bound.rate / 1e9),
                    format!("{:.0}%", 100.0 * bound.fraction),
                ],
                None => ["", "", ""].map(str::to_owned),
            };
            table.row([
                row.test.name().to_owned(),
                row.test.tokens().to_string(),
                row.depth.to_string(),
                row.test.streams().to_string(),
                speed(median),
                format!("{}..{}", speed(min), speed(max)),
                bytes,
                rate,
                fraction,
            ]);
        }
        table
    }

    /// Facts, a line each: what, and its value.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let (model, machine) = (&self.model, &self.machine);
        let parameters = match model.parameters as f64 {
            n if n < 1e9 => format!("{:.1} M", n / 1e6),
            n => format!("{:.2} B", n / 1e9),
        };
        let of_model = format!(
            "{}: {}, {} layers, {parameters} parameters, {}",
            output::printable(&model.name),
            model.arch,
            model.layers,
            DecimalBytes(model.bytes)
        );
        let of_device = format!(
            "{}: {}, activations {}",
            machine.device,
            machine.hardware.describe(),
            machine.activations
        );
        let passes = Spread::of(&self.bandwidth.passes);
        let of_bandwidth = format!(
            "{:.1} GB/s: the best of {} passes over {} ({:.1}..{:.1}, median {:.1})",
            self.bandwidth.bound() / 1e9,
            self.bandwidth.passes.len(),
            DecimalBytes(self.bandwidth.bytes),
            passes.min / 1e9,
            passes.max / 1e9,
            passes.median / 1e9
        );
        let of_load = format!("{:.2} s from the file to a device that is ready", self.load_seconds);
        let mut facts =
            vec![("model", of_model), ("device", of_device), ("load", of_load), ("bandwidth", of_bandwidth)];
        if let Hardware::Gpu { plan, beyond_weights, .. } = &machine.hardware {
            let (weights, beyond) = (DecimalBytes(plan.weights), DecimalBytes(*beyond_weights));
            let (kv, workspace) = (DecimalBytes(plan.kv), DecimalBytes(plan.workspace));
            let of_memory = format!(
                "weights {weights}, beyond them {beyond} (KV {kv}, buffers {workspace}, the rest the driver's)"
            );
            facts.push(("GPU memory", of_memory));
        }
        if let Some(peak) = self.peak {
            facts.push(("peak memory", format!("{} resident, mapped weights included", DecimalBytes(peak))));
        }
        if self.cached() {
            let note =
                "a token's weights fit into the last-level cache: memory bandwidth does not bound them";
            facts.push(("note", note.to_owned()));
        }
        facts
    }

    /// Prints facts and table for a terminal.
    pub(super) fn print(&self) -> Result<(), Failure> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        for (what, value) in self.facts() {
            writeln!(out, "{what:<11}  {value}")?;
        }
        writeln!(out)?;
        self.table().text("", &mut out)?;
        Ok(out.flush()?)
    }

    /// Prints the table, then the facts, as Markdown.
    pub(super) fn print_markdown(&self) -> Result<(), Failure> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        self.table().markdown(&mut out)?;
        writeln!(out)?;
        for (what, value) in self.facts() {
            writeln!(out, "- {what}: {value}")?;
        }
        Ok(out.flush()?)
    }

    /// Everything, every sample included; bytes and seconds, no other units.
    pub(super) fn json(&self) -> Value {
        let spread = |samples: &[f64]| {
            let Spread { median, min, max } = Spread::of(samples);
            json!({ "median": median, "min": min, "max": max })
        };
        let row = |row: &Row| {
            let bound = self.bound(row).map(|Bound { bytes, rate, fraction }| {
                json!({ "bytes_per_token": bytes, "bytes_per_second": rate, "fraction": fraction })
            });
            json!({
                "test": row.test.name(), "tokens": row.test.tokens(), "depth": row.depth, "batch": row.test.streams(),
                "seconds": row.seconds, "tokens_per_second": spread(&row.speeds()), "bandwidth": bound,
            })
        };
        let (model, machine) = (&self.model, &self.machine);
        json!({
            "model": {
                "name": model.name, "arch": model.arch, "layers": model.layers, "parameters": model.parameters,
                "bytes": model.bytes, "weight_bytes_per_token": self.traffic.weights(1),
                "kv_bytes_per_position": self.traffic.position,
            },
            "device": machine.device.to_string(),
            "machine": machine.hardware.json(),
            "load_seconds": self.load_seconds,
            "activations": machine.activations,
            "seed": SEED,
            "bandwidth": {
                "bytes_per_second": self.bandwidth.bound(), "bytes_per_pass": self.bandwidth.bytes,
                "passes": self.bandwidth.passes,
            },
            "peak_resident_bytes": self.peak,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
        })
    }
}

/// Four significant digits or so, whatever the model's size.
fn speed(tokens_per_second: f64) -> String {
    match tokens_per_second {
        x if x < 100.0 => format!("{x:.2}"),
        x if x < 1000.0 => format!("{x:.1}"),
        x => format!("{x:.0}"),
    }
}

fn size(bytes: f64) -> String {
    match bytes {
        x if x < 1e9 => format!("{:.1} MB", x / 1e6),
        x => format!("{:.3} GB", x / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        let check = |samples: &[f64], want| {
            let Spread { median, min, max } = Spread::of(samples);
            assert_eq!([median, min, max], want, "{samples:?}");
        };
        check(&[3.0], [3.0, 3.0, 3.0]);
        check(&[4.0, 1.0], [2.5, 1.0, 4.0]);
        check(&[5.0, 1.0, 2.0], [2.0, 1.0, 5.0]);
        check(&[5.0, 1.0, 2.0, 9.0], [3.5, 1.0, 9.0]);
    }

    #[test]
    fn a_row_beside_the_bound() {
        let report = Report {
            model: ModelFacts { name: "m".into(), arch: "qwen3", layers: 1, parameters: 1, bytes: 1 },
            machine: Machine {
                device: Device::Cpu,
                hardware: Hardware::Cpu { processor: None, cache: None, isa: "scalar", threads: 1 },
                activations: "a16",
            },
            load_seconds: 1.0,
            bandwidth: Bandwidth { bytes: 1, passes: vec![10e9, 40e9, 20e9] },
            traffic: Traffic::dense(990_000_000, 10_000_000),
            rows: Vec::new(),
            peak: None,
        };
        let check = |test, want: Option<[f64; 3]>| {
            // A median of 10 steps a second.
            let seconds = vec![0.5, 0.1, 0.05];
            let bound = report.bound(&Row { test, depth: 0, seconds });
            assert_eq!(bound.map(|b| [b.bytes, b.rate, b.fraction]), want, "{test:?}");
        };
        check(Test::Generate { tokens: 1, streams: 1 }, Some([1e9, 1e10, 0.25]));
        // Weights are read once for both.
        check(Test::Generate { tokens: 1, streams: 2 }, Some([0.505e9, 1.01e10, 0.2525]));
        check(Test::Prompt(1), None);
    }
}
