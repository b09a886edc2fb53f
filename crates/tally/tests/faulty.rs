//! `faulty:NAME` as a side: found where it was planted, on the models that faults are made for and on others; and refused
//! where it would change nothing.

mod models;
mod process;

use std::path::Path;

use process::{Directory, tally};
use serde_json::Value;

/// A prompt of two tiles of attention.
fn long() -> String {
    (0..70).map(|i| ((i * i * 31 + i * 7 + 3) % 64).to_string()).collect::<Vec<_>>().join(",")
}

/// What `tally bisect` finds with `cpu` on the left.
fn bisected(model: &str, right: &str, ids: &str, more: &[&str]) -> Value {
    let all = ["bisect", model, "--left", "cpu", "--right", right, "--ids", ids, "--json"];
    let found = tally(all.iter().chain(more));
    serde_json::from_str(&found.stdout).unwrap_or_else(|error| panic!("{right}: {error}: {found:?}"))
}

/// The model of each fault, written, opened and bisected: the command that `--write-model` prints finds what the table of
/// faults has.
#[test]
fn found_in_the_model_that_is_written_for_it() {
    let directory = Directory::new();
    // Stage, layer, class, tensor.
    let check = |name: &str, stage: &str, layer: Option<u64>, class: &str, tensor: Option<&str>| {
        let path = directory.file(&format!("{name}.gguf"));
        let text = tally(["faults", "--only", name, "--write-model", &path]).ok();
        let command = text.lines().last().expect("how to find it");
        let args: Vec<&str> = command.split(' ').skip(1).chain(["--json"]).collect();
        let found = tally(&args);
        let report: Value =
            serde_json::from_str(&found.stdout).unwrap_or_else(|e| panic!("{name}: {e}: {found:?}"));
        let finding = &report["finding"];
        assert_eq!(
            (finding["place"]["stage"].as_str(), finding["place"]["layer"].as_u64()),
            (Some(stage), layer),
            "{}",
            report["verdict"]
        );
        assert_eq!(finding["class"]["kind"], class, "{}", report["verdict"]);
        let named = finding["location"]["tensors"][0]["name"].as_str();
        assert_eq!(named, tensor, "{}", report["verdict"]);
        assert_eq!(report["sides"][1]["name"], format!("faulty:{name}"));
        assert!(matches!(found.code, Some(3 | 4)), "{name}: {:?}", found.code);
    };
    check("one-kernel-for-all-types", "experts_down", Some(2), "local", Some("blk.2.ffn_down_exps.weight"));
    // Weights as they are in no other model, rows that are no whole super-blocks, a stage, and a matter of state.
    check("subnormal-scales-flushed", "qkv", Some(2), "local", Some("blk.2.attn_k.weight"));
    check("activations-in-f16", "experts_down", Some(2), "local", Some("blk.2.ffn_down_exps.weight"));
    check("stride-of-whole-blocks", "experts_down", Some(2), "local", Some("blk.2.ffn_down_exps.weight"));
    check("wrong-kv-head", "attend", Some(2), "local", None);
    check("tables-mixed-up", "attend", Some(2), "state", None);
}

/// Any model that has what a fault is about will do: here two layers of a mix of types, one network in place of experts, and
/// as many layers as the model of the story has, whose types part in the same one.
#[test]
fn found_in_a_model_of_ones_own() {
    let directory = Directory::new();
    let experts = models::tiny(&directory, "experts.gguf", false);
    let dense = directory.synth("dense.gguf", "tiny-dense", &["--layers", "3", "--vocab", "300"]);
    let story = directory.synth("story.gguf", "tiny-moe", &["--layers", "48", "--vocab", "300"]);
    let check = |model: &str, name: &str, stage: &str, layer: u64| {
        let report = bisected(model, &format!("faulty:{name}"), &long(), &[]);
        let place = &report["finding"]["place"];
        assert_eq!(
            (place["stage"].as_str(), place["layer"].as_u64()),
            (Some(stage), Some(layer)),
            "{name}: {}",
            report["verdict"]
        );
    };
    check(&experts, "gate-and-up-swapped", "experts_up", 1);
    check(&experts, "nan-in-router", "route", 1);
    check(&experts, "wrong-rope-base", "rope_store", 0);
    check(&story, "one-kernel-for-all-types", "experts_down", 6);
    check(&dense, "gate-and-up-swapped", "ffn", 2);
    check(&dense, "masked-tile", "attend", 2);
    check(&dense, "wrong-rope-base", "rope_store", 0);
}

