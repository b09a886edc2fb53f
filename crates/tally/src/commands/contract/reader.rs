//! Checks of the reader of model files: that it survives and refuses what is hostile.

use std::fs;

use contract::{Figures, Miss, Parameters, Verdict};
use gguf::File;

use super::lab::Lab;

/// A small valid file from the repository.
fn valid(lab: &Lab, parameters: &Parameters) -> Result<Vec<u8>, Miss> {
    let name = parameters.text("file").ok_or_else(|| Miss::unable("no `file`"))?;
    let bytes = lab.bytes(name)?;
    File::from_vec(bytes.clone()).map_err(|error| Miss::failed(format!("{name} is not valid: {error}")))?;
    Ok(bytes)
}

/// Whatever is accepted can be used: every tensor's data are its shape's.
fn usable(file: &File, short: u64) -> Result<(), String> {
    for tensor in file.tensors() {
        let want = tensor.rows() as u64 * tensor.row_bytes() as u64; // `usize` is at most 64 bits wide
        let got = tensor.data.len() as u64 - short; // as above
        if got != want {
            return Err(format!("tensor `{}` has {got} bytes, of a shape that takes {want}", tensor.name));
        }
    }
    Ok(())
}

/// Every beginning of a valid file is refused.
pub(super) fn truncated(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let whole = valid(lab, parameters)?;
    for len in 0..whole.len() {
        let mut bytes = whole[..len].to_vec();
        if fault.is_some() {
            // A reader that takes what lies beyond the end for zeros.
            bytes.resize(whole.len(), 0);
        }
        if File::from_vec(bytes).is_ok() {
            return Err(Miss::failed(format!("the first {len} of {} bytes were accepted", whole.len())));
        }
    }
    Ok(Figures::from_iter([("prefixes".into(), whole.len().into())]))
}

/// Every single byte of a valid file changed, in several ways: an error, or a file that can be used.
pub(super) fn flipped(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let whole = valid(lab, parameters)?;
    let (mut refused, mut accepted) = (0, 0);
    for at in 0..whole.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff, whole[at] ^ 1] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            match File::from_vec(bytes) {
                Err(_) => refused += 1,
                Ok(file) => {
                    // A reader that loses the last byte of a tensor.
                    let short = u64::from(fault.is_some());
                    usable(&file, short)
                        .map_err(|why| Miss::failed(format!("byte {at} = {value}: {why}")))?;
                    accepted += 1;
                }
            }
        }
    }
    Ok(Figures::from_iter([("refused".into(), refused.into()), ("accepted".into(), accepted.into())]))
}

/// Every lie of a folder is refused in one readable line, every file called `valid-..` accepted.
pub(super) fn hostile(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let name = parameters.text("corpus").ok_or_else(|| Miss::unable("no `corpus`"))?;
    let folder = lab.path(name);
    let entries = fs::read_dir(&folder).map_err(|e| Miss::unable(format!("{}: {e}", folder.display())))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let (mut refused, mut accepted) = (0usize, 0usize);
    for path in paths {
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let bytes = fs::read(&path).map_err(|error| Miss::unable(format!("{name}: {error}")))?;
        // With the fault, the valid files are called lies, too, and are accepted as they should be.
        let valid = name.starts_with("valid-") && fault.is_none();
        match File::from_vec(bytes) {
            Ok(file) if valid => {
                usable(&file, 0).map_err(|why| Miss::failed(format!("{name}: {why}")))?;
                accepted += 1;
            }
            Ok(_) => return Err(Miss::failed(format!("{name} was accepted"))),
            Err(error) if valid => return Err(Miss::failed(format!("{name}: {error}"))),
            Err(error) => {
                let line = error.to_string();
                if line.is_empty() || line.contains(|c: char| c.is_control()) {
                    return Err(Miss::failed(format!(
                        "{name}: the refusal is not one readable line: {line:?}"
                    )));
                }
                refused += 1;
            }
        }
    }
    if (refused as u64) < parameters.integer("at_least").unwrap_or(1) || accepted == 0 {
        return Err(Miss::failed(format!("{refused} lies and {accepted} valid files in {name} are too few")));
    }
    Ok(Figures::from_iter([("refused".into(), refused.into()), ("accepted".into(), accepted.into())]))
}
