//! Split models: which files belong together, and whether they do. Knows names and `split.*` keys only.
//!
//! A model split in three lies in `NAME-00001-of-00003.gguf` and so on, each a whole GGUF file with some of the
//! tensors. The first has the metadata; all have `split.no` (from 0), `split.count` and `split.tensors.count`
//! (the tensors of all shards). Source: llama.cpp, `tools/gguf-split`.

use std::io;
use std::path::{Path, PathBuf};

use crate::map::Part;
use crate::{Error, ErrorKind, Metadata};

/// The number of shards if `metadata` is that of a shard. A count of 0 or 1 is a model in one file.
pub(crate) fn count(metadata: &Metadata) -> Result<Option<u16>, Error> {
    Ok(metadata.integer::<u16>("split.count", "u16")?.filter(|&count| count > 1))
}

/// Opens the file at `path` or, if it is a shard, all the shards in their order.
pub(crate) fn open(path: &Path) -> Result<Vec<Part>, Error> {
    let opened = Part::open(path)?;
    let Some(count) = count(&opened.parsed.metadata).map_err(|error| error.at(path))? else {
        return Ok(vec![opened]);
    };
    let Some(name) = ShardName::of(path).filter(|name| name.count == count) else {
        return Err(Error::from(ErrorKind::ShardName { count }).at(path));
    };

    let mut opened = Some(opened);
    let mut parts: Vec<Part> = Vec::new();
    for number in 1..=count {
        let path = name.path(number);
        let part = match opened.take_if(|_| number == name.number) {
            Some(part) => part,
            None => Part::open(&path).map_err(|error| match error.kind() {
                ErrorKind::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                    Error::from(ErrorKind::ShardMissing { number, count }).at(&path)
                }
                _ => error,
            })?,
        };
        check_member(&part.parsed.metadata, number, count, parts.first()).map_err(|error| error.at(&path))?;
        parts.push(part);
    }
    check_tensor_count(&parts).map_err(|error| error.at(&name.path(1)))?;
    Ok(parts)
}

/// Checks that a file is the shard that its name says, of the model whose first shard is `first`.
///
/// Shards made by gguf-split carry nothing but `split.*` keys after the first, so that one of another model
/// with the same counts is told only by its tensors; a key that both have must be equal.
fn check_member(metadata: &Metadata, number: u16, count: u16, first: Option<&Part>) -> Result<(), Error> {
    let found = metadata.u64("split.count")?;
    if found != u64::from(count) {
        return Err(ErrorKind::ShardCount { wanted: count, found }.into());
    }
    let found = metadata.u64("split.no")?;
    if found != u64::from(number - 1) {
        return Err(ErrorKind::ShardNumber { wanted: number, found }.into());
    }
    let Some(first) = first else { return Ok(()) };
    for (key, value) in metadata.iter().filter(|(key, _)| *key != "split.no") {
        if first.parsed.metadata.get(key).is_some_and(|firsts| firsts != value) {
            return Err(ErrorKind::ShardForeign { key: key.to_owned() }.into());
        }
    }
    Ok(())
}

fn check_tensor_count(parts: &[Part]) -> Result<(), Error> {
    let found = parts.iter().map(|part| part.parsed.tensors.len()).sum();
    match parts[0].parsed.metadata.opt_u64("split.tensors.count")? {
        Some(wanted) if u64::try_from(found) != Ok(wanted) => {
            Err(ErrorKind::ShardTensors { wanted, found }.into())
        }
        _ => Ok(()),
    }
}

/// What the name of a shard says.
#[derive(Debug, PartialEq)]
struct ShardName {
    /// The path up to the number.
    prefix: String,
    directory: PathBuf,
    /// From 1 to `count`.
    number: u16,
    count: u16,
}

impl ShardName {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let (number, count) = (number.parse().ok()?, count.parse().ok()?);
        let parsed = Self { prefix: prefix.to_owned(), directory: path.parent()?.to_owned(), number, count };
        // Going back and forth accepts exactly the names that `path` makes, so that the file opened is the one
        // that its number leads to: not "+1", and not 1 for 00001.
        (parsed.path(number) == path && (1..=count).contains(&number)).then_some(parsed)
    }

    fn path(&self, number: u16) -> PathBuf {
        self.directory.join(format!("{}-{number:05}-of-{:05}.gguf", self.prefix, self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_shards() {
        #[track_caller]
        fn check(path: &str, expected: Option<(&str, u16, u16)>) {
            let found = ShardName::of(Path::new(path));
            let found = found.as_ref().map(|name| (name.prefix.as_str(), name.number, name.count));
            assert_eq!(found, expected, "{path}");
        }
        check("m-00001-of-00003.gguf", Some(("m", 1, 3)));
        check("dir/a-b-of-c-00012-of-65535.gguf", Some(("a-b-of-c", 12, 65535)));
        check("/x/-00002-of-00002.gguf", Some(("", 2, 2)));
        check("m.gguf", None);
        check("m-1-of-3.gguf", None);
        check("m-+0001-of-00003.gguf", None);
        check("m-00000-of-00003.gguf", None);
        check("m-00004-of-00003.gguf", None);
        check("m-00001-of-65536.gguf", None);
        check("m-00001-of-00003.bin", None);
        check("..", None);
    }
}
