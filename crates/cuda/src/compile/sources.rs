//! The text of all kernels: built in, or with the files of a folder before them, for who works on kernels.

use std::borrow::Cow;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::hex;
use crate::Error;

macro_rules! sources {
    [$($name:literal),* $(,)?] => { [$(($name, include_str!(concat!("../../kernels/", $name)))),*] };
}

/// (name, source) of what is built in. A `.cu` is compiled by itself; a `.cuh` is there to be included.
const BUILT_IN: &[(&str, &str)] = &sources![
    "arith.cuh",
    "attend.cuh",
    "attend_deep.cuh",
    "attend_span.cuh",
    "cache.cuh",
    "choose.cuh",
    "decode_stream.cuh",
    "dot.cuh",
    "fixed.cuh",
    "norm.cuh",
    "float_job.cuh",
    "float_weights.cuh",
    "fragment.cuh",
    "head.cuh",
    "open.cuh",
    "prelude.cuh",
    "ptx.cuh",
    "product_blocks.cuh",
    "product_job.cuh",
    "product_few.cuh",
    "product_open.cuh",
    "ring.cuh",
    "row.cuh",
    "sample.cuh",
    "sample_adjust.cuh",
    "sample_scan.cuh",
    "stream.cuh",
    "types.cuh",
    "wgmma.cuh",
    "attend_groups.cu",
    "attend_one.cu",
    "attend_split.cu",
    "attend_stream.cu",
    "bandwidth.cu",
    "combine.cu",
    "decode.cu",
    "decode_ffn.cu",
    "decode_head.cu",
    "decode_route.cu",
    "embed.cu",
    "exp_check.cu",
    "fixed.cu",
    "float_product.cu",
    "float_tile.cu",
    "group.cu",
    "observe.cu",
    "product.cu",
    "product_many.cu",
    "product_stream.cu",
    "repack.cu",
    "rope_store.cu",
    "route.cu",
    "route_few.cu",
    "sample.cu",
];

/// One text to each name of `BUILT_IN`.
#[derive(Debug, Clone)]
pub(crate) struct Sources(Arc<[(&'static str, Cow<'static, str>)]>);

impl Sources {
    /// What is built in.
    pub(crate) fn built_in() -> Sources {
        Sources(BUILT_IN.iter().map(|&(name, text)| (name, Cow::Borrowed(text))).collect())
    }

    /// What is built in, but for the files of the same names in `folder`.
    pub(crate) fn with(folder: &Path) -> Result<Sources, Error> {
        let fail = |text: String| Error::Kernels { folder: folder.into(), text };
        let mut found = false;
        let text = |&(name, built_in): &(&'static str, &'static str)| {
            let path = folder.join(name);
            if !path.is_file() {
                return Ok((name, Cow::Borrowed(built_in)));
            }
            found = true;
            let own = fs::read_to_string(&path).map_err(|error| fail(format!("{name}: {error}")))?;
            Ok((name, Cow::Owned(own)))
        };
        let texts = BUILT_IN.iter().map(text).collect::<Result<_, Error>>()?;
        if found { Ok(Sources(texts)) } else { Err(fail("it has no file of kernels".into())) }
    }

    /// The text of a file.
    pub(crate) fn text(&self, name: &str) -> &str {
        let found = self.0.iter().find(|(n, _)| *n == name);
        &found.expect("a file of kernels: units name one, and a closure finds no others").1
    }

    /// All names and texts.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, text)| (*name, text.as_ref()))
    }

    /// A file and what it includes, itself and through others.
    pub(super) fn closure(&self, name: &'static str) -> Vec<&'static str> {
        let mut list = vec![name];
        let mut next = 0;
        while let Some(name) = list.get(next) {
            let text = self.text(name);
            let included = |file: &str| text.contains(&format!("#include \"{file}\""));
            let new: Vec<_> =
                self.all().map(|(n, _)| n).filter(|n| included(n) && !list.contains(n)).collect();
            list.extend(new);
            next += 1;
        }
        list
    }

    /// The hash of all of them.
    pub(crate) fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for (name, source) in self.all() {
            for part in [name, source] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part.as_bytes());
            }
        }
        hex(&hash.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_comes_before_what_is_built_in() {
        let folder = std::env::temp_dir().join(format!("tally-kernels-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let missing = Sources::with(&folder).expect_err("the folder is empty").to_string();
        assert!(missing.contains("no file of kernels"), "{missing}");
        fs::write(folder.join("embed.cu"), "#include \"types.cuh\"\n").expect("a temporary file");
        let (built_in, own) = (Sources::built_in(), Sources::with(&folder).expect("a file of kernels"));
        fs::remove_dir_all(&folder).expect("the folder made above");
        assert_eq!(own.text("embed.cu"), "#include \"types.cuh\"\n");
        assert_eq!(own.text("types.cuh"), built_in.text("types.cuh"));
        assert_eq!(own.closure("embed.cu"), ["embed.cu", "types.cuh", "prelude.cuh", "ptx.cuh"]);
        assert_ne!(own.hash(), built_in.hash());
    }
}