/// Each command that runs something takes a faulty side, and a reproduction errs on it as it did in the bisection.
#[test]
fn a_side_of_every_command() {
    let directory = Directory::new();
    let model = models::tiny(&directory, "model.gguf", false);
    let (out, trace) = (directory.file("out"), directory.file("trace"));
    let faulty = "faulty:residual-twice";
    let sides = ["--left", "cpu", "--right", faulty, "--ids", "1,2,3"];
    let parity = tally(["parity", model.as_str()].iter().chain(&sides).copied());
    assert!(parity.code == Some(4) && parity.stderr.contains(faulty), "{parity:?}");
    bisected(&model, faulty, "1,2,3", &["--out", &out]);
    let replay = |device: &str| {
        let file = format!("{out}/reproduction.safetensors");
        let replayed = tally(["replay", file.as_str(), "--device", device, "--json"]);
        let value: Value =
            serde_json::from_str(&replayed.stdout).unwrap_or_else(|e| panic!("{e}: {replayed:?}"));
        (replayed.code, value["as_then"].clone())
    };
    assert_eq!((replay("cpu"), replay(faulty)), ((Some(0), false.into()), (Some(4), true.into())));
    let report = tally(["report", out.as_str()]).ok();
    assert!(report.contains(&format!("reproduction.safetensors --device {faulty}\n")), "{report}");
    // The trace of a faulty side stands in for it.
    tally(["trace", &model, "--ids", "1,2,3", "--device", faulty, "--out", &trace]).ok();
    let dumped = bisected(&model, &format!("dump:{trace}"), "1,2,3", &[]);
    assert_eq!(
        (&dumped["finding"]["place"]["stage"], &dumped["finding"]["place"]["layer"]),
        (&"attn_out".into(), &1.into()),
        "{}",
        dumped["verdict"]
    );
}

#[test]
fn refused_where_it_would_change_nothing() {
    let directory = Directory::new();
    let experts = models::tiny(&directory, "experts.gguf", false);
    let dense = directory.synth("dense.gguf", "tiny-dense", &["--layers", "2", "--vocab", "300"]);
    let uniform =
        directory.synth("q8.gguf", "tiny-moe", &["--layers", "2", "--vocab", "300", "--type", "Q8_0"]);
    let bisect = |model: &str, right: &str, more: &[&str]| {
        tally(["bisect", model, "--left", "cpu", "--right", right, "--ids", "1,2,3"].iter().chain(more))
    };
    let misfit = |model: &str, name: &str, lacks: &str| {
        let refused = bisect(model, &format!("faulty:{name}"), &[]).hinted();
        assert!(refused.stderr.contains(&format!("--only {name} --write-model FILE")), "{refused:?}");
        refused.fails(2, &format!("the fault {name} does not fit this model: {lacks}"));
    };
    misfit(&dense, "nan-in-router", "its feed-forward network has no experts");
    misfit(&uniform, "values-read-as-q4-k", "it has no `attn_v` of Q6_K");
    misfit(
        &experts,
        "stride-of-whole-blocks",
        "rows of 256 weights, as of `blk.1.ffn_down_exps.weight`, are whole",
    );
    misfit(&experts, "subnormal-scales-flushed", "it has no `attn_k` of super-blocks");
    bisect(&experts, "faulty:masked-tile", &[]).fails(2, "shows in 65 tokens and more, not in 3");
    // Names that are none.
    bisect(&experts, "faulty:layer-6-story", &[]).fails(2, "(is it `one-kernel-for-all-types`, or");
    bisect(&experts, "faulty:", &[]).fails(2, "`tally faults --list` shows all");
    bisect(&experts, "faulty:wrong-epsilon@gpu", &[]).fails(2, "expected cpu");
    bisect(&experts, "faulti", &[]).fails(2, "or faulty:NAME, or dump:DIR");
    // Kernels of which there are none, or two.
    bisect(&experts, "faulty:kernel-rotated-backwards@cpu", &[]).fails(2, "@emulated");
    let kernels = ["--kernels", directory.to_str().expect("cargo's directory is UTF-8")];
    bisect(&experts, "faulty:kernel-rotated-backwards@emulated", &kernels).fails(2, "leave out --kernels");
    // Nothing is masked where there is nothing.
    for absent in ["7.qkv", "1.ffn"] {
        bisect(&experts, "faulty:residual-twice", &["--mask", absent])
            .fails(2, "--mask: the model has no layer ");
    }
    // A model is of one fault.
    let path = directory.file("none.gguf");
    tally(["faults", "--only", "wrong-epsilon,lane-dropped", "--write-model", &path])
        .fails(2, "of one fault");
    assert!(!Path::new(&path).exists());
}

/// Everything that can be planted is on the list, under the name that plants it.
#[test]
fn the_list() {
    let list = tally(["faults", "--list", "--json"]).json();
    let faults = list["faults"].as_array().expect("a list");
    let text = tally(["faults", "--list"]).ok();
    let of = |kind: &str| faults.iter().filter(|fault| fault["in"] == kind).count();
    assert!(of("model") >= 15 && of("stages") >= 20 && of("kernels") >= 10, "{list}");
    assert_eq!(of("model") + of("stages") + of("kernels"), faults.len());
    for fault in faults {
        let [name, what] = ["name", "what"].map(|key| fault[key].as_str().expect("text"));
        assert!(
            text.lines().any(|line| line.trim_start().starts_with(name) && line.ends_with(what)),
            "{name}"
        );
    }
}
