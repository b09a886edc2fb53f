//! `tally prewarm`: a model's GPU kernels compiled ahead, so that its first run need not wait for them.

use std::path::PathBuf;
use std::time::Instant;

use cuda::{Compiler, ReadBandwidth, Unit};
use model::Model;
use rayon::prelude::*;
use serde_json::json;

use crate::activations::ActivationsArg;
use crate::device::KernelCache;
use crate::failure::Failure;
use crate::progress::Progress;
use crate::threads::Threads;
use crate::{output, source};

const EXAMPLES: &str = "\
Examples:
  tally prewarm model.gguf                          for the GPUs of this machine
  tally prewarm model.gguf --arch 80,90,120         for others; this machine needs no GPU for it

Kernels are compiled for a model's dimensions and tensor types by NVRTC, and kept. What was compiled for another \
version of Tally, NVRTC or the model is not used and can be deleted.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model; without one, the small one that ships.
    model: Option<PathBuf>,
    /// Compute capabilities to compile for, times ten [default: those of this machine's GPUs].
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(80..=999))]
    arch: Vec<u32>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    activations: ActivationsArg,
    #[command(flatten)]
    kernels: KernelCache,
    #[command(flatten)]
    threads: Threads,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let name = source::name(&self.model);
        let file = source::open(self.model.as_deref())?;
        let model = Model::load(&file).map_err(|error| Failure::from(error).at(&name))?;
        let folder = self.kernels.folder().ok_or_else(|| {
            Failure::new("there is no folder for compiled kernels").hint("name one with --kernel-cache")
        })?;
        let mut units = cuda::units(&model, self.activations.value());
        units.push(ReadBandwidth::unit());
        let compilers = self.architectures()?;
        let compilers =
            compilers.into_iter().map(|arch| Ok((arch, Compiler::new(arch, &self.kernels.files())?)));
        let compilers = compilers.collect::<Result<Vec<_>, cuda::Error>>()?;
        let work: Vec<(&Compiler, &Unit)> = compilers
            .iter()
            .flat_map(|(_, compiler)| units.iter().map(move |unit| (compiler, unit)))
            .filter(|(compiler, unit)| !compiler.is_cached(unit))
            .collect();
        let start = Instant::now();
        let progress = Progress::steps("compiling", work.len() as u64); // `usize` is at most 64 bits wide
        self.threads.pool()?.install(|| {
            work.par_iter().try_for_each(|(compiler, unit)| {
                compiler.image(unit)?;
                progress.add(1);
                Ok::<_, cuda::Error>(())
            })
        })?;
        drop(progress);
        // An engine that cannot keep a kernel compiles it again; here keeping is all that is asked for.
        if work.iter().any(|(compiler, unit)| !compiler.is_cached(unit)) {
            let message = format!("compiled kernels cannot be kept in {}", folder.display());
            return Err(Failure::new(message).hint("name a folder that can be written with --kernel-cache"));
        }
        let (compiled, total) = (work.len(), units.len() * compilers.len());
        let (there, seconds) = (total - compiled, start.elapsed().as_secs_f64());
        let archs: Vec<u32> = compilers.iter().map(|(arch, _)| *arch).collect();
        if self.json {
            // Of this machine, which need not have any.
            let gpus = cuda::gpus().unwrap_or_default();
            let names: Vec<_> = gpus.iter().map(|gpu| &gpu.name).collect();
            let driver = gpus.first().map(|gpu| format!("{}.{}", gpu.driver / 1000, gpu.driver % 1000 / 10));
            return output::json(&json!({
                "model": name, "architectures": archs, "compiled": compiled, "already_there": there,
                "seconds": seconds, "folder": folder.display().to_string(), "kernel_hash": cuda::source_hash(),
                "nvrtc": cuda::nvrtc_version()?, "driver": driver, "gpus": names,
            }));
        }
        let archs = archs.iter().map(|arch| format!("sm_{arch}")).collect::<Vec<_>>().join(", ");
        output::line(format_args!(
            "{compiled} kernel files compiled in {seconds:.1} s, {there} were there, for {archs} in {}",
            folder.display()
        ))
    }

    /// Those asked for, or those of the machine's GPUs; each once.
    fn architectures(&self) -> Result<Vec<u32>, Failure> {
        let mut archs = self.arch.clone();
        if archs.is_empty() {
            archs = cuda::gpus().map_err(hint)?.iter().map(|gpu| gpu.arch).collect();
        }
        if archs.is_empty() {
            return Err(hint(cuda::Error::NoDevice { asked: 0, count: 0 }));
        }
        archs.sort_unstable();
        archs.dedup();
        Ok(archs)
    }
}

/// What to do where there is no GPU to ask.
fn hint(error: cuda::Error) -> Failure {
    Failure::new(error).hint("say what to compile for with --arch, for example 90 for an H100")
}
