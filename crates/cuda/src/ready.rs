//! Whether a model can go onto a GPU, found out before anything is loaded: driver, compiler, GPU, memory.

use std::sync::Arc;

use model::Model;

use crate::compile::Compiler;
use crate::driver::Device;
use crate::{Error, Gpu, Options, Plan};

/// A GPU that a model can go onto. The GPU stays open as long as this lives: opening it takes a moment, and
/// [`crate::Cuda::new`] finds it open.
pub struct Ready {
    /// The GPU.
    pub gpu: Gpu,
    /// What the model will take of its memory.
    pub plan: Plan,
    /// Version of the kernels' compiler.
    pub compiler: String,
    /// Hash of the kernels' sources.
    pub kernel_hash: String,
    pub(crate) device: Arc<Device>,
}

impl Ready {
    /// Bytes of the GPU's memory that are free now.
    pub fn free_memory(&self) -> Result<u64, Error> {
        self.device.free_memory()
    }
}

/// Everything that [`crate::Cuda::new`] needs and that can be missing; the first that is, is the error.
pub fn check(model: &Model, options: &Options) -> Result<Ready, Error> {
    let device = Device::open(options.place)?;
    let compiler = Compiler::of(&device.gpu, &options.kernels)?;
    crate::weights::check(model)?;
    let plan = Plan::new(model, options, device.gpu.memory, device.free_memory()?)?;
    let (version, kernel_hash) = (compiler.version().to_string(), compiler.source_hash());
    Ok(Ready { gpu: device.gpu.clone(), plan, compiler: version, kernel_hash, device })
}
