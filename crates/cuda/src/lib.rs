//! The CUDA backend: the arithmetic of ARCHITECTURE.md on an NVIDIA GPU, the same bits as the CPU's.
//!
//! Owns the GPU: weights, KV cache, activations, kernels. The stages are in `launch/`, one file each, over
//! `kernels/<stage>.cu`; this file is what the engine sees. Needs no CUDA toolkit to build: driver and compiler are
//! looked up when the program runs.

mod access;
mod buffers;
mod cache;
mod compile;
mod driver;
mod error;
mod exp_check;
mod generate;
mod held;
mod kernels;
mod launch;
mod layout;
mod pinned;
mod plan;
mod profile;
mod ready;
mod replay;
mod step;
mod weights;

use std::sync::Arc;

use model::{Backend, Buffer, Chooser, Fault, Ffn, Model, Site, Stage, Step};
use quant::fixed::Activations;

pub use compile::{Compiler, Image, KernelFiles, Unit, kernel_sources, nvrtc_version, source_hash};
pub use driver::{Gpu, Place, gpus};
pub use error::Error;
pub use exp_check::{exp_checksums, exp_unit};
pub use kernels::{compile_all, units};
pub use launch::bandwidth::ReadBandwidth;
pub use plan::Plan;
pub use profile::{KernelTime, StageTime};
pub use ready::{Ready, check};

use buffers::Buffers;
use driver::{Device, Memory};
use generate::Generation;
use held::Held;
use kernels::Kernels;
use launch::sample::Sampling;
use replay::{Recording, Replay};
use step::DeviceStep;
use weights::Weights;

/// How to build a [`Cuda`].
#[derive(Debug, Clone)]
pub struct Options {
    /// Which GPU, or the emulator.
    pub place: Place,
    /// Precision of activations in products with quantised weights.
    pub activations: Activations,
    /// Positions a sequence may reach.
    pub context: usize,
    /// KV blocks of [`model::BLOCK`] positions.
    pub kv_blocks: usize,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Where kernels come from and are kept.
    pub kernels: KernelFiles,
    /// Whether small steps are recorded as CUDA graphs and replayed; changes speed, no bit.
    pub graphs: bool,
}

impl Options {
    /// One sequence of up to `context` positions, prompts in chunks of 2,048.
    pub fn for_context(context: usize) -> Options {
        Options {
            place: Place::Gpu(0),
            activations: Activations::default(),
            context,
            kv_blocks: context.div_ceil(model::BLOCK),
            max_rows: 2048.min(context.max(1)),
            kernels: KernelFiles::default(),
            graphs: true,
        }
    }
}

/// A model on a GPU.
pub struct Cuda {
    // Fields drop in order: what lives on the device before the device.
    kernels: Kernels,
    weights: Weights,
    cache: cache::Cache,
    buffers: Buffers,
    /// Which of them hold what the current step has written.
    held: Held,
    /// What is kept of the inside of stages, while it is observed.
    inside: Option<launch::observe::Inside>,
    step: DeviceStep,
    replay: Replay,
    generation: Generation,
    /// Whether small steps are recorded.
    graphs: bool,
    /// Whether a whole step is being launched: nobody sees what lies between its stages, so they may share work.
    whole: bool,
    /// Whether `experts_up` has just sorted the step's pairs, and nothing has changed since.
    grouped: bool,
    /// Whether `experts_up` has just been launched as a kernel that nothing after it overtakes until `Experts` is there.
    routed: bool,
    /// Whether the next layer's norm has been made along with the experts' sum.
    normed: bool,
    /// Cosine and sine of every position, `[context, HD / 2, 2]`.
    rope: Memory<f32>,
    /// The last step's logits, on the host.
    logits: Vec<f32>,
    model: Arc<Model>,
    activations: Activations,
    max_rows: usize,
    context: usize,
    device: Arc<Device>,
}

