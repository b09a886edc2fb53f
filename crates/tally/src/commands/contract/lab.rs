//! The laboratory: the models and devices that checks are executed with, and what evidence says of them. Knows no check.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contract::{Ground, Miss, Parameters, Provenance};
use cuda::KernelFiles;
use gguf::File;
use model::{Backend, Config, Fault, Ffn, Model, Moe, Step, forward};
use quant::fixed::Activations;
use quant::{Mix, MixContext};
use sha2::{Digest, Sha256};
use synth::Shape;

use super::planted::{Wrong, broken};
use crate::device::{Device, Facts, Placed, Request};
use crate::failure::Failure;

/// What the model that checks make for themselves is called.
const SMALL: &str = "small-moe";

/// Models and devices.
pub(super) struct Lab {
    /// Where paths of contracts begin.
    root: PathBuf,
    /// Where the checks that ask for a GPU are executed; the CPU if there is none.
    device: Device,
    threads: usize,
    kernels: KernelFiles,
    model: Arc<Model>,
    name: String,
    /// The model's file, if it came from one.
    file: Option<File>,
    arithmetic: OnceCell<String>,
    /// GPU, driver and compiler, once one was used.
    gpu: Option<(String, String, String)>,
}

/// A backend is asked for with room for this.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Positions of a sequence.
    pub(super) context: usize,
    /// Sequences at a time.
    pub(super) sequences: usize,
}

impl Room {
    /// One sequence.
    pub(super) fn of(context: usize) -> Room {
        Room { context, sequences: 1 }
    }
}

/// A mixture of experts small enough for CI, with the types of Q4_K_M: `ffn_down_exps` changes its type from layer to
/// layer, as in the published file, for the first time at layer 1.
pub(super) fn small() -> Arc<Model> {
    let base = Shape::named("tiny-moe").expect("a shape of the list");
    let ffn = Ffn::Moe(Moe { experts: 16, used: 4, width: 256, renormalise: true, scale: 1.0 });
    let shape = Shape { config: Config { layers: 8, vocab: 300, ffn, ..base.config }, ..base };
    // 16 experts: eight are Mixtral's number, to which the mix gives other types.
    let mix = MixContext { n_layers: 8, n_experts: 16, tied: false };
    Arc::new(synth::model(&shape, 1, |spec| Mix::Q4KM.tensor_type(&mix, &spec.name, &spec.dims)))
}

/// The named shape that a model has, whatever its context and rotary base.
fn shape_of(config: &Config) -> Option<&'static str> {
    let dimensions = |c: &Config| {
        let ffn = match c.ffn {
            Ffn::Dense { width } => [1, 1, width],
            Ffn::Moe(moe) => [moe.experts, moe.used, moe.width],
        };
        (c.arch, c.layers, [c.hidden, c.heads, c.kv_heads, c.head_dim, c.vocab], ffn)
    };
    let same =
        |name: &&str| Shape::named(name).is_some_and(|shape| dimensions(&shape.config) == dimensions(config));
    Shape::NAMES.into_iter().find(same)
}

/// Token ids without a pattern that a fault could hide in.
pub(super) fn tokens(seed: u64, n: usize, vocab: usize) -> Vec<u32> {
    // Below a vocabulary, which is below 2^32.
    (0..n as u64).map(|i| ((seed ^ i.wrapping_mul(0x9e37_79b9)) % vocab as u64) as u32).collect()
}

/// Logits of a step.
pub(super) fn logits(backend: &mut dyn Backend, step: &Step) -> Result<Vec<f32>, Miss> {
    let run = |backend: &mut dyn Backend| -> Result<Vec<f32>, Fault> {
        forward(backend, step)?;
        Ok(backend.logits()?.to_vec())
    };
    run(backend).map_err(broke)
}

/// A backend that fails is a prediction that failed.
pub(super) fn broke(fault: Fault) -> Miss {
    Miss::failed(fault.to_string())
}

impl Lab {
    /// Opens `model`, or makes the small one.
    pub(super) fn new(
        root: &Path,
        model: Option<&Path>,
        device: Device,
        threads: usize,
        kernels: KernelFiles,
    ) -> Result<Lab, Failure> {
        let file = model.map(File::open).transpose()?;
        let (model, name) = match (&file, model) {
            (Some(file), Some(path)) => {
                let model = Model::load(file).map_err(|error| Failure::from(error).at(path.display()))?;
                let name =
                    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
                (Arc::new(model), name)
            }
            _ => (small(), SMALL.to_owned()),
        };
        let (arithmetic, root) = (OnceCell::new(), root.to_owned());
        Ok(Lab { root, device, threads, kernels, model, name, file, arithmetic, gpu: None })
    }

    /// The model at hand.
    pub(super) fn model(&self) -> Arc<Model> {
        self.model.clone()
    }

    /// What it is called, and its fingerprint.
    pub(super) fn named_model(&self) -> (String, String) {
        (self.name.clone(), parity::fingerprint(&self.model))
    }

