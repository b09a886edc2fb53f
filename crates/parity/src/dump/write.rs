//! Writing a trace down.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use model::Step;
use safetensors::tensor::{Dtype, TensorView};

use super::manifest::{EntryRecord, FORMAT, Manifest, Origin, StepRecord, VERSION};
use super::{DumpError, MANIFEST, PAGE, bytes, hex, io_at, kept_shape};
use crate::trace::Trace;

/// Writes `trace` into `dir`, which is made if need be; an earlier trace there is replaced, anything else is refused.
pub fn write(dir: &Path, trace: &Trace, origin: Origin, prompt_ids: &[u32]) -> Result<Manifest, DumpError> {
    fs::create_dir_all(dir).map_err(io_at(dir))?;
    let strange = fs::read_dir(dir).map_err(io_at(dir))?.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        !(name == MANIFEST || name == PAGE || name.starts_with("step-") && name.ends_with(".safetensors"))
    });
    if strange {
        let why = "not empty, and more than a trace is in it: name a new directory".into();
        return Err(DumpError::Bad { path: dir.to_owned(), why });
    }
    let manifest_path = dir.join(MANIFEST);
    // Without its manifest, what is half written is no trace.
    match fs::remove_file(&manifest_path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_at(&manifest_path)(error)),
        _ => {}
    }
    let steps = trace.steps.iter().enumerate().map(|(index, step)| step_record(dir, trace, index, step));
    let manifest = Manifest {
        format: FORMAT.into(),
        version: VERSION,
        origin,
        prompt_ids: prompt_ids.to_vec(),
        steps: steps.collect::<Result<_, _>>()?,
        inside: trace.inside,
        types: trace.types.clone(),
        entries: trace.entries.iter().map(EntryRecord::of).collect(),
    };
    let text = serde_json::to_string_pretty(&manifest).expect("names, numbers and lists are JSON");
    fs::write(&manifest_path, text + "\n").map_err(io_at(&manifest_path))?;
    Ok(manifest)
}

fn step_record(dir: &Path, trace: &Trace, index: usize, step: &Step) -> Result<StepRecord, DumpError> {
    let mut record = StepRecord::of(step);
    let mut tensors = BTreeMap::new();
    for entry in trace.entries.iter().filter(|entry| entry.place.step == index) {
        let Some(values) = &entry.values else { continue };
        let shape = kept_shape(&entry.shape, entry.place.buffer, &entry.lines);
        tensors.insert(entry.place.key(), (shape, bytes(values)));
    }
    if tensors.is_empty() {
        return Ok(record);
    }
    let name = format!("step-{index:04}.safetensors");
    let path = dir.join(&name);
    let bad =
        |error: safetensors::SafeTensorError| DumpError::Bad { path: path.clone(), why: error.to_string() };
    let views = tensors
        .iter()
        .map(|(key, (shape, bytes))| {
            Ok((key, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(bad)?))
        })
        .collect::<Result<Vec<_>, DumpError>>()?;
    let file = safetensors::serialize(views, None).map_err(bad)?;
    fs::write(&path, &file).map_err(io_at(&path))?;
    record.sha256 = Some(hex(&file));
    record.file = Some(name);
    Ok(record)
}
