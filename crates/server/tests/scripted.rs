//! What a model says, word for word, and how each protocol tells it: reasoning, text and calls apart, nothing of the markup in
//! any of them; whole and streamed alike, however the words are cut into tokens.

mod client;
#[path = "../../engine/tests/over_cpu/mod.rs"]
mod over_cpu;

use std::sync::{Arc, Mutex};

use client::{Shape, post, served, start_with};
use engine::{Specials, Tokenizer};
use model::{Backend, Row};
use over_cpu::Bent;
use serde_json::{Value as Json, json};
use server::{Options, Server};

/// What is to be said, and the position of its first token, once that is known.
#[derive(Default)]
struct Script {
    tokens: Vec<u32>,
    first: Option<u32>,
}

/// What a client is told.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    reasoning: String,
    content: String,
    calls: Vec<(String, Json)>,
    /// Whether the answer ended to have tools called.
    calling: bool,
}

/// The text of a field, nothing if there is none.
fn text(value: &Json) -> &str {
    value.as_str().unwrap_or_default()
}

fn parsed(arguments: &str) -> Json {
    serde_json::from_str(arguments).unwrap_or_else(|error| panic!("{error}: {arguments}"))
}

const TOOLS: [&str; 2] = ["paint", "note"];

fn schema() -> Json {
    json!({ "type": "object", "properties": { "text": { "type": "string" }, "size": { "type": "integer" } } })
}

type Ask = fn(&Server, u32) -> Seen;

/// A body of chat completions; the `number` keeps prompts apart.
fn chat(number: u32) -> Json {
    let tool =
        |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": schema() } });
    json!({
        "messages": [{ "role": "user", "content": format!("say {number}") }], "max_tokens": 500, "temperature": 0,
        "tools": TOOLS.map(tool),
    })
}

fn chat_whole(server: &Server, number: u32) -> Seen {
    let answer = post(server, "/v1/chat/completions", &chat(number)).json();
    let choice = &answer["choices"][0];
    let message = &choice["message"];
    let call = |call: &Json| {
        (text(&call["function"]["name"]).to_owned(), parsed(text(&call["function"]["arguments"])))
    };
    Seen {
        reasoning: text(&message["reasoning_content"]).to_owned(),
        content: text(&message["content"]).to_owned(),
        calls: message["tool_calls"].as_array().into_iter().flatten().map(call).collect(),
        calling: choice["finish_reason"] == "tool_calls",
    }
}

fn chat_streamed(server: &Server, number: u32) -> Seen {
    let mut body = chat(number);
    body["stream"] = true.into();
    let (events, done) = post(server, "/v1/chat/completions", &body).events();
    assert!(done);
    let mut seen = Seen::default();
    let mut calls: Vec<(String, String)> = Vec::new();
    for choice in events.iter().map(|event| &event["choices"][0]) {
        let delta = &choice["delta"];
        seen.reasoning.push_str(text(&delta["reasoning_content"]));
        seen.content.push_str(text(&delta["content"]));
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().expect("an index") as usize;
            if index == calls.len() {
                calls.push((text(&call["function"]["name"]).to_owned(), String::new()));
            }
            calls[index].1.push_str(text(&call["function"]["arguments"]));
        }
        seen.calling |= choice["finish_reason"] == "tool_calls";
    }
    seen.calls = calls.into_iter().map(|(name, arguments)| (name, parsed(&arguments))).collect();
    seen
}

fn messages(number: u32) -> Json {
    let tool = |name: &str| json!({ "name": name, "input_schema": schema() });
    json!({
        "messages": [{ "role": "user", "content": format!("say {number}") }], "max_tokens": 500, "temperature": 0,
        "tools": TOOLS.map(tool),
    })
}

fn messages_whole(server: &Server, number: u32) -> Seen {
    let answer = post(server, "/v1/messages", &messages(number)).json();
    let mut seen = Seen { calling: answer["stop_reason"] == "tool_use", ..Seen::default() };
    for block in answer["content"].as_array().expect("blocks") {
        match text(&block["type"]) {
            "thinking" => seen.reasoning.push_str(text(&block["thinking"])),
            "text" => seen.content.push_str(text(&block["text"])),
            "tool_use" => seen.calls.push((text(&block["name"]).to_owned(), block["input"].clone())),
            other => panic!("{other}"),
        }
    }
    seen
}

fn messages_streamed(server: &Server, number: u32) -> Seen {
    let mut body = messages(number);
    body["stream"] = true.into();
    let (events, _) = post(server, "/v1/messages", &body).events();
    assert_eq!(events[events.len() - 1]["type"], "message_stop");
    let mut seen = Seen::default();
    let mut calls: Vec<(String, String)> = Vec::new();
    for event in &events {
        let block = &event["content_block"];
        if block["type"] == "tool_use" {
            calls.push((text(&block["name"]).to_owned(), String::new()));
        }
        let delta = &event["delta"];
        seen.reasoning.push_str(text(&delta["thinking"]));
        seen.content.push_str(text(&delta["text"]));
        if let Some(arguments) = delta["partial_json"].as_str() {
            calls.last_mut().expect("a call has begun").1.push_str(arguments);
        }
        seen.calling |= delta["stop_reason"] == "tool_use";
    }
    seen.calls = calls.into_iter().map(|(name, arguments)| (name, parsed(&arguments))).collect();
    seen
}

