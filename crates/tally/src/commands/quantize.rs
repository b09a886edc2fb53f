//! `tally quantize`: a float model into a file of another type.
//!
//! Tensors stream: a task reads some rows from the mapped input, and writes them to the output. A row is quantised by
//! itself, so no byte depends on how rows are shared among threads.

use std::collections::BTreeMap;
use std::path::PathBuf;

use gguf::{Dtype, File, Metadata, Tensor, TensorSpec, Writer};
use indicatif::DecimalBytes;
use model::{Ffn, Model};
use quant::{Mix, MixContext, dequantise_row, quantise_row};
use rayon::prelude::*;
use serde_json::json;

use crate::failure::Failure;
use crate::model_file::{self, Written};
use crate::progress::Progress;
use crate::threads::Threads;
use crate::{mix_argument, output};

/// Weights of one task: a few megabytes of f32, and some hundred tasks in the smallest model worth the wait.
const WEIGHTS_PER_TASK: usize = 1 << 20;

const EXAMPLES: &str = "\
Examples:
  tally quantize model-f16.gguf model-q4.gguf Q4_K_M
  tally quantize model-00001-of-00004.gguf model.gguf Q8_0     split files are joined

Types, from the largest file to the smallest (bits per weight of a 30B-A3B model):
  F32 32   F16 16   BF16 16   Q8_0 8.5   Q6_K 6.6   Q5_K_M 5.7   Q4_K_M 4.9   Q4_K_S 4.6
Norms and routers stay F32. The mixes with _M and _S give more bits to the tensors that need them, as llama.cpp \
does; `tally inspect` shows which. Q4_K and Q5_K mean Q4_K_M and Q5_K_M.

A file at OUT is replaced once the new one is whole.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model to read, in F32, F16 or BF16.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The file to write.
    out: PathBuf,
    /// The type to write.
    #[arg(value_name = "TYPE", ignore_case = true, value_parser = mix_argument::mix())]
    mix: Mix,
    #[command(flatten)]
    threads: Threads,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let input = File::open(&self.input)?;
        let specs = self.plan(&input)?;
        let metadata = metadata(input.metadata(), self.mix);
        let pool = self.threads.pool()?;
        let written = model_file::write(&self.out, &metadata, &specs, "quantising", |writer, progress| {
            pool.install(|| quantise(input.tensors(), &specs, writer, progress))?;
            // Someone may have written to the input in the meantime.
            Ok(input.check_unchanged()?)
        })?;
        self.summarise(&input, &specs, &written)
    }

    /// The tensors to write, in the order of the input.
    fn plan(&self, input: &File) -> Result<Vec<TensorSpec>, Failure> {
        let path = self.input.display();
        // Shapes and architecture are checked here: a file that cannot be run is not worth quantising.
        let model = Model::load(input).map_err(|error| Failure::from(error).at(&path))?;
        if let Some(tensor) = input.tensors().iter().find(|tensor| tensor.dtype.block_len() > 1) {
            let message = format!("{path}: tensor `{}` is {} already", tensor.name, tensor.dtype);
            return Err(
                Failure::new(message).hint("quantising twice loses accuracy: start from F32, F16 or BF16")
            );
        }
        let n_experts = if let Ffn::Moe(moe) = model.config.ffn { moe.experts } else { 0 };
        let tied = input.tensor("output.weight").is_none();
        let context = MixContext { n_layers: model.config.layers, n_experts, tied };
        let spec = |tensor: &Tensor| TensorSpec {
            name: tensor.name.to_string(),
            dtype: self.mix.tensor_type(&context, &tensor.name, &tensor.dims),
            dims: tensor.dims.clone(),
        };
        Ok(input.tensors().iter().map(spec).collect())
    }

    fn summarise(&self, input: &File, specs: &[TensorSpec], written: &Written) -> Result<(), Failure> {
        let weights: usize = input.tensors().iter().map(Tensor::len).sum();
        // Shown to three digits.
        let bits_per_weight = written.data as f64 * 8.0 / weights as f64;
        let mut types: BTreeMap<Dtype, usize> = BTreeMap::new();
        for spec in specs {
            *types.entry(spec.dtype).or_default() += 1;
        }
        if self.json {
            let types = types.iter().map(|(dtype, &n)| (dtype.name().to_owned(), n.into()));
            return output::json(&json!({
                "path": self.out, "type": self.mix.name(), "bytes_before": input.size(), "bytes": written.size,
                "bits_per_weight": bits_per_weight, "tensors": types.collect::<serde_json::Map<_, _>>(),
                "seconds": written.elapsed.as_secs_f64(),
            }));
        }
        let types: Vec<_> = types.iter().map(|(dtype, n)| format!("{n} {dtype}")).collect();
        output::line(format_args!(
            "{}: {written}\n{} became {} in {}: {bits_per_weight:.2} bits per weight; tensors: {}",
            self.out.display(),
            DecimalBytes(input.size()),
            DecimalBytes(written.size),
            self.mix,
            types.join(", ")
        ))
    }
}

