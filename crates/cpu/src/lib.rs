//! The CPU backend: the arithmetic of ARCHITECTURE.md on any processor, the same bits whatever the vector width, the
//! number of threads or the cut of the prompt.
//!
//! Owns the activations of a step, the KV cache and a thread pool. The stages are in `stages`; this file is what
//! the engine sees.

mod attention;
mod cache;
mod isa;
mod kernels;
mod matmul;
mod ops;
mod small;
mod stages;

use std::sync::Arc;

use model::{Backend, Buffer, Fault, Ffn, Model, Site, Stage, Step};
use quant::fixed::Activations;

pub use isa::Isa;

/// How to build a [`Cpu`].
#[derive(Debug, Clone)]
pub struct Options {
    /// Instruction set; the best of the machine unless a test forces another.
    pub isa: Isa,
    /// Worker threads; 0 means one a core.
    pub threads: usize,
    /// Precision of activations in products with quantised weights.
    pub activations: Activations,
    /// Positions a sequence may reach.
    pub context: usize,
    /// KV blocks of [`model::BLOCK`] positions.
    pub kv_blocks: usize,
    /// Most rows of a step.
    pub max_rows: usize,
}

impl Options {
    /// One sequence of up to `context` positions, prompts in chunks of 512.
    pub fn for_context(context: usize) -> Options {
        Options {
            isa: Isa::best(),
            threads: 0,
            activations: Activations::default(),
            context,
            kv_blocks: context.div_ceil(model::BLOCK),
            max_rows: 512.min(context.max(1)),
        }
    }
}

/// Why a [`Cpu`] could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The threads could not be started.
    #[error("cannot start {threads} worker threads: {source}")]
    Threads {
        /// How many.
        threads: usize,
        /// Why not.
        source: rayon::ThreadPoolBuildError,
    },
}

/// A model on the CPU.
pub struct Cpu {
    model: Arc<Model>,
    isa: Isa,
    pool: rayon::ThreadPool,
    activations: Activations,
    rope: model::rope::Table,
    norms: stages::Norms,
    cache: cache::Cache,
    max_rows: usize,
    context: usize,
    step: Step,
    buffers: Buffers,
    scratch: stages::Scratch,
}

/// The named buffers of the current step; shapes as in [`Buffer`].
#[derive(Default)]
struct Buffers {
    x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attn: Vec<f32>,
    normed: Vec<f32>,
    router_logits: Vec<f32>,
    experts: Vec<u32>,
    expert_weights: Vec<f32>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
    /// What is kept of the inside of stages, while it is observed.
    inside: Option<Inside>,
    /// The layer whose rows of the cache were stored last: where [`Buffer::CacheK`] is read from.
    cached_layer: Option<usize>,
}

/// What goes on inside the feed-forward stages; empty until the stage that fills it has run in this step.
#[derive(Default)]
struct Inside {
    /// `[T, K, F]`.
    gate: Vec<f32>,
    /// `[T, K, F]`.
    up: Vec<f32>,
    /// `[T, K, D]`.
    down: Vec<f32>,
    /// Of the dense network, `[T, 1, F]`.
    hidden: Vec<f32>,
}

