//! The file's chat template against Python's Jinja, byte for byte, and hostile templates against their limits.
//!
//! Expected texts are made by `tools/fixtures/chat_templates.py`, which sets Jinja up as `transformers` does.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::{ChatError, ChatTemplate, Conversation, Limits};
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
            Ok(want) => wrong.push(format!(
                "== {name}, {case_name}\n-- Python\n{want}\n-- here\n{got:?}\n{}",
                got.as_deref().unwrap_or("")
            )),
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
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("../../../shared/data/templates/{name}.jinja"));
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

/// The error of rendering `source` for a conversation without messages; it must be one line with `want` in it.
fn check_stopped(name: &str, source: &str, limits: Limits, want: &str) {
    let rendered = ChatTemplate::with_limits(source, limits).and_then(|t| t.render(&Conversation::default()));
    let error = rendered.expect_err(name).to_string();
    assert!(error.contains(want) && !error.contains('\n'), "{name}: {error}");
}

#[test]
fn hostile_templates_are_stopped() {
    let budget = "exceeded its budget of 1000000 units of work";
    let repeat = |body: &str| {
        format!(
            "{{% set ns = namespace(x=[1], s='aaaaaaaa') %}}{{% for i in range(60) %}}{body}{{% endfor %}}"
        )
    };
    let shared = repeat("{% set ns.x = [ns.x, ns.x] %}");
    for (name, source, want) in [
        (
            "nested loops",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            budget,
        ),
        ("a string doubled", &repeat("{% set ns.s = ns.s ~ ns.s %}"), budget),
        ("a string multiplied", "{{ 'a' * 100000000000 }}", budget),
        ("a long range", "{{ range(100000000000) | list }}", "range has too many elements"),
        ("endless recursion", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion limit"),
        ("lists that share, as JSON", &(shared.clone() + "{{ ns.x | tojson }}"), budget),
        ("lists that share, printed", &(shared.clone() + "{{ ns.x }}"), budget),
        ("lists that share, as a string", &(shared.clone() + "{{ ns.x | string }}"), budget),
        ("deep parentheses", &("{{ ".to_owned() + &"(".repeat(100_000)), "recursion"),
        ("no template", "{% if %}", "syntax error"),
        ("another file", "{% include '/etc/passwd' %}", "template not found"),
        (
            "an exception",
            "{{ raise_exception('roles must alternate') }}",
            "refuses the conversation: roles must alternate",
        ),
        ("an unknown date", "{{ strftime_now('%Q') }}", "unknown directive %Q"),
    ] {
        check_stopped(name, source, Limits::default(), want);
    }
}

/// Values and expressions nested far deeper than a thread's usual stack: dropping them recurses as well.
#[test]
fn deep_nesting_overflows_no_stack() {
    let deep = "{% set ns = namespace(x=[1]) %}{% for j in range(999) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
    check_stopped("in a loop", deep, Limits::default(), "exceeded its budget");
    let written_out = "{% set x = 1 %}".to_owned() + &"{% set x=[x] %}".repeat(500_000);
    check_stopped("written out", &written_out, Limits::default(), "exceeded its budget");
    let shallow = deep.replace("999", "100");
    for tail in ["{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x | string }}"] {
        check_stopped(tail, &(shallow.clone() + tail), Limits::default(), "nested deeper than 128");
    }
    let long_sum = "{{ 1".to_owned() + &"+1".repeat(200_000) + " }}";
    assert_eq!(ChatTemplate::new(&long_sum).unwrap().render(&Conversation::default()).unwrap(), "200001");
}

#[test]
fn output_and_time_are_limited() {
    let limits = Limits { output: 10, ..Limits::default() };
    check_stopped("output", "{{ 'abcdefghijk' }}", limits, "wrote more than 10 bytes");
    assert_eq!(
        ChatTemplate::with_limits("{{ 'abcdefghij' }}", limits)
            .unwrap()
            .render(&Conversation::default())
            .unwrap(),
        "abcdefghij"
    );
    // Comparing costs minijinja no fuel: 2^40 comparisons, abandoned. Not 2^60, so that the thread ends some day.
    let compare = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}";
    let limits = Limits { time: Duration::from_millis(100), ..Limits::default() };
    check_stopped("time", compare, limits, "was not done after 100ms");
    // What was abandoned holds its thread, and there are so many and no more.
    let limits = Limits { time: Duration::from_millis(50), threads: 2, ..limits };
    let template = ChatTemplate::with_limits(compare, limits).unwrap();
    for want in ["was not done", "was not done", "being rendered 2 times already"] {
        let error = template.render(&Conversation::default()).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

/// The default limits leave room: 3,000 messages, 2 MB.
#[test]
fn long_conversations_fit() {
    let template = ChatTemplate::new(&fs::read_to_string(data().join("chatml.jinja")).unwrap()).unwrap();
    let message = |i: usize| serde_json::json!({"role": if i.is_multiple_of(2) { "user" } else { "assistant" }, "content": "word ".repeat(140)});
    let conversation = Conversation { messages: (0..3000).map(message).collect(), ..Default::default() };
    assert!(template.render(&conversation).unwrap().len() > 2_000_000);
}

#[test]
fn a_file_without_template_is_refused() {
    let error = ChatError::Missing.to_string();
    assert!(error.starts_with("tokenizer.chat_template: missing") && error.contains("--raw"), "{error}");
}
