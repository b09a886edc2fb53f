//! Chat completions over HTTP with the model that ships.

mod client;

use client::{get, post, start};
use serde_json::{Value as Json, json};

fn body(more: Json) -> Json {
    let mut body = json!({
        "model": "tally-rust", "messages": [{ "role": "user", "content": "fn main() {\n" }],
        "max_tokens": 24, "seed": 7,
    });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

#[test]
fn whole_and_streamed() {
    let server = start();
    let whole = post(&server, "/v1/chat/completions", &body(json!({})));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    let text = whole["choices"][0]["message"]["content"].as_str().expect("text").to_owned();
    assert!(!text.is_empty());
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["usage"]["completion_tokens"], 24);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["seed"], 7);

    let streamed = post(
        &server,
        "/v1/chat/completions",
        &body(json!({ "stream": true, "stream_options": { "include_usage": true } })),
    );
    let (events, done) = streamed.events();
    assert!(done, "{}", streamed.body);
    let pieces = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), text, "the same bits, in pieces");
    assert_eq!(events.last().expect("events")["usage"]["completion_tokens"], 24);
    assert!(events.len() > 10, "it came in pieces: {}", events.len());
    assert_eq!(get(&server, "/health").json()["status"], "ok");
    server.stop();
}

/// The beginning of a conversation is found again, whatever was asked in between.
#[test]
fn beginnings_are_kept() {
    let server = start();
    let turn = |role: &str, content: String| json!({ "role": role, "content": content });
    let long = "use std::fmt;\n".repeat(40);
    let ask = |messages: Json| {
        let answer = post(&server, "/v1/chat/completions", &body(json!({ "messages": messages }))).json();
        let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
        let prompt = answer["usage"]["prompt_tokens"].as_u64().expect("a number");
        (answer["choices"][0]["message"]["content"].as_str().expect("text").to_owned(), prompt, cached)
    };
    let first = json!([turn("user", long.clone())]);
    let (text, prompt, cached) = ask(first.clone());
    assert_eq!(cached, 0);
    // Side requests, as agents send them.
    for i in 0..20 {
        ask(json!([turn("user", format!("title {i} ").repeat(30))]));
    }
    let (again, _, cached) = ask(first);
    assert_eq!(again, text, "the same bits from the cache");
    assert_eq!(cached, (prompt - 1) / 64 * 64);
    let (_, more, cached) =
        ask(json!([turn("user", long), turn("assistant", text), turn("user", "go on".into())]));
    assert!(cached >= (prompt - 1) / 64 * 64 && cached < more, "{cached} of {more}");
    server.stop();
}