impl Cuda {
    /// Puts a model on a GPU. `progress` hears how many bytes of weights have been sent, of how many.
    pub fn new(
        model: Arc<Model>,
        options: &Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Cuda, Error> {
        let device = Device::open(options.place)?;
        let compiler = Compiler::of(&device.gpu, &options.kernels)?;
        weights::check(&model)?;
        Plan::new(&model, options, device.gpu.memory, device.free_memory()?)?;
        let kernels = Kernels::load(&device, &compiler, &units(&model, options.activations))?;
        let total = weights::bytes(&model);
        let weights =
            Weights::upload(&device, kernels.get("repack"), &model, &mut |sent| progress(sent, total))?;
        let config = &model.config;
        let rope = config.rope.table(config.head_dim, options.context);
        let sequences = options.max_rows.min(step::MAX_SEQUENCES);
        let get = |name: &str| kernels.get(name);
        let places = launch::adjust::places(sequences, options.kv_blocks, options.context);
        let sampling = Sampling::new(&device, get, config.vocab, sequences, places)?;
        Ok(Cuda {
            generation: Generation::new(sampling),
            graphs: options.graphs,
            whole: false,
            grouped: false,
            routed: false,
            normed: false,
            kernels,
            weights,
            cache: cache::Cache::new(&device, config, options.kv_blocks)?,
            buffers: Buffers::new(&device, config, options.max_rows, options.kv_blocks, options.activations)?,
            held: Held::default(),
            inside: None,
            step: DeviceStep::new(&device, options.max_rows, options.context)?,
            replay: Replay::new(options.graphs),
            rope: device.upload(rope.entries().as_flattened())?,
            logits: Vec::new(),
            activations: options.activations,
            max_rows: options.max_rows,
            context: options.context,
            model,
            device,
        })
    }

    /// The GPU in use.
    pub fn gpu(&self) -> &Gpu {
        &self.device.gpu
    }

    fn begin_step(&mut self, step: &Step) -> Result<(), Error> {
        self.device.bind()?;
        if self.buffers.reserve_logits(&self.device, step.logits.len(), self.model.config.vocab)? {
            self.replay.forget();
            self.generation.forget();
        }
        self.replay.begin((step.rows.len(), step.logits.len()));
        self.cache.begin();
        self.held = Held::default();
        (self.grouped, self.routed, self.normed) = (false, false, false);
        self.step.set(step)
    }

    /// Launches a stage, or notes it for the end of the step.
    fn take_up(&mut self, site: Site) -> Result<(), Fault> {
        if !self.replay.defers() {
            return self.launch(&[site]);
        }
        let head = self.step.outputs() > 0;
        match self.replay.note(site, &self.model.config, head) {
            Some(sites) if sites == replay::forward_sites(&self.model.config, head) => {
                self.replay_all(&sites)
            }
            Some(sites) => self.launch(&sites),
            None => Ok(()),
        }
    }

    /// Launches stages one after the other.
    fn launch(&mut self, sites: &[Site]) -> Result<(), Fault> {
        self.device.bind().map_err(fault(STEP))?;
        for &site in sites {
            self.run_stage(site.stage, site.layer.unwrap_or(0)).map_err(fault(site))?;
        }
        Ok(())
    }

    /// Launches all stages of a step, whose buffers are looked at only when it is over.
    fn launch_whole(&mut self, sites: &[Site]) -> Result<(), Fault> {
        self.whole = self.inside.is_none();
        let launched = self.launch(sites);
        self.whole = false;
        launched
    }

    /// Runs a whole small step: stage by stage the first time, recorded the second, replayed from then on.
    fn replay_all(&mut self, sites: &[Site]) -> Result<(), Fault> {
        let key = (self.step.rows(), self.step.outputs());
        let failed = fault(STEP);
        match self.replay.get(key) {
            Some(Recording::Ready(graph)) => {
                graph.launch().map_err(failed)?;
                self.cache.set_all_stored();
                self.held.ran_forward(&self.model.config, key.1 > 0);
                Ok(())
            }
            Some(Recording::Seen) => {
                self.device.begin_capture().map_err(&failed)?;
                let launched = self.launch_whole(sites);
                // Ended in any case: a stream left recording would be of no use to anyone.
                let graph = self.device.end_capture();
                launched?;
                let graph = graph.map_err(&failed)?;
                graph.launch().map_err(&failed)?;
                self.replay.set(key, Recording::Ready(graph));
                Ok(())
            }
            None => {
                self.launch_whole(sites)?;
                self.replay.set(key, Recording::Seen);
                Ok(())
            }
        }
    }

    /// Makes sure that what was asked for so far has been launched.
    fn settle(&mut self) -> Result<(), Fault> {
        let sites = self.replay.take();
        self.launch(&sites)
    }

    fn run_stage(&mut self, stage: Stage, layer: usize) -> Result<(), Error> {
        self.grouped &= stage == Stage::ExpertsDown;
        self.routed &= stage == Stage::ExpertsDown;
        self.held.ran(stage, self.inside.is_some());
        match stage {
            Stage::Embed => self.embed(),
            Stage::Qkv => self.qkv(layer),
            Stage::RopeStore => self.rope_store(layer),
            Stage::Attend => self.attend(layer),
            Stage::AttnOut => self.attn_out(layer),
            Stage::Route => self.route(layer),
            Stage::ExpertsUp => self.experts_up(layer),
            Stage::ExpertsDown => self.experts_down(layer),
            Stage::FeedForward => self.ffn(layer),
            Stage::Head => self.head(),
        }
    }
}

/// An error of the GPU as a fault of a stage.
fn fault(site: Site) -> impl Fn(Error) -> Fault {
    move |error| match error {
        Error::Lost { .. } => Fault::Lost { source: Box::new(error) },
        _ => Fault::Device { site, source: Box::new(error) },
    }
}

/// Where a failure between two stages is reported.
const STEP: Site = Site { stage: Stage::Embed, layer: None };

impl Backend for Cuda {
    fn model(&self) -> &Model {
        &self.model
    }

