//! From executions to evidence, and from evidence to a status; every transition, and evidence that is none.

mod bench;

use std::fs;
use std::path::{Path, PathBuf};

use bench::{CONTRACT, Fake, SPECS, source};
use contract::{
    ContractStatus, Current, Evidence, EvidenceError, Ground, Mode, Outcome, Session, Status, execute, status,
};

fn session() -> Session {
    Session { command: "tally contract run".into(), date: "2026-11-23".into() }
}

fn current() -> Current {
    let models = ["small", "large"].map(|name| (name.to_owned(), "m1".to_owned()));
    Current { kernel_hash: "k1".into(), arithmetic: "a1".into(), models: models.into() }
}

fn run(index: usize, mode: Mode, checks: &mut Fake) -> Result<Evidence, String> {
    let contract = source(CONTRACT).contract;
    execute(&contract, &contract.falsifiers[index], mode, checks, &session())
}

fn computed(evidence: &[Evidence], current: &Current) -> ContractStatus {
    status(&source(CONTRACT).contract, evidence, current, &SPECS)
}

const FINITE: usize = 0;
const EQUAL: usize = 1;

/// Statuses of the two falsifiers with checks.
fn statuses(evidence: &[Evidence]) -> [Status; 2] {
    let known = computed(evidence, &current());
    [known.falsifiers[FINITE].status, known.falsifiers[EQUAL].status]
}

#[test]
fn levels() {
    use Status::{AlgorithmLevel, Discharged, Proposed, Refuted};
    assert_eq!(statuses(&[]), [Proposed, Proposed]);
    let on = |ground, shape, index| {
        run(index, Mode::Plain, &mut Fake { ground, shape, ..Fake::default() }).expect("it can be executed")
    };
    let check = |ground, shape, want| {
        assert_eq!(statuses(&[on(ground, shape, FINITE), on(ground, shape, EQUAL)]), want)
    };
    // Without a GPU, what needs none is discharged by the real shape.
    check(Ground::Emulated, "small", [AlgorithmLevel, AlgorithmLevel]);
    check(Ground::Emulated, "large", [Discharged, AlgorithmLevel]);
    check(Ground::Gpu, "small", [AlgorithmLevel, AlgorithmLevel]);
    check(Ground::Gpu, "large", [Discharged, Discharged]);
    // The best counts, and a single failure refutes.
    let both = [on(Ground::Ci, "small", FINITE), on(Ground::Gpu, "large", FINITE)];
    assert_eq!(statuses(&both), [Discharged, Proposed]);
    let broken = run(FINITE, Mode::Plain, &mut Fake { broken: true, ..Fake::default() }).expect("executed");
    assert_eq!((broken.outcome, broken.why.as_deref()), (Outcome::Failed, Some("value 3 is NaN")));
    let refuted = [both[1].clone(), broken];
    assert_eq!(statuses(&refuted)[0], Refuted);
    let known = computed(&refuted, &current());
    assert_eq!(
        (known.status, known.falsifiers[FINITE].because.as_str()),
        (Refuted, "ci, small, 2026-11-23: value 3 is NaN")
    );
}

#[test]
fn a_contract_is_as_good_as_its_worst_and_stages_are_computed() {
    let record = run(FINITE, Mode::Plain, &mut Fake::default()).expect("it can be executed");
    let known = computed(&[record], &current());
    assert_eq!(
        (known.status, &known.falsifiers[2].because),
        (Status::Proposed, &"no check exists".to_owned())
    );
    assert_eq!(known.stages, [("begun".into(), true), ("done".into(), false)]);
}

