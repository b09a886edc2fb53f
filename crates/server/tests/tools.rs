//! Calls of tools and answers held to a form, by the model that ships: it has learned neither, so whatever it writes rightly
//! it was made to write.

mod client;
#[path = "../../engine/tests/over_cpu/mod.rs"]
mod over_cpu;

use client::{Shape, post, served, start, start_with};
use engine::Specials;
use model::{Backend, Row};
use over_cpu::Bent;
use serde_json::{Value as Json, json};
use server::{Options, Server};

fn body(more: Json) -> Json {
    let mut body = json!({
        "messages": [{ "role": "user", "content": "fn main() {\n" }], "max_tokens": 400, "seed": 3, "temperature": 1,
    });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

fn tools() -> Json {
    let tool = |name: &str, properties: Json, required: Json| {
        json!({ "type": "function", "function": { "name": name, "description": "d", "parameters": {
            "type": "object", "properties": properties, "required": required, "additionalProperties": false,
        } } })
    };
    json!([
        tool(
            "paint",
            json!({ "colour": { "enum": ["red", "green"] }, "size": { "type": "integer", "minimum": 1, "maximum": 9 } }),
            json!(["colour", "size"])
        ),
        tool("note", json!({ "text": { "type": "string", "maxLength": 12 } }), json!(["text"])),
    ])
}

/// The calls of an answer, whole and streamed alike.
#[track_caller]
fn calls(server: &Server, more: Json) -> Vec<(String, Json)> {
    let body = body(more);
    let whole = post(server, "/v1/chat/completions", &body);
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
    assert_eq!(choice["message"]["content"], Json::Null, "nothing of the markup leaks: {whole}");
    let parsed = |arguments: &str| serde_json::from_str::<Json>(arguments).expect("JSON");
    let calls: Vec<(String, Json)> = choice["message"]["tool_calls"]
        .as_array()
        .expect("calls")
        .iter()
        .map(|call| {
            let of = |name: &str| call["function"][name].as_str().expect("text");
            assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")));
            (of("name").to_owned(), parsed(of("arguments")))
        })
        .collect();

    let mut streaming = body;
    streaming["stream"] = true.into();
    let (events, done) = post(server, "/v1/chat/completions", &streaming).events();
    assert!(done);
    let mut streamed: Vec<(String, String)> = Vec::new();
    let mut pieces = 0;
    for event in &events {
        let delta = &event["choices"][0]["delta"];
        assert!(delta["content"].as_str().unwrap_or_default().is_empty(), "{event}");
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().expect("an index") as usize;
            if let Some(name) = call["function"]["name"].as_str() {
                assert_eq!(index, streamed.len());
                streamed.push((name.to_owned(), String::new()));
            }
            streamed[index].1.push_str(call["function"]["arguments"].as_str().expect("text"));
            pieces += 1;
        }
    }
    assert!(pieces > 2 * streamed.len(), "arguments come in pieces: {pieces}");
    let streamed: Vec<(String, Json)> =
        streamed.iter().map(|(name, text)| (name.clone(), parsed(text))).collect();
    assert_eq!(streamed, calls);
    calls
}

#[track_caller]
fn check_call((name, arguments): &(String, Json)) {
    match name.as_str() {
        "paint" => {
            assert!(["red", "green"].iter().any(|colour| arguments["colour"] == *colour), "{arguments}");
            assert!(arguments["size"].as_u64().is_some_and(|size| (1..=9).contains(&size)), "{arguments}");
        }
        "note" => assert!(arguments["text"].is_string(), "{arguments}"),
        other => panic!("no such tool: {other}"),
    }
}

/// In both forms in which models write calls.
#[test]
fn forced_calls() {
    for form in ["", "<function=name>"] {
        let mut served = served(Shape::default(), |cpu| Box::new(cpu));
        served.template = served.template.map(|(template, source)| (template, source + form));
        let server = start_with(served, Options::default());
        let one = json!({ "tools": tools(), "tool_choice": "required", "parallel_tool_calls": false });
        let found = calls(&server, one);
        assert_eq!(found.len(), 1, "{found:?}");
        check_call(&found[0]);
        for name in ["paint", "note"] {
            let named = json!({ "type": "function", "function": { "name": name } });
            let found = calls(&server, json!({ "tools": tools(), "tool_choice": named }));
            assert_eq!((found.len(), found[0].0.as_str()), (1, name));
            check_call(&found[0]);
        }
        server.stop();
    }
}

/// A call that the model begins by itself is held to the schemas where a tool is strict, in both forms, streaming and not.
#[test]
fn strict_calls() {
    for form in ["", "<function=name>"] {
        let plain = served(Shape::default(), |cpu| Box::new(cpu));
        let tag = plain.tokenizer.encode("\n<tool_call>", Specials::Parse).expect("text");
        assert_eq!(tag.len(), 6, "one token and then the tag: {tag:?}");
        let wrap = move |cpu| {
            let tag = tag.clone();
            // Writes the tag wherever it may begin a line of its answer, which the model would not by itself.
            let bend = move |row: &Row, logits: &mut [f32]| {
                for pair in tag.windows(2).filter(|pair| pair[0] == row.token) {
                    logits[pair[1] as usize] += 1000.0;
                }
            };
            Box::new(Bent::new(cpu, bend)) as Box<dyn Backend>
        };
        let mut served = served(Shape::default(), wrap);
        served.template = plain.template.map(|(template, source)| (template, source + form));
        let server = start_with(served, Options::default());
        for seed in 0..3 {
            let one = json!({ "tools": strict(true), "parallel_tool_calls": false, "seed": seed });
            let found = calls(&server, one);
            assert_eq!(found.len(), 1, "{found:?}");
            check_call(&found[0]);
        }
        // Without, what follows the tag is whatever the model writes, which is no call.
        let free = post(&server, "/v1/chat/completions", &body(json!({ "tools": strict(false) }))).json();
        assert_eq!(free["choices"][0]["message"]["tool_calls"], Json::Null, "{free}");
        server.stop();
    }
}

