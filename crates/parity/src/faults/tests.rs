use std::collections::{BTreeMap, BTreeSet};

use cpu::{Cpu, Isa, Options as CpuOptions};
use gguf::Tensor;
use model::Site;
use synth::Shape;

use super::*;

fn host(host: Host) -> Model {
    synth::model(&Shape { config: host.config(), tied: false }, 7, |spec| host.dtype(spec))
}

fn build(model: Arc<Model>) -> Result<Box<dyn Backend>, String> {
    let options = CpuOptions { threads: 1, max_rows: 140, kv_blocks: 4, ..CpuOptions::for_context(256) };
    Ok(Box::new(Cpu::new(model, &options).map_err(|error| error.to_string())?))
}

#[test]
fn every_fault_is_named_exactly() {
    let hosts = [Host::Mixed, Host::Ragged].map(|kind| (kind, host(kind)));
    let faults = all();
    let names: BTreeSet<_> = faults.iter().map(|fault| fault.name).collect();
    assert!(faults.len() >= 35 && names.len() == faults.len());
    let trials: Vec<Trial> = faults
        .iter()
        .map(|fault| {
            let host = &hosts.iter().find(|(kind, _)| *kind == fault.host).expect("both are there").1;
            fault.find(host, &build).unwrap_or_else(|error| panic!("{}: {error}", fault.name))
        })
        .collect();
    let missed: Vec<String> = trials
        .iter()
        .filter(|trial| !trial.missed.is_empty())
        .map(|trial| {
            format!("{}: {}\n    {}", trial.name, trial.missed.join("; "), trial.bisection.report.verdict)
        })
        .collect();
    assert!(missed.is_empty(), "{} of {} missed:\n{}", missed.len(), trials.len(), missed.join("\n"));
    let table = table(&trials);
    assert!(table.ends_with(&format!("\n{0} of {0} faults named exactly.\n", trials.len())), "{table}");
    let written = include_str!("../../FAULTS.md");
    for (written, line) in written.lines().zip(table.lines()) {
        assert_eq!(written, line, "`tally faults > crates/parity/FAULTS.md` writes it anew");
    }
    assert_eq!(written.lines().count(), table.lines().count());
    assert!(trials.iter().all(|trial| trial.bisection.report.verdict.matches(". ").count() >= 1));
}

/// The story, as the table has it: the first layer whose type is another, and what the failing layers share.
#[test]
fn the_story() {
    let story = all()[0];
    let trial = story.find(&host(story.host), &build).expect("it runs");
    let report = &trial.bisection.report;
    assert_eq!(report.outcome, crate::report::Outcome::NonFinite, "{}", report.verdict);
    let finding = report.finding.as_ref().expect("it was planted");
    let best = &finding.features[0];
    assert_eq!(
        (best.failing_with, best.failing, best.passing_with, best.passing),
        (2, 2, 0, 2),
        "{:?}",
        finding.features
    );
    assert!(
        report.reading.iter().any(|line| line.contains("after a router that is")),
        "{:?}",
        report.reading
    );
    assert!(report.reading.iter().any(|line| line.contains("layers 0 to 1 agree")), "{:?}", report.reading);
    // The report survives being written down.
    let text = serde_json::to_string(report).expect("names, numbers and lists");
    assert_eq!(&serde_json::from_str::<Report>(&text).expect("just written"), report);
}

#[test]
fn behind_a_masked_fault_the_next_is_found() {
    let faults = all();
    let named = |name: &str| *faults.iter().find(|fault| fault.name == name).expect("in the list");
    let (first, second) = (named("tail-beyond-the-tensor"), named("scale-is-nan"));
    let model = Arc::new(host(Host::Mixed));
    let broken = |model: Arc<Model>| -> Result<Box<dyn Backend>, String> {
        first.plant(&model, &build).map_err(|error| error.to_string())
    };
    let mut masked = BTreeSet::new();
    for fault in [first, second] {
        let (mut left, mut right) =
            (build(model.clone()).expect("it builds"), second.plant(&model, &broken).expect("it builds"));
        let mut sides = [Side::live("left", "a16", &mut left), Side::live("right", "a16", &mut right)];
        let options = Options { masked: masked.clone(), ..Options::default() };
        let found = bisect(&model, &mut sides, &fault.host.prompt(), &options).expect("it runs");
        assert!(fault.expected.missed(&found.report).is_empty(), "{}: {}", fault.name, found.report.verdict);
        masked.insert(Site { stage: fault.expected.stage, layer: fault.expected.layer });
    }
    let (mut left, mut right) =
        (build(model.clone()).expect("it builds"), second.plant(&model, &broken).expect("it builds"));
    let mut sides = [Side::live("left", "a16", &mut left), Side::live("right", "a16", &mut right)];
    let options = Options { masked, ..Options::default() };
    let found = bisect(&model, &mut sides, &first.host.prompt(), &options).expect("it runs");
    assert!(found.report.finding.is_none(), "both masked: {}", found.report.verdict);
    // What is no number where it is masked, and nowhere else, is not what the run came to.
    assert_eq!(found.report.outcome, crate::report::Outcome::Agree, "{}", found.report.verdict);
    assert!(
        found.report.verdict.contains("masked, of layer 3 attn_out, layer 2 experts_up."),
        "{}",
        found.report.verdict
    );
}

