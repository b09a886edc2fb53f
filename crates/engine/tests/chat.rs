//! The file's chat template against Python's Jinja, byte for byte, and hostile templates against their limits.
//!
//! Expected texts are made by `tools/fixtures/chat_templates.py`, which sets Jinja up as `transformers` does.

use std::fs;
use std::path::{Path, PathBuf};

use engine::{ChatTemplate, Conversation};
use serde_json::Value as Json;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat")
}

/// A conversation from the variables of a case: the named ones in their fields, the rest as further variables.
fn conversation(case: &Json) -> Conversation {
    let mut variables = case["variables"].as_object().unwrap().clone();
    let mut list = |name| variables.remove(name).map_or(Vec::new(), |list| list.as_array().unwrap().clone());
    let (messages, tools) = (list("messages"), list("tools"));
    let mut flag = |name| variables.remove(name).map(|flag| flag.as_bool().unwrap());
    Conversation {
        messages,
        tools,
        add_generation_prompt: flag("add_generation_prompt").unwrap_or(false),
        enable_thinking: flag("enable_thinking"),
        variables: [("eos_token".to_owned(), "<|im_end|>".into())].into_iter().chain(variables).collect(),
        now: 1_795_425_546,
    }
}

/// Renders every case with the template at `path` and compares with what Python made of it.
fn check(name: &str, path: &Path) {
    let source = fs::read_to_string(path).unwrap();
    let template = ChatTemplate::new(&source).unwrap();
    let cases: Json = serde_json::from_str(&fs::read_to_string(data().join("cases.json")).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for case in cases.as_array().unwrap() {
        let case_name = case["name"].as_str().unwrap();
        let expected = data().join(format!("expected/{name}.{case_name}"));
        let got = template.render(&conversation(case));
        match fs::read_to_string(expected.with_file_name(format!("{name}.{case_name}.txt"))) {
            Ok(want) if got.as_ref().is_ok_and(|got| *got == want) => {}
            Ok(want) => wrong.push(format!("== {name}, {case_name}\n-- Python\n{want}\n-- here\n{got:?}\n{}", got.as_deref().unwrap_or(""))),
            Err(_) => {
                let error = expected.with_file_name(format!("{name}.{case_name}.error"));
                assert!(error.exists(), "no expected file for {name}, {case_name}");
                if let Ok(got) = got {
                    wrong.push(format!("== {name}, {case_name}\nPython raises, here:\n{got}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn real_templates_as_in_python() {
    for name in ["Qwen3-Coder", "Qwen-Qwen3-0.6B", "Qwen-Qwen2.5-7B-Instruct"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../../shared/data/templates/{name}.jinja"));
        if !path.exists() {
            println!("did not run: {} is not there", path.display());
            return;
        }
        check(name, &path);
    }
}

#[test]
fn python_semantics() {
    check("python", &data().join("python.jinja"));
}
