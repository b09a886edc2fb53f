//! The kernels of a model on a GPU: which files there are, the constants they are compiled with, and the loaded
//! functions by name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use gguf::Dtype;
use model::{Config, Ffn, Model, math};
use quant::fixed::Activations;

use crate::Error;
use crate::compile::{Compiler, Unit};
use crate::driver::{Device, Function, Module};
use crate::launch;

/// A file of kernels and the kernels in it.
pub(crate) type UnitOf = (&'static str, &'static [&'static str]);

/// Every file that is compiled.
const UNITS: &[UnitOf] = &[
    crate::weights::UNIT,
    launch::embed::UNIT,
    launch::rope_store::UNIT,
    launch::attend::UNIT_SPLIT,
    launch::attend::UNIT_ONE,
    launch::attend::UNIT_STREAM,
    launch::attend::UNIT_GROUPS,
    launch::decode::UNIT,
    launch::decode::UNIT_FFN,
    launch::decode::UNIT_HEAD,
    launch::decode::UNIT_ROUTE,
    launch::experts_down::UNIT,
    launch::fixed::UNIT,
    launch::group::UNIT,
    launch::observe::UNIT,
    launch::product::UNIT,
    launch::product::UNIT_FLOAT,
    launch::product::UNIT_FLOAT_TILE,
    launch::product_many::UNIT,
    launch::route::UNIT,
    launch::route::UNIT_FEW,
    launch::sample::UNIT,
    launch::stream::UNIT,
];

/// What to compile for a model: every file, with the model's constants.
pub fn units(model: &Model, activations: Activations) -> Vec<Unit> {
    let defines = defines(model, activations);
    UNITS.iter().map(|(name, _)| Unit { name, defines: defines.clone() }).collect()
}

/// The constants that `prelude.cuh` and `arith.cuh` name.
fn defines(model: &Model, activations: Activations) -> Vec<(String, String)> {
    let Config { layers, hidden, heads, kv_heads, head_dim, vocab, rms_eps, ffn, .. } = model.config;
    let (width, experts, used, renormalise, scale) = match ffn {
        Ffn::Dense { width } => (width, 0, 0, false, 1.0),
        Ffn::Moe(moe) => (moe.width, moe.experts, moe.used, moe.renormalise, moe.scale),
    };
    let count = |n: usize| n.to_string();
    let list = [
        ("LAYERS", count(layers)),
        ("HIDDEN", count(hidden)),
        ("HEADS", count(heads)),
        ("KV_HEADS", count(kv_heads)),
        ("HEAD_DIM", count(head_dim)),
        ("VOCAB", count(vocab)),
        ("WIDTH", count(width)),
        ("EXPERTS", count(experts)),
        ("USED", count(used)),
        ("PLANES", count(if activations == Activations::A16 { 2 } else { 1 })),
        ("RENORMALISE", count(usize::from(renormalise))),
        ("RMS_EPS", bits(rms_eps)),
        ("EXPERT_SCALE", bits(scale)),
        ("TYPES", format!("0x{:x}u", types(model).iter().fold(0u64, |mask, t| mask | 1 << t.id()))),
    ];
    list.into_iter().map(|(name, value)| (name.to_string(), value)).chain(arithmetic()).collect()
}

/// The constants of `model::math`, which no model changes.
pub(crate) fn arithmetic() -> Vec<(String, String)> {
    let names = ["LOG2_E_HI", "LOG2_E_LO", "EXP2_C0", "EXP2_C1", "EXP2_C2", "EXP2_C3", "EXP2_C4", "EXP2_C5"];
    let values = math::LOG2_E.into_iter().chain(math::EXP2_POLY);
    names.into_iter().zip(values).map(|(name, v)| (name.to_string(), bits(v))).collect()
}

fn bits(v: f32) -> String {
    format!("0x{:08x}", v.to_bits())
}

/// The types of a model's matrices, the embedding's included.
pub(crate) fn types(model: &Model) -> Vec<Dtype> {
    let mut types: Vec<Dtype> = crate::weights::matrices(model).iter().map(|t| t.dtype).collect();
    types.sort_unstable_by_key(|t| t.id());
    types.dedup();
    types
}

/// Loaded kernels.
pub(crate) struct Kernels {
    functions: BTreeMap<&'static str, Function>,
    _modules: Vec<Module>,
}

impl Kernels {
    /// Compiles what the cache does not have, all files at once, and loads them.
    pub(crate) fn load(device: &Arc<Device>, compiler: &Compiler, units: &[Unit]) -> Result<Kernels, Error> {
        let images = compile_all(compiler, units)?;
        let (mut functions, mut modules) = (BTreeMap::new(), Vec::new());
        for ((_, names), image) in UNITS.iter().zip(images) {
            let module = Module::load(device, &image)?;
            for name in *names {
                functions.insert(*name, module.function(name)?);
            }
            modules.push(module);
        }
        Ok(Kernels { functions, _modules: modules })
    }

    /// The kernel called `name`.
    pub(crate) fn get(&self, name: &str) -> Function {
        *self.functions.get(name).unwrap_or_else(|| panic!("no unit lists a kernel called {name}"))
    }
}

/// The images of all units, in order, compiled side by side on all cores.
pub fn compile_all(compiler: &Compiler, units: &[Unit]) -> Result<Vec<Vec<u8>>, Error> {
    let next = AtomicUsize::new(0);
    let compile = || -> Result<Vec<_>, Error> {
        let indices = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        let mine = indices.map_while(|i| Some((i, units.get(i)?)));
        mine.map(|(i, unit)| Ok((i, compiler.image(unit)?))).collect()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut images = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(compile)).collect();
        let shares = threads.into_iter().map(|t| t.join().expect("the compiler does not panic"));
        shares.collect::<Result<Vec<_>, Error>>()
    })?
    .concat();
    images.sort_unstable_by_key(|&(i, _)| i);
    Ok(images.into_iter().map(|(_, image)| image).collect())
}
