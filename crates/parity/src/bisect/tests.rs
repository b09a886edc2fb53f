use std::path::PathBuf;
use std::sync::Arc;

use cpu::Cpu;
use model::{Backend, Buffer, Hook, Hooked, Stage, forward};
use oracle::Oracle;
use quant::fixed::Activations;

use super::*;
use crate::dump::{self, Arithmetic, Dump, Origin};
use crate::faults;
use crate::player::Player;
use crate::testing;
use crate::trace::{Filter, Trace};

const IDS: [u32; 7] = [3, 1, 4, 1, 5, 9, 2];

fn oracle(model: &Arc<Model>) -> Oracle {
    Oracle::new(model.clone(), 96, 8)
}

fn side<'a>(name: &str, arithmetic: Arithmetic, backend: &'a mut dyn Backend) -> Side<'a> {
    Side { name: name.into(), arithmetic, engine: Engine::Live(backend) }
}

fn tally(activations: Activations) -> Arithmetic {
    Arithmetic::Tally { activations: activations.name().into() }
}

fn float(precision: &str) -> Arithmetic {
    Arithmetic::Float { precision: precision.into() }
}

/// A directory that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("tally-parity-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left behind in a temporary directory does no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn trace(
    folder: &Folder,
    model: &Arc<Model>,
    backend: &mut dyn Backend,
    arithmetic: Arithmetic,
    filter: Filter,
) {
    let mut traced = Trace::watch(backend, filter, true);
    let step = Step::prefill(&IDS, 0, vec![0]);
    forward(&mut traced, &step).expect("it computes");
    let origin = Origin {
        producer: "test".into(),
        model: "random".into(),
        fingerprint: Some(fingerprint(model)),
        arithmetic,
        device: "cpu".into(),
        facts: serde_json::Value::Null,
        kernel_hash: None,
    };
    dump::write(&folder.0, &Trace::of(traced), origin, &IDS).expect("there is room");
}

/// Does not show the inside of stages.
struct Blind;

impl Hook for Blind {
    fn observe(&self, _: bool) -> bool {
        false
    }
}

/// The bounds hold with room to spare on clean runs, and a fault is far beyond them.
#[test]
fn against_the_oracle() {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tally-rust-Q4_K_M.gguf");
    let shipped = Model::load(&gguf::File::open(shipped.as_ref()).expect("it ships")).expect("a model");
    let (moe, dense, shipped) = (testing::model(false, 3), testing::model(true, 3), Arc::new(shipped));
    let cases = [
        (&moe, Activations::A16),
        (&dense, Activations::A16),
        (&shipped, Activations::A16),
        (&moe, Activations::A8),
    ];
    for (model, activations) in cases {
        let model = model.clone();
        let options = cpu::Options {
            threads: 1,
            activations,
            max_rows: 96,
            kv_blocks: 8,
            ..cpu::Options::for_context(256)
        };
        let mut cpu = Cpu::new(model.clone(), &options).expect("one thread");
        let mut oracle = oracle(&model);
        let mut sides =
            [side("oracle", float("f64"), &mut oracle), side("cpu", tally(activations), &mut cpu)];
        let found = bisect(&model, &mut sides, &IDS, &Options::default()).expect("it runs").report;
        assert_eq!((found.outcome, &found.finding), (Outcome::Agree, &None), "{}", found.verdict);
        let cells = found.runs.iter().filter(|run| run.forced).flat_map(|run| &run.cells);
        for cell in cells {
            let bound = cell.bound.expect("different rules");
            // A choice of experts is no error by size.
            if cell.near_ties.is_empty() && cell.place.buffer != Buffer::Experts {
                assert!(bound.error <= bound.limit / 2.0, "{}: {bound:?} ({activations:?})", cell.place);
            }
        }
        assert!(found.judge.contains("different rules"));
        // Nothing can be forced where nothing is looked at.
        assert_eq!(found.skipped.iter().map(|s| s.scenario).collect::<Vec<_>>(), [Scenario::Unobserved]);
    }
    let story = faults::all()[0];
    let host = synth::model(&synth::Shape { config: story.host.config(), tied: false }, 7, |spec| {
        story.host.dtype(spec)
    });
    let build =
        |model: Arc<Model>| -> Result<Box<dyn Backend>, String> { Ok(Box::new(testing::cpu(&model))) };
    let host = Arc::new(host);
    let mut faulty = story.plant(&host, &build).expect("it builds");
    let mut oracle = oracle(&host);
    let mut sides =
        [side("oracle", float("f64"), &mut oracle), side("faulty", tally(Activations::A16), &mut faulty)];
    let found = bisect(&host, &mut sides, &IDS, &Options::default()).expect("it runs").report;
    assert!(story.expected.missed(&found).is_empty(), "{}", found.verdict);
}

