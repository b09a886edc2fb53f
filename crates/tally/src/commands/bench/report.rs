//! The figures of a bench for people, for programs and for BENCH.md. Measures nothing.

use std::io::{self, Write};

use indicatif::DecimalBytes;
use serde_json::{Value, json};

use super::bandwidth::Bandwidth;
use super::measure::{Row, SEED, Test};
use super::traffic::Traffic;
use crate::failure::Failure;
use crate::output;
use crate::table::{Align, Table};

/// Everything that was found out.
pub(super) struct Report {
    pub(super) model: ModelFacts,
    pub(super) machine: MachineFacts,
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
pub(super) struct MachineFacts {
    pub(super) processor: Option<String>,
    /// Bytes of the last-level caches.
    pub(super) cache: Option<usize>,
    pub(super) isa: &'static str,
    pub(super) threads: usize,
    pub(super) activations: &'static str,
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
    /// Of the machine's bandwidth.
    fraction: f64,
}

impl Report {
    fn bound(&self, row: &Row) -> Option<Bound> {
        let Test::Generate(tokens) = row.test else { return None };
        let bytes = self.traffic.per_token(row.depth, tokens);
        let rate = bytes * Spread::of(&row.speeds()).median;
        Some(Bound { bytes, rate, fraction: rate / self.bandwidth.bound() })
    }

    /// Whether a token's bytes fit into the last-level cache, where memory does not bound anything.
    fn cached(&self) -> bool {
        // A few megabytes more or less do not matter.
        self.machine.cache.is_some_and(|cache| self.traffic.per_token(0, 1) < cache as f64)
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            ("test", Align::Left),
            ("tokens", Align::Right),
            ("depth", Align::Right),
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
        let processor = machine.processor.as_deref().unwrap_or(std::env::consts::ARCH);
        let threads = machine.threads;
        let of_machine = format!(
            "{processor}, {}, {threads} thread{}, activations {}",
            machine.isa,
            if threads == 1 { "" } else { "s" },
            machine.activations
        );
        let passes = Spread::of(&self.bandwidth.passes);
        let of_bandwidth = format!(
            "{:.1} GB/s: the best of {} passes over {} ({:.1}..{:.1}, median {:.1})",
            self.bandwidth.bound() / 1e9,
            self.bandwidth.passes.len(),
            DecimalBytes(self.bandwidth.bytes as u64), // `usize` is at most 64 bits wide
            passes.min / 1e9,
            passes.max / 1e9,
            passes.median / 1e9
        );
        let mut facts = vec![("model", of_model), ("machine", of_machine), ("bandwidth", of_bandwidth)];
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
                "test": row.test.name(), "tokens": row.test.tokens(), "depth": row.depth,
                "seconds": row.seconds, "tokens_per_second": spread(&row.speeds()), "bandwidth": bound,
            })
        };
        let (model, machine) = (&self.model, &self.machine);
        json!({
            "model": {
                "name": model.name, "arch": model.arch, "layers": model.layers, "parameters": model.parameters,
                "bytes": model.bytes, "weight_bytes_per_token": self.traffic.weights,
                "kv_bytes_per_position": self.traffic.position,
            },
            "machine": {
                "processor": machine.processor, "cache_bytes": machine.cache, "isa": machine.isa,
                "threads": machine.threads,
            },
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
            machine: MachineFacts {
                processor: None,
                cache: None,
                isa: "scalar",
                threads: 1,
                activations: "a16",
            },
            bandwidth: Bandwidth { bytes: 1, passes: vec![10e9, 40e9, 20e9] },
            traffic: Traffic { weights: 990_000_000, position: 10_000_000 },
            rows: Vec::new(),
            peak: None,
        };
        let check = |test, want: Option<[f64; 3]>| {
            // Medians of 20 and 100 tokens a second.
            let seconds = vec![0.5, 0.1, 0.05];
            let bound = report.bound(&Row { test, depth: 0, seconds });
            assert_eq!(bound.map(|b| [b.bytes, b.rate, b.fraction]), want, "{test:?}");
        };
        check(Test::Generate(1), Some([1e9, 1e10, 0.25]));
        check(Test::Prompt(1), None);
    }
}
