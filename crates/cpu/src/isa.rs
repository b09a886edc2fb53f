//! Instruction sets: which are there, and how one source becomes code for each.
//!
//! A [`Task`] is written once. Running it compiles its body for scalar, AVX2 and AVX-512 code; every operation in it
//! is IEEE and lane-wise, so the vector width cannot change a bit. Only the integer kernels ([`Kernels`]) are written
//! separately for each set, and they are exact.

#[cfg(target_arch = "x86_64")]
use crate::kernels::{Avx2, Avx512};
use crate::kernels::{Kernels, Scalar};

/// An instruction set that this machine has: values exist only for sets that were detected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The sets this machine has, slowest first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut, reason = "only x86-64 has more than one")]
        let mut sets = vec![Isa(Kind::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                sets.push(Isa(Kind::Avx2));
                if has!("avx512f")
                    && has!("avx512bw")
                    && has!("avx512dq")
                    && has!("avx512vl")
                    && has!("avx512vnni")
                {
                    sets.push(Isa(Kind::Avx512));
                }
            }
        }
        sets
    }

    /// The fastest set of this machine.
    pub fn best() -> Isa {
        Isa::available().pop().unwrap_or(Isa(Kind::Scalar))
    }

    /// `scalar`, `avx2` or `avx512`.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
        }
    }

    /// Runs a task compiled for this set.
    #[inline]
    pub(crate) fn run<T: Task>(self, task: T) -> T::Out {
        match self.0 {
            Kind::Scalar => task.run::<Scalar>(),
            // SAFETY: an `Isa` of this kind exists only if `available` detected the features.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { run_avx2(task) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { run_avx512(task) },
        }
    }
}

/// A piece of work whose `run` is marked `#[inline(always)]`, so that it is compiled with the caller's features.
pub(crate) trait Task {
    /// What it returns.
    type Out;
    /// Does the work with the kernels of one instruction set.
    fn run<K: Kernels>(self) -> Self::Out;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<T: Task>(task: T) -> T::Out {
    task.run::<Avx2>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn run_avx512<T: Task>(task: T) -> T::Out {
    task.run::<Avx512>()
}
