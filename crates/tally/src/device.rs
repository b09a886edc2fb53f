//! `--device`: where a command computes. The only place that builds backends; every command gets a `Box<dyn Backend>` and
//! what there is to say of it.
//!
//! Nothing falls back silently: `auto` says what it chose and why, before anything is loaded, and a device that was
//! asked for by name is used or is an error.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::{env, io};

use cpu::{Cpu, Isa};
use cuda::{Cuda, KernelFiles, Place};
use indicatif::DecimalBytes;
use model::{BLOCK, Backend, Model};
use oracle::Oracle;
use quant::fixed::Activations;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::progress::Progress;

/// The arguments, to be flattened into a command's.
#[derive(clap::Args)]
pub(crate) struct DeviceArgs {
    /// Where to compute: `cpu`, `cuda` or `cuda:N` (the N-th GPU), or `auto`: a GPU where there is one that the model
    /// fits on. `emulated`, for those who write kernels, runs the GPU's on the CPU, as on Hopper;
    /// `emulated:80` and `emulated:86` as on the GPUs before it. The result is the same.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: Wish,
    #[command(flatten)]
    pub(crate) kernels: KernelArgs,
}

/// Where kernels come from and are kept, to be flattened into a command's.
#[derive(clap::Args, Clone, Default)]
pub(crate) struct KernelArgs {
    /// A folder of GPU kernels (*.cu, *.cuh) to use instead of the built-in ones of the same names: for those who write
    /// kernels.
    #[arg(long, value_name = "DIR")]
    kernels: Option<PathBuf>,
    #[command(flatten)]
    cache: KernelCache,
}

impl KernelArgs {
    /// The folder of kernels that stand in for the built-in ones.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.kernels.as_deref()
    }

    pub(crate) fn files(&self) -> KernelFiles {
        KernelFiles { sources: self.kernels.clone(), ..self.cache.files() }
    }
}

/// `--kernel-cache`, to be flattened into a command's.
#[derive(clap::Args, Clone, Default)]
pub(crate) struct KernelCache {
    /// Where compiled GPU kernels are kept [default: $XDG_CACHE_HOME/tally/kernels, or ~/.cache/tally/kernels].
    #[arg(long, value_name = "DIR")]
    kernel_cache: Option<PathBuf>,
}

impl KernelCache {
    /// Built-in kernels.
    pub(crate) fn files(&self) -> KernelFiles {
        KernelFiles { sources: None, cache: self.folder() }
    }

    /// The folder; `None` where there is no home to put it in.
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let of_user = || {
            let cache = variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
            Some(cache.or_else(|| Some(variable("HOME")?.join(".cache")))?.join("tally").join("kernels"))
        };
        self.kernel_cache.clone().or_else(of_user)
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Auto,
    On(Device),
}

/// A device by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    Cpu,
    /// The CPU without its vector instructions: what the others are held against where they differ.
    CpuScalar,
    /// A GPU, as the driver counts them.
    Cuda(usize),
    /// The GPU's kernels on the CPU, as of this compute capability (times ten): for those who write kernels, and slow.
    Emulated(u32),
    /// Double precision: slow, and never equal in bits.
    Oracle,
}

/// What the emulator may take itself for: Hopper unless told otherwise; before it, other copies and other products, with more
/// and with less shared memory.
const EMULATED: [u32; 3] = [90, 80, 86];

impl FromStr for Wish {
    type Err = String;

    fn from_str(text: &str) -> Result<Wish, String> {
        match text.parse() {
            _ if text == "auto" => Ok(Wish::Auto),
            Ok(device @ (Device::Cpu | Device::Cuda(_) | Device::Emulated(_))) => Ok(Wish::On(device)),
            _ => Err("expected auto, cpu, cuda, cuda:N or emulated".into()),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        let ordinal =
            || text.strip_prefix("cuda:").filter(|n| n.bytes().all(|b| b.is_ascii_digit()))?.parse().ok();
        let arch =
            || EMULATED.into_iter().find(|arch| text.strip_prefix("emulated:") == Some(&arch.to_string()));
        match text {
            "cpu" => Ok(Device::Cpu),
            "cpu-scalar" => Ok(Device::CpuScalar),
            "cuda" => Ok(Device::Cuda(0)),
            "emulated" => Ok(Device::Emulated(EMULATED[0])),
            "oracle" => Ok(Device::Oracle),
            _ => (ordinal().map(Device::Cuda))
                .or_else(|| arch().map(Device::Emulated))
                .ok_or("expected cpu, cpu-scalar, cuda, cuda:N, emulated, emulated:80 or oracle".into()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::CpuScalar => f.write_str("cpu-scalar"),
            Device::Cuda(ordinal) => Place::Gpu(*ordinal).fmt(f),
            Device::Emulated(arch) => Place::Emulated(*arch).fmt(f),
            Device::Oracle => f.write_str("oracle"),
        }
    }
}

/// What a backend is built for.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Positions a sequence may reach.
    pub(crate) context: usize,
    /// Sequences that are in the cache at the same time.
    pub(crate) sequences: usize,
    /// Threads of the CPU; 0 for one on each core.
    pub(crate) threads: usize,
    pub(crate) activations: Activations,
    /// Where kernels come from and are kept.
    pub(crate) kernels: KernelFiles,
}

/// A backend, and what there is to say of it.
pub(crate) struct Placed {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) device: Device,
    pub(crate) facts: Facts,
}