fn responses(number: u32) -> Json {
    let tool = |name: &str| json!({ "type": "function", "name": name, "parameters": schema() });
    json!({
        "input": format!("say {number}"), "max_output_tokens": 500, "temperature": 0, "tools": TOOLS.map(tool),
    })
}

fn of_response(response: &Json) -> Seen {
    assert_eq!(response["status"], "completed", "{response}");
    let mut seen = Seen::default();
    for item in response["output"].as_array().expect("items") {
        match text(&item["type"]) {
            "reasoning" => seen.reasoning.push_str(text(&item["content"][0]["text"])),
            "message" => seen.content.push_str(text(&item["content"][0]["text"])),
            "function_call" => {
                seen.calls.push((text(&item["name"]).to_owned(), parsed(text(&item["arguments"]))));
            }
            other => panic!("{other}"),
        }
    }
    // This protocol has no word for it.
    seen.calling = !seen.calls.is_empty();
    seen
}

fn responses_whole(server: &Server, number: u32) -> Seen {
    of_response(&post(server, "/v1/responses", &responses(number)).json())
}

fn responses_streamed(server: &Server, number: u32) -> Seen {
    let mut body = responses(number);
    body["stream"] = true.into();
    let (events, _) = post(server, "/v1/responses", &body).events();
    let seen = of_response(&events[events.len() - 1]["response"]);
    let of = |kind: &str| -> String {
        events.iter().filter(|event| event["type"] == kind).map(|event| text(&event["delta"])).collect()
    };
    assert_eq!(of("response.reasoning_text.delta"), seen.reasoning);
    assert_eq!(of("response.output_text.delta"), seen.content);
    let arguments = of("response.function_call_arguments.delta");
    let calls = serde_json::Deserializer::from_str(&arguments).into_iter::<Json>();
    let calls: Vec<Json> = calls.collect::<Result<_, _>>().expect("JSON, one after the other");
    assert_eq!(calls, seen.calls.iter().map(|(_, arguments)| arguments.clone()).collect::<Vec<_>>());
    seen
}

const PROTOCOLS: [(&str, Ask); 6] = [
    ("chat", chat_whole),
    ("chat, streamed", chat_streamed),
    ("messages", messages_whole),
    ("messages, streamed", messages_streamed),
    ("responses", responses_whole),
    ("responses, streamed", responses_streamed),
];

/// A server of a model whose template has `form` in it, its script, its tokenizer and the token that ends a turn.
fn scripted(form: &str) -> (Server, Arc<Mutex<Script>>, Arc<Tokenizer>, u32) {
    let script = Arc::new(Mutex::new(Script::default()));
    let wrap = {
        let script = script.clone();
        move |cpu| {
            let script = script.clone();
            // Says what it is told to, to one request at a time.
            let bend = move |row: &Row, logits: &mut [f32]| {
                let mut script = script.lock().expect("nobody panics with it");
                let place = row.position + 1;
                let first = *script.first.get_or_insert(place);
                if let Some(&token) = script.tokens.get((place - first) as usize) {
                    logits[token as usize] = 1000.0;
                }
            };
            Box::new(Bent::new(cpu, bend)) as Box<dyn Backend>
        }
    };
    let mut served = served(Shape::default(), wrap);
    served.template = served.template.map(|(template, source)| (template, source + form));
    let tokenizer = served.tokenizer.clone();
    let end = *tokenizer.eos().last().expect("an end");
    (start_with(served, Options::default()), script, tokenizer, end)
}

/// Such a model says each text; each is told as it should be.
fn check(form: &str, says: &[(&str, Seen)]) {
    let (server, script, tokenizer, end) = scripted(form);
    let mut number = 0;
    for (said, want) in says {
        let whole = tokenizer.encode(said, Specials::AsText).expect("text");
        // The same, a character at a time.
        let encode = |c: char| tokenizer.encode(c.encode_utf8(&mut [0; 4]), Specials::AsText).expect("text");
        let single: Vec<u32> = said.chars().flat_map(encode).collect();
        for mut tokens in [whole, single] {
            tokens.push(end);
            for (protocol, ask) in PROTOCOLS {
                *script.lock().expect("nobody panics with it") =
                    Script { tokens: tokens.clone(), first: None };
                number += 1;
                assert_eq!(ask(&server, number), *want, "{protocol}, {} tokens: {said}", tokens.len());
            }
        }
    }
    server.stop();
}

