//! Dumps made elsewhere: transformers against this engine. The dumps are those of tools/fixtures/transformers_dumps.py;
//! nothing here needs Python.

mod models;
mod process;

use std::fs;
use std::path::{Path, PathBuf};

use process::{Directory, Outcome, tally};
use serde_json::Value;

/// What was dumped, by name, and how many buffers there are: layers times what a layer writes, and two.
const DUMPS: [(&str, u64); 2] = [("moe-top2-norm", 3 * 17 + 2), ("dense-tied", 3 * 13 + 2)];

fn dump(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/dumps").join(name)
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../oracle/tests/data/{name}.gguf"))
}

fn bisect(model: &Path, left: &str, dump: &Path, more: &[&str]) -> Outcome {
    let manifest = fs::read_to_string(dump.join("manifest.json")).expect("a manifest");
    let manifest: Value = serde_json::from_str(&manifest).expect("JSON");
    let ids: Vec<_> = manifest["prompt_ids"].as_array().expect("ids").iter().map(Value::to_string).collect();
    let (model, right) = (model.to_str().expect("UTF-8"), format!("dump:{}", dump.display()));
    let args = ["bisect", model, "--ids", &ids.join(","), "--left", left, "--right", &right];
    tally(args.iter().chain(more))
}

#[test]
fn transformers_agrees_within_the_bounds() {
    for (name, buffers) in DUMPS {
        for left in ["oracle", "cpu"] {
            let report = bisect(&model(name), left, &dump(name), &["--json"]).json();
            assert_eq!(report["outcome"], "agree", "{name} {left}: {}", report["verdict"]);
            let cells = report["runs"][0]["cells"].as_array().expect("cells");
            assert_eq!(cells.len() as u64, buffers, "{name}");
            for cell in cells {
                // Ids of experts agree or they do not; all else has room, which a clean run must not need.
                let error = cell["bound"]["error"].as_f64().unwrap_or(0.0);
                let limit = cell["bound"]["limit"].as_f64().unwrap_or(0.0);
                assert!(cell["status"] == "match" && error <= limit / 4.0, "{name} {left}: {cell}");
            }
            assert!(
                report["judge"]
                    .as_str()
                    .is_some_and(|why| why.starts_with("bounds: the sides follow different rules"))
            );
        }
    }
}

#[test]
fn a_planted_fault_is_found() {
    let directory = Directory::new();
    // All weights of one tensor a fiftieth larger: what no rounding does.
    let check = |name: &str, tensor: &str, layer: u64, stage: &str, buffer: &str| {
        let path = directory.file("faulty.gguf");
        fs::copy(model(name), &path).expect("writable");
        models::edit(&path, &[], |spec, bytes| {
            if spec.name == tensor {
                let (values, _) = bytes.as_chunks_mut::<4>();
                values
                    .iter_mut()
                    .for_each(|value| *value = (f32::from_le_bytes(*value) * 1.02).to_le_bytes());
            }
        });
        let outcome = bisect(Path::new(&path), "oracle", &dump(name), &["--json"]);
        assert_eq!(outcome.code, Some(4), "{tensor}: {outcome:?}");
        let report: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        let place = &report["finding"]["place"];
        assert_eq!(
            (&place["layer"], &place["stage"], &place["buffer"]),
            (&layer.into(), &stage.into(), &buffer.into()),
            "{tensor}: {}",
            report["verdict"]
        );
        assert_eq!(report["finding"]["class"]["kind"], "local", "{tensor}");
    };
    check("moe-top2-norm", "blk.1.ffn_down_exps.weight", 1, "experts_down", "down");
    check("moe-top2-norm", "blk.0.ffn_up_exps.weight", 0, "experts_up", "up");
    check("moe-top2-norm", "blk.2.attn_q_norm.weight", 2, "rope_store", "q");
    check("moe-top2-norm", "blk.1.ffn_gate_inp.weight", 1, "route", "router_logits");
    check("dense-tied", "blk.2.attn_v.weight", 2, "qkv", "v");
    check("dense-tied", "blk.1.attn_output.weight", 1, "attn_out", "x");
    check("dense-tied", "blk.0.ffn_gate.weight", 0, "ffn", "gate");
}

#[test]
fn a_dump_that_is_not_what_it_says() {
    let (name, directory) = (DUMPS[0].0, Directory::new());
    let copy = directory.join("dump");
    fs::create_dir(&copy).expect("writable");
    let files = ["manifest.json", "step-0000.safetensors"];
    let [manifest, tensors] = files.map(|file| fs::read(dump(name).join(file)).expect("there"));
    let check = |manifest: &[u8], tensors: &[u8], message: &str| {
        for (file, content) in files.iter().zip([manifest, tensors]) {
            fs::write(copy.join(file), content).expect("writable");
        }
        bisect(&model(name), "cpu", &copy, &[]).fails(1, message);
    };
    let text = String::from_utf8(manifest.clone()).expect("text");
    check(
        &manifest,
        &tensors[..tensors.len() / 2],
        "step-0000.safetensors: its SHA-256 is not the manifest's",
    );
    check(text.replacen("\"layer\": 2", "\"layer\": 7", 1).as_bytes(), &tensors, "3 layers");
    check(text.replacen("\"version\": 1", "\"version\": 2", 1).as_bytes(), &tensors, "version 2");
    check(
        text.replacen("router_logits", "router_scores", 1).as_bytes(),
        &tensors,
        "unknown buffer `router_scores`",
    );
}

/// What a dump does not have is no success, unless whoever asks says so; and where nothing is left, not even then.
#[test]
fn a_dump_of_a_part() {
    let directory = Directory::new();
    let path = models::tiny(&directory, "model.gguf", false);
    let part = |stages: &str| {
        let out = directory.file(stages);
        tally(["trace", &path, "--ids", "1,2,3", "--stages", stages, "--out", &out]).ok();
        out
    };
    let (attend, route) = (part("attend"), part("route"));
    let against = |left: &str, more: &[&str]| bisect(Path::new(&path), left, Path::new(&attend), more);
    let all = 2 * 17 + 2;
    let missing = format!(
        "{} of {all} buffers are not there on both sides, the first of them step 0, embed, x",
        all - 2
    );
    let refused = against("cpu", &["--json"]).hinted();
    assert!(refused.code == Some(1) && refused.stderr.contains(&missing), "{refused:?}");
    let told = against("cpu", &["--partial"]).ok();
    assert!(told.contains(&format!("{} of {all} buffers are not there", all - 2)), "{told}");
    against(&format!("dump:{route}"), &["--partial"]).fails(1, "nothing was compared");
    // A difference is one whatever is missing.
    assert_eq!(against("faulty:wrong-rope-base", &[]).code, Some(4));
}