/// What has no real shape to hold on does not keep the rest from being discharged, as long as it holds.
#[test]
fn a_table_needs_no_gpu() {
    let check = "    check: { name: table, fault: typo }\n    prediction: It will be.";
    let contract = source(&CONTRACT.replace("    prediction: It will be.", check)).contract;
    let on = |ground, index: usize| {
        let mut checks = Fake { ground, shape: "large", ..Fake::default() };
        let falsifier = &contract.falsifiers[index];
        execute(&contract, falsifier, Mode::Plain, &mut checks, &session()).expect("it can be executed")
    };
    let known = |evidence: &[Evidence]| status(&contract, evidence, &current(), &SPECS).status;
    let [finite, equal, table] = [on(Ground::Gpu, 0), on(Ground::Gpu, 1), on(Ground::Ci, 2)];
    assert_eq!(known(&[finite.clone(), equal.clone(), table.clone()]), Status::Discharged);
    assert_eq!(known(&[finite.clone(), equal.clone()]), Status::Proposed);
    assert_eq!(known(&[finite.clone(), on(Ground::Emulated, 1), table.clone()]), Status::AlgorithmLevel);
    let refuted = Evidence { outcome: Outcome::Failed, ..table };
    assert_eq!(known(&[finite, equal, refuted]), Status::Refuted);
    // A contract of nothing else is never discharged.
    let alone = CONTRACT.replace("name: finite", "name: table").replace("{ tokens: 3 }", "{}");
    let mut contract = source(&alone.replace("fault: nan", "fault: typo")).contract;
    contract.falsifiers.truncate(1);
    let record = execute(&contract, &contract.falsifiers[0], Mode::Plain, &mut Fake::default(), &session());
    let known = status(&contract, &[record.expect("executed")], &current(), &SPECS);
    assert_eq!((known.status, known.falsifiers[0].at_most), (Status::AlgorithmLevel, Status::AlgorithmLevel));
}

#[test]
fn evidence_goes_stale() {
    let mut gpu = Fake { ground: Ground::Gpu, shape: "large", ..Fake::default() };
    let evidence =
        [FINITE, EQUAL].map(|index| run(index, Mode::Plain, &mut gpu).expect("it can be executed"));
    let check = |current: Current, want: [Status; 2], said: &str| {
        let known = computed(&evidence, &current);
        assert_eq!([known.falsifiers[0].status, known.falsifiers[1].status], want, "{said}");
        assert!(known.falsifiers[EQUAL].because.contains(said), "{known:#?}");
    };
    use Status::{Discharged, Stale};
    check(current(), [Discharged, Discharged], "gpu (G1), large");
    // Kernels matter to what runs on a GPU alone.
    check(Current { kernel_hash: "k2".into(), ..current() }, [Discharged, Stale], "of other kernels");
    check(Current { arithmetic: "a2".into(), ..current() }, [Stale, Stale], "of another arithmetic, a1");
    let models = vec![("large".into(), "m2".into())];
    check(Current { models, ..current() }, [Stale, Stale], "of another model called large");
    check(Current { models: vec![], ..current() }, [Discharged, Discharged], "");
    // Another bound is another check.
    let text = CONTRACT.replace("within: 1e-6", "within: 1e-5");
    let known = status(&source(&text).contract, &evidence, &current(), &SPECS);
    assert_eq!(known.falsifiers[EQUAL].status, Stale);
    assert!(known.falsifiers[EQUAL].because.contains("of another check, equal(device=gpu, within=0.000001)"));
    // A failure of other kernels refutes nothing; a small model that holds still does, and says what it lacks.
    let mut failed = evidence[EQUAL].clone();
    failed.outcome = Outcome::Failed;
    failed.provenance.kernel_hash = "k0".into();
    let small =
        run(EQUAL, Mode::Plain, &mut Fake { ground: Ground::Emulated, ..Fake::default() }).expect("executed");
    let known = computed(&[failed, small], &current());
    let equal = &known.falsifiers[EQUAL];
    assert_eq!(equal.status, Status::AlgorithmLevel);
    assert_eq!(
        equal.because,
        "emulated, small, 2026-11-23; stale: gpu (G1), large, 2026-11-23: of other kernels"
    );
}

#[test]
fn what_cannot_run_is_no_evidence() {
    let unable = |index, mode, checks: &mut Fake| run(index, mode, checks).expect_err("it cannot");
    assert_eq!(unable(EQUAL, Mode::Plain, &mut Fake::default()), "needs a GPU: pass --device cuda");
    assert_eq!(unable(2, Mode::Plain, &mut Fake::default()), "it has no check: no more than a proposal");
    let silent = unable(FINITE, Mode::Plain, &mut Fake { silent: true, ..Fake::default() });
    assert_eq!(silent, "check `finite` reported no figures: nothing was compared");
}

