//! `tally trace`: every stage of a run, written down.

use std::collections::BTreeSet;
use std::path::PathBuf;

use model::{BLOCK, Backend, Config, Ffn, Stage, Step, forward};
use parity::{Arithmetic, Comparison, Filter, Trace, dump, fingerprint, names};
use serde_json::json;

use crate::device::Device;
use crate::failure::Failure;
use crate::live::Live;
use crate::output;
use crate::prompted::PromptedArgs;

const EXAMPLES: &str = "\
Examples:
  tally trace model.gguf -p 'fn main() {' --out trace
  tally trace model.gguf --ids 1,2,3 --device cuda --layers 5-7 --stages moe_router,moe_ffn_out --out trace
  tally trace --file text.txt --stats --out trace

DIR gets a manifest.json and, unless --stats is given, a safetensors file a step, whose tensors are called
blk.6.experts_down.x, embed.x, head.logits. Stages go by their own names (embed, qkv, rope_store, attend, attn_out, route,
experts_up, experts_down, ffn, head) or by those of others (moe_router, moe_ffn_out, kqv_out, ffn_moe_topk, l_out).

The prompt is run twice, once without being watched: the command fails unless both runs' logits agree in every bit.

Exit codes: 0 done; 3 a traced value is NaN or infinite (the trace is written); 4 being watched changed a logit.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    prompted: PromptedArgs,
    /// Where to run: cpu, cpu-scalar, cuda, cuda:N, emulated, oracle, or faulty:NAME (`tally faults --list`).
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Live,
    /// Directory to write, made if need be; a trace there is replaced.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Only these layers, such as 0,5-7.
    #[arg(long, value_name = "RANGES", value_parser = ranges)]
    layers: Option<Ranges>,
    /// Only these stages.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = stage)]
    stages: Vec<Named>,
    /// Only these positions.
    #[arg(long, value_name = "RANGES", value_parser = ranges)]
    positions: Option<Ranges>,
    /// Only these experts.
    #[arg(long, value_name = "RANGES", value_parser = ranges)]
    experts: Option<Ranges>,
    /// Statistics alone: min, max, mean, rms, NaN, Inf, first index.
    #[arg(long)]
    stats: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Numbers from an argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ranges(BTreeSet<u32>);

/// Stages of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named(Vec<Stage>);

fn ranges(text: &str) -> Result<Ranges, String> {
    let mut all = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) if first <= last && last < 1 << 24 => all.extend(first..=last),
            _ => return Err(format!("`{part}` is no number and no range such as 5-7")),
        }
    }
    Ok(Ranges(all))
}

fn stage(name: &str) -> Result<Named, String> {
    match names::stages(name) {
        none if none.is_empty() => {
            let own: Vec<_> = Stage::ALL.iter().map(|stage| stage.name()).collect();
            Err(format!("stages are {}, or what others call them, such as moe_router", own.join(", ")))
        }
        stages => Ok(Named(stages)),
    }
}

impl Args {
    fn filter(&self) -> Filter {
        let set = |ranges: &Option<Ranges>| ranges.as_ref().map(|ranges| ranges.0.clone());
        let stages: BTreeSet<Stage> = self.stages.iter().flat_map(|named| named.0.clone()).collect();
        Filter {
            // `usize` is no narrower than u32.
            layers: set(&self.layers).map(|layers| layers.into_iter().map(|l| l as usize).collect()),
            stages: (!stages.is_empty()).then_some(stages),
            positions: set(&self.positions),
            experts: set(&self.experts),
        }
    }

