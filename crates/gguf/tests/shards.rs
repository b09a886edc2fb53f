//! Split models: opened from any shard, and refused when the shards do not belong together.

mod raw;

use std::fs;
use std::path::{Path, PathBuf};

use gguf::File;
use raw::{F32, I32, STRING, U16, file, pair, string, tensor};

/// An empty directory of this test's own.
fn directory(test: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("shards").join(test);
    let _ = fs::remove_dir_all(&path); // not there the first time
    fs::create_dir_all(&path).unwrap();
    path
}

/// The bytes of shard `no` (from 0) of `count`, in a model of `tensors`, called `name`, with one tensor `weight`.
fn shard(no: u16, count: u16, tensors: i32, name: Option<&str>, weight: &str) -> Vec<u8> {
    let mut pairs = vec![
        pair("split.no", U16, no.to_le_bytes()),
        pair("split.count", U16, count.to_le_bytes()),
        pair("split.tensors.count", I32, tensors.to_le_bytes()),
    ];
    pairs.extend(name.map(|name| pair("general.name", STRING, string(name))));
    file(3, &pairs, &[tensor(weight, &[8], F32, 0)], 32)
}

/// The three shards of a model as gguf-split makes them: only the first has the model's metadata.
fn three() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("m-00001-of-00003.gguf", shard(0, 3, 3, Some("m"), "a")),
        ("m-00002-of-00003.gguf", shard(1, 3, 3, None, "b")),
        ("m-00003-of-00003.gguf", shard(2, 3, 3, None, "c")),
    ]
}

fn put(directory: &Path, files: &[(&str, Vec<u8>)]) {
    files.iter().for_each(|(name, bytes)| fs::write(directory.join(name), bytes).unwrap());
}

#[test]
fn any_shard_opens_all() {
    let directory = directory("any");
    put(&directory, &three());
    for (name, _) in three() {
        let file = File::open(&directory.join(name)).unwrap();
        let tensors: Vec<&str> = file.tensors().iter().map(|tensor| &*tensor.name).collect();
        assert_eq!(tensors, ["a", "b", "c"], "{name}");
        assert_eq!(file.tensor("c").unwrap().data.len(), 32);
        assert_eq!(file.paths().len(), 3);
        assert_eq!(file.size(), three().iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
        let keys: Vec<&str> = file.metadata().iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["general.name"], "what describes the files alone is gone");
    }
}

#[test]
fn a_count_of_one_is_no_split() {
    let directory = directory("one");
    put(&directory, &[("whole.gguf", shard(0, 1, 1, Some("m"), "a"))]);
    assert_eq!(File::open(&directory.join("whole.gguf")).unwrap().tensors().len(), 1);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    /// Puts `change` over the three shards (no bytes: removes), opens `open`, and expects `message` about `at`.
    #[track_caller]
    fn check(test: &str, change: &[(&str, Vec<u8>)], open: &str, at: &str, message: &str) {
        let directory = directory(test);
        put(&directory, &three());
        put(&directory, change);
        for (name, _) in change.iter().filter(|(_, bytes)| bytes.is_empty()) {
            fs::remove_file(directory.join(name)).unwrap();
        }
        let error = File::open(&directory.join(open)).expect_err(test);
        assert_eq!(error.to_string(), format!("{}: {message}", directory.join(at).display()), "{test}");
    }
    const FIRST: &str = "m-00001-of-00003.gguf";
    const SECOND: &str = "m-00002-of-00003.gguf";
    const THIRD: &str = "m-00003-of-00003.gguf";

    check("missing", &[(SECOND, vec![])], FIRST, SECOND, "shard 2 of 3 is missing");
    check("first-missing", &[(FIRST, vec![])], THIRD, FIRST, "shard 1 of 3 is missing");
    check(
        "twice",
        &[(THIRD, shard(1, 3, 3, None, "b"))],
        FIRST,
        THIRD,
        "named as shard 3, but its split.no, which counts from 0, is 1",
    );
    check(
        "out-of-order",
        &[(SECOND, shard(2, 3, 3, None, "c")), (THIRD, shard(1, 3, 3, None, "b"))],
        FIRST,
        SECOND,
        "named as shard 2, but its split.no, which counts from 0, is 2",
    );
    check(
        "count-differs",
        &[(SECOND, shard(1, 2, 3, None, "b"))],
        FIRST,
        SECOND,
        "a shard of 2, next to a shard of 3",
    );
    check(
        "name-and-count-differ",
        &[(FIRST, shard(0, 4, 3, None, "a"))],
        FIRST,
        FIRST,
        "one of 4 shards, but its name does not end in -00001-of-00004.gguf or the like",
    );
    check(
        "renamed",
        &[("m.gguf", shard(0, 3, 3, None, "a"))],
        "m.gguf",
        "m.gguf",
        "one of 3 shards, but its name does not end in -00001-of-00003.gguf or the like",
    );
    check(
        "no-split-keys",
        &[(SECOND, file(3, &[], &[tensor("b", &[8], F32, 0)], 32))],
        FIRST,
        SECOND,
        "metadata key \"split.count\" is missing",
    );
    check(
        "another-model",
        &[(SECOND, shard(1, 3, 3, Some("other"), "b"))],
        FIRST,
        SECOND,
        "a shard of another model: its metadata key \"general.name\" differs from the first shard's",
    );
    check(
        "another-model-with-other-counts",
        &[(SECOND, shard(1, 3, 4, None, "b"))],
        FIRST,
        SECOND,
        "a shard of another model: its metadata key \"split.tensors.count\" differs from the first shard's",
    );
    check("tensor-twice", &[(THIRD, shard(2, 3, 3, None, "a"))], SECOND, FIRST, "tensor \"a\" occurs twice");
    check(
        "tensors-missing",
        &[
            (FIRST, shard(0, 3, 4, Some("m"), "a")),
            (SECOND, shard(1, 3, 4, None, "b")),
            (THIRD, shard(2, 3, 4, None, "c")),
        ],
        FIRST,
        FIRST,
        "the shards hold 3 tensors together; the first says 4 (split.tensors.count)",
    );
    check(
        "truncated",
        &[(THIRD, shard(2, 3, 3, None, "c")[..168].to_vec())],
        FIRST,
        THIRD,
        "tensor \"c\" takes 32 bytes from byte 0 of the data, which has 8; truncated?",
    );
}
