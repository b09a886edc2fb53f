//! Whether the GPU's `exp`, `exp2` and SiLU are `model::math`'s, and its scales of fixed point the quotients of rule 1, at all
//! 2^32 inputs (`kernels/exp_check.cu`).

use crate::Error;
use crate::compile::{Compiler, KernelFiles, Unit};
use crate::driver::{Arguments, Device, Module, Place, Shape};
use crate::kernels::arithmetic;

/// Chunks of 2^24 bit patterns.
const CHUNKS: usize = 256;
const THREADS: u32 = 256;
const BLOCKS_PER_CHUNK: usize = 64;

/// What [`exp_checksums`] compiles: a unit of no model.
pub fn exp_unit() -> Unit {
    let mut defines = arithmetic();
    // Named by the headers, used by none of these functions.
    defines.extend([("PLANES", "2"), ("TYPES", "0u")].map(|(name, value)| (name.into(), value.into())));
    Unit { name: "exp_check.cu", defines }
}

/// Checksums of `exp`, `exp2`, SiLU and fixed point's scales at `place`, four for each chunk of 2^24 bit patterns of the
/// argument, ascending: the wrapping sum of `mix(bits(x), bits(f(x)))`, where every NaN of a result counts as `0x7fc00000`
/// and, in 32 bits, `mix(x, y)` is `m ^ m >> 15` with `m = (y ^ x * 0x9e3779b1) * 0x85ebca6b`. The fourth is that of the scale
/// of a block whose largest magnitude is `|x|`, and of `mix(!bits(x), bits(inverse))`, 0 where the block becomes zeros.
///
/// # Errors
/// [`Error`] if there is no such GPU or no compiler.
pub fn exp_checksums(place: Place) -> Result<Vec<[u64; 4]>, Error> {
    let device = Device::open(place)?;
    let image = Compiler::of(&device.gpu, &KernelFiles::default())?.image(&exp_unit())?;
    let module = Module::load(&device, &image)?;
    let sums = device.zeros::<u64>(4 * CHUNKS)?;
    let shape = Shape { dependent: false, ..Shape::new(1, THREADS).grid(BLOCKS_PER_CHUNK, CHUNKS, 1) };
    module.function("exp_check")?.launch(&device, shape, Arguments::default().push(sums.ptr()))?;
    let mut host = vec![0; 4 * CHUNKS];
    sums.read(0, &mut host)?;
    Ok(host.as_chunks().0.to_vec())
}
