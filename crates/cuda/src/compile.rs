//! From CUDA C++ to machine code: NVRTC for a GPU, a C++ compiler for the emulator, and a cache on disk that is checked
//! before it is believed.

use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::{fs, io};

use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use crate::Error;
use crate::driver::{Gpu, Place};
use emulated::Cxx;
pub(crate) use sources::Sources;

mod emulated;
mod sources;

/// Where kernels come from, and where compiled ones are kept. Neither changes what is computed, unless a kernel was
/// edited.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelFiles {
    /// A folder whose files come before the built-in sources of the same names: for who works on kernels.
    pub sources: Option<PathBuf>,
    /// A folder for compiled kernels; `None` compiles every time.
    pub cache: Option<PathBuf>,
}

impl KernelFiles {
    /// Built-in sources, compiled ones kept in `cache`.
    pub fn cached(cache: PathBuf) -> KernelFiles {
        KernelFiles { sources: None, cache: Some(cache) }
    }

    fn read(&self) -> Result<Sources, Error> {
        self.sources.as_deref().map_or_else(|| Ok(Sources::built_in()), Sources::with)
    }
}

/// What is compiled together: a `.cu` with its constants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// File name in `kernels/`.
    pub name: &'static str,
    /// Preprocessor definitions.
    pub defines: Vec<(String, String)>,
}

/// Machine code for one architecture, or a shared library of this machine.
pub type Image = Vec<u8>;

/// A compiler for one architecture or for the emulator, with or without a cache.
#[derive(Debug, Clone)]
pub struct Compiler {
    target: Target,
    sources: Sources,
    cache: Option<PathBuf>,
}

#[derive(Debug, Clone)]
enum Target {
    /// Compute capability, times ten, and NVRTC's version.
    Gpu {
        arch: u32,
        version: String,
    },
    Emulator {
        arch: u32,
        cxx: Cxx,
    },
}

impl Compiler {
    /// A compiler for compute capability `arch` (times ten).
    pub fn new(arch: u32, files: &KernelFiles) -> Result<Compiler, Error> {
        Compiler::with(Target::Gpu { arch, version: nvrtc_version()? }, files)
    }

    /// A compiler for the emulator of compute capability `arch` (times ten); fails where there is no C++ compiler.
    pub fn emulated(arch: u32, files: &KernelFiles) -> Result<Compiler, Error> {
        Compiler::with(Target::Emulator { arch, cxx: Cxx::find()? }, files)
    }

    /// A compiler for what `gpu` is.
    pub fn of(gpu: &Gpu, files: &KernelFiles) -> Result<Compiler, Error> {
        match gpu.place {
            Place::Gpu(_) => Compiler::new(gpu.arch, files),
            Place::Emulated(arch) => Compiler::emulated(arch, files),
        }
    }

    fn with(target: Target, files: &KernelFiles) -> Result<Compiler, Error> {
        Ok(Compiler { target, sources: files.read()?, cache: files.cache.clone() })
    }

    /// The hash of the kernels' sources.
    pub fn source_hash(&self) -> String {
        self.sources.hash()
    }

    /// NVRTC's version, `13.0`, or what the C++ compiler calls itself.
    pub fn version(&self) -> &str {
        match &self.target {
            Target::Gpu { version, .. } => version,
            Target::Emulator { cxx, .. } => cxx.version(),
        }
    }

    /// The image of `unit`: from the cache where a sound one is there, else compiled now and kept.
    pub fn image(&self, unit: &Unit) -> Result<Image, Error> {
        let Some(cache) = &self.cache else { return self.compile(unit) };
        let path = self.entry(cache, unit);
        if let Some(image) = load(&path) {
            return Ok(image);
        }
        let image = self.compile(unit)?;
        // A cache that cannot be written costs time at the next start, nothing else.
        let _ = store(&path, &image);
        Ok(image)
    }

    /// Whether the cache already has a sound image of `unit`.
    pub fn is_cached(&self, unit: &Unit) -> bool {
        self.cache.as_ref().is_some_and(|cache| load(&self.entry(cache, unit)).is_some())
    }

    fn entry(&self, cache: &Path, unit: &Unit) -> PathBuf {
        let suffix = match self.target {
            Target::Gpu { .. } => "cubin",
            Target::Emulator { .. } => "so",
        };
        cache.join(format!("{}.{suffix}", self.key(unit)))
    }