/// What is known of the device beside its name.
pub(crate) enum Facts {
    Cpu { isa: Isa, threads: usize },
    Cuda(Box<cuda::Ready>),
    Oracle,
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Facts::Cpu { isa, threads } => {
                write!(f, "{}, {threads} thread{}", isa.name(), if *threads == 1 { "" } else { "s" })
            }
            Facts::Cuda(ready) => f.write_str(&ready.gpu.name),
            Facts::Oracle => f.write_str("f64"),
        }
    }
}

impl Facts {
    /// Of the kernels' sources, where there are any.
    pub(crate) fn kernel_hash(&self) -> Option<&str> {
        match self {
            Facts::Cuda(ready) => Some(&ready.kernel_hash),
            Facts::Cpu { .. } | Facts::Oracle => None,
        }
    }

    /// By name; the hash of the kernels' sources is what evidence of a run on a GPU is evidence for.
    pub(crate) fn json(&self) -> Value {
        match self {
            Facts::Cpu { isa, threads } => json!({ "isa": isa.name(), "threads": threads }),
            Facts::Cuda(ready) => json!({
                "gpu": ready.gpu.name, "arch": ready.gpu.arch, "driver": ready.gpu.driver, "nvrtc": ready.compiler,
                "kernel_hash": ready.kernel_hash,
            }),
            Facts::Oracle => json!({ "precision": "f64" }),
        }
    }
}

impl Request {
    /// Puts `model` where `wish` says. `note` hears what `auto` chose and why, before anything is loaded.
    pub(crate) fn place(
        &self,
        model: &Arc<Model>,
        wish: Wish,
        note: impl FnOnce(fmt::Arguments<'_>),
    ) -> Result<Placed, Failure> {
        match wish {
            Wish::On(device) => self.place_on(model, device),
            Wish::Auto => match cuda::check(model, &self.cuda(Place::Gpu(0))) {
                Ok(ready) => {
                    note(format_args!("device: cuda:0 ({})", ready.gpu.name));
                    self.on_ready(model, ready)
                }
                Err(error) => {
                    note(format_args!("device: cpu ({error})"));
                    self.on_cpu(model, Device::Cpu)
                }
            },
        }
    }

    /// Puts `model` onto a device, or fails.
    pub(crate) fn place_on(&self, model: &Arc<Model>, device: Device) -> Result<Placed, Failure> {
        match device {
            Device::Cpu | Device::CpuScalar => self.on_cpu(model, device),
            Device::Cuda(ordinal) => self.on_cuda(model, Place::Gpu(ordinal)),
            Device::Emulated(arch) => self.on_cuda(model, Place::Emulated(arch)),
            Device::Oracle => {
                let oracle = Oracle::new(model.clone(), self.context.min(512), self.kv_blocks());
                Ok(Placed { backend: Box::new(oracle), device, facts: Facts::Oracle })
            }
        }
    }

    fn kv_blocks(&self) -> usize {
        self.sequences * self.context.div_ceil(BLOCK)
    }

    fn on_cpu(&self, model: &Arc<Model>, device: Device) -> Result<Placed, Failure> {
        self.check_host_memory(model)?;
        let of_context = cpu::Options::for_context(self.context);
        let slowest = Isa::available()[0];
        let options = cpu::Options {
            isa: if device == Device::CpuScalar { slowest } else { of_context.isa },
            threads: self.threads,
            activations: self.activations,
            kv_blocks: self.kv_blocks(),
            max_rows: of_context.max_rows.max(self.sequences),
            ..of_context
        };
        let cpu = Cpu::new(model.clone(), &options)?;
        let facts = Facts::Cpu { isa: cpu.isa(), threads: cpu.threads() };
        Ok(Placed { backend: Box::new(cpu), device, facts })
    }

    /// Refuses a cache that this machine can never hold. Below that, pages are taken as positions are used.
    fn check_host_memory(&self, model: &Model) -> Result<(), Failure> {
        let positions = (self.kv_blocks() * BLOCK) as u64; // `usize` is at most 64 bits wide
        // At most 2^24 positions of 2^38 bytes: see `Config`.
        let bytes = positions.saturating_mul(model.config.kv_bytes_per_position() as u64);
        match host_memory() {
            Some(memory) if bytes > memory => {
                let (bytes, memory, context) = (DecimalBytes(bytes), DecimalBytes(memory), self.context);
                let message =
                    format!("a context of {context} positions takes {bytes}; this machine has {memory}");
                Err(Failure::new(message).hint("try a smaller --ctx"))
            }
            _ => Ok(()),
        }
    }

    fn cuda(&self, place: Place) -> cuda::Options {
        let of_context = cuda::Options::for_context(self.context);
        cuda::Options {
            place,
            activations: self.activations,
            kv_blocks: self.kv_blocks(),
            max_rows: of_context.max_rows.max(self.sequences),
            kernels: self.kernels.clone(),
            ..of_context
        }
    }

    fn on_cuda(&self, model: &Arc<Model>, place: Place) -> Result<Placed, Failure> {
        self.on_ready(model, cuda::check(model, &self.cuda(place))?)
    }

    fn on_ready(&self, model: &Arc<Model>, ready: cuda::Ready) -> Result<Placed, Failure> {
        let cuda = self.load(model, &ready)?;
        let device = match ready.gpu.place {
            Place::Gpu(ordinal) => Device::Cuda(ordinal),
            Place::Emulated(arch) => Device::Emulated(arch),
        };
        Ok(Placed { backend: Box::new(cuda), device, facts: Facts::Cuda(Box::new(ready)) })
    }

    /// Puts `model` onto a GPU, for who needs that backend and no other.
    pub(crate) fn load_cuda(
        &self,
        model: &Arc<Model>,
        ordinal: usize,
    ) -> Result<(Cuda, cuda::Ready), Failure> {
        let ready = cuda::check(model, &self.cuda(Place::Gpu(ordinal)))?;
        Ok((self.load(model, &ready)?, ready))
    }

    fn load(&self, model: &Arc<Model>, ready: &cuda::Ready) -> Result<Cuda, Failure> {
        let progress = Progress::bytes("loading", ready.plan.weights);
        let mut done = 0;
        Ok(Cuda::new(model.clone(), &self.cuda(ready.gpu.place), &mut |sent, _| {
            progress.add((sent - done) as u64); // `usize` is at most 64 bits wide
            done = sent;
        })?)
    }
}

/// The machine's memory in bytes, where the system tells.
fn host_memory() -> Option<u64> {
    // SAFETY: `sysconf` only reads the two names' values.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).ok()?.checked_mul(u64::try_from(size).ok()?)
}

/// Writes a note on standard error; that it is closed is no failure.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = io::Write::write_fmt(&mut io::stderr().lock(), format_args!("{text}\n"));
}

