//! The models that faults are made for: in memory, and as a file that other commands open.

use std::path::Path;

use gguf::TensorSpec;
use indicatif::DecimalBytes;
use model::Model;
use parity::faults::Host;
use synth::Shape;

use super::catalogue::Entry;
use crate::failure::Failure;
use crate::{model_file, output};

/// Of the random weights; any would do.
const SEED: u64 = 7;

fn shape(host: Host) -> Shape {
    Shape { config: host.config(), tied: false }
}

/// The model that a fault is made for.
pub(super) fn model_of(host: Host) -> Model {
    synth::model(&shape(host), SEED, |spec| host.dtype(spec))
}

/// Writes the model in which `fault` shows, and says how to see it.
pub(super) fn write(fault: &Entry, path: &Path) -> Result<(), Failure> {
    let (host, model) = match fault {
        Entry::Planted(fault) => (fault.host, fault.model(&model_of(fault.host))),
        Entry::Kernel(_) => (Host::Mixed, model_of(Host::Mixed)),
    };
    let tensors = model.weights.tensors();
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|t| TensorSpec { name: t.name.to_string(), dtype: t.dtype, dims: t.dims.clone() })
        .collect();
    let metadata = synth::metadata(&shape(host), SEED);
    let written = model_file::write(path, &metadata, &specs, "writing", |writer, progress| {
        for (i, tensor) in tensors.iter().enumerate() {
            writer.write_at(i, 0, &tensor.data)?;
            progress.add(tensor.data.len() as u64); // `usize` is at most 64 bits wide
        }
        Ok(())
    })?;
    let (name, path) = (fault.name(), path.display().to_string());
    let (shown, word) = (output::printable(&path), output::word(&path));
    let ids: Vec<String> = host.prompt().iter().map(u32::to_string).collect();
    output::line(format_args!(
        "{shown}: the model of {name}, {}; to find it there:\n",
        DecimalBytes(written.size)
    ))?;
    output::line(format_args!("tally bisect {word} --left cpu --right faulty:{name} --ids {}", ids.join(",")))
}
