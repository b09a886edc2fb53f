//! `tally faults`: every fault that the debugger is tested with, planted, and what it says of each.

pub(crate) mod catalogue;
mod host;
pub(crate) mod kernels;
mod random;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::{Backend, Model, Site, Stage};
use parity::faults::{self, Host, Planted, Trial};
use parity::{Bisection, Options, Side, bisect};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::device::Device;
use crate::failure::Failure;
use crate::output;
use crate::progress::Progress;
use crate::prompted::ComputeArgs;
use catalogue::Entry;
use host::model_of;
use kernels::{Edited, KernelFault};

const EXAMPLES: &str = "\
Examples:
  tally faults > faults.md                         the table of the repository
  tally faults --only one-kernel-for-all-types     the story that began it all
  tally faults --device cuda                       planted around a GPU's stages and in its weights
  tally faults --in-kernels --device cuda          planted in the GPU's kernels, which are held against the CPU
  tally faults --in-kernels --only kernel-down-read-as-q6-k --write edited
  tally bisect model.gguf --ids 1,2,3 --right cuda --kernels edited
  tally faults --random 50 --device cuda           none planted in 50 random models: nothing may be found

  tally faults --list                              what there is to plant
  tally faults --only one-kernel-for-all-types --write-model story.gguf
  tally bisect story.gguf --ids 1,2,3 --right faulty:one-kernel-for-all-types
  tally bisect model.gguf -p 'fn main() {' --right faulty:one-kernel-for-all-types@cuda

Each fault is planted in one of two backends that are equal otherwise, on a small random model, and the debugger is let
loose on both. The table says what it named. Two kernels' faults are planted together as well: the first must be named,
and the second once the first is masked.

A side of `tally bisect`, `parity`, `trace` and `replay` may be faulty, too, on any model that has what the fault is about:
types that differ, say, or experts. The fault is then in layer 2, or the last of fewer, or the first layer that has it.

