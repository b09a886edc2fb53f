//! `tally perplexity`: the value that another computation gives, the same for any number of threads; divergences that
//! follow from the logits on disk; files that do not fit refused.

mod process;

use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use cpu::{Cpu, Options};
use engine::{Engine, Session, Specials, Tokenizer};
use gguf::{File, TensorSpec};
use model::Model;
use process::{Directory, command, tally};
use serde_json::Value;

const HELDOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/heldout.txt");
const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tally-rust-Q4_K_M.gguf");
/// A text that takes a few windows of [`CTX`] tokens of a vocabulary of bytes.
const TEXT: &str =
    "fn main() { println!(\"Grüße\"); } // the quick brown fox jumps over the lazy dog, twice\n";
const CTX: &str = "32";

/// Runs with `args` and parses what it prints.
#[track_caller]
fn perplexity(args: &[&str]) -> Value {
    tally(["perplexity", "--json"].iter().chain(args)).json()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// A model of random weights and a text, with what the tests do to them.
struct Case {
    directory: Directory,
    model: String,
    text: String,
}

impl Case {
    fn new() -> Case {
        let directory = Directory::new();
        let model = directory.synth("model.gguf", "tiny-moe", &["--layers", "2"]);
        let text = directory.file("text.txt");
        fs::write(&text, TEXT).expect("writable");
        Case { directory, model, text }
    }

    #[track_caller]
    fn run(&self, args: &[&str]) -> Value {
        perplexity(&[&[&self.model, &self.text, "--ctx", CTX], args].concat())
    }

    /// Writes logits under `name`.
    #[track_caller]
    fn save(&self, name: &str, args: &[&str]) -> String {
        let path = self.directory.file(name);
        self.run(&[&["--save-logits", &path], args].concat());
        path
    }

    fn fails(&self, args: &[&str], code: i32, message: &str) {
        let head = ["perplexity", &self.model, &self.text, "--ctx", CTX];
        tally(head.iter().chain(args)).fails(code, message);
    }
}

/// The negative log-probabilities of the second half of `count` windows, by decoding token after token.
fn by_decoding(count: usize, ctx: usize) -> Vec<f64> {
    let file = File::open(Path::new(SHIPPED)).expect("it ships");
    let tokenizer = Tokenizer::from_metadata(file.metadata()).expect("it has one");
    let model = Arc::new(Model::load(&file).expect("it is whole"));
    let text = fs::read_to_string(HELDOUT).expect("it ships");
    let ids = tokenizer.encode(&text, Specials::AsText).expect("text");
    let mut engine = Engine::new(Cpu::new(model, &Options::for_context(ctx)).expect("it fits"));
    let mut session = Session::default();
    let mut nll = Vec::new();
    for window in ids.chunks_exact(ctx).take(count) {
        engine.truncate(&mut session, 0);
        for (i, pair) in window.windows(2).enumerate() {
            let flow =
                engine.feed(&mut session, &pair[..1], |_| ControlFlow::Continue(())).expect("it computes");
            assert!(flow.is_continue());
            if i >= ctx / 2 {
                let logits = engine.logits().expect("just computed");
                // No maximum is taken out: logits of a trained model are far from where `exp` overflows.
                let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
                nll.push(sum.ln() - f64::from(logits[pair[1] as usize]));
            }
        }
    }
    nll
}

#[test]
fn as_another_computation_has_it() {
    let nll = by_decoding(2, 64);
    let n = nll.len() as f64;
    let mean = nll.iter().sum::<f64>() / n;
    let variance = nll.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let mut seen = Vec::new();
    for threads in ["1", "2", "7"] {
        let mut report =
            perplexity(&["shipped", HELDOUT, "--ctx", "64", "--chunks", "2", "--threads", threads]);
        let near = |found: &Value, want: f64| {
            assert!((number(found) - want).abs() <= 1e-9 * want, "{found} is not {want}");
        };
        assert_eq!((&report["windows"], &report["tokens_scored"]), (&2.into(), &nll.len().into()));
        near(&report["nll"]["mean"], mean);
        near(&report["nll"]["stderr"], (variance / n).sqrt());
        near(&report["perplexity"]["mean"], mean.exp());
        near(&report["perplexity"]["stderr"], mean.exp() * (variance / n).sqrt());
        report["seconds"].take();
        seen.push(report);
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "the number of threads shows: {seen:?}");
    // It was trained: text that it never saw is far from 4096 equally likely tokens.
    assert!((2.0..100.0).contains(&mean.exp()), "{mean}");
}

#[test]
fn nothing_between_a_run_and_its_own_logits() {
    let case = Case::new();
    let path = case.save("logits", &[]);
    let report = case.run(&["--against", &path]);
    let against = &report["against"];
    for key in ["mean", "stderr", "median", "p90", "p99", "max"] {
        assert_eq!(against["kl_divergence"][key], 0.0, "{key}: F32 keeps every bit of a logit");
    }
    assert_eq!((&against["same_top"], &against["logprob_change"]["mean"]), (&1.0.into(), &0.0.into()));
    assert_eq!(against["perplexity"], report["perplexity"]);
    let names = ["logits", "model.gguf", "text.txt"];
    assert_eq!(case.directory.names(), names, "something is left behind");
}

/// Divergence from `p` to `q` of each row, whether the tops are the same, computed as plainly as can be.
fn divergences(p: &str, q: &str) -> Vec<(f64, bool)> {
    let [p, q] = [p, q].map(|path| File::open(Path::new(path)).expect("just written"));
    let [p, q] = [&p, &q].map(|file| file.tensor("logits").expect("the tensor"));
    let (vocab, rows) = (p.row_len(), p.rows());
    let row = |tensor: &gguf::Tensor, i: usize| -> Vec<f64> {
        let bytes = &tensor.data[i * vocab * 4..][..vocab * 4];
        let logits: Vec<_> =
            bytes.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().expect("four")))).collect();
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        logits.into_iter().map(|logit| logit.exp() / sum).collect()
    };
    let top = |p: &[f64]| (0..vocab).max_by(|&a, &b| p[a].total_cmp(&p[b]).then(b.cmp(&a)));
    let compare = |i| {
        let (p, q) = (row(p, i), row(q, i));
        let divergence = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        (divergence, top(&p) == top(&q))
    };
    (0..rows).map(compare).collect()
}

