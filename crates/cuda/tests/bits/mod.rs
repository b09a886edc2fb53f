//! The CUDA backend held against the CPU, bit for bit, wherever it runs: `tests/gpu.rs` on a GPU, `tests/emulated.rs` in
//! the emulator. This file compares; `models.rs` makes what is run, `checks.rs` runs it.

// Each of the two test programs uses a part.
#![allow(dead_code)]

pub(crate) mod checks;
pub(crate) mod models;

use std::env;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpu::Cpu;
use cuda::{Compiler, Cuda, KernelFiles, Place, Unit, compile_all, units};
use model::{BLOCK, Backend, Ffn, Model, Site, Stage, Step, forward};
use quant::fixed::Activations;

/// Where the CUDA backend runs, and how both backends of a comparison are built.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) place: Place,
    /// Where compiled kernels are kept.
    pub(crate) kernels: KernelFiles,
    pub(crate) activations: Activations,
    pub(crate) context: usize,
    pub(crate) max_rows: usize,
    pub(crate) kv_blocks: usize,
    pub(crate) graphs: bool,
}

impl Setup {
    pub(crate) fn at(place: Place) -> Setup {
        let (activations, context) = (Activations::A16, 1024);
        Setup {
            place,
            kernels: KernelFiles::default(),
            activations,
            context,
            max_rows: 256,
            kv_blocks: 160,
            graphs: true,
        }
    }

    /// On the first GPU. What is compiled is kept for as long as temporary files are: tests share most of it.
    pub(crate) fn gpu() -> Setup {
        let cache = env::temp_dir().join("tally-gpu-tests");
        Setup { kernels: KernelFiles::cached(cache), ..Setup::at(Place::Gpu(0)) }
    }

    pub(crate) fn a8(&self) -> Setup {
        Setup { activations: Activations::A8, ..self.clone() }
    }

    pub(crate) fn cpu(&self, model: &Arc<Model>) -> Cpu {
        let &Setup { activations, context, max_rows, kv_blocks, .. } = self;
        let options = cpu::Options { activations, kv_blocks, max_rows, ..cpu::Options::for_context(context) };
        Cpu::new(model.clone(), &options).unwrap()
    }

    /// Compiles what these models need and is not kept yet, all of it side by side: by itself, each model would wait for
    /// its slowest file. What needs the longest comes first.
    pub(crate) fn compile(&self, models: &[Arc<Model>]) {
        let Place::Gpu(ordinal) = self.place else { return };
        let _one = alone(&COMPILER);
        let gpus = cuda::gpus()
            .unwrap_or_else(|error| panic!("the backend ({}) does not start: {error}", self.place));
        let gpu = gpus.get(ordinal).unwrap_or_else(|| panic!("there is no GPU {ordinal}"));
        let compiler = Compiler::of(gpu, &self.kernels).unwrap();
        let mut work: Vec<Unit> = models.iter().flat_map(|model| units(model, self.activations)).collect();
        work.sort_by_key(|unit| SLOWEST.iter().position(|slow| unit.name == *slow).unwrap_or(SLOWEST.len()));
        compile_all(&compiler, &work).unwrap_or_else(|error| panic!("{error}"));
    }

    pub(crate) fn cuda(&self, model: &Arc<Model>) -> Placed {
        self.compile(std::slice::from_ref(model));
        let alone = matches!(self.place, Place::Gpu(_)).then(|| alone(&GPU));
        let options = cuda::Options {
            place: self.place,
            activations: self.activations,
            context: self.context,
            kv_blocks: self.kv_blocks,
            max_rows: self.max_rows,
            kernels: self.kernels.clone(),
            graphs: self.graphs,
        };
        let cuda = Cuda::new(model.clone(), &options, &mut |_, _| ());
        let cuda =
            cuda.unwrap_or_else(|error| panic!("the backend ({}) does not start: {error}", self.place));
        Placed { cuda, _alone: alone }
    }
}

/// Files that take a compiler the longest, in order.
const SLOWEST: [&str; 3] = ["product_many.cu", "product.cu", "product_stream.cu"];

/// Held while a test compiles: two that need the same kernels do not compile them twice.
static COMPILER: Mutex<()> = Mutex::new(());
/// Held while a backend is on the GPU: some kernels' blocks wait for one another, which two streams at once may keep from
/// being resident together.
static GPU: Mutex<()> = Mutex::new(());