    fn max_rows(&self) -> usize {
        self.max_rows
    }

    fn context(&self) -> usize {
        self.context
    }

    fn kv_blocks(&self) -> usize {
        self.cache.blocks()
    }

    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.admit(step)?;
        let (got, limit) = (step.tables.len(), self.step.max_sequences());
        if got > limit {
            return Err(Fault::Capacity { what: "a batch", got, limit });
        }
        self.begin_step(step).map_err(fault(STEP))
    }

    fn run(&mut self, site: Site) -> Result<(), Fault> {
        if !site.exists(&self.model.config) {
            return Err(Fault::NoSuchStage { site });
        }
        self.take_up(site)
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        self.settle()?;
        if self.is_inside(buffer) && self.inside.is_none() {
            return Err(Fault::Buffer { buffer, why: "it is not being observed".into() });
        }
        if self.values_of(buffer) > 0 {
            self.held.check(buffer).map_err(|why| Fault::Buffer { buffer, why })?;
        }
        self.read_buffer(buffer).map_err(fault(STEP))
    }

    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
        let refuse = |why: String| Err(Fault::Buffer { buffer, why });
        let len = match buffer {
            Buffer::Experts => self.expert_ids(),
            Buffer::CacheK | Buffer::CacheV => {
                return refuse("the cache is written by rope_store alone".into());
            }
            Buffer::Gate | Buffer::Up | Buffer::Down => return refuse("it is only ever read".into()),
            _ => self.floats(buffer).map_or(0, |(_, len)| len),
        };
        if values.len() != len {
            return refuse(format!("{} values do not fill its {len}", values.len()));
        }
        self.settle()?;
        (self.grouped, self.routed) = (false, false);
        self.held.wrote(buffer);
        if self.floats(buffer).is_some() {
            return self.write_floats(buffer, values).map_err(fault(STEP));
        }
        let Ffn::Moe(moe) = self.model.config.ffn else {
            return refuse("a dense model has no experts".into());
        };
        let valid = |v: f32| v >= 0.0 && v < moe.experts as f32 && v.fract() == 0.0;
        if let Some(bad) = values.iter().find(|&&v| !valid(v)) {
            return refuse(format!("{bad} is not one of {} experts", moe.experts));
        }
        let ids: Vec<u32> = values.iter().map(|&v| v as u32).collect();
        self.buffers.experts.write(0, &ids).map_err(fault(STEP))
    }

    fn logits(&mut self) -> Result<&[f32], Fault> {
        self.logits = self.read(Buffer::Logits)?;
        Ok(&self.logits)
    }

    fn observe(&mut self, on: bool) -> bool {
        if on != self.inside.is_some() {
            // Recordings are of the fused kernels, or of those that keep what goes on inside.
            self.replay.forget();
            self.generation.forget();
            let values = self.buffers.hidden.len();
            self.inside = if on { launch::observe::Inside::new(&self.device, values).ok() } else { None };
        }
        self.inside.is_some() == on
    }

    fn chooser(&mut self) -> Option<&mut dyn Chooser> {
        Some(self)
    }
}