impl Cpu {
    /// Takes up a model. Weights stay where they are, mapped from the file; only norms are copied.
    pub fn new(model: Arc<Model>, options: &Options) -> Result<Cpu, BuildError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .map_err(|source| BuildError::Threads { threads: options.threads, source })?;
        let config = &model.config;
        Ok(Cpu {
            isa: options.isa,
            pool,
            activations: options.activations,
            rope: config.rope.table(config.head_dim, options.context),
            norms: stages::Norms::new(&model.weights),
            cache: cache::Cache::new(config, options.kv_blocks),
            max_rows: options.max_rows,
            context: options.context,
            step: Step::default(),
            buffers: Buffers::default(),
            scratch: stages::Scratch::default(),
            model,
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Worker threads in use.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// What a stage kept of its inside.
    fn inside(&self, buffer: Buffer) -> Result<&[f32], Fault> {
        let refuse = |why: &str| Err(Fault::Buffer { buffer, why: why.into() });
        let Some(inside) = &self.buffers.inside else { return refuse("it is not being observed") };
        let kept = match buffer {
            Buffer::Gate => &inside.gate,
            Buffer::Up => &inside.up,
            Buffer::Down => &inside.down,
            _ => &inside.hidden,
        };
        if kept.is_empty() { refuse("no stage of this step has written it") } else { Ok(kept) }
    }

    fn float_buffer(&mut self, buffer: Buffer) -> Option<&mut Vec<f32>> {
        let b = &mut self.buffers;
        Some(match buffer {
            Buffer::X => &mut b.x,
            Buffer::Q => &mut b.q,
            Buffer::K => &mut b.k,
            Buffer::V => &mut b.v,
            Buffer::Attn => &mut b.attn,
            Buffer::Normed => &mut b.normed,
            Buffer::RouterLogits => &mut b.router_logits,
            Buffer::ExpertWeights => &mut b.expert_weights,
            Buffer::Hidden => &mut b.hidden,
            Buffer::Logits => &mut b.logits,
            Buffer::Experts | Buffer::CacheK | Buffer::CacheV => return None,
            Buffer::Gate | Buffer::Up | Buffer::Down => return None,
        })
    }
}

impl Backend for Cpu {
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
        self.step.clone_from(step);
        self.size_buffers();
        Ok(())
    }

    fn run(&mut self, site: Site) -> Result<(), Fault> {
        if !site.exists(&self.model.config) {
            return Err(Fault::NoSuchStage { site });
        }
        let layer = site.layer.unwrap_or(0);
        match site.stage {
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
        Ok(())
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        let b = &self.buffers;
        Ok(match buffer {
            Buffer::X => b.x.clone(),
            Buffer::Q => b.q.clone(),
            Buffer::K => b.k.clone(),
            Buffer::V => b.v.clone(),
            Buffer::Attn => b.attn.clone(),
            Buffer::Normed => b.normed.clone(),
            Buffer::RouterLogits => b.router_logits.clone(),
            Buffer::Experts => b.experts.iter().map(|&e| e as f32).collect(),
            Buffer::ExpertWeights => b.expert_weights.clone(),
            Buffer::Hidden if matches!(self.model.config.ffn, Ffn::Moe(_)) => b.hidden.clone(),
            Buffer::Gate | Buffer::Up | Buffer::Down | Buffer::Hidden => self.inside(buffer)?.to_vec(),
            Buffer::Logits => b.logits.clone(),
            Buffer::CacheK => self.cached_rows(buffer)?.0,
            Buffer::CacheV => self.cached_rows(buffer)?.1,
        })
    }

    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
        let size_of = |len: usize| -> Result<(), Fault> {
            let why = format!("{} values do not fill its {len}", values.len());
            if values.len() == len { Ok(()) } else { Err(Fault::Buffer { buffer, why }) }
        };
        if buffer == Buffer::Experts {
            size_of(self.buffers.experts.len())?;
            let Ffn::Moe(moe) = self.model.config.ffn else {
                return Err(Fault::Buffer { buffer, why: "a dense model has no experts".into() });
            };
            if let Some(bad) =
                values.iter().find(|&&v| !(v >= 0.0 && v < moe.experts as f32 && v.fract() == 0.0))
            {
                return Err(Fault::Buffer {
                    buffer,
                    why: format!("{bad} is not one of {} experts", moe.experts),
                });
            }
            self.buffers.experts.iter_mut().zip(values).for_each(|(e, &v)| *e = v as u32);
            return Ok(());
        }
        let Some(target) = self.float_buffer(buffer) else {
            let why =
                "it is only ever read: the cache is written by rope_store, and a stage's inside by the stage";
            return Err(Fault::Buffer { buffer, why: why.into() });
        };
        size_of(target.len())?;
        target.copy_from_slice(values);
        Ok(())
    }

    fn logits(&mut self) -> Result<&[f32], Fault> {
        Ok(&self.buffers.logits)
    }

    fn observe(&mut self, on: bool) -> bool {
        self.buffers.inside = on.then(Inside::default);
        true
    }
}