#[test]
fn a_dump_stands_in_for_a_side() {
    let model = testing::model(false, 4);
    let folder = Folder::new("dump");
    trace(&folder, &model, &mut testing::cpu(&model), tally(Activations::A16), Filter::default());
    let open = || Dump::open(&folder.0).expect("just written");
    open().check(&model, &IDS).expect("of this model and prompt");
    // On either side, and of itself.
    for (dump_left, dump_right) in [(true, false), (false, true), (true, true)] {
        let (mut left, mut right) = (testing::cpu(&model), testing::cpu(&model));
        let (mut a, mut b) = (Player::new(open()), Player::new(open()));
        let played = |player| Side {
            name: "dump".into(),
            arithmetic: tally(Activations::A16),
            engine: Engine::Dump(player),
        };
        let mut sides = [
            if dump_left { played(&mut a) } else { side("cpu", tally(Activations::A16), &mut left) },
            if dump_right { played(&mut b) } else { side("cpu", tally(Activations::A16), &mut right) },
        ];
        let found = bisect(&model, &mut sides, &IDS, &Options::default()).expect("it runs").report;
        assert_eq!(found.outcome, Outcome::Agree, "{}", found.verdict);
        assert!(
            found.runs[0].cells.iter().all(|cell| cell.status == Status::Match && cell.figures.total > 0)
        );
    }
    // A fault on the side that runs.
    let story = faults::all().into_iter().find(|f| f.name == "unscaled-attention").expect("in the list");
    let build =
        |model: Arc<Model>| -> Result<Box<dyn Backend>, String> { Ok(Box::new(testing::cpu(&model))) };
    let mut faulty = story.plant(&model, &build).expect("it builds");
    let mut player = Player::new(open());
    let left =
        Side { name: "dump".into(), arithmetic: tally(Activations::A16), engine: Engine::Dump(&mut player) };
    let mut sides = [left, side("faulty", tally(Activations::A16), &mut faulty)];
    let found = bisect(&model, &mut sides, &IDS, &Options::default()).expect("it runs").report;
    assert!(story.expected.missed(&found).is_empty(), "{}", found.verdict);
    let notes = &found.finding.expect("planted").location.expect("a buffer differs").notes;
    assert!(notes.iter().any(|note| note.contains("cannot be probed")), "{notes:?}");
}

/// Of what was not kept nothing is said, and an error that comes from it is inherited.
#[test]
fn a_dump_of_some_stages() {
    let model = testing::model(false, 4);
    let folder = Folder::new("part");
    let filter = Filter { stages: Some([Stage::ExpertsDown].into()), ..Filter::default() };
    trace(&folder, &model, &mut testing::cpu(&model), tally(Activations::A16), filter);
    let fault = faults::all().into_iter().find(|f| f.name == "unscaled-attention").expect("in the list");
    let build =
        |model: Arc<Model>| -> Result<Box<dyn Backend>, String> { Ok(Box::new(testing::cpu(&model))) };
    let mut faulty = fault.plant(&model, &build).expect("it builds");
    let mut player = Player::new(Dump::open(&folder.0).expect("just written"));
    let left =
        Side { name: "dump".into(), arithmetic: tally(Activations::A16), engine: Engine::Dump(&mut player) };
    let mut sides = [left, side("faulty", tally(Activations::A16), &mut faulty)];
    let found = bisect(&model, &mut sides, &IDS, &Options::default()).expect("it runs").report;
    let finding = found.finding.as_ref().expect("planted");
    // The first place that was kept after the fault in layer 2's attention.
    assert_eq!(finding.place.site, Site { stage: Stage::ExpertsDown, layer: Some(2) }, "{}", found.verdict);
    assert!(found.reading.iter().any(|line| line.contains("were not compared")), "{:?}", found.reading);
}