/// The tools, strict or not.
fn strict(strict: bool) -> Json {
    let mut tools = tools();
    for tool in tools.as_array_mut().expect("tools") {
        tool["function"]["strict"] = strict.into();
    }
    tools
}

/// What an answer is held to, and whether a text satisfies it.
#[test]
fn answers_held_to_a_form() {
    let server = start();
    let json_of =
        |text: &str| serde_json::from_str::<Json>(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let schema = json!({
        "type": "object", "required": ["kind", "parts"], "additionalProperties": false,
        "properties": {
            "kind": { "enum": ["a", "b"] },
            "parts": { "type": "array", "minItems": 2, "maxItems": 3, "items": { "type": "boolean" } },
        },
    });
    type Holds<'a> = &'a dyn Fn(&str) -> bool;
    let is_schema: Holds<'_> = &|text| {
        let value = json_of(text);
        let parts = value["parts"].as_array().expect("an array");
        (value["kind"] == "a" || value["kind"] == "b")
            && (2..=3).contains(&parts.len())
            && parts.iter().all(Json::is_boolean)
    };
    let cases: Vec<(Json, Holds<'_>)> = vec![
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "n", "strict": true, "schema": schema } } }),
            is_schema,
        ),
        (json!({ "guided_json": schema }), is_schema),
        (json!({ "structured_outputs": { "json": schema } }), is_schema),
        (json!({ "guided_regex": "[0-9]{3}-[a-f]{2}" }), &|text| {
            let (digits, letters) = text.split_once('-').expect("a dash");
            digits.len() == 3 && letters.len() == 2 && letters.chars().all(|c| ('a'..='f').contains(&c))
        }),
        (json!({ "guided_grammar": "start: \"x\" (\"y\" | \"z\") \"!\"" }), &|text| {
            text == "xy!" || text == "xz!"
        }),
        (json!({ "structured_outputs": { "choice": ["yes", "no"] } }), &|text| text == "yes" || text == "no"),
    ];
    for (more, holds) in &cases {
        let answer = post(&server, "/v1/chat/completions", &body(more.clone()));
        assert_eq!(answer.status, 200, "{}", answer.body);
        let answer = answer.json();
        let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        assert!(holds(text), "{more}: {text}");
    }
    // Any object, if it comes to its end.
    let more = json!({ "response_format": { "type": "json_object" }, "max_tokens": 900, "temperature": 0 });
    let answer = post(&server, "/v1/chat/completions", &body(more)).json();
    let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(text.starts_with('{'), "{text}");
    if answer["choices"][0]["finish_reason"] == "stop" {
        assert!(json_of(text).is_object());
    }
    server.stop();
}

/// With tools that may be called, an answer is a call or has its form, whichever form that is.
#[test]
fn a_form_or_a_call() {
    let server = start();
    let tokenizer = served(Shape::default(), |cpu| Box::new(cpu)).tokenizer;
    let first = |text: &str| tokenizer.encode(text, Specials::Parse).expect("text")[0].to_string();
    for (form, holds) in [
        (
            json!({ "guided_regex": "[0-9]{2}/[a-f]{2}" }),
            (|text| text.len() == 5 && text.as_bytes()[2] == b'/') as fn(&str) -> bool,
        ),
        (json!({ "guided_grammar": "start: \"x{\" (\"y\" | \"z\") \"!\"" }), |text| {
            text == "x{y!" || text == "x{z!"
        }),
        (json!({ "structured_outputs": { "choice": ["yes", "no"] } }), |text| text == "yes" || text == "no"),
    ] {
        let mut form = form;
        form["tools"] = tools();
        form["logit_bias"] = json!({ first("<"): -100 });
        let answer = post(&server, "/v1/chat/completions", &body(form.clone())).json();
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}"));
        assert!(holds(text), "{form}: {text}");
        form["logit_bias"] = json!({ first("<"): 100 });
        let answer = post(&server, "/v1/chat/completions", &body(form.clone())).json();
        let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
        assert!(call["name"].is_string(), "{form}: {answer}");
    }
    server.stop();
}

/// A form that the answer is held to does not change with the company.
#[test]
fn several_choices() {
    let server = start();
    let body = body(json!({ "n": 3, "guided_regex": "[a-z ]{20}", "logprobs": true }));
    let together = post(&server, "/v1/chat/completions", &body).json();
    let choices = together["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 3);
    for (i, choice) in choices.iter().enumerate() {
        let mut alone = body.clone();
        alone["n"] = 1.into();
        alone["seed"] = (3 + i).into();
        let alone = post(&server, "/v1/chat/completions", &alone).json();
        assert_eq!(alone["choices"][0]["message"], choice["message"], "the seed plus {i}");
        assert_eq!(alone["choices"][0]["logprobs"], choice["logprobs"]);
    }
    assert_ne!(choices[0]["message"], choices[1]["message"]);
    server.stop();
}