/// A test that failed has left nothing behind that the next one could stumble over.
fn alone(what: &'static Mutex<()>) -> MutexGuard<'static, ()> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A backend, alone on the GPU as long as it lives: tests that compile or compute on the CPU go on beside it.
pub(crate) struct Placed {
    // Dropped in order.
    cuda: Cuda,
    _alone: Option<MutexGuard<'static, ()>>,
}

impl Deref for Placed {
    type Target = Cuda;

    fn deref(&self) -> &Cuda {
        &self.cuda
    }
}

impl DerefMut for Placed {
    fn deref_mut(&mut self) -> &mut Cuda {
        &mut self.cuda
    }
}

/// A folder of kernels to test in the emulator instead of those that were built in.
pub(crate) const KERNELS: &str = "TALLY_TEST_KERNELS";

/// How to run in the emulator, if there is one.
pub(crate) fn emulated() -> Option<Setup> {
    if let Err(error) = Compiler::emulated(90, &KernelFiles::default()) {
        assert!(env::var_os("CI_NEEDS_NVRTC").is_none(), "CI runs every kernel, but: {error}");
        println!("did not run: {error}");
        return None;
    }
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    let kernels = KernelFiles { sources: env::var_os(KERNELS).map(PathBuf::from), cache: Some(cache) };
    Some(Setup { kernels, context: 320, kv_blocks: 24, ..Setup::at(Place::EMULATED) })
}

/// The bits of a value, every NaN taken as one.
fn bits(v: f32) -> u32 {
    if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }
}

/// Fails at the first value that differs, with how many do.
pub(crate) fn same(what: &str, left: &[f32], right: &[f32]) {
    assert_eq!(left.len(), right.len(), "{what}: lengths");
    let differs: Vec<usize> = (0..left.len()).filter(|&i| bits(left[i]) != bits(right[i])).collect();
    if let Some(&i) = differs.first() {
        panic!(
            "{what}: {} of {} differ, first at {i}: cpu {} ({:08x}), cuda {} ({:08x}); next at {:?}",
            differs.len(),
            left.len(),
            left[i],
            left[i].to_bits(),
            right[i],
            right[i].to_bits(),
            &differs[1..differs.len().min(8)],
        );
    }
}

/// Every stage of a step on both, all that it writes compared.
pub(crate) fn lockstep(what: &str, cpu: &mut Cpu, cuda: &mut Cuda, step: &Step) {
    let config = cpu.model().config;
    cpu.begin(step).unwrap();
    cuda.begin(step).unwrap();
    let mut sites = vec![Site { stage: Stage::Embed, layer: None }];
    for layer in 0..config.layers {
        let tail: &[Stage] = match config.ffn {
            Ffn::Dense { .. } => &[Stage::FeedForward],
            Ffn::Moe(_) => &[Stage::Route, Stage::ExpertsUp, Stage::ExpertsDown],
        };
        let head = [Stage::Qkv, Stage::RopeStore, Stage::Attend, Stage::AttnOut];
        sites.extend(head.iter().chain(tail).map(|&stage| Site { stage, layer: Some(layer) }));
    }
    if !step.logits.is_empty() {
        sites.push(Site { stage: Stage::Head, layer: None });
    }
    for site in sites {
        cpu.run(site).unwrap_or_else(|e| panic!("{what}: cpu: {e}"));
        cuda.run(site).unwrap_or_else(|e| panic!("{what}: cuda: {e}"));
        for &buffer in site.stage.writes() {
            let (left, right) = (cpu.read(buffer).unwrap(), cuda.read(buffer).unwrap());
            same(&format!("{what}: {site} {buffer:?} ({} rows)", step.rows.len()), &left, &right);
        }
    }
}

/// The same step as a user runs it: nothing read between stages.
pub(crate) fn plain(what: &str, cpu: &mut Cpu, cuda: &mut Cuda, step: &Step) {
    forward(cpu, step).unwrap();
    forward(cuda, step).unwrap();
    same(what, cpu.logits().unwrap(), cuda.logits().unwrap());
}

pub(crate) fn tokens(seed: u64, n: usize, vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((seed ^ i.wrapping_mul(0x9e37_79b9)) % vocab as u64) as u32).collect()
}

pub(crate) fn table(n: usize) -> Vec<u32> {
    // Backwards: a block's id is not its place.
    (0..n.div_ceil(BLOCK) as u32).rev().collect()
}