/// The input's metadata, with what the new types change.
fn metadata(input: &Metadata, mix: Mix) -> Metadata {
    let mut metadata = input.clone();
    metadata.set("general.file_type", mix.file_type());
    metadata.set("general.quantization_version", model_file::QUANTIZATION_VERSION);
    metadata
}

/// Some rows of a tensor.
struct Task {
    tensor: usize,
    first_row: usize,
    rows: usize,
}

fn tasks(tensors: &[Tensor]) -> Vec<Task> {
    let of_tensor = |(i, tensor): (usize, &Tensor)| {
        let (rows, step) = (tensor.rows(), (WEIGHTS_PER_TASK / tensor.row_len()).max(1));
        let task = move |first_row| Task { tensor: i, first_row, rows: step.min(rows - first_row) };
        (0..rows).step_by(step).map(task)
    };
    tensors.iter().enumerate().flat_map(of_tensor).collect()
}

/// Fills the tensors of `writer`, on all threads of the current pool.
fn quantise(
    tensors: &[Tensor],
    specs: &[TensorSpec],
    writer: &Writer,
    progress: &Progress,
) -> Result<(), Failure> {
    // Of several errors at once, the one of the first task: which threads were quickest must not show.
    let failed = tasks(tensors).par_iter().find_map_first(|task| {
        let (tensor, dtype) = (&tensors[task.tensor], specs[task.tensor].dtype);
        match quantise_rows(tensor, dtype, task) {
            Ok((offset, bytes)) => {
                let result = writer.write_at(task.tensor, offset, &bytes);
                progress.add(bytes.len() as u64); // `usize` is at most 64 bits wide
                result.err().map(Failure::from)
            }
            Err(failure) => Some(failure),
        }
    });
    failed.map_or(Ok(()), Err)
}

/// The rows of `task` as `dtype`, and where they start in the new tensor, in bytes.
fn quantise_rows(tensor: &Tensor, dtype: Dtype, task: &Task) -> Result<(u64, Vec<u8>), Failure> {
    let row_bytes =
        dtype.row_bytes(tensor.row_len()).expect("a mix falls back to types whose blocks divide the row");
    let mut weights = vec![0.0; tensor.row_len()];
    let mut out = vec![0; task.rows * row_bytes];
    for (row, out) in (task.first_row..).zip(out.chunks_exact_mut(row_bytes)) {
        dequantise_row(
            tensor.dtype,
            &tensor.data[row * tensor.row_bytes()..][..tensor.row_bytes()],
            &mut weights,
        );
        quantise_row(dtype, &weights, out).map_err(|bad| {
            Failure::new(format!(
                "tensor `{}`: element {} of row {row} is {}",
                tensor.name, bad.index, bad.value
            ))
            .hint("only finite weights can be quantised; `tally inspect --check` lists all that are not")
        })?;
    }
    Ok(((task.first_row * row_bytes) as u64, out)) // `usize` is at most 64 bits wide
}