Exit codes: 0 all were named exactly; 4 one was not, or one was found where none is; 1 something failed; 2 wrong usage.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Only these faults.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = catalogue::named)]
    only: Vec<Entry>,
    /// Show what each fault is, and run nothing.
    #[arg(long, conflicts_with_all = ["only", "in_kernels", "random", "write", "write_model"])]
    list: bool,
    /// Write the model in which the one fault of --only shows, for `--right faulty:NAME`, and run nothing.
    #[arg(long, value_name = "FILE", requires = "only", conflicts_with_all = ["in_kernels", "write", "json"])]
    write_model: Option<PathBuf>,
    /// Plant faults in the kernels' sources; --device is cuda or emulated then.
    #[arg(long, conflicts_with = "kernels")]
    in_kernels: bool,
    /// Plant nothing: hold as many random models on --device against the CPU (the CPU against its scalar code).
    #[arg(long, value_name = "N", conflicts_with_all = ["only", "in_kernels", "write"], value_parser = clap::value_parser!(u64).range(1..=10_000))]
    random: Option<u64>,
    /// Write the kernels with the faults into this folder, for `--kernels`, and run nothing.
    #[arg(long, value_name = "DIR", requires = "in_kernels", requires = "only")]
    write: Option<PathBuf>,
    /// Where to run: cpu, cpu-scalar, cuda, cuda:N or emulated.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        if self.list {
            return if self.json {
                output::json(&catalogue::json())
            } else {
                output::line(format_args!("{}", catalogue::text().trim_end()))
            };
        }
        if let Some(path) = &self.write_model {
            return match &self.only[..] {
                [fault] => host::write(fault, path),
                _ => Err(Failure::usage("--write-model writes the model of one fault: name one by --only")),
            };
        }
        if let Some(folder) = &self.write {
            return self
                .kernel_faults()?
                .iter()
                .try_for_each(|fault| fault.write(folder).map_err(Failure::new));
        }
        if let Some(count) = self.random {
            return self.without_a_fault(count);
        }
        let trials = if self.in_kernels { self.in_kernels()? } else { self.around_stages()? };
        let missed: Vec<&str> = trials.iter().filter(|t| !t.missed.is_empty()).map(|t| t.name).collect();
        if self.json {
            let faults: Vec<Value> = trials.iter().map(trial).collect();
            let named = trials.len() - missed.len();
            output::json(&json!({ "planted": trials.len(), "named_exactly": named, "faults": faults }))?;
        } else {
            output::line(format_args!("{}", faults::table(&trials).trim_end()))?;
        }
        if missed.is_empty() {
            return Ok(());
        }
        Err(Failure::mismatch(format!("not named exactly: {}", missed.join(", "))))
    }

    fn chosen(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only.name() == name)
    }

    /// The results of `work`, side by side: each trial is of two small backends.
    fn side_by_side<T: Sync, R: Send>(
        &self,
        items: &[T],
        work: impl Fn(&T) -> Result<R, Failure> + Sync + Send,
    ) -> Result<Vec<R>, Failure> {
        let progress = Progress::steps("planting", items.len() as u64); // `usize` is at most 64 bits wide
        let pool = self.compute.pool()?;
        pool.install(|| items.par_iter().map(|item| work(item).inspect(|_| progress.add(1))).collect())
    }

    /// Faults in the weights, and around the stages, of a backend.
    fn around_stages(&self) -> Result<Vec<Trial>, Failure> {
        let faults: Vec<Planted> =
            faults::all().into_iter().filter(|fault| self.chosen(fault.name)).collect();
        if faults.is_empty() {
            return Err(Failure::usage("these faults are the kernels': add --in-kernels"));
        }
        self.side_by_side(&faults, |fault| {
            let host = fault.host;
            let build = |model: Arc<Model>| {
                let placed = self.place(&model, host.prompt().len(), self.device, None);
                placed.map_err(|failure| failure.message().to_owned())
            };
            fault.find(&model_of(host), &build).map_err(|error| Failure::new(error).at(fault.name))
        })
    }

    fn kernel_faults(&self) -> Result<Vec<KernelFault>, Failure> {
        let faults: Vec<_> = kernels::ALL.iter().copied().filter(|fault| self.chosen(fault.name)).collect();
        if faults.is_empty() {
            return Err(Failure::usage("these faults are not in kernels: leave out --in-kernels"));
        }
        Ok(faults)
    }

    /// Faults in the kernels of `--device`, whose other side is the CPU.
    fn in_kernels(&self) -> Result<Vec<Trial>, Failure> {
        if !matches!(self.device, Device::Cuda(_) | Device::Emulated(_)) {
            return Err(Failure::usage("faults in kernels need kernels: --device cuda, or emulated"));
        }
        let mut work: Vec<Vec<KernelFault>> =
            self.kernel_faults()?.into_iter().map(|fault| vec![fault]).collect();
        if self.only.is_empty() {
            work.push(kernels::TWO.iter().filter_map(|name| kernels::named(name)).collect());
        }
        // Before anything is run: what a kernel does not say any more.
        for fault in work.iter().flatten() {
            fault.write(&Edited::new()?.0).map_err(Failure::new)?;
        }
        let trials = self.side_by_side(&work, |faults| self.planted_together(faults))?;
        Ok(trials.into_iter().flatten().collect())
    }

    /// Plants faults in one set of kernels: each must be named once those before it are masked, and behind all of them
    /// nothing may be found.
    fn planted_together(&self, faults: &[KernelFault]) -> Result<Vec<Trial>, Failure> {
        let folder = Edited::new()?;
        for fault in faults {
            fault.write(&folder.0).map_err(Failure::new)?;
        }
        let host = Host::Mixed;
        let model = Arc::new(model_of(host));
        let mut left = self.place(&model, host.prompt().len(), Device::Cpu, None)?;
        let mut right = self.place(&model, host.prompt().len(), self.device, Some(&folder.0))?;
        let mut masked = BTreeSet::new();
        let mut find = |masked: &BTreeSet<Site>| -> Result<Bisection, Failure> {
            let mut sides = [Side::live("cpu", "a16", &mut left), Side::live("edited", "a16", &mut right)];
            let options = Options { masked: masked.clone(), ..Options::default() };
            bisect(&model, &mut sides, &host.prompt(), &options)
                .map_err(|error| Failure::from(error).at(faults[0].name))
        };
        let mut trials = Vec::new();
        for fault in faults {
            let about = [fault.name, fault.what, fault.file()];
            trials.push(Trial::of(about, &fault.expected, find(&masked)?));
            // A kernel errs in all layers.
            masked.extend(sites(fault.expected.stage, model.config.layers));
        }
        if let [.., last] = &mut trials[..]
            && faults.len() > 1
            && let Some(finding) = find(&masked)?.report.finding
        {
            last.missed.push(format!("behind all that were planted: {}", finding.place));
        }
        Ok(trials)
    }

    /// For bisections of a prompt of `tokens`.
    fn place(
        &self,
        model: &Arc<Model>,
        tokens: usize,
        device: Device,
        kernels: Option<&Path>,
    ) -> Result<Box<dyn Backend>, Failure> {
        // Two sequences of the prompt, side by side in one step.
        let mut request = self.compute.request(2 * tokens, 2);
        request.threads = 1;
        if let Some(folder) = kernels {
            request.kernels.sources = Some(folder.into());
        }
        Ok(request.place_on(model, device)?.backend)
    }
}

/// A stage in every layer.
fn sites(stage: Stage, layers: usize) -> Vec<Site> {
    match stage {
        Stage::Embed | Stage::Head => vec![Site { stage, layer: None }],
        _ => (0..layers).map(|layer| Site { stage, layer: Some(layer) }).collect(),
    }
}

fn trial(trial: &Trial) -> Value {
    let report = &trial.bisection.report;
    json!({
        "name": trial.name, "what": trial.what, "source": trial.source,
        "found": trial.missed.is_empty(), "missed": trial.missed, "finding": report.finding,
        "verdict": report.verdict,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each fault replaces stands in the kernels, and what it leaves is another text.
    #[test]
    fn every_fault_can_be_planted() {
        let names: BTreeSet<&str> = kernels::ALL.iter().map(|fault| fault.name).collect();
        assert!(kernels::ALL.len() >= 10 && names.len() == kernels::ALL.len());
        for fault in kernels::ALL {
            let folder = Edited::new().expect("a temporary folder");
            fault.write(&folder.0).unwrap_or_else(|error| panic!("{error}"));
            let edited = std::fs::read_to_string(folder.0.join(fault.file())).expect("just written");
            let sources = cuda::kernel_sources();
            let same = |(name, text): &(&str, String)| *name == fault.file() && *text == edited;
            assert!(!sources.iter().any(same), "{}", fault.name);
        }
        let both: Vec<_> = kernels::TWO.iter().filter_map(|name| kernels::named(name)).collect();
        assert_eq!(both.len(), 2);
    }
}