/// Whether it is a matter of a type, whatever it is used for, or of a projection, whatever its type.
#[test]
fn types_and_projections_are_told_apart() {
    let model = Arc::new(host(Host::Mixed));
    let check = |what: &str, is_broken: &dyn Fn(&Tensor) -> bool, best: &str, counts: [usize; 4]| {
        let mut tensors: Vec<Tensor> = model.weights.tensors().into_iter().cloned().collect();
        for tensor in tensors.iter_mut().filter(|tensor| is_broken(tensor)) {
            let (block, mut bytes) = (tensor.dtype.block_bytes(), tensor.data.to_vec());
            // A code of every block, whatever its type.
            bytes.chunks_exact_mut(block).for_each(|block| block[block.len() / 2] ^= 0x11);
            tensor.data = bytes.into();
        }
        let broken = Model::from_tensors(model.config, &tensors).expect("the same tensors");
        let (mut left, mut right) =
            (build(model.clone()).expect("it builds"), build(Arc::new(broken)).expect("it builds"));
        let mut sides = [Side::live("left", "a16", &mut left), Side::live("right", "a16", &mut right)];
        let report =
            bisect(&model, &mut sides, &Host::Mixed.prompt(), &Options::default()).expect("it runs").report;
        let first = &report.finding.as_ref().expect("planted").features[0];
        let found = [first.failing_with, first.failing, first.passing_with, first.passing];
        assert_eq!((first.text.as_str(), found), (best, counts), "{what}: {}", report.verdict);
    };
    // Four layers of eight products, and the head.
    let products = 4 * 8 + 1;
    let q4 = |t: &Tensor| t.dtype == Dtype::Q4K;
    let of_type = model.weights.tensors().iter().filter(|t| q4(t)).count();
    check("a type's kernel", &q4, "type = Q4_K", [of_type, of_type, 0, products - of_type]);
    let values = |t: &Tensor| t.name.contains("attn_v");
    check("a projection's", &values, "projection = attn_v", [4, 4, 0, products - 4]);
}

/// Scalar code against the best vector code: different instructions, the same bits.
#[test]
fn without_a_fault_nothing_is_found() {
    let sets = Isa::available();
    let isas = [sets[0], sets[sets.len() - 1]];
    for seed in 0..50u64 {
        // Shapes and types walk through their ranges with the seed.
        let pick = |n: usize, i: u32| (seed as usize / n.pow(i)) % n;
        let dense = seed % 4 == 3;
        let mut shape = crate::testing::shape(dense, 1 + pick(2, 0));
        shape.config.hidden = [256, 512][pick(2, 1)];
        shape.config.kv_heads = [1, 2, 4][pick(3, 0)];
        let types = [Dtype::Q4K, Dtype::Q6K, Dtype::Q5K, Dtype::Q8_0, Dtype::Q2K, Dtype::F16, Dtype::Q3K];
        let hash =
            |name: &str| name.bytes().fold(seed as usize, |h, b| h.wrapping_mul(31).wrapping_add(b as usize));
        let dtype = |spec: &Spec| {
            if spec.dims.len() == 1 { Dtype::F32 } else { types[hash(&spec.name) % types.len()] }
        };
        let model = Arc::new(synth::model(&shape, seed, dtype));
        let [mut left, mut right] = isas.map(|isa| {
            let options =
                CpuOptions { isa, threads: 1, max_rows: 16, kv_blocks: 2, ..CpuOptions::for_context(64) };
            Cpu::new(model.clone(), &options).expect("one thread")
        });
        let ids: Vec<u32> = (0..9).map(|i| (i * 7 + seed as u32) % 64).collect();
        let mut sides = [Side::live("scalar", "a16", &mut left), Side::live("vector", "a16", &mut right)];
        let found = bisect(&model, &mut sides, &ids, &Options::default()).expect("it runs");
        assert!(found.report.finding.is_none(), "seed {seed}: {}", found.report.verdict);
        assert_eq!(found.report.runs.len(), Scenario::LIVE.len(), "seed {seed}: {:?}", found.report.skipped);
        assert_eq!(found.report.outcome, crate::report::Outcome::Agree);
    }
}

