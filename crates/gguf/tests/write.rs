//! Writing: what is written is what is read, and nothing half-written is ever left.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use gguf::{Array, Dtype, File, Metadata, TensorSpec, Value, Writer, write};
use proptest::prelude::*;

/// An empty directory of this test's own.
fn directory(test: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("write").join(test);
    let _ = fs::remove_dir_all(&path); // not there the first time
    fs::create_dir_all(&path).unwrap();
    path
}

fn names_in(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn spec(name: &str, dtype: Dtype, dims: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dtype, dims: dims.to_vec() }
}

/// The `n`th byte of tensor `i`.
fn pattern(i: usize, n: usize) -> u8 {
    (i * 101 + n * 7 + n / 251) as u8
}

fn data(i: usize, spec: &TensorSpec) -> Vec<u8> {
    let rows: usize = spec.dims[1..].iter().product();
    (0..rows * spec.dtype.row_bytes(spec.dims[0]).unwrap()).map(|n| pattern(i, n)).collect()
}

#[track_caller]
fn check_same(file: &File, metadata: &Metadata, specs: &[TensorSpec]) {
    assert_eq!(file.version(), 3);
    assert_eq!(file.metadata(), metadata);
    assert_eq!(file.tensors().len(), specs.len());
    for (i, (tensor, spec)) in file.tensors().iter().zip(specs).enumerate() {
        assert_eq!(*tensor.name, *spec.name);
        assert_eq!((tensor.dtype, &tensor.dims), (spec.dtype, &spec.dims));
        assert_eq!(*tensor.data, data(i, spec));
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    /// Everything but NaN, which would not be equal to itself.
    fn floats() -> impl Strategy<Value = f32> {
        any::<f32>().prop_filter("NaN", |v| !v.is_nan())
    }
    fn doubles() -> impl Strategy<Value = f64> {
        any::<f64>().prop_filter("NaN", |v| !v.is_nan())
    }
    fn both<T>(items: impl Strategy<Value = T> + Clone + 'static) -> impl Strategy<Value = Value>
    where
        T: std::fmt::Debug + 'static,
        Value: From<T> + From<Vec<T>>,
    {
        let list = prop::collection::vec(items.clone(), 0..20);
        prop_oneof![items.prop_map(Value::from), list.prop_map(Value::from)]
    }
    prop_oneof![
        both(any::<u8>()),
        both(any::<i8>()),
        both(any::<u16>()),
        both(any::<i16>()),
        both(any::<u32>()),
        both(any::<i32>()),
        both(any::<u64>()),
        both(any::<i64>()),
        both(any::<bool>()),
        any::<String>().prop_map(Value::from),
        prop::collection::vec(any::<String>(), 0..20).prop_map(Value::from),
        floats().prop_map(Value::from),
        prop::collection::vec(floats(), 0..20).prop_map(Value::from),
        doubles().prop_map(Value::from),
        prop::collection::vec(doubles(), 0..20).prop_map(Value::from),
    ]
}

fn any_spec() -> impl Strategy<Value = TensorSpec> {
    let dtype = prop::sample::select(&Dtype::ALL[..]);
    (any::<String>(), dtype, 1usize..4, prop::collection::vec(1usize..4, 0..4)).prop_map(
        |(name, dtype, blocks, outer)| {
            let dims = [vec![blocks * dtype.block_len()], outer].concat();
            TensorSpec { name, dtype, dims }
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        entries in prop::collection::btree_map(any::<String>(), any_value(), 0..12),
        alignment in prop::option::of(prop::sample::select(vec![1u32, 8, 32, 64, 4096])),
        specs in prop::collection::vec(any_spec(), 0..8),
    ) {
        let mut metadata = Metadata::new();
        for (key, value) in entries {
            metadata.set(&key, value);
        }
        alignment.map(|alignment| metadata.set("general.alignment", alignment));
        let mut specs = specs;
        // Names that happen to be equal get a suffix, since a file may not have one twice.
        specs.iter_mut().enumerate().for_each(|(i, spec)| spec.name.push_str(&format!(".{i}")));

        let path = directory("property").join("m.gguf");
        write(&path, &metadata, &specs, |i, out| out.write_all(&data(i, &specs[i]))).unwrap();
        check_same(&File::open(&path).unwrap(), &metadata, &specs);
        check_same(&File::from_vec(fs::read(&path).unwrap()).unwrap(), &metadata, &specs);
    }
}

#[test]
fn every_bit_of_a_nan_survives() {
    let path = directory("nan").join("m.gguf");
    let quiet = f32::from_bits(0x7fc0_1234);
    let mut metadata = Metadata::new();
    metadata.set("nan", quiet);
    metadata.set("nans", vec![f64::from_bits(0x7ff8_0000_0000_4321)]);
    write(&path, &metadata, &[], |_, _| Ok(())).unwrap();
    let file = File::open(&path).unwrap();
    assert_eq!(file.metadata().f32("nan").unwrap().to_bits(), quiet.to_bits());
    let Some(Value::Array(Array::F64(nans))) = file.metadata().get("nans") else { panic!("not an array") };
    assert_eq!(nans[0].to_bits(), 0x7ff8_0000_0000_4321);
}

#[test]
fn threads_fill_one_file() {
    let path = directory("threads").join("m.gguf");
    let specs: Vec<TensorSpec> =
        (0..5).map(|i| spec(&format!("blk.{i}.ffn_down.weight"), Dtype::Q6K, &[512, 64 + i])).collect();
    let metadata = Metadata::new();
    let writer = Writer::create(&path, &metadata, &specs).unwrap();
    std::thread::scope(|scope| {
        for (i, spec) in specs.iter().enumerate() {
            let data = data(i, spec);
            let writer = &writer;
            assert_eq!(writer.tensor_bytes(i), data.len() as u64);
            for part in 0..4 {
                let step = data.len() / 4;
                let range = part * step..if part == 3 { data.len() } else { (part + 1) * step };
                let bytes = data[range.clone()].to_vec();
                scope.spawn(move || writer.write_at(i, range.start as u64, &bytes).unwrap());
            }
        }
    });
    let (size, second) = (writer.size(), writer.tensor_offset(1));
    writer.finish().unwrap();
    check_same(&File::open(&path).unwrap(), &metadata, &specs);
    assert_eq!(fs::metadata(&path).unwrap().len(), size);
    let at = usize::try_from(second).unwrap();
    assert_eq!(fs::read(&path).unwrap()[at..at + 8], data(1, &specs[1])[..8]);
}

#[test]
fn only_a_whole_file_appears() {
    let directory = directory("whole");
    let path = directory.join("m.gguf");
    fs::write(&path, "what was there").unwrap();
    let specs = [spec("a", Dtype::F32, &[4])];

    let writer = Writer::create(&path, &Metadata::new(), &specs).unwrap();
    assert_eq!(writer.temporary_path().parent(), Some(directory.as_path()));
    assert!(writer.temporary_path().exists());
    writer.write_at(0, 0, &[1; 8]).unwrap();
    drop(writer);
    assert_eq!(names_in(&directory), ["m.gguf"], "dropped");

    let writer = Writer::create(&path, &Metadata::new(), &specs).unwrap();
    writer.write_at(0, 0, &[1; 8]).unwrap();
    let error = writer.finish().unwrap_err().to_string();
    assert_eq!(error, format!("{}: tensor \"a\" got 8 of its 16 bytes", path.display()));
    assert_eq!(names_in(&directory), ["m.gguf"], "not whole");

    let broken = |_: usize, _: &mut dyn Write| Err(io::Error::other("source failed"));
    let error = write(&path, &Metadata::new(), &specs, broken).unwrap_err().to_string();
    assert_eq!(error, format!("{}: cannot write tensor \"a\": source failed", path.display()));
    let long = |_: usize, out: &mut dyn Write| out.write_all(&[0; 17]);
    let error = write(&path, &Metadata::new(), &specs, long).unwrap_err().to_string();
    let message = "cannot write tensor \"a\": more data than the tensor has room for";
    assert_eq!(error, format!("{}: {message}", path.display()));
    assert_eq!(names_in(&directory), ["m.gguf"], "failed");
    assert_eq!(fs::read(&path).unwrap(), b"what was there");

    write(&path, &Metadata::new(), &specs, |_, out| out.write_all(&[1; 16])).unwrap();
    assert_eq!(names_in(&directory), ["m.gguf"]);
    assert_eq!(*File::open(&path).unwrap().tensor("a").unwrap().data, [1; 16]);
}

#[test]
#[should_panic(expected = "4 bytes at 13 of tensor \"a\", which has 16")]
fn writing_over_the_end_of_a_tensor_panics() {
    let path = directory("over").join("m.gguf");
    let writer = Writer::create(&path, &Metadata::new(), &[spec("a", Dtype::F32, &[4])]).unwrap();
    let _ = writer.write_at(0, 13, &[0; 4]);
}

#[test]
fn a_model_may_replace_the_one_it_is_made_from() {
    let path = directory("in-place").join("m.gguf");
    let specs = [spec("a", Dtype::F32, &[4])];
    write(&path, &Metadata::new(), &specs, |_, out| out.write_all(&[1; 16])).unwrap();
    let old = File::open(&path).unwrap();
    let data = |n: usize| old.tensors()[n].data.iter().map(|byte| byte + 1).collect::<Vec<u8>>();
    write(&path, &Metadata::new(), &specs, |i, out| out.write_all(&data(i))).unwrap();
    assert_eq!(*old.tensors()[0].data, [1; 16]);
    assert_eq!(*File::open(&path).unwrap().tensors()[0].data, [2; 16]);
}

#[test]
fn links_are_followed() {
    let directory = directory("link");
    fs::write(directory.join("target"), "").unwrap();
    std::os::unix::fs::symlink("target", directory.join("link")).unwrap();
    write(&directory.join("link"), &Metadata::new(), &[], |_, _| Ok(())).unwrap();
    assert!(fs::symlink_metadata(directory.join("link")).unwrap().is_symlink());
    File::open(&directory.join("target")).unwrap();
}

#[test]
fn what_cannot_be_written_is_refused() {
    let directory = directory("refused");
    #[track_caller]
    fn check(path: &Path, metadata: &Metadata, specs: &[TensorSpec], message: &str) {
        let before = path.parent().filter(|parent| parent.is_dir()).map(names_in);
        let error = Writer::create(path, metadata, specs).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(path.parent().filter(|parent| parent.is_dir()).map(names_in), before);
    }
    let path = directory.join("m.gguf");
    let none = Metadata::new();
    let mut odd = Metadata::new();
    odd.set("general.alignment", 24u32);

    check(&directory, &none, &[], "a directory, not a model file");
    check(&directory.join("no/m.gguf"), &none, &[], "cannot create: No such file or directory");
    check(Path::new("/dev/null"), &none, &[], "not a regular file");
    check(&path, &odd, &[], "metadata key \"general.alignment\" is 24, not a power of two");
    let a = spec("a", Dtype::F32, &[4]);
    check(&path, &none, &[a.clone(), a], "tensor \"a\" occurs twice");
    check(&path, &none, &[spec("a", Dtype::F32, &[])], "tensor \"a\" has 0 dimensions");
    check(&path, &none, &[spec("a", Dtype::F32, &[4, 0])], "tensor \"a\" has a dimension of zero");
    check(&path, &none, &[spec("a", Dtype::Q4K, &[128])], "tensor \"a\" has rows of 128 elements");
    let huge = 1 << 61;
    check(
        &path,
        &none,
        &[spec("a", Dtype::F32, &[huge]), spec("b", Dtype::F32, &[huge])],
        "more bytes than a file can have",
    );
    // A petabyte: the disk is too full, or the file system has no such files. Either is said at once.
    let error = Writer::create(&path, &none, &[spec("a", Dtype::F32, &[1 << 48])]).unwrap_err().to_string();
    assert!(error.contains("the disk is too full") || error.contains("cannot reserve"), "{error}");
    assert_eq!(names_in(&directory), Vec::<String>::new());
}
