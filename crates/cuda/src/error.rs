//! What can go wrong between a model and a GPU. What to do about it is for who knows the user: the command line.

/// Why the CUDA backend cannot start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libcuda is not installed.
    #[error("no CUDA driver: libcuda.so was not found")]
    NoDriver,
    /// The driver answers, but is older than what the kernels' compiler needs.
    #[error("the NVIDIA driver supports CUDA {found}, but {need} is needed")]
    OldDriver {
        /// `major.minor` of the driver.
        found: String,
        /// `major.minor` needed.
        need: &'static str,
    },
    /// The GPU asked for is not there.
    #[error("there is no GPU {asked}: this machine has {}", gpus(*count))]
    NoDevice {
        /// Ordinal asked for.
        asked: usize,
        /// GPUs there are.
        count: usize,
    },
    /// The GPU is older than the kernels.
    #[error("{name} has compute capability {}.{}: at least 8.0 is needed", arch / 10, arch % 10)]
    OldDevice {
        /// The GPU.
        name: String,
        /// Its compute capability, times ten.
        arch: u32,
    },
    /// libnvrtc is not installed.
    #[error("no kernel compiler: libnvrtc.so was not found")]
    NoNvrtc,
    /// The folder of kernel sources cannot be used.
    #[error("kernels in {}: {text}", folder.display())]
    Kernels {
        /// The folder.
        folder: std::path::PathBuf,
        /// What is wrong with it.
        text: String,
    },
    /// A kernel did not compile.
    #[error("kernels `{unit}` do not compile for sm_{arch}: {log}")]
    Compile {
        /// Source file.
        unit: String,
        /// Compute capability, times ten.
        arch: u32,
        /// What the compiler said.
        log: String,
    },
    /// No C++ compiler for the emulator.
    #[error("no C++ compiler for the emulator: none of g++, clang++ and c++ was found")]
    NoCxx,
    /// A kernel did not compile for the emulator.
    #[error("kernels `{unit}` do not compile for the emulator: {log}")]
    CompileEmulated {
        /// Source file.
        unit: String,
        /// What the compiler said.
        log: String,
    },
    /// A kernel did what it must not, or the emulator was asked for what it cannot do.
    #[error("the emulator stopped: {what}: {text}")]
    Emulated {
        /// The kernel, or what was tried.
        what: String,
        /// What happened.
        text: String,
    },
    /// A row that is no whole number of the kernels' smallest blocks.
    #[error(
        "tensor `{tensor}`: its rows of {found} values are no multiple of 32, as the CUDA kernels want them"
    )]
    Rows {
        /// GGUF name.
        tensor: String,
        /// Values of a row.
        found: usize,
    },
    /// The model does not fit.
    #[error(
        "the GPU has {} free, but {} are needed: weights {} + KV cache for {context} positions {} + workspace {} + \
         reserve {}{}",
        gb(*free), gb(weights + kv + workspace + reserve), gb(*weights), gb(*kv), gb(*workspace), gb(*reserve),
        fits(*would_fit)
    )]
    Memory {
        /// Free bytes.
        free: u64,
        /// Bytes of weights.
        weights: u64,
        /// Bytes of the KV cache.
        kv: u64,
        /// Bytes of buffers.
        workspace: u64,
        /// Bytes that are to stay free: see [`crate::Plan`].
        reserve: u64,
        /// Positions asked for.
        context: usize,
        /// The longest context that would fit, if any.
        would_fit: Option<usize>,
    },
    /// The cache's rows were asked for before a layer had stored any.
    #[error("nothing has been stored in this step")]
    NothingStored,
    /// The driver will do nothing more for this process: a kernel trapped or went astray, or the hardware failed.
    #[error("the GPU is lost: {text} ({name}), noticed while {what}")]
    Lost {
        /// What was tried when it was noticed, which need not be what failed.
        what: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// The driver refused something.
    #[error("the GPU failed: {what}: {text} ({name})")]
    Driver {
        /// What was tried.
        what: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's words.
        text: String,
    },
}

fn gpus(count: usize) -> String {
    match count {
        0 => "none".into(),
        1 => "one (cuda:0)".into(),
        n => format!("{n} (cuda:0 to cuda:{})", n - 1),
    }
}

fn gb(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

fn fits(context: Option<usize>) -> String {
    match context {
        Some(n) => format!("; a context of {n} would fit"),
        None => "; no context would fit".into(),
    }
}