#[test]
fn divergence_follows_from_the_logits() {
    let case = Case::new();
    let [exact, coarse] = ["a16", "a8"].map(|kind| case.save(kind, &["--activations", kind]));
    let report = case.run(&["--activations", "a8", "--against", &exact]);
    let rows = divergences(&exact, &coarse);
    let n = rows.len() as f64;
    assert_eq!(report["tokens_scored"], rows.len());
    let mut sorted: Vec<_> = rows.iter().map(|row| row.0).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let against = &report["against"];
    let near = |key: &str, want: f64| {
        let found = number(&against["kl_divergence"][key]);
        assert!((found - want).abs() < 1e-14, "{key}: {found} is not {want}");
    };
    let mean = sorted.iter().sum::<f64>() / n;
    // Eight bits show, as two unequal arithmetics must: the bound is far above rounding.
    assert!(mean > 1e-8, "{mean}");
    near("mean", mean);
    near("max", sorted[sorted.len() - 1]);
    let middle = sorted.len() / 2;
    near(
        "median",
        if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 },
    );
    assert_eq!(against["same_top"], rows.iter().filter(|row| row.1).count() as f64 / n);
    let change = number(&report["against"]["perplexity"]["mean"]).ln() - number(&report["nll"]["mean"]);
    assert!((number(&against["logprob_change"]["mean"]) - change).abs() < 1e-12, "{against}");
    assert!(
        against["source"].as_str().is_some_and(|source| source.ends_with("model.gguf, a16")),
        "{against}"
    );
}

#[test]
fn fewer_windows_than_were_saved() {
    let case = Case::new();
    let path = case.save("logits", &[]);
    let report = case.run(&["--chunks", "1", "--against", &path]);
    assert_eq!((&report["windows"], &report["against"]["kl_divergence"]["max"]), (&1.into(), &0.0.into()));
    let fewer = case.save("fewer", &["--chunks", "1"]);
    case.fails(&["--against", &fewer], 1, "one window of this text");
}

#[test]
fn logits_that_do_not_fit() {
    let case = Case::new();
    let path = case.save("logits", &[]);
    let check = |model: &str, text: &str, ctx: &str, message: &str| {
        tally(["perplexity", model, text, "--ctx", ctx, "--against", &path]).fails(1, message);
    };
    let other = case.directory.file("other.txt");
    fs::write(&other, TEXT.replace("quick", "quack")).expect("writable");
    check(&case.model, &other, CTX, "another text or vocabulary: token ");
    check(&case.model, &case.text, "31", "windows of 32 tokens, not of 31");
    // The same ids, for bytes come first in both.
    let larger = case.directory.synth("larger.gguf", "tiny-moe", &["--layers", "1", "--vocab", "1025"]);
    check(&larger, &case.text, CTX, "vocabulary of 1024, not of 1025");

    case.fails(&["--against", &case.model], 1, "architecture `qwen3moe`, not logits");
    case.fails(&["--against", &case.text], 1, "GGUF");
    case.fails(&["--against", "nowhere"], 1, "nowhere");
    let whole = fs::read(&path).expect("written");
    for left in [0, 20, whole.len() / 2, whole.len() - 1] {
        let cut = case.directory.file("cut");
        fs::write(&cut, &whole[..left]).expect("writable");
        case.fails(&["--against", &cut], 1, "cut: ");
    }
    tally(["run", &path, "-p", "x"]).fails(1, "architecture `logits` is not supported");
}