    /// Everything that the machine code depends on, hashed.
    fn key(&self, unit: &Unit) -> String {
        let target = match &self.target {
            Target::Gpu { arch, version } => [vec![version.clone()], options(*arch, unit)].concat(),
            Target::Emulator { arch, cxx } => {
                let defines = unit.defines.iter().map(|(name, value)| format!("{name}={value}"));
                cxx.identity().into_iter().chain([format!("sm_{arch}")]).chain(defines).collect()
            }
        };
        let names = self.sources.closure(unit.name);
        let sources = names.into_iter().flat_map(|name| [name, self.sources.text(name)]).map(str::to_owned);
        let mut hash = Sha256::new();
        for part in [unit.name.to_string()].into_iter().chain(target).chain(sources) {
            // The length keeps two neighbours from reading as two others.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hex(&hash.finalize())
    }

    fn compile(&self, unit: &Unit) -> Result<Image, Error> {
        match &self.target {
            Target::Gpu { arch, .. } => nvrtc(*arch, unit, &self.sources),
            Target::Emulator { arch, cxx } => cxx.compile(*arch, unit, &self.sources),
        }
    }
}

/// NVRTC's options.
fn options(arch: u32, unit: &Unit) -> Vec<String> {
    // No contraction, no flushing, IEEE division and root: the arithmetic is what the source says.
    let arithmetic = ["--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"];
    let mut options: Vec<String> = arithmetic.iter().map(|o| (*o).to_string()).collect();
    options.push("--std=c++17".into());
    options.push("--device-as-default-execution-space".into());
    options.push("--generate-line-info".into());
    // Hopper's own instructions, which later GPUs do not have, are there under its own name only.
    let own = if arch == 90 { "a" } else { "" };
    options.push(format!("--gpu-architecture=sm_{arch}{own}"));
    options.extend(unit.defines.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
    options
}

/// Compiles a unit for a GPU.
fn nvrtc(arch: u32, unit: &Unit, sources: &Sources) -> Result<Image, Error> {
    let fail = |log: String| Error::Compile { unit: unit.name.into(), arch, log };
    let text = |s: &str| CString::new(s.replace('\0', " ")).expect("every NUL was replaced just now");
    let (source, name) = (text(sources.text(unit.name)), text(unit.name));
    let headers: Vec<_> = sources.all().filter(|(name, _)| name.ends_with(".cuh")).collect();
    let names: Vec<CString> = headers.iter().map(|(name, _)| text(name)).collect();
    let texts: Vec<CString> = headers.iter().map(|(_, source)| text(source)).collect();
    let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
    let mut program = std::ptr::null_mut();
    // SAFETY: NUL-terminated strings that outlive the program, and arrays as long as the count says.
    unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as i32, // a handful
            pointers(&texts).as_ptr(),
            pointers(&names).as_ptr(),
        )
    }
    .result()
    .map_err(|error| fail(error.to_string()))?;
    let program = Program(program);
    let options: Vec<CString> = options(arch, unit).iter().map(|o| text(o)).collect();
    // SAFETY: a live program; as above.
    let compiled = unsafe {
        sys::nvrtcCompileProgram(program.0, options.len() as i32, pointers(&options).as_ptr()).result()
    };
    if let Err(error) = compiled {
        let log = program.bytes(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        return Err(fail(if log.trim_end_matches('\0').is_empty() {
            error.to_string()
        } else {
            log.trim_end_matches('\0').trim().to_string()
        }));
    }
    program.bytes(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN).map_err(|error| fail(error.to_string()))
}

/// An NVRTC program, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Program {
    /// Something that NVRTC hands out as a size and a copy.
    fn bytes(
        &self,
        size: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        copy: unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult,
    ) -> Result<Vec<u8>, NvrtcError> {
        let mut len = 0;
        // SAFETY: a live program and a place for one size.
        unsafe { size(self.0, &mut len) }.result()?;
        let mut bytes = vec![0u8; len];
        // SAFETY: room for as many bytes as NVRTC announced.
        unsafe { copy(self.0, bytes.as_mut_ptr().cast()) }.result()?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe {
            let _ = sys::nvrtcDestroyProgram(&mut self.0);
        }
    }
}

/// NVRTC's version; fails if it is not installed.
pub fn nvrtc_version() -> Result<String, Error> {
    // SAFETY: loads a library by name to see whether it is there.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoNvrtc);
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers.
    match unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result() {
        Ok(()) => Ok(format!("{major}.{minor}")),
        Err(_) => Err(Error::NoNvrtc),
    }
}

/// The built-in kernel sources: name and text of each file.
pub fn kernel_sources() -> Vec<(&'static str, String)> {
    Sources::built_in().all().map(|(name, text)| (name, text.to_owned())).collect()
}

/// The hash of the built-in kernel sources: what evidence of a run on a GPU is evidence for.
pub fn source_hash() -> String {
    Sources::built_in().hash()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A cache entry is the SHA-256 of the image, then the image.
const HASH: usize = 32;

fn load(path: &Path) -> Option<Image> {
    let entry = fs::read(path).ok()?;
    let (hash, image) = entry.split_at_checked(HASH)?;
    (Sha256::digest(image).as_slice() == hash && !image.is_empty()).then(|| image.to_vec())
}

/// Written beside its place and moved there, so that no reader meets half of it.
fn store(path: &Path, image: &[u8]) -> io::Result<()> {
    let folder = path.parent().expect("entries lie in the cache's folder");
    fs::create_dir_all(folder)?;
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let entry = [Sha256::digest(image).as_slice(), image].concat();
    let written = fs::write(&temporary, entry).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}
