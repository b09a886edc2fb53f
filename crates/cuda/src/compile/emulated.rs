//! Kernels for the emulator: the machine's C++ compiler makes a shared library of a unit and `emulator/*.h`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, io, process};

use super::{Image, Sources, Unit};
use crate::Error;

/// The emulator's own sources; a unit is compiled behind `cuda.h`.
const EMULATOR: &[(&str, &str)] = &[
    ("runtime.h", include_str!("../../emulator/runtime.h")),
    ("cuda.h", include_str!("../../emulator/cuda.h")),
    ("ptx.h", include_str!("../../emulator/ptx.h")),
    ("wgmma.h", include_str!("../../emulator/wgmma.h")),
];

/// Compilers, the first that is there is taken.
const COMPILERS: [&str; 3] = ["g++", "clang++", "c++"];

/// What the arithmetic and the kernels' way with memory ask of a compiler: operations as they are written, integers that
/// wrap, and words that are read as other types.
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-fno-stack-protector",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-pthread",
    "-w",
];

/// A C++ compiler of this machine.
#[derive(Debug, Clone)]
pub(super) struct Cxx {
    program: &'static str,
    /// What it says it is.
    version: String,
}

impl Cxx {
    /// The first compiler on the path.
    pub(super) fn find() -> Result<Cxx, Error> {
        let version = |program| {
            let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
            let version = String::from_utf8_lossy(&output.stdout).lines().next()?.to_string();
            output.status.success().then_some((program, version))
        };
        let (program, version) = COMPILERS.into_iter().find_map(version).ok_or(Error::NoCxx)?;
        Ok(Cxx { program, version })
    }

    /// Everything that decides on a library beside the unit's sources and constants.
    pub(super) fn identity(&self) -> Vec<String> {
        let emulator = EMULATOR.iter().map(|(_, text)| (*text).to_string());
        let flags = [self.version.clone(), features().join(" "), FLAGS.join(" ")];
        flags.into_iter().chain(emulator).collect()
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// The library of `unit`, whose kernels are those that it declares, as a GPU of compute capability `arch` has them.
    pub(super) fn compile(&self, arch: u32, unit: &Unit, sources: &Sources) -> Result<Image, Error> {
        let fail = |log: String| Error::CompileEmulated { unit: unit.name.into(), log };
        let folder = Folder::new().map_err(|error| fail(error.to_string()))?;
        self.compile_in(&folder.0, arch, unit, sources)
            .map_err(|error| fail(error.to_string()))?
            .map_err(fail)
    }

    /// The library, or what the compiler said.
    fn compile_in(
        &self,
        folder: &Path,
        arch: u32,
        unit: &Unit,
        sources: &Sources,
    ) -> io::Result<Result<Image, String>> {
        for (name, text) in EMULATOR {
            fs::write(folder.join(name), text)?;
        }
        for name in sources.closure(unit.name) {
            fs::write(folder.join(name), sources.text(name))?;
        }
        let entries = kernels(sources.text(unit.name))
            .map(|name| format!("EMULATOR_KERNEL({name})\n"))
            .collect::<String>();
        let library = folder.join("library");
        let mut compiler = Command::new(self.program)
            .args(FLAGS)
            .args(features())
            .arg(format!("-D__CUDA_ARCH__={arch}0"))
            .args(unit.defines.iter().map(|(name, value)| format!("-D{name}={value}")))
            .arg("-I")
            .arg(folder)
            .arg("-o")
            .arg(&library)
            .args(["-x", "c++", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let text = format!("#include \"cuda.h\"\n#include \"{}\"\n{entries}", unit.name);
        // Shorter than a pipe holds; dropped at once, which ends the compiler's input.
        compiler.stdin.take().expect("piped just now").write_all(text.as_bytes())?;
        let output = compiler.wait_with_output()?;
        if !output.status.success() {
            return Ok(Err(String::from_utf8_lossy(&output.stderr).trim().to_string()));
        }
        fs::read(library).map(Ok)
    }
}

/// Instructions that this machine has and that make the emulator much faster, fused multiply-add above all.
fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return vec!["-mavx2", "-mfma"];
    }
    Vec::new()
}

/// The kernels that a source declares: `extern "C" __global__ void [__launch_bounds__(..)] NAME(`.
fn kernels(source: &str) -> impl Iterator<Item = &str> {
    source.split("extern \"C\" __global__ void").skip(1).filter_map(|rest| {
        let mut rest = rest.trim_start();
        if let Some(bounds) = rest.strip_prefix("__launch_bounds__") {
            rest = bounds.split_once(')')?.1.trim_start();
        }
        rest.split_once('(').map(|(name, _)| name.trim())
    })
}

/// A temporary folder, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Folder> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tally-emulator-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        fs::create_dir(&path)?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No kernel is forgotten, whatever stands between the keywords and its name.
    #[test]
    fn kernels_by_name() {
        let source = "extern \"C\" __global__ void plain(int x) {}\nextern \"C\" __global__ void __launch_bounds__(512, 2)\n\
                      bounded(const f32* x) {}\n__device__ void helper() {}";
        assert_eq!(kernels(source).collect::<Vec<_>>(), ["plain", "bounded"]);
        let sources = Sources::built_in();
        for (name, source) in sources.all().filter(|(name, _)| name.ends_with(".cu")) {
            assert_eq!(kernels(source).count(), source.matches("__global__").count(), "{name}");
            assert!(
                kernels(source).all(|k| k.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')),
                "{name}"
            );
        }
    }
}
