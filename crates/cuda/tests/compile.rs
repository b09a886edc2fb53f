//! Kernels as the compiler sees them: every unit for every architecture, what a broken one says, and the cache.
//!
//! Needs NVRTC but no GPU. Where the library is not installed these tests say so and do nothing; with `CI_NEEDS_NVRTC`
//! set they fail instead.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use cuda::{Compiler, Error, KernelFiles, Unit, exp_unit, nvrtc_version, units};
use gguf::Dtype;
use model::{Config, Ffn, Model, Moe, Spec};
use quant::fixed::Activations;
use synth::Shape;

/// Compute capabilities, times ten: what the README promises.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// Whether NVRTC is there.
fn installed() -> bool {
    let found = nvrtc_version();
    if let Err(error) = &found {
        assert!(env::var_os("CI_NEEDS_NVRTC").is_none(), "CI compiles every kernel, but: {error}");
        println!("did not run: {error}");
    }
    found.is_ok()
}

/// A model of these dimensions; matrices get the types in turn.
fn model(name: &str, change: impl Fn(&mut Config), types: &[Dtype]) -> Model {
    let mut shape = Shape::named(name).expect("a named shape");
    change(&mut shape.config);
    let next = AtomicUsize::new(0);
    let turn = |spec: &Spec| match spec.dims.len() {
        1 => Dtype::F32,
        // A router of floats, as converters write it.
        _ if spec.name.contains("gate_inp") => Dtype::F32,
        _ => types[next.fetch_add(1, Ordering::Relaxed) % types.len()],
    };
    synth::model(&shape, 1, turn)
}

/// A mixture of experts that has every type.
fn every_type() -> Model {
    let ffn = Ffn::Moe(Moe { experts: 6, used: 2, width: 256, renormalise: true, scale: 1.0 });
    model("tiny-moe", |c| (c.layers, c.vocab, c.ffn) = (2, 1003, ffn), &Dtype::ALL)
}

/// A dense model whose rows are no multiple of 256.
fn dense() -> Model {
    let small = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::F16, Dtype::BF16];
    let change = |c: &mut Config| {
        (c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.vocab) = (2, 160, 3, 3, 32, 300);
        c.ffn = Ffn::Dense { width: 192 };
    };
    model("tiny-dense", change, &small)
}

/// The units of the 30B-A3B model of the Q4_K_M mix: its constants on the tensors of a small one, for a compiler sees
/// constants only.
fn full_size() -> Vec<Unit> {
    let ffn = Ffn::Moe(Moe { experts: 2, used: 1, width: 256, renormalise: true, scale: 1.0 });
    let change = |c: &mut Config| (c.layers, c.vocab, c.ffn) = (1, 256, ffn);
    let mut model = model("tiny-moe", change, &[Dtype::Q4K, Dtype::Q6K]);
    model.config = Shape::named("qwen3-30b-a3b").expect("a named shape").config;
    units(&model, Activations::A16)
}

/// Compiles all of `work` on all cores; the longest first would be best, but nobody knows which that is.
fn compile(work: &[(u32, Unit)]) {
    let (next, start) = (AtomicUsize::new(0), Instant::now());
    let compile = || {
        let mut slowest = (Duration::ZERO, String::new());
        while let Some((arch, unit)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let begun = Instant::now();
            let image = Compiler::new(*arch, &KernelFiles::default()).and_then(|c| c.image(unit));
            let image = image.unwrap_or_else(|error| panic!("{error}"));
            assert!(image.starts_with(b"\x7fELF"), "{} for sm_{arch} is no cubin", unit.name);
            slowest = slowest.max((begun.elapsed(), format!("{} for sm_{arch}", unit.name)));
        }
        slowest
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let slowest = thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(compile)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).max()
    });
    let (time, name) = slowest.unwrap_or_default();
    println!("{} compilations in {:.1?}; the slowest, {name}: {time:.1?}", work.len(), start.elapsed());
}

#[test]
fn every_unit_compiles_for_every_architecture() {
    if !installed() {
        return;
    }
    // Together they have every type, both widths of activations, both kinds of network and both lengths of blocks;
    // what depends on the architecture depends on no more than these.
    let for_all = |units: &[Unit]| -> Vec<(u32, Unit)> {
        ARCHITECTURES.iter().flat_map(|&arch| units.iter().map(move |u| (arch, u.clone()))).collect()
    };
    let mut work = for_all(&units(&every_type(), Activations::A16));
    work.extend(for_all(&[exp_unit()]));
    work.extend(units(&dense(), Activations::A8).into_iter().map(|u| (80, u)));
    work.extend(full_size().into_iter().map(|u| (90, u)));
    compile(&work);
}

/// The smallest unit, for what is not about kernels.
fn small_unit() -> Unit {
    units(&dense(), Activations::A16)
        .into_iter()
        .find(|u| u.name == "repack.cu")
        .expect("a unit of every model")
}