/// The cut-out stage errs as the model did, is right on the right side, and knows what came.
#[test]
fn reproductions_reproduce() {
    let hosts = [Host::Mixed, Host::Ragged].map(|kind| (kind, host(kind)));
    let dir = std::env::temp_dir().join(format!("tally-parity-reproduction-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    let (mut cut, mut otherwise) = (0, Vec::new());
    for fault in all() {
        let host = &hosts.iter().find(|(kind, _)| *kind == fault.host).expect("both are there").1;
        let trial = fault.find(host, &build).expect("it runs");
        let Some(reproduction) = trial.bisection.reproduction else { continue };
        let path = dir.join(format!("{}.safetensors", fault.name));
        reproduction.write(&path).expect("there is room");
        let right = crate::replay(&path, build).unwrap_or_else(|error| panic!("{}: {error}", fault.name));
        assert_eq!(right.wrong, 0, "{}: the right side is right on what was cut out", fault.name);
        assert!(!right.as_then, "{}", fault.name);
        cut += 1;
        // Where the cut model has what the fault is about, it errs there as it did in the whole one.
        let broken = |model: Arc<Model>| fault.plant(&model, &build).map_err(|error| error.to_string());
        otherwise.extend(match crate::replay(&path, broken) {
            Ok(replay) if replay.wrong > 0 && replay.as_then => None,
            Ok(replay) if replay.wrong > 0 => Some((fault.name, "errs in another way")),
            Ok(_) => Some((fault.name, "does not err")),
            Err(_) => Some((fault.name, "does not fit")),
        });
    }
    std::fs::remove_dir_all(&dir).expect("just made");
    assert!(cut >= 25, "{cut} faults were cut out");
    // What depends on experts, tokens, rows, heads or layers that were cut away.
    let on_what_is_gone = [
        ("one-kernel-for-all-types", "errs in another way"),
        ("expert-off-by-one", "errs in another way"),
        ("tokens-off-by-one", "errs in another way"),
        ("stride-of-whole-blocks", "errs in another way"),
        ("wrong-kv-head", "does not fit"),
        ("early-load", "does not fit"),
    ];
    assert_eq!(otherwise, on_what_is_gone);
}

/// Errs from position 64 on: in a prompt of several steps, in a later one.
struct Late(Stage);

impl Hook for Late {
    fn run(&mut self, inner: &mut dyn Backend, step: &model::Step, site: Site) -> Result<(), model::Fault> {
        inner.run(site)?;
        // Replayed alone, the layer is the first of one.
        let layer = weights::LAYER.min(inner.model().config.layers - 1);
        if site != (Site { stage: self.0, layer: Some(layer) }) || step.rows[0].position < 64 {
            return Ok(());
        }
        let buffer = if self.0 == Stage::Attend { Buffer::Attn } else { Buffer::Q };
        let mut values = inner.read(buffer)?;
        values.iter_mut().for_each(|v| *v *= 1.5);
        inner.write(buffer, &values)
    }
}

/// Attention and rotation in a later step: with the keys and values of the steps before, at their positions.
#[test]
fn reproductions_beyond_the_first_step() {
    let few_rows = |model: Arc<Model>| -> Result<Box<dyn Backend>, String> {
        let options = CpuOptions { threads: 1, max_rows: 32, kv_blocks: 4, ..CpuOptions::for_context(256) };
        Ok(Box::new(Cpu::new(model, &options).map_err(|error| error.to_string())?))
    };
    let model = Arc::new(host(Host::Mixed));
    let path = std::env::temp_dir().join(format!("tally-parity-late-{}.safetensors", std::process::id()));
    for stage in [Stage::Attend, Stage::RopeStore] {
        let broken = |model: Arc<Model>| -> Result<Box<dyn Backend>, String> {
            Ok(Box::new(Hooked::with(few_rows(model)?, Box::new(Late(stage)))))
        };
        let mut left = few_rows(model.clone()).expect("it builds");
        let mut right = broken(model.clone()).expect("it builds");
        let mut sides = [Side::live("left", "a16", &mut left), Side::live("right", "a16", &mut right)];
        let found = bisect(&model, &mut sides, &Host::Mixed.prompt(), &Options::default()).expect("it runs");
        let finding = found.report.finding.as_ref().expect("planted");
        assert_eq!((finding.place.step, finding.place.site.stage), (2, stage), "{}", found.report.verdict);
        let reproduction = found.reproduction.unwrap_or_else(|| panic!("{stage}: none was cut"));
        assert_eq!((reproduction.head.start, reproduction.context()), (64, 70), "{stage}");
        reproduction.write(&path).expect("there is room");
        let (right, wrong) = (crate::replay(&path, few_rows), crate::replay(&path, broken));
        let (right, wrong) = (right.expect("it runs"), wrong.expect("it runs"));
        assert!(right.wrong == 0 && !right.as_then, "{stage}: {right:?}");
        assert!(wrong.wrong > 0 && wrong.as_then, "{stage}: {wrong:?}");
    }
    std::fs::remove_file(&path).expect("just written");
}

/// Of weights as no random model has them: in such a model these faults are planted, and do not show.
const OF_EXTREMES: [&str; 2] = ["sums-in-f16", "activations-in-f16"];

/// A fault fits a model or says what the model lacks; where it fits, it shows.
#[test]
fn a_fault_that_fits_shows() {
    let mut found = BTreeMap::new();
    for n in 0..Random::KINDS as u64 {
        let random = Random(n);
        let shape = Shape { config: random.config(), tied: false };
        let model = Arc::new(synth::model(&shape, n, |spec| random.dtype(spec)));
        for fault in all() {
            let mut right = match fault.plant(&model, &build) {
                Ok(backend) => backend,
                Err(TrialError::Misfit(misfit)) => {
                    assert!(misfit.to_string().contains(": "), "{misfit}");
                    found.entry(misfit.fault).or_insert_with(Vec::new).push(n);
                    continue;
                }
                Err(error) => panic!("{n} {}: {error}", fault.name),
            };
            let mut left = build(model.clone()).expect("it builds");
            let mut sides = [Side::live("left", "a16", &mut left), Side::live("right", "a16", &mut right)];
            let report = bisect(&model, &mut sides, &Host::Mixed.prompt(), &Options::default());
            let report = report.unwrap_or_else(|error| panic!("{n} {}: {error}", fault.name)).report;
            let shows = !OF_EXTREMES.contains(&fault.name);
            assert_eq!(report.finding.is_some(), shows, "{n} {}: {}", fault.name, report.verdict);
        }
    }
    // By fault, the models that it does not fit: the second has no experts.
    let misfits: [(&str, &[u64]); 20] = [
        ("activations-in-f16", &[1]),
        ("aligned-loads", &[0, 1]),
        ("combined-in-another-order", &[1]),
        ("early-load", &[1]),
        ("expert-off-by-one", &[1]),
        ("lane-dropped", &[1, 2, 3]),
        ("minima-without-high-bits", &[0, 1, 3]),
        ("nan-in-router", &[1]),
        ("not-renormalised", &[1, 2]),
        ("one-kernel-for-all-types", &[3]),
        ("quants-off-by-one", &[0, 1, 2, 3]),
        ("scales-without-high-bits", &[0, 1, 2, 3]),
        ("scales-without-sign", &[0, 1, 2, 3]),
        ("shared-buffer", &[1]),
        ("stride-of-whole-blocks", &[0, 1, 2]),
        ("subnormal-scales-flushed", &[0, 1, 2, 3]),
        ("sums-in-f16", &[1]),
        ("values-read-as-q4-k", &[0, 1, 2, 3]),
        ("wrong-kv-head", &[1, 3]),
        ("zero-by-zero", &[1]),
    ];
    assert_eq!(found.into_iter().collect::<Vec<_>>(), misfits.map(|(name, models)| (name, models.to_vec())));
}

/// [`Planted::tokens`] are as few as it takes.
#[test]
fn a_fault_shows_in_as_many_tokens_as_it_says() {
    let hosts = [Host::Mixed, Host::Ragged].map(|kind| (kind, host(kind)));
    for fault in all() {
        let host = &hosts.iter().find(|(kind, _)| *kind == fault.host).expect("both are there").1;
        let shows = |tokens: usize| {
            let prompt = &fault.host.prompt()[..tokens];
            fault.find_with(host, prompt, &build).expect("it runs").bisection.report.finding.is_some()
        };
        assert!(shows(fault.tokens), "{} in {} tokens", fault.name, fault.tokens);
        assert!(
            fault.tokens == 1 || !shows(fault.tokens - 1),
            "{}: {} are not needed",
            fault.name,
            fault.tokens
        );
    }
}