#[test]
fn a_falsifier_is_seen_to_fail_once_a_fault_made_it() {
    let seen = |evidence: &[Evidence]| computed(evidence, &current()).falsifiers[FINITE].seen_to_fail.clone();
    let plain = run(FINITE, Mode::Plain, &mut Fake::default()).expect("it can be executed");
    assert_eq!(seen(std::slice::from_ref(&plain)), None);
    let planted = run(FINITE, Mode::Planted, &mut Fake::default()).expect("it can be executed");
    assert_eq!((planted.outcome, planted.planted.as_deref()), (Outcome::Failed, Some("nan")));
    assert_eq!(seen(&[plain.clone(), planted.clone()]), Some("nan".into()));
    // That it failed with a fault planted refutes nothing, and proves nothing by itself.
    assert_eq!(statuses(&[plain.clone(), planted.clone()])[0], Status::AlgorithmLevel);
    assert_eq!(statuses(std::slice::from_ref(&planted))[0], Status::Proposed);
    // A fault that was overlooked does not count, nor does one that another check noticed.
    let blind = run(FINITE, Mode::Planted, &mut Fake { blind: true, ..Fake::default() }).expect("executed");
    assert_eq!(seen(&[plain.clone(), blind]), None);
    let of_other = Evidence { check: "finite(tokens=4)".into(), ..planted };
    assert_eq!(seen(&[plain, of_other]), None);
}

/// A folder of this test's own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        Folder(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("contract-{name}-{}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn evidence_is_kept_and_read_back() {
    let folder = Folder::new("kept");
    let mut written = Vec::new();
    for (mode, shape, name) in [
        (Mode::Plain, "small", "F-FINITE.ci.json"),
        (Mode::Planted, "small", "F-FINITE.ci.planted.json"),
        (Mode::Plain, "large", "F-FINITE.ci.large.json"),
    ] {
        let record = run(FINITE, mode, &mut Fake { shape, ..Fake::default() }).expect("it can be executed");
        let path = record.store(&folder.0).expect("writable");
        assert_eq!(path, folder.0.join("thing-v1").join(name));
        written.push(record);
    }
    let (records, errors) = Evidence::load(&folder.0, "thing-v1");
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(records.len(), written.len());
    assert!(records.iter().all(|record| written.contains(record)), "{records:#?}");
    assert_eq!(Evidence::load(&folder.0, "other-v1").0, []);
}

#[test]
fn an_edit_by_hand_is_noticed() {
    let folder = Folder::new("edited");
    let path =
        run(FINITE, Mode::Plain, &mut Fake::default()).expect("executed").store(&folder.0).expect("writable");
    let text = fs::read_to_string(&path).expect("it was written");
    let check = |from: &str, to: &str| {
        assert!(text.contains(from), "{from:?} is not in {text}");
        match Evidence::parse(&path, &text.replace(from, to)) {
            Err(error @ EvidenceError::Edited { .. }) => {
                assert!(error.to_string().contains("edited since it was written"), "{error}");
            }
            other => panic!("{to:?}: {other:?}"),
        }
    };
    check("\"outcome\": \"passed\"", "\"outcome\": \"failed\"");
    check("\"values\": 1000", "\"values\": 1001");
    check("\"kernel_hash\": \"k1\"", "\"kernel_hash\": \"k2\"");
    check("  \"version\"", "   \"version\"");
    check("\"\n}\n", "0\"\n}\n");
    check("\"\n}\n", "\"\n}");
    check("\"\n}\n", "\",\n  \"outcome\": \"passed\"\n}\n");
    let without = text.rsplit_once(",\n  \"hash\"").expect("it is sealed").0;
    assert!(matches!(
        Evidence::parse(&path, &format!("{without}\n}}\n")),
        Err(EvidenceError::Unsealed { .. })
    ));
    // One that is edited does not count, and is named.
    fs::write(&path, text.replace("\"values\": 1000", "\"values\": 1001")).expect("writable");
    let (records, errors) = Evidence::load(&folder.0, "thing-v1");
    assert!(records.is_empty() && errors.len() == 1 && errors[0].to_string().contains("F-FINITE.ci.json"));
}
