//! `exp`, `exp2`, SiLU and the scales of fixed point of the GPU at all 2^32 inputs, against the CPU's: `just gpu-test`.

use std::sync::atomic::{AtomicU32, Ordering};

use model::math;

/// Of a result: every NaN is one.
#[inline(always)]
fn bits(v: f32) -> u32 {
    if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }
}

/// As `cuda::exp_checksums` has it.
#[inline(always)]
fn mix(x: u32, y: u32) -> u32 {
    let m = (y ^ x.wrapping_mul(0x9e37_79b1)).wrapping_mul(0x85eb_ca6b);
    m ^ (m >> 15)
}

/// Of a block whose largest magnitude is that of `x`: its scale and the factor on its values, by rule 1 of ARCHITECTURE.md.
#[inline(always)]
fn scale(x: u32) -> u32 {
    /// `M` of 16-bit activations.
    const LIMIT: f32 = 32639.0;
    let largest = f32::from_bits(x & 0x7fff_ffff);
    let (scale, inverse) = (largest / LIMIT, LIMIT / largest);
    let zero = !largest.is_finite() || scale < f32::MIN_POSITIVE;
    let scale = if !largest.is_finite() {
        f32::NAN
    } else if zero {
        0.0
    } else {
        scale
    };
    mix(x, bits(scale)).wrapping_add(mix(!x, if zero { 0 } else { inverse.to_bits() }))
}

/// `f` and its argument, mixed.
#[inline(always)]
fn of(f: impl Fn(f32) -> f32) -> impl Fn(u32) -> u32 {
    move |x| mix(x, bits(f(f32::from_bits(x))))
}

/// The sum of `f` over the 2^24 bit patterns of a chunk.
#[inline(always)]
fn checksum(chunk: u32, f: impl Fn(u32) -> u32) -> u64 {
    /// Values at a time, for the compiler to use vectors; 64 of 32 bits sum to less than 2^38.
    const RUN: u32 = 64;
    let runs = (0..1u32 << 24).step_by(RUN as usize).map(|start| chunk << 24 | start);
    runs.fold(0u64, |sum, first| {
        let run: u64 = (0..RUN).map(|i| u64::from(f(first + i))).sum();
        sum.wrapping_add(run)
    })
}

#[inline(always)]
fn chunk_sums(chunk: u32) -> [u64; 4] {
    [
        checksum(chunk, of(math::exp)),
        checksum(chunk, of(math::exp2)),
        checksum(chunk, of(math::silu)),
        checksum(chunk, scale),
    ]
}

/// With fused multiply-adds as instructions: as calls of the C library they would take minutes.
fn sums(chunk: u32) -> [u64; 4] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        #[target_feature(enable = "avx2,fma")]
        fn wide(chunk: u32) -> [u64; 4] {
            chunk_sums(chunk)
        }
        // SAFETY: the processor was just asked for both features.
        return unsafe { wide(chunk) };
    }
    chunk_sums(chunk)
}

/// All chunks on all cores.
fn on_the_cpu() -> Vec<[u64; 4]> {
    let next = AtomicU32::new(0);
    let work = || -> Vec<(u32, [u64; 4])> {
        let chunks = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&c| c < 256));
        chunks.map(|chunk| (chunk, sums(chunk))).collect()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut all: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|t| t.join().expect("sums do not panic")).collect()
    });
    all.sort_unstable();
    all.into_iter().map(|(_, sums)| sums).collect()
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn every_input_gives_the_same_bits() {
    let gpu = cuda::exp_checksums(cuda::Place::Gpu(0))
        .unwrap_or_else(|error| panic!("this test needs a GPU: {error}"));
    let cpu = on_the_cpu();
    assert_eq!(gpu.len(), cpu.len());
    for (chunk, (gpu, cpu)) in gpu.iter().zip(&cpu).enumerate() {
        for (f, name) in ["exp", "exp2", "silu", "scales"].into_iter().enumerate() {
            assert_eq!(gpu[f], cpu[f], "{name} of bit patterns {chunk:02x}000000 to {chunk:02x}ffffff");
        }
    }
}

/// One wrong bit at one of 2^24 inputs shows, and so do two results that changed places.
#[test]
fn a_checksum_sees_one_bit() {
    let chunk = 0x3f;
    let right = checksum(chunk, of(|x| x));
    for bit in [0, 1, 13, 31] {
        let at = 0x3f12_3456;
        let wrong = |x: f32| if x.to_bits() == at { f32::from_bits(at ^ 1 << bit) } else { x };
        assert_ne!(checksum(chunk, of(wrong)), right, "bit {bit}");
    }
    let swapped =
        |x: f32| f32::from_bits(if x.to_bits() >> 1 == 0x1f80_0000 { x.to_bits() ^ 1 } else { x.to_bits() });
    assert_ne!(checksum(chunk, of(swapped)), right);
}
