//! Opening what is there and what is not.

mod raw;

use std::fs;
use std::path::{Path, PathBuf};

use gguf::{Dtype, File, Value};

/// An empty directory of this test's own.
fn directory(test: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("open").join(test);
    let _ = fs::remove_dir_all(&path); // not there the first time
    fs::create_dir_all(&path).unwrap();
    path
}

/// What [`raw::valid`] holds, however it was opened.
#[track_caller]
fn check_valid(file: &File, version: u32) {
    assert_eq!(file.version(), version);
    let metadata = file.metadata();
    assert_eq!(metadata.str("general.architecture").unwrap(), "qwen3");
    assert_eq!(metadata.u64("a.u64").unwrap(), u64::MAX);
    assert_eq!(metadata.i32s("a.ints").unwrap(), [1, -1]);
    assert_eq!(metadata.bools("a.bools").unwrap(), [true, false, true]);
    assert_eq!(metadata.strings("a.strings").unwrap(), ["<|im_end|>", "Ġthe"]);

    let [a, b] = file.tensors() else { panic!("{} tensors", file.tensors().len()) };
    assert_eq!((&*a.name, a.dtype, a.dims.as_slice()), ("a.weight", Dtype::F32, &[4, 2][..]));
    assert_eq!((a.row_len(), a.rows(), a.row_bytes(), a.len()), (4, 2, 16, 8));
    assert_eq!(*a.data, Vec::from_iter(0..32));
    assert_eq!((b.row_len(), b.rows(), b.row_bytes(), b.len()), (32, 2, 34, 64));
    assert_eq!(*b.data, Vec::from_iter(32..100));
    assert_eq!(*b.data.slice(34..68), Vec::from_iter(66..100));
    assert_eq!(file.tensor("b.weight").unwrap().dtype, Dtype::Q8_0);
    assert!(file.tensor("c.weight").is_none());
}

#[test]
fn versions_and_sources() {
    let directory = directory("versions");
    for version in [2, 3] {
        let bytes = raw::valid(version);
        let path = directory.join("m.gguf");
        fs::write(&path, &bytes).unwrap();
        let mapped = File::open(&path).unwrap();
        check_valid(&mapped, version);
        assert_eq!(mapped.size(), bytes.len() as u64);
        check_valid(&File::from_vec(bytes.clone()).unwrap(), version);
        check_valid(&File::from_static(bytes.leak()).unwrap(), version);
    }
}

#[test]
fn data_outlive_the_file() {
    let file = File::from_vec(raw::valid(3)).unwrap();
    let data = file.tensor("a.weight").unwrap().data.slice(4..8);
    drop(file);
    assert_eq!(*data, [4, 5, 6, 7]);
}

#[test]
fn an_alignment_of_its_own() {
    let pairs = [raw::pair("general.alignment", raw::U32, 64u32.to_le_bytes())];
    let tensors = [raw::tensor("a", &[4], raw::F32, 0), raw::tensor("b", &[4], raw::F32, 64)];
    let file = File::from_vec(raw::file_aligned(3, &pairs, &tensors, 80, 64)).unwrap();
    assert_eq!(*file.tensor("b").unwrap().data, Vec::from_iter(64..80));
}

#[test]
fn no_model_file() {
    let directory = directory("none");
    fs::write(directory.join("empty"), []).unwrap();
    fs::write(directory.join("text"), "A tally stick was split in two.").unwrap();
    #[track_caller]
    fn check(path: &Path, message: &str) {
        let error = File::open(path).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: {message}", path.display()));
        assert_eq!(error.path(), Some(path));
    }
    check(&directory.join("missing"), "cannot open: No such file or directory (os error 2)");
    check(&directory.join("text/under"), "cannot open: Not a directory (os error 20)");
    check(&directory, "a directory, not a model file");
    check(&directory.join("empty"), "the file is empty");
    check(&directory.join("text"), "not a GGUF file: it starts with \"A ta\", not \"GGUF\"");
    check(Path::new("/dev/null"), "not a regular file");
}

#[test]
fn a_change_of_length_is_seen() {
    let path = directory("changed").join("m.gguf");
    fs::write(&path, raw::valid(3)).unwrap();
    let file = File::open(&path).unwrap();
    file.check_unchanged().unwrap();
    let was = file.size();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(was - 1).unwrap();
    let message =
        format!("the file changed while it was open: it had {was} bytes and has {}; load it again", was - 1);
    assert_eq!(file.check_unchanged().unwrap_err().to_string(), format!("{}: {message}", path.display()));
}

#[test]
fn a_real_vocabulary() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/qwen2-vocab.gguf");
    if !path.exists() {
        println!("did not run: ../shared/data/qwen2-vocab.gguf is not there");
        return;
    }
    let start = std::time::Instant::now();
    let file = File::open(&path).unwrap();
    println!("opened in {:?}", start.elapsed());
    let metadata = file.metadata();
    assert_eq!(metadata.str("general.architecture").unwrap(), "qwen2");
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!((tokens.len(), tokens[0].as_str(), tokens[151_643].as_str()), (151_936, "!", "<|endoftext|>"));
    assert_eq!(metadata.i32s("tokenizer.ggml.token_type").unwrap().len(), tokens.len());
    assert!(metadata.strings("tokenizer.ggml.merges").unwrap().iter().all(|merge| merge.contains(' ')));
    assert_eq!(file.tensors().len(), 0);
}

/// The other implementation's files, whole and in shards: see `data/make.py`.
#[test]
fn what_gguf_py_writes() {
    #[track_caller]
    fn check(name: &str, files: usize) {
        let file = File::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap();
        assert_eq!(file.paths().len(), files);
        let metadata = file.metadata();
        assert_eq!(metadata.str("general.architecture").unwrap(), "qwen3");
        assert_eq!(metadata.str("general.name").unwrap(), "by gguf-py");
        assert_eq!(metadata.u32("a.u8").unwrap(), 200);
        assert_eq!(metadata.i64("a.i16").unwrap(), -300);
        assert_eq!(metadata.get("a.f64"), Some(&Value::F64(1e-300)));
        assert!(metadata.bool("a.bool").unwrap());
        assert_eq!(metadata.f32s("a.floats").unwrap(), [0.5, -2.0]);
        assert_eq!(metadata.strings("a.strings").unwrap(), ["Ġthe", "", "🦀"]);

        let tensor = |name: &str| file.tensor(name).unwrap();
        assert_eq!((tensor("f32").dtype, tensor("f32").dims.as_slice()), (Dtype::F32, &[3, 2][..]));
        let floats =
            tensor("f32").data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        assert_eq!(floats.collect::<Vec<_>>(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!((tensor("f16").dtype, tensor("f16").dims.as_slice()), (Dtype::F16, &[4][..]));
        assert_eq!((tensor("q8_0").dtype, tensor("q8_0").dims.as_slice()), (Dtype::Q8_0, &[32, 2][..]));
        assert_eq!(*tensor("q8_0").data, Vec::from_iter(0..68));
    }
    check("whole.gguf", 1);
    check("split-00001-of-00003.gguf", 3);
    check("split-00003-of-00003.gguf", 3);
}
