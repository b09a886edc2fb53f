//! What is told without the model, and to whom: routes that answer by themselves, keys, other origins.

mod client;

use client::{Answer, Shape, get, post, raw, request, served, start, start_with};
use serde_json::{Value as Json, json};
use server::{Options, Server};

#[test]
fn what_runs_and_which_model() {
    let server = start();
    let version = get(&server, "/version").json();
    assert_eq!((&version["name"], &version["device"]), (&json!("tally"), &json!("cpu")), "{version}");
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let models = get(&server, "/v1/models").json();
    let [model] = &models["data"].as_array().expect("a list")[..] else { panic!("{models}") };
    assert_eq!((&model["id"], &model["max_model_len"]), (&json!("tally-rust"), &json!(2048)));
    assert_eq!(get(&server, "/v1/models/tally-rust").json(), *model);
    assert_eq!(get(&server, "/v1/models/other").status, 404);
    assert_eq!(get(&server, "/health").json()["status"], "ok");
    assert_eq!(get(&server, "/openapi.json").json()["openapi"].as_str().map(|v| &v[..2]), Some("3."));
    let page = get(&server, "/");
    assert!(page.body.starts_with("<!doctype html>"), "{}", page.body);
    assert!(
        page.header("content-security-policy").is_some_and(|policy| policy.contains("default-src 'none'"))
    );
    server.stop();
}

/// Every line of `/metrics` is one that Prometheus reads, and they count.
#[test]
fn metrics() {
    let server = start();
    let body = json!({ "prompt": "fn main() {", "max_tokens": 7, "seed": 1, "ignore_eos": true });
    assert_eq!(post(&server, "/v1/completions", &body).status, 200);
    let answer = get(&server, "/metrics");
    assert!(
        answer.header("content-type").is_some_and(|kind| kind.starts_with("application/openmetrics-text"))
    );
    let lines: Vec<&str> = answer.body.lines().collect();
    assert_eq!(lines.last(), Some(&"# EOF"));
    let mut described = Vec::new();
    for line in &lines[..lines.len() - 1] {
        match line.strip_prefix("# ").map(|rest| rest.split(' ').collect::<Vec<_>>()) {
            Some(words) if ["HELP", "TYPE", "UNIT"].contains(&words[0]) && words.len() > 2 => {
                described.push(words[1]);
            }
            Some(words) => panic!("{words:?}"),
            None => {
                let (name, value) = line.rsplit_once(' ').expect("a name and a number");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(described.iter().any(|known| name.starts_with(known)), "not described: {line}");
            }
        }
    }
    assert!(lines.contains(&"tally_generated_tokens_total 7"), "{}", answer.body);
    let counted = r#"tally_requests_total{route="/v1/completions",status="200"} 1"#;
    assert!(lines.contains(&counted), "{}", answer.body);
    server.stop();
}

#[test]
fn text_to_ids_and_back() {
    let server = start();
    let tokenizer = served(Shape::default(), |cpu| Box::new(cpu)).tokenizer;
    for text in ["fn main() {\n    println!(\"→ 😀\");\n}", "", "<|im_start|>user"] {
        let told = post(&server, "/tokenize", &json!({ "content": text })).json();
        let want = tokenizer.encode(text, engine::Specials::Parse).expect("text");
        assert_eq!((&told["tokens"], &told["count"]), (&json!(want), &json!(want.len())), "{text}");
        let back = post(&server, "/detokenize", &json!({ "tokens": want })).json();
        assert_eq!(back["content"], text);
        // As text, control tokens are what they are made of.
        let plain = post(&server, "/tokenize", &json!({ "content": text, "parse_special": false })).json();
        assert_eq!(plain["tokens"], json!(tokenizer.encode(text, engine::Specials::AsText).expect("text")));
    }
    server.stop();
}

/// As many tokens as the prompt of the same request has.
#[test]
fn tokens_are_counted_as_they_are_taken() {
    let server = start();
    let tool = json!({ "name": "paint", "description": "Paint.", "input_schema": { "type": "object" } });
    for more in [json!({}), json!({ "system": "Be brief." }), json!({ "tools": [tool] })] {
        let mut body = json!({ "messages": [{ "role": "user", "content": "fn main() {" }], "max_tokens": 1 });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let counted = post(&server, "/v1/messages/count_tokens", &body).json();
        let usage = &post(&server, "/v1/messages", &body).json()["usage"];
        let of = |name: &str| usage[name].as_u64().expect("a number");
        assert_eq!(counted["input_tokens"], of("input_tokens") + of("cache_read_input_tokens"), "{more}");
    }
    server.stop();
}

fn from_origin(server: &Server, method: &str, origin: &str) -> Answer {
    let address = server.address().to_string();
    let headers = [("origin", origin), ("access-control-request-method", "POST")];
    let mut text = String::from_utf8(request(method, "/v1/models", &headers, "")).expect("text");
    text = text.replace("host: localhost", &format!("host: {address}"));
    raw(server.address(), text.as_bytes())
}

/// Pages of other origins are told nothing unless their origin was named.
#[test]
fn other_origins() {
    for (allowed, asks, may) in [
        (&[] as &[&str], "https://a.example", false),
        (&["https://a.example"], "https://a.example", true),
        (&["https://a.example"], "https://b.example", false),
        (&["https://a.example"], "null", false),
    ] {
        let origins = allowed.iter().map(|&origin| origin.to_owned()).collect();
        let options = Options { origins, hosts: vec!["127.0.0.1".into()], ..Options::default() };
        let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), options);
        for method in ["GET", "OPTIONS"] {
            let answer = from_origin(&server, method, asks);
            let told = answer.header("access-control-allow-origin");
            assert_eq!(told, may.then_some(asks), "{method} from {asks}, {allowed:?} allowed");
            // A preflight is told nothing, which is a refusal to a browser.
            assert!(method == "OPTIONS" || (answer.status < 300) == may, "from {asks}: {}", answer.status);
        }
        server.stop();
    }
}

/// Errors have the shape that each protocol's clients read.
#[test]
fn shapes_of_errors() {
    let options = Options { keys: vec!["one".into()], ..Options::default() };
    let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), options);
    let check = |path: &str, key: &str, status: u16, of_anthropic: Option<&str>| {
        let answer = raw(server.address(), &request("POST", path, &[("x-api-key", key)], "{}"));
        assert_eq!(answer.status, status, "{path} {key}: {}", answer.body);
        let body = answer.json();
        let error = &body["error"];
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
        match of_anthropic {
            Some(kind) => {
                assert_eq!((&body["type"], &error["type"]), (&json!("error"), &json!(kind)), "{body}")
            }
            None => {
                let fields: Vec<&String> = error.as_object().expect("an object").keys().collect();
                assert_eq!(fields, ["message", "type", "param", "code"], "{body}");
                assert_eq!(body["type"], Json::Null);
            }
        }
    };
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"] {
        check(path, "one", 400, None);
        check(path, "two", 401, None);
    }
    check("/v1/messages", "one", 400, Some("invalid_request_error"));
    check("/v1/messages", "two", 401, Some("authentication_error"));
    server.stop();
}
