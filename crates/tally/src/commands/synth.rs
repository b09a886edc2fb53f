//! `tally synth`: a model of random weights, for measuring shapes too large to ship and for trying things out.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use model::{Arch, Config, Ffn};
use quant::{Mix, MixContext};
use serde_json::json;
use synth::Shape;

use crate::failure::Failure;
use crate::threads::Threads;
use crate::{mix_argument, model_file, output};

const EXAMPLES: &str = "\
Examples:
  tally synth tiny-moe tiny.gguf                    a model of 7 MB with a vocabulary of bytes
  tally synth qwen3-30b-a3b eight.gguf --layers 8   the 30B shape, cut to 8 layers (3.4 GB)
  tally synth qwen3-0.6b dense.gguf --type Q8_0 --seed 7

A model of random weights answers with random text; it loads and runs as fast as a trained one of its shape. \
The same shape, type and seed give the same bytes on every machine and for any number of threads.

A file at OUT is replaced once the new one is whole.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Shape to start from; the options below change parts of it.
    #[arg(value_parser = PossibleValuesParser::new(Shape::NAMES))]
    shape: String,
    /// The file to write.
    out: PathBuf,
    /// Type of the tensors, in the mix that published files of this name have.
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_K_M", ignore_case = true,
          value_parser = mix_argument::mix())]
    mix: Mix,
    /// Seed of the random weights.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    threads: Threads,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    overrides: Overrides,
}

/// Numbers to put in place of a named shape's.
#[derive(clap::Args)]
#[command(next_help_heading = "Shape")]
struct Overrides {
    /// Layers.
    #[arg(long, value_name = "N")]
    layers: Option<u32>,
    /// Hidden size.
    #[arg(long, value_name = "N")]
    hidden: Option<u32>,
    /// Query heads.
    #[arg(long, value_name = "N")]
    heads: Option<u32>,
    /// Key/value heads; they divide the query heads.
    #[arg(long, value_name = "N")]
    kv_heads: Option<u32>,
    /// Size of a head: a multiple of 32 up to 256.
    #[arg(long, value_name = "N")]
    head_dim: Option<u32>,
    /// Experts of a layer, of mixture-of-experts shapes.
    #[arg(long, value_name = "N")]
    experts: Option<u32>,
    /// Experts chosen for a token.
    #[arg(long, value_name = "N")]
    experts_used: Option<u32>,
    /// Width of one expert.
    #[arg(long, value_name = "N")]
    expert_width: Option<u32>,
    /// Width of the feed-forward network, of dense shapes.
    #[arg(long, value_name = "N")]
    width: Option<u32>,
    // Each token takes memory for its name before anything is written: bounded, unlike the rest.
    /// Tokens of the vocabulary; with fewer than 259 the file has no tokenizer.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    vocab: Option<u32>,
    /// Positions of the context.
    #[arg(long, value_name = "N")]
    context: Option<u32>,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let shape = self.overrides.apply(Shape::named(&self.shape).expect("clap allows the names alone"))?;
        let Config { layers, ffn, .. } = shape.config;
        let n_experts = if let Ffn::Moe(moe) = ffn { moe.experts } else { 0 };
        let context = MixContext { n_layers: layers, n_experts, tied: shape.tied };
        let tensors = synth::tensors(&shape, |spec| self.mix.tensor_type(&context, &spec.name, &spec.dims));
        let mut metadata = synth::metadata(&shape, self.seed);
        metadata.set("general.file_type", self.mix.file_type());
        metadata.set("general.quantization_version", model_file::QUANTIZATION_VERSION);

        let pool = self.threads.pool()?;
        let written = model_file::write(&self.out, &metadata, &tensors, "writing", |writer, progress| {
            Ok(pool.install(|| synth::write(writer, &tensors, self.seed, |bytes| progress.add(bytes)))?)
        })?;
        let parameters = tensors.iter().map(|t| t.dims.iter().product::<usize>() as u64).sum();
        if self.json {
            return output::json(&json!({
                "path": self.out, "type": self.mix.name(), "seed": self.seed, "bytes": written.size,
                "parameters": parameters, "seconds": written.elapsed.as_secs_f64(),
            }));
        }
        output::line(format_args!(
            "{}: {} random parameters in {} on seed {}; {written}",
            self.out.display(),
            output::grouped(parameters),
            self.mix,
            self.seed
        ))
    }
}

impl Overrides {
    /// `shape` with the numbers that were given, checked by the rules for any model file.
    fn apply(&self, mut shape: Shape) -> Result<Shape, Failure> {
        let config = &mut shape.config;
        let mut fields = vec![
            (&mut config.layers, self.layers),
            (&mut config.hidden, self.hidden),
            (&mut config.heads, self.heads),
            (&mut config.kv_heads, self.kv_heads),
            (&mut config.head_dim, self.head_dim),
            (&mut config.vocab, self.vocab),
            (&mut config.context, self.context),
        ];
        let of_experts = [
            ("experts", self.experts),
            ("experts-used", self.experts_used),
            ("expert-width", self.expert_width),
        ];
        let of_dense = [("width", self.width)];
        let misplaced: &[_] = match &mut config.ffn {
            Ffn::Moe(moe) => {
                fields.extend([
                    (&mut moe.experts, self.experts),
                    (&mut moe.used, self.experts_used),
                    (&mut moe.width, self.expert_width),
                ]);
                &of_dense
            }
            Ffn::Dense { width } => {
                fields.push((width, self.width));
                &of_experts
            }
        };
        for (field, value) in fields {
            // A u32 fits: the crate runs on 64 bits, as the map of a model does.
            *field = value.map_or(*field, |value| value as usize);
        }
        if let Some((option, _)) = misplaced.iter().find(|(_, value)| value.is_some()) {
            let (is, want) = match config.arch {
                Arch::Qwen3 => ("dense", "tiny-moe or qwen3-30b-a3b"),
                Arch::Qwen3Moe => ("a mixture of experts", "tiny-dense or qwen3-0.6b"),
            };
            return Err(Failure::new(format!("--{option} does not apply: the shape is {is}"))
                .hint(format!("start from {want}")));
        }
        let checked = Config::from_metadata(&synth::metadata(&shape, 0), shape.config.vocab);
        checked.map_err(|error| Failure::new(format!("not a shape that can be run: {error}")))?;
        Ok(shape)
    }
}