#[test]
fn nothing_compared_is_an_error() {
    let model = testing::model(false, 2);
    let (mut left, mut right) = (testing::cpu(&model), testing::cpu(&model));
    let mut sides = [Side::live("left", "a16", &mut left), Side::live("right", "a16", &mut right)];
    let options = Options { scenarios: vec![Scenario::Decode], ..Options::default() };
    let error = bisect(&model, &mut sides, &[1], &options).expect_err("one token cannot be decoded");
    assert!(error.to_string().contains("nothing was compared: a single token"), "{error}");
    let options = Options { scenarios: Vec::new(), ..Options::default() };
    assert!(matches!(bisect(&model, &mut sides, &IDS, &options), Err(BisectError::Nothing { .. })));
}

/// What is wrong with a dump is said with its place.
#[test]
fn bad_dumps() {
    let model = testing::model(false, 2);
    let folder = Folder::new("bad");
    let write =
        || trace(&folder, &model, &mut testing::cpu(&model), tally(Activations::A16), Filter::default());
    write();
    let dump = Dump::open(&folder.0).expect("just written");
    let other = Arc::new(synth::model(&testing::shape(false, 2), 8, testing::mix));
    let check = |error: Result<(), String>, want: &str| {
        let error = error.expect_err(want);
        assert!(error.contains(want), "{error:?} should say {want:?}");
    };
    let text = |r: Result<(), crate::DumpError>| r.map_err(|e| e.to_string());
    check(text(dump.check(&other, &IDS)), "a trace of another model: sampled-sha256:");
    check(text(dump.check(&model, &IDS[..6])), "at 6 it has token 2, where no token is run");
    check(text(dump.check(&model, &[3, 1, 4, 2, 5, 9, 2])), "at 3 it has token 1, where token 2 is run");

    let manifest = folder.0.join(dump::MANIFEST);
    let tensors = folder.0.join("step-0000.safetensors");
    let original = std::fs::read_to_string(&manifest).expect("just written");
    let edited = |from: &str, to: &str| {
        // The type map, which stands before the entries, names layers too.
        let at = if from.contains("layer") { original.rfind(from) } else { original.find(from) };
        let (before, after) = original.split_at(at.expect(from));
        std::fs::write(&manifest, [before, to, &after[from.len()..]].concat()).expect("there is room");
        text(Dump::open(&folder.0).and_then(|dump| {
            dump.check(&model, &IDS)?;
            dump.read_step(0).map(|_| ())
        }))
    };
    check(edited("tally-trace", "other"), "`format` is not \"tally-trace\"");
    check(edited("\"version\": 1", "\"version\": 2"), "version 2, where 1 is known");
    check(edited("\"stage\": \"qkv\"", "\"stage\": \"kqv\""), "unknown stage `kqv`");
    check(edited("\"buffer\": \"q\"", "\"buffer\": \"hidden\""), "no such place in a forward");
    check(edited("step-0000.safetensors", "../step-0000.safetensors"), "is not the name of a file beside it");
    check(edited("\"layer\": 1", "\"layer\": 7"), "the model has 2 layers");
    check(edited("\"sha256\": \"", "\"sha256\": \"0"), "its SHA-256 is not the manifest's");
    check(edited("\"step\": 0", "\"step\": 3"), "there are 1 steps");
    check(edited("{", "["), "manifest.json: ");
    check(edited("512\n", "256\n"), "shape [7, 256], where the model has [7, 512]");

    // Cut short, with and without its hash.
    std::fs::write(&manifest, &original).expect("there is room");
    let whole = std::fs::read(&tensors).expect("just written");
    std::fs::write(&tensors, &whole[..whole.len() / 2]).expect("there is room");
    check(text(dump.read_step(0).map(|_| ())), "its SHA-256 is not the manifest's");
    let mut unsigned = dump.clone();
    unsigned.manifest.steps[0].sha256 = None;
    check(text(unsigned.read_step(0).map(|_| ())), "step-0000.safetensors: ");
    // A stage too few, and one too many.
    std::fs::write(&tensors, &whole).expect("there is room");
    let first = unsigned.manifest.entries.remove(0);
    check(text(unsigned.read_step(0).map(|_| ())), "the tensor `embed.x` is not in the manifest");
    unsigned.manifest.entries.insert(0, first);
    unsigned.manifest.entries[0].place.buffer = Buffer::Q;
    check(text(unsigned.read_step(0).map(|_| ())), "there is no tensor `embed.q`");
    std::fs::remove_file(&tensors).expect("it is there");
    check(text(dump.read_step(0).map(|_| ())), "step-0000.safetensors: ");
    // Not a place to write into.
    std::fs::write(folder.0.join("thesis.tex"), "").expect("there is room");
    let origin = dump.manifest.origin.clone();
    let refused =
        dump::write(&folder.0, &crate::Trace::default(), origin, &IDS).expect_err("something else is there");
    assert!(refused.to_string().contains("more than a trace is in it"), "{refused}");
}