    /// The named shape that it has.
    pub(super) fn shape(&self) -> Option<&'static str> {
        shape_of(&self.model.config)
    }

    /// Fails where a contract asks for a named shape and the model at hand has another.
    pub(super) fn of_shape(&self, parameters: &Parameters) -> Result<(), Miss> {
        match parameters.text("shape") {
            Some(want) if self.shape() != Some(want) => {
                Err(Miss::unable(format!("needs a model of the shape {want}: pass --model")))
            }
            _ => Ok(()),
        }
    }

    /// A file of the repository.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The bytes of a file of the repository.
    pub(super) fn bytes(&self, name: &str) -> Result<Vec<u8>, Miss> {
        let path = self.path(name);
        std::fs::read(&path).map_err(|error| Miss::unable(format!("{}: {error}", path.display())))
    }

    /// The kind of the device for checks that ask for a GPU.
    pub(super) fn ground(&self) -> Ground {
        match self.device {
            Device::Cuda(_) => Ground::Gpu,
            Device::Emulated(_) => Ground::Emulated,
            _ => Ground::Ci,
        }
    }

    /// Where kernels are kept.
    pub(super) fn kernels(&self) -> KernelFiles {
        self.kernels.clone()
    }

    /// Puts `model` on the device that contracts call `on`.
    pub(super) fn place(&mut self, model: &Arc<Model>, on: &str, room: Room) -> Result<Placed, Miss> {
        self.place_with(model, on, room, Activations::A16)
    }

    /// The same with another precision of activations.
    pub(super) fn place_with(
        &mut self,
        model: &Arc<Model>,
        on: &str,
        room: Room,
        activations: Activations,
    ) -> Result<Placed, Miss> {
        let device = match on {
            "gpu" if self.ground() == Ground::Ci => {
                return Err(Miss::unable(
                    "needs a GPU: pass --device cuda (and --model, for the real shape)",
                ));
            }
            "gpu" => self.device,
            other => other.parse().map_err(|_| Miss::unable(format!("`{other}` is no device")))?,
        };
        let request = Request {
            context: room.context,
            sequences: room.sequences,
            threads: self.threads,
            activations,
            kernels: self.kernels.clone(),
        };
        let placed = request.place_on(model, device).map_err(|failure| Miss::unable(failure.message()))?;
        if let Facts::Cuda(ready) = &placed.facts {
            let driver = format!("{}.{}", ready.gpu.driver / 1000, ready.gpu.driver % 1000 / 10);
            self.gpu = Some((ready.gpu.name.clone(), driver, ready.compiler.clone()));
        }
        Ok(placed)
    }

    /// A backend for the model at hand, wrong if `wrong` says how.
    pub(super) fn backend(
        &mut self,
        on: &str,
        room: Room,
        wrong: Option<Wrong>,
    ) -> Result<Box<dyn Backend>, Miss> {
        let model = self.model();
        let backend = self.place(&model, on, room)?.backend;
        Ok(match wrong {
            Some(wrong) => broken(backend, wrong),
            None => backend,
        })
    }

    /// The arithmetic by its bits: a hash of the logits that the scalar CPU computes for three tokens of the small model.
    pub(super) fn arithmetic(&self) -> Result<String, Failure> {
        if let Some(known) = self.arithmetic.get() {
            return Ok(known.clone());
        }
        let request = Request {
            context: 64,
            sequences: 1,
            threads: self.threads,
            activations: Activations::A16,
            kernels: KernelFiles::default(),
        };
        let mut backend = request.place_on(&small(), Device::CpuScalar)?.backend;
        forward(&mut backend, &Step::prefill(&[1, 2, 3], 0, vec![0]))?;
        let mut hash = Sha256::new();
        backend.logits()?.iter().for_each(|v| hash.update(parity::canonical(*v).to_le_bytes()));
        let hash: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(self.arithmetic.get_or_init(|| format!("a16:{hash}")).clone())
    }

    /// Where and of what evidence is that is made now, by a check that needs a GPU, or the model, or not.
    pub(super) fn provenance(&self, on_gpu: bool, of_model: bool) -> Result<Provenance, Miss> {
        let gpu = self.gpu.clone().filter(|_| on_gpu);
        if let Some(file) = &self.file {
            // Cut short or replaced in the meantime, perhaps: then the evidence is of no one's model.
            file.check_unchanged().map_err(|error| Miss::failed(error.to_string()))?;
        }
        let (name, hash) = self.named_model();
        Ok(Provenance {
            r#where: if on_gpu { self.ground() } else { Ground::Ci },
            gpu: gpu.as_ref().map(|(name, _, _)| name.clone()),
            driver: gpu.as_ref().map(|(_, driver, _)| driver.clone()),
            nvrtc: gpu.map(|(_, _, nvrtc)| nvrtc),
            kernel_hash: cuda::source_hash(),
            model: of_model.then_some(name),
            model_hash: of_model.then_some(hash),
            shape: self.shape().filter(|_| of_model).map(str::to_owned),
            arithmetic: self.arithmetic().map_err(|failure| Miss::failed(failure.message()))?,
        })
    }
}
