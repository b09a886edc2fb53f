//! Models for tests of generation: synthetic ones with a chat template, and with weights that are no numbers.
#![allow(dead_code, reason = "each test file uses a part")]

use std::path::Path;

use gguf::{Dtype, File, Metadata, TensorSpec};

use crate::process::Directory;

/// ChatML.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {{ '<|im_start|>assistant\n' }}";

/// Tokens that end a text of [`tiny`] models and of the one that ships, biased so far down that none is chosen.
pub(crate) const ENDLESS_TINY: [&str; 4] = ["--logit-bias", "297=-1e9", "--logit-bias", "299=-1e9"];
pub(crate) const ENDLESS_SHIPPED: [&str; 4] = ["--logit-bias", "4093=-1e9", "--logit-bias", "4095=-1e9"];

/// A small model of random weights over bytes, in `directory`; it has a chat template if `chat` says so.
pub(crate) fn tiny(directory: &Directory, name: &str, chat: bool) -> String {
    let path = directory.synth(name, "tiny-moe", &["--vocab", "300", "--layers", "2"]);
    if chat {
        edit(&path, &[("tokenizer.chat_template", TEMPLATE)], |_, _| {});
    }
    path
}

/// Writes the model at `path` anew, with keys set and with its tensors' bytes as `change` leaves them.
pub(crate) fn edit(path: &str, keys: &[(&str, &str)], change: impl Fn(&TensorSpec, &mut [u8])) {
    let file = File::open(path.as_ref()).expect("a model");
    let mut metadata = file.metadata().clone();
    for (key, value) in keys {
        metadata.set(key, *value);
    }
    write(path, &file, &metadata, change);
}

/// Writes the model at `path` anew with other metadata.
pub(crate) fn write_metadata(path: &str, metadata: &Metadata) {
    write(path, &File::open(path.as_ref()).expect("a model"), metadata, |_, _| {});
}

fn write(path: &str, file: &File, metadata: &Metadata, change: impl Fn(&TensorSpec, &mut [u8])) {
    let spec =
        |t: &gguf::Tensor| TensorSpec { name: t.name.to_string(), dtype: t.dtype, dims: t.dims.clone() };
    let specs: Vec<_> = file.tensors().iter().map(spec).collect();
    gguf::write(Path::new(path), metadata, &specs, |i, out| {
        let mut bytes = file.tensors()[i].data.to_vec();
        change(&specs[i], &mut bytes);
        out.write_all(&bytes)
    })
    .expect("written");
}

/// A NaN in place of the first scale of `blk.1.attn_output.weight`.
pub(crate) fn break_a_scale(path: &str) {
    edit(path, &[], |spec, bytes| {
        if spec.name == "blk.1.attn_output.weight" {
            // Where a block keeps its f16 scale.
            let at = match spec.dtype {
                Dtype::Q4K | Dtype::Q5K | Dtype::Q8_0 => 0,
                Dtype::Q6K => spec.dtype.block_bytes() - 2,
                other => panic!("{other} in Q4_K_M"),
            };
            bytes[at..at + 2].copy_from_slice(&[0x00, 0x7e]);
        }
    });
}