/// Where no calls are wanted, or no tools were offered, nothing is one.
#[test]
fn no_calls_where_none_are_wanted() {
    let (server, script, tokenizer, end) = scripted("</think><function=name>");
    let said = "I would.\n<tool_call>\n<function=paint>\n</function>\n</tool_call>";
    let mut tokens = tokenizer.encode(said, Specials::AsText).expect("text");
    tokens.push(end);
    for (number, more) in [(1, json!({ "tool_choice": "none" })), (2, json!({ "tools": [] }))] {
        *script.lock().expect("nobody panics with it") = Script { tokens: tokens.clone(), first: None };
        let mut body = chat(number);
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let answer = post(&server, "/v1/chat/completions", &body).json();
        let choice = &answer["choices"][0];
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(said), &json!("stop")));
        assert_eq!(choice["message"]["tool_calls"], Json::Null);
    }
    server.stop();
}

/// A call that the limit cuts off is told as far as it came, and by no protocol as one that is to be made.
#[test]
fn a_call_cut_off() {
    let (server, script, tokenizer, _) = scripted("<function=name>");
    let said = "<tool_call>\n<function=note>\n<parameter=text>\nhalf a file";
    let tokens = tokenizer.encode(said, Specials::AsText).expect("text");
    let set = || {
        let mut script = script.lock().expect("nobody panics with it");
        *script = Script { tokens: tokens.clone(), first: None };
    };
    for (path, mut body, limit) in [
        ("/v1/chat/completions", chat(1), "max_tokens"),
        ("/v1/messages", messages(2), "max_tokens"),
        ("/v1/responses", responses(3), "max_output_tokens"),
    ] {
        body[limit] = tokens.len().into();
        set();
        let answer = post(&server, path, &body).json();
        let (why, want) = match path {
            "/v1/chat/completions" => (&answer["choices"][0]["finish_reason"], json!("length")),
            "/v1/messages" => (&answer["stop_reason"], json!("max_tokens")),
            _ => (&answer["incomplete_details"]["reason"], json!("max_output_tokens")),
        };
        assert_eq!(*why, want, "{answer}");
        if path == "/v1/responses" {
            let item = &answer["output"][0];
            assert_eq!((&item["type"], &item["status"]), (&json!("function_call"), &json!("incomplete")));
        }
        let calls = &answer["choices"][0]["message"]["tool_calls"];
        if let Some(arguments) = calls[0]["function"]["arguments"].as_str() {
            assert!(serde_json::from_str::<Json>(arguments).is_err(), "it looks whole: {arguments}");
        }
    }
    server.stop();
}

fn seen(reasoning: &str, content: &str, calls: &[(&str, Json)]) -> Seen {
    Seen {
        reasoning: reasoning.into(),
        content: content.into(),
        calls: calls.iter().map(|(name, arguments)| (name.to_string(), arguments.clone())).collect(),
        calling: !calls.is_empty(),
    }
}

#[test]
fn as_qwen3_coder_writes() {
    let paint = "<tool_call>\n<function=paint>\n<parameter=text>\nrot, grün → 😀\n</parameter>\n<parameter=size>\n3\n\
                 </parameter>\n</function>\n</tool_call>";
    let painted = ("paint", json!({ "text": "rot, grün → 😀", "size": 3 }));
    let tags = "<tool_call>\n<function=note>\n<parameter=text>\n</tool_call> and <function=paint> are tags\n</parameter>\n\
                </function>\n</tool_call>";
    let noted = ("note", json!({ "text": "</tool_call> and <function=paint> are tags" }));
    check(
        "</think><function=name>",
        &[
            ("Yes, naïvely: 1 → 2.", seen("", "Yes, naïvely: 1 → 2.", &[])),
            ("<think>\nwhy?\n</think>\n\nBecause.", seen("why?", "Because.", &[])),
            (&format!("I paint.\n\n{paint}\n{tags}"), seen("", "I paint.", &[painted.clone(), noted])),
            (&format!("<think>\nhm\n{paint}\n</think>\n\nDone."), seen("hm", "Done.", &[painted])),
            (
                "A <tool_call> is a tag, </think> is one.",
                seen("", "A <tool_call> is a tag, </think> is one.", &[]),
            ),
            ("a < b && c<function", seen("", "a < b && c<function", &[])),
        ],
    );
}

#[test]
fn as_hermes_writes() {
    let paint = r#"<tool_call>
{"name": "paint", "arguments": {"text": "</tool_call> \"x\" é", "size": 3}}
</tool_call>"#;
    let painted = ("paint", json!({ "text": "</tool_call> \"x\" é", "size": 3 }));
    check(
        "</think>",
        &[
            (paint, seen("", "", std::slice::from_ref(&painted))),
            (
                &format!("<think>\nso\n</think>\n\nTwice.\n{paint}\n{paint}"),
                seen("so", "Twice.", &[painted.clone(), painted]),
            ),
            ("<tool_call>\nno call\n</tool_call>", seen("", "<tool_call>\nno call\n</tool_call>", &[])),
        ],
    );
}