/// Where the inside of the experts cannot be seen, probes still tell which expert and which weights.
#[test]
fn without_the_inside() {
    let check = |name: &str, tensors: &[&str], expert: Option<usize>, row: Option<usize>| {
        let fault = faults::all().into_iter().find(|f| f.name == name).expect("in the list");
        let shape = synth::Shape { config: fault.host.config(), tied: false };
        let model = Arc::new(fault.model(&synth::model(&shape, 7, |spec| fault.host.dtype(spec))));
        let build =
            |model: Arc<Model>| -> Result<Box<dyn Backend>, String> { Ok(Box::new(testing::cpu(&model))) };
        let (left, right) = (testing::cpu(&model), fault.plant(&model, &build).expect("it builds"));
        let mut left = Hooked::with(left, Box::new(Blind));
        let mut right = Hooked::with(right, Box::new(Blind));
        let mut sides = [Side::live("left", "a16", &mut left), Side::live("right", "a16", &mut right)];
        let found =
            bisect(&model, &mut sides, &fault.host.prompt(), &Options::default()).expect("it runs").report;
        let finding = found.finding.as_ref().expect("planted");
        assert_eq!(
            (finding.place.site.stage, &finding.class),
            (fault.expected.stage, &Class::Local),
            "{name}"
        );
        let location = finding.location.as_ref().expect("it is local");
        let named: Vec<&str> = location.tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(named, tensors, "{name}: {location:?}");
        if let Some(first) = location.tensors.first() {
            assert!(expert.is_none_or(|e| first.experts == [e]), "{name}: {:?}", first.experts);
            assert!(row.is_none() || first.row == row, "{name}: {:?}", first.row);
            assert!(first.block.is_some(), "{name}: {location:?}");
        }
    };
    check("one-kernel-for-all-types", &["blk.2.ffn_down_exps.weight"], None, None);
    // The two projections cannot be told apart by what SwiGLU makes of them.
    let both = ["blk.2.ffn_gate_exps.weight", "blk.2.ffn_up_exps.weight"];
    check("tail-beyond-the-tensor", &both, Some(5), Some(255));
    check("combined-in-another-order", &[], None, None);
}