#[test]
fn nothing_half_written() {
    let case = Case::new();
    let out = case.directory.file("logits");
    let names = case.directory.names();
    let script = format!(
        "ulimit -f 64 && exec '{}' perplexity '{}' '{}' --device cpu --ctx {CTX} --save-logits '{out}'",
        env!("CARGO_BIN_EXE_tally"),
        case.model,
        case.text
    );
    let outcome = std::process::Command::new("sh").args(["-c", &script]).output().expect("there is a shell");
    process::Outcome::from(outcome).fails(1, "File too large");
    case.fails(&["--save-logits", &case.directory.file("")], 1, "directory");
    case.fails(&["--save-logits", "/dev/null"], 1, "regular");
    assert_eq!(case.directory.names(), names);

    // Refused before anything is written, with what was there left alone.
    fs::write(&out, "kept").expect("writable");
    case.fails(&["--save-logits", &out, "--against", "nowhere"], 1, "nowhere");
    assert_eq!(fs::read(&out).expect("still there"), b"kept");
}

#[test]
fn bad_text() {
    let case = Case::new();
    let check = |content: &[u8], message: &str| {
        fs::write(&case.text, content).expect("writable");
        case.fails(&[], 1, message);
    };
    check(b"", "0 tokens, less than one window of 32");
    check(b"x", "1 token, less than one window of 32");
    check(b"abcdefgh", "less than one window of 32");
    check(b"ab\xFF", "not UTF-8: byte 2 ");
    let directory = case.directory.file("");
    tally(["perplexity", &case.model, &directory]).fails(1, "a directory, not a text");
    tally(["perplexity", &case.model, "nowhere.txt"]).hinted().fails(1, "nowhere.txt: cannot read the text");
    tally(["perplexity", "nowhere.gguf", HELDOUT]).fails(1, "nowhere.gguf");
    case.fails(&["--chunks", "0"], 2, "'--chunks <N>'");
    tally(["perplexity", &case.model, HELDOUT, "--ctx", "3"]).fails(2, "'--ctx <N>'");
    tally(["perplexity", &case.model, HELDOUT, "--ctx", "8193"]).fails(1, "made for at most 8192 positions");
}

#[test]
fn text_from_standard_input() {
    let case = Case::new();
    let from_file = case.run(&[]);
    let args = ["perplexity", &case.model, "-", "--ctx", CTX, "--json"];
    let piped = process::tally_with(args, TEXT.as_bytes()).json();
    assert_eq!(piped["perplexity"], from_file["perplexity"]);
}

#[test]
fn a_model_that_computes_no_numbers() {
    let case = Case::new();
    let file = File::open(Path::new(&case.model)).expect("written");
    let specs: Vec<_> = file
        .tensors()
        .iter()
        .map(|t| TensorSpec { name: t.name.to_string(), dtype: t.dtype, dims: t.dims.clone() })
        .collect();
    let broken = case.directory.file("broken.gguf");
    let fill = |i: usize, out: &mut dyn Write| {
        let mut bytes = file.tensors()[i].data.to_vec();
        if &*file.tensors()[i].name == "output_norm.weight" {
            bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        out.write_all(&bytes)
    };
    gguf::write(Path::new(&broken), file.metadata(), &specs, fill).expect("writable");
    let names = case.directory.names();
    let out = case.directory.file("logits");
    let args = ["perplexity", &broken, &case.text, "--ctx", CTX, "--save-logits", &out];
    tally(args).fails(3, "window 0, position 16: the model computed no numbers");
    assert_eq!(case.directory.names(), names);
}

#[test]
fn a_closed_pipe() {
    let case = Case::new();
    for format in [&[][..], &["--json"]] {
        let (reader, writer) = std::io::pipe().expect("pipes");
        drop(reader);
        let args = [&["perplexity", &case.model, &case.text, "--ctx", CTX], format].concat();
        let output =
            command().args(process::on_the_cpu(args)).stdout(writer).output().expect("the binary runs");
        process::Outcome::from(output).fails(141, "standard output was closed");
    }
}