#[test]
fn an_error_names_unit_and_place() {
    if !installed() {
        return;
    }
    let mut unit = small_unit();
    // As if a constant were missing from the source: the first file that names it says so.
    unit.defines.retain(|(name, _)| name != "TYPES");
    let error = Compiler::new(80, &KernelFiles::default())
        .and_then(|c| c.image(&unit))
        .expect_err("TYPES is not defined");
    assert!(matches!(&error, Error::Compile { unit, arch: 80, .. } if unit == "repack.cu"), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("repack.cu") && text.contains("TYPES") && text.contains("prelude.cuh("), "{text}");

    unit.defines = vec![("TYPES".into(), "0u".into())];
    let error =
        Compiler::new(1, &KernelFiles::default()).and_then(|c| c.image(&unit)).expect_err("there is no sm_1");
    assert!(matches!(error, Error::Compile { arch: 1, .. }), "{error:?}");
}

/// A folder of this test's own, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = env::temp_dir().join(format!("tally-cuda-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Folder(path)
    }

    /// The only entry.
    fn entry(&self) -> PathBuf {
        let entries: Vec<_> = fs::read_dir(&self.0).expect("the cache's folder").flatten().collect();
        assert_eq!(entries.len(), 1, "{entries:?}");
        entries[0].path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn compiler(cache: &Path) -> Compiler {
    Compiler::new(90, &KernelFiles::cached(cache.into())).expect("NVRTC is installed")
}

#[test]
fn the_cache_is_checked_before_it_is_believed() {
    if !installed() {
        return;
    }
    let folder = Folder::new("cache");
    let (compiler, unit) = (compiler(&folder.0.join("made/when/needed")), small_unit());
    let inner = Folder(folder.0.join("made/when/needed"));
    assert!(!compiler.is_cached(&unit));
    let image = compiler.image(&unit).expect("it compiles");
    assert!(compiler.is_cached(&unit));
    let good = fs::read(inner.entry()).expect("the entry");
    assert!(good.ends_with(&image) && good.len() > image.len());

    // A hit is what the entry has: another image with its own right hash is handed out unseen.
    let other = b"\x7fELF, but not what was compiled";
    fs::write(inner.entry(), entry_of(other)).expect("the entry can be written");
    assert_eq!(compiler.image(&unit).expect("a hit"), other);

    let flip = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    for (what, bytes) in [
        ("an image with a flipped bit", flip(good.len() / 2)),
        ("a hash with a flipped bit", flip(3)),
        ("an entry cut short", good[..good.len() - 1].to_vec()),
        ("an entry of half a hash", good[..16].to_vec()),
        ("an entry of a hash alone", entry_of(b"")),
        ("an empty entry", vec![]),
        ("a foreign file", b"not an entry, but longer than a hash of thirty-two bytes".to_vec()),
    ] {
        fs::write(inner.entry(), bytes).expect("the entry can be written");
        assert!(!compiler.is_cached(&unit), "{what}");
        assert!(compiler.image(&unit).expect(what) == image, "{what}: what was handed out is not the unit");
        assert!(fs::read(inner.entry()).expect("the entry") == good, "{what}: the entry was not mended");
    }
}

/// An entry as the cache writes it: SHA-256 of the image, then the image.
fn entry_of(image: &[u8]) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    [Sha256::digest(image).as_slice(), image].concat()
}

#[test]
fn an_entry_is_for_one_unit_architecture_and_constant() {
    if !installed() {
        return;
    }
    let folder = Folder::new("keys");
    let unit = small_unit();
    compiler(&folder.0).image(&unit).expect("it compiles");
    assert!(compiler(&folder.0).is_cached(&unit));
    let other_arch = Compiler::new(80, &KernelFiles::cached(folder.0.clone())).expect("NVRTC is installed");
    assert!(!other_arch.is_cached(&unit));
    let changed = |change: fn(&mut Unit)| {
        let mut unit = unit.clone();
        change(&mut unit);
        unit
    };
    for (what, unit) in [
        ("another constant", changed(|u| u.defines[0].1.push('1'))),
        ("a constant less", changed(|u| drop(u.defines.pop()))),
        ("another file", changed(|u| u.name = "embed.cu")),
        // The same text in a row, cut elsewhere.
        (
            "a shifted cut",
            changed(|u| u.defines[0] = (format!("{}=", u.defines[0].0), u.defines[0].1.clone())),
        ),
    ] {
        assert!(!compiler(&folder.0).is_cached(&unit), "{what}");
    }
}

/// A folder that cannot be written costs the next start its time, and nothing else.
#[test]
fn a_cache_that_cannot_be_written_is_no_error() {
    if !installed() {
        return;
    }
    let folder = Folder::new("blocked");
    fs::write(&folder.0, b"a file where the folder should be").expect("a file in the temporary folder");
    let compiler = compiler(&folder.0);
    assert!(compiler.image(&small_unit()).is_ok());
    assert!(!compiler.is_cached(&small_unit()));
    fs::remove_file(&folder.0).expect("the file is there");
}