/// What to do about a GPU that is lost.
pub(crate) const LOST: &str =
    "`nvidia-smi`, and Xid lines of the system's log, tell how the GPU is; start again, or use --device cpu";

impl From<cuda::Error> for Failure {
    fn from(error: cuda::Error) -> Failure {
        let hint = match &error {
            cuda::Error::NoDriver => "install the NVIDIA driver, or use --device cpu".into(),
            cuda::Error::OldDriver { .. } => "update the NVIDIA driver, or use --device cpu".into(),
            cuda::Error::NoNvrtc => {
                "it is part of the CUDA toolkit; or `pip install nvidia-cuda-nvrtc` and add the \
                                     folder of libnvrtc.so.13 to LD_LIBRARY_PATH; or use --device cpu"
                    .into()
            }
            cuda::Error::Memory { would_fit: Some(context), .. } => {
                format!("try --ctx {context}, or --device cpu")
            }
            cuda::Error::NoDevice { .. } => {
                "CUDA_VISIBLE_DEVICES hides GPUs, too; or use --device cpu".into()
            }
            cuda::Error::Kernels { .. } => "it is to hold files as crates/cuda/kernels has them".into(),
            cuda::Error::NoCxx => "install one, g++ say".into(),
            cuda::Error::Driver { .. } => "`nvidia-smi` tells how the GPU is".into(),
            cuda::Error::Lost { .. } => LOST.into(),
            cuda::Error::Emulated { .. } => "this is a defect of a kernel, or of the emulator".into(),
            cuda::Error::Compile { .. } | cuda::Error::CompileEmulated { .. } => {
                "this is a defect of Tally, or a compiler that it does not know".into()
            }
            _ => "try --device cpu".into(),
        };
        Failure::new(error).hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_by_name() {
        let check = |text: &str, want: Option<Wish>| assert_eq!(text.parse::<Wish>().ok(), want, "{text:?}");
        check("auto", Some(Wish::Auto));
        check("cpu", Some(Wish::On(Device::Cpu)));
        check("cuda", Some(Wish::On(Device::Cuda(0))));
        check("cuda:0", Some(Wish::On(Device::Cuda(0))));
        check("cuda:12", Some(Wish::On(Device::Cuda(12))));
        check("emulated", Some(Wish::On(Device::Emulated(90))));
        check("emulated:80", Some(Wish::On(Device::Emulated(80))));
        for bad in [
            "",
            "gpu",
            "CPU",
            "cuda:",
            "cuda:-1",
            "cuda:+1",
            "cuda:1x",
            "cuda:99999999999999999999",
            "oracle",
            "emulated:",
            "emulated:81",
            "emulated:080",
        ] {
            check(bad, None);
        }
        for device in [
            Device::Cpu,
            Device::CpuScalar,
            Device::Cuda(3),
            Device::Emulated(90),
            Device::Emulated(80),
            Device::Oracle,
        ] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
    }
}