    pub(crate) fn run(self) -> Result<(), Failure> {
        let (filter, values) = (self.filter(), !self.stats);
        let Args { prompted, device, out, json, .. } = self;
        let prompted = prompted.open()?;
        fits(&filter, &prompted.model.config, prompted.ids.len())?;
        let placed = prompted.place(&device, 1)?;
        let origin = dump::Origin {
            producer: concat!("tally ", env!("CARGO_PKG_VERSION")).into(),
            model: prompted.name.clone(),
            fingerprint: Some(fingerprint(&prompted.model)),
            arithmetic: arithmetic(device.device, prompted.activations().name()),
            device: device.to_string(),
            facts: placed.facts.json(),
            kernel_hash: placed.facts.kernel_hash().map(str::to_owned),
        };
        let mut backend = placed.backend;
        let steps = steps(&prompted.ids, &*backend);
        let plain = logits(&mut backend, &steps)?;
        let mut traced = Trace::watch(backend, filter, values);
        let watched = logits(&mut traced, &steps)?;
        let trace = Trace::of(traced);
        if trace.entries.is_empty() {
            return Err(Failure::usage("the filters leave nothing of the run"));
        }
        prompted.check_unchanged()?;
        let manifest = dump::write(&out, &trace, origin, &prompted.ids)?;
        let same = Comparison::of(&plain, &watched).bits_equal();
        let bad = trace.entries.iter().find(|entry| entry.summary.finite < entry.summary.total);
        if json {
            let value = json!({
                "out": out.display().to_string(), "steps": manifest.steps.len(), "buffers": manifest.entries.len(),
                "inside": manifest.inside, "logits_unchanged": same,
                "first_non_finite": bad.map(|entry| serde_json::to_value(entry.place).expect("names and numbers")),
            });
            output::json(&value)?;
        } else {
            let inside = if manifest.inside {
                ""
            } else {
                "; what is inside the experts cannot be seen on this device"
            };
            let out = out.display().to_string();
            let (buffers, steps) = (manifest.entries.len(), manifest.steps.len());
            let plural = if steps == 1 { "" } else { "s" };
            output::line(format_args!(
                "{}: {buffers} buffers of {steps} step{plural}{inside}",
                output::printable(&out)
            ))?;
        }
        if !same {
            return Err(Failure::mismatch("being watched changed the logits"));
        }
        match bad {
            Some(entry) => {
                let (place, stats) = (entry.place, entry.summary);
                let count = stats.total - stats.finite;
                let message = format!("{place}: {count} of {} values are NaN or infinite", stats.total);
                Err(Failure::numeric(message))
            }
            None => Ok(()),
        }
    }
}

/// Fails where a filter asks for what the run does not have: a trace without it would look like one that has it.
fn fits(filter: &Filter, config: &Config, tokens: usize) -> Result<(), Failure> {
    // A dense model's one network counts as expert 0.
    let experts = if let Ffn::Moe(moe) = config.ffn { moe.experts } else { 1 };
    // `usize` is no narrower than u32.
    let last = |set: &Option<BTreeSet<u32>>| set.as_ref()?.last().map(|&n| n as usize);
    let limits = [
        ("layer", filter.layers.as_ref().and_then(|set| set.last().copied()), config.layers),
        ("position", last(&filter.positions), tokens),
        ("expert", last(&filter.experts), experts),
    ];
    match limits.into_iter().find(|(_, asked, count)| asked.is_some_and(|asked| asked >= *count)) {
        Some((what, asked, count)) => {
            let asked = asked.unwrap_or_default();
            Err(Failure::usage(format!("there is no {what} {asked}: the last one is {}", count - 1)))
        }
        None => Ok(()),
    }
}

/// The rules that a device follows.
pub(crate) fn arithmetic(device: Device, activations: &str) -> Arithmetic {
    match device {
        Device::Oracle => Arithmetic::Float { precision: "f64".into() },
        _ => Arithmetic::Tally { activations: activations.into() },
    }
}

/// The prompt in as few steps as the backend takes, with the logits of the last token.
fn steps(ids: &[u32], backend: &dyn Backend) -> Vec<Step> {
    // Positions are below the context, which is below 2^32.
    let table: Vec<u32> = (0..ids.len().div_ceil(BLOCK) as u32).collect();
    let mut steps = Vec::new();
    let mut start = 0;
    for chunk in ids.chunks(backend.max_rows()) {
        let mut step = Step::prefill(chunk, start as u32, table.clone());
        start += chunk.len();
        if start < ids.len() {
            step.logits.clear();
        }
        steps.push(step);
    }
    steps
}

fn logits(backend: &mut impl Backend, steps: &[Step]) -> Result<Vec<f32>, Failure> {
    for step in steps {
        forward(backend, step)?;
    }
    Ok(backend.logits()?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_ranges() {
        let check = |text, want: Option<&[u32]>| {
            assert_eq!(ranges(text).ok(), want.map(|w| Ranges(w.iter().copied().collect())), "{text}");
        };
        check("0", Some(&[0]));
        check("7,0,3-5", Some(&[0, 3, 4, 5, 7]));
        for bad in ["", ",", "a", "5-3", "-1", "1-", "0-4294967295"] {
            check(bad, None);
        }
    }
}
