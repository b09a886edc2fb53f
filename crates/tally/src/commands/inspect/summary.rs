//! What sort of model a file holds, in a few lines.

use std::io::{self, Write};
use std::path::Path;

use gguf::{Array, File, Tensor};
use indicatif::DecimalBytes;
use model::{Config, ConfigError, Ffn};
use quant::Mix;
use serde_json::{Value, json};

use crate::output::{grouped, printable};

/// The facts of a file as a whole.
pub(super) struct Summary {
    version: u32,
    architecture: String,
    /// Fails for architectures that this engine does not run, and for files without a shape.
    config: Result<Config, ConfigError>,
    file_type: Option<String>,
    files: usize,
    size: u64,
    tensors: usize,
    parameters: u64,
    /// Of the tensors' data alone.
    data_bytes: u64,
}

impl Summary {
    pub(super) fn of(file: &File) -> Summary {
        let metadata = file.metadata();
        let rows = file.tensor("token_embd.weight").and_then(|embedding| embedding.dims.get(1).copied());
        let listed = || metadata.array("tokenizer.ggml.tokens").map_or(0, Array::len);
        let vocab = rows.unwrap_or_else(listed);
        let named = |id: u32| {
            let mix = Mix::ALL.into_iter().find(|mix| mix.file_type() == id);
            mix.map_or_else(|| format!("number {id}"), |mix| mix.to_string())
        };
        // Lengths and counts are `usize`, at most 64 bits wide; those of a file's tensors add up to less than its size.
        Summary {
            version: file.version(),
            architecture: metadata.str("general.architecture").unwrap_or("not named").to_owned(),
            config: Config::from_metadata(metadata, vocab),
            file_type: metadata.u32("general.file_type").ok().map(named),
            files: file.paths().len(),
            size: file.size(),
            tensors: file.tensors().len(),
            parameters: file.tensors().iter().map(|t| Tensor::len(t) as u64).sum(),
            data_bytes: file.tensors().iter().map(|t| t.data.len() as u64).sum(),
        }
    }

    fn bits_per_weight(&self) -> Option<f64> {
        // Shown to three digits.
        (self.parameters > 0).then(|| self.data_bytes as f64 * 8.0 / self.parameters as f64)
    }

    pub(super) fn write(&self, path: &Path, out: &mut impl Write) -> io::Result<()> {
        let path = path.display().to_string();
        write!(out, "{}: GGUF {}, {}", printable(&path), self.version, DecimalBytes(self.size))?;
        match self.files {
            2.. => writeln!(out, " in {} files", self.files)?,
            _ => writeln!(out)?,
        }
        let mut line = |name: &str, text: String| writeln!(out, "  {name:<13} {text}");
        match &self.config {
            Ok(config) => {
                line("architecture", shape(config))?;
                if let Ffn::Moe(moe) = config.ffn {
                    line("experts", format!("{} of width {}, {} used", moe.experts, moe.width, moe.used))?;
                }
                let (vocab, context) = (grouped(config.vocab as u64), grouped(config.context as u64));
                line("vocabulary", format!("{vocab} tokens; context {context} positions"))?;
            }
            Err(error) => {
                line("architecture", printable(&self.architecture).into_owned())?;
                line("cannot be run", printable(&error.to_string()).into_owned())?;
            }
        }
        if let Some(bits) = self.bits_per_weight() {
            let (weights, tensors) = (grouped(self.parameters), self.tensors);
            line("weights", format!("{weights} in {tensors} tensors; {bits:.2} bits each"))?;
        } else {
            line("weights", "none; a vocabulary alone".into())?;
        }
        self.file_type.as_ref().map_or(Ok(()), |name| line("file type", name.clone()))
    }

    pub(super) fn to_json(&self) -> Value {
        let mut report = json!({
            "gguf_version": self.version, "architecture": self.architecture, "file_type": self.file_type,
            "files": self.files, "bytes": self.size, "tensor_count": self.tensors,
            "weights": self.parameters, "bits_per_weight": self.bits_per_weight(),
        });
        match &self.config {
            Ok(config) => report["config"] = config_json(config),
            Err(error) => report["cannot_be_run"] = json!(error.to_string()),
        }
        report
    }
}

fn shape(config: &Config) -> String {
    let Config { arch, layers, hidden, heads, kv_heads, head_dim, .. } = config;
    let width = match config.ffn {
        Ffn::Dense { width } => format!(", feed-forward width {width}"),
        Ffn::Moe(_) => String::new(),
    };
    format!(
        "{}: {layers} layers, hidden size {hidden}, {heads} query and {kv_heads} key/value heads of {head_dim}{width}",
        arch.name()
    )
}

fn config_json(config: &Config) -> Value {
    let mut report = json!({
        "layers": config.layers, "hidden": config.hidden, "heads": config.heads, "kv_heads": config.kv_heads,
        "head_dim": config.head_dim, "vocab": config.vocab, "context": config.context,
        "rope_base": config.rope.base, "rms_eps": config.rms_eps,
    });
    match config.ffn {
        Ffn::Dense { width } => report["width"] = json!(width),
        Ffn::Moe(moe) => {
            report["experts"] = json!(moe.experts);
            report["experts_used"] = json!(moe.used);
            report["expert_width"] = json!(moe.width);
            report["renormalise"] = json!(moe.renormalise);
        }
    }
    report
}
