//! The bandwidth of the GPU's memory, measured by reading and nothing else (`kernels/bandwidth.cu`): what a decode step,
//! which reads every weight it uses once, is held against.

use std::sync::Arc;

use crate::compile::{Compiler, KernelFiles, Unit};
use crate::driver::{Arguments, Device, Function, Memory, Module, Shape};
use crate::{Error, Ready};

/// Bytes of a pass: many times any cache.
const BYTES: u64 = 4 << 30;
const THREADS: u32 = 512;
/// Blocks to a processor: as many threads as it holds.
const BLOCKS: usize = 4;
/// Passes of one measurement, after one that does not count.
const PASSES: usize = 8;

/// Reads the memory of a GPU, whatever else lives there.
pub struct ReadBandwidth {
    read: Function,
    _module: Module,
    device: Arc<Device>,
}

impl ReadBandwidth {
    /// What is compiled.
    pub fn unit() -> Unit {
        Unit { name: "bandwidth.cu", defines: Vec::new() }
    }

    /// Compiles the kernel, or takes it from the cache.
    pub fn new(ready: &Ready, files: &KernelFiles) -> Result<ReadBandwidth, Error> {
        let device = ready.device.clone();
        let image = Compiler::of(&device.gpu, files)?.image(&ReadBandwidth::unit())?;
        let module = Module::load(&device, &image)?;
        Ok(ReadBandwidth { read: module.function("read_all")?, _module: module, device })
    }

    /// Bytes that a pass reads (4 GiB, or half of what is free), and the bytes a second of each of a few passes.
    pub fn measure(&self) -> Result<(u64, Vec<f64>), Error> {
        let bytes = BYTES.min(self.device.free_memory()? / 2) / 16 * 16;
        // Memory of a GPU is addressable.
        let data: Memory<u8> = self.device.zeros(bytes as usize)?;
        let out: Memory<u32> = self.device.alloc(1)?;
        let shape = Shape::new(self.device.gpu.processors * BLOCKS, THREADS);
        let shape = Shape { dependent: false, ..shape };
        let pass = || {
            let arguments = Arguments::default().push(data.ptr()).push(bytes / 16).push(out.ptr());
            self.read.launch(&self.device, shape, arguments)
        };
        self.device.time(pass)?;
        let rate = |_| Ok(bytes as f64 / (f64::from(self.device.time(pass)?) * 1e-3));
        Ok((bytes, (0..PASSES).map(rate).collect::<Result<_, Error>>()?))
    }
}
