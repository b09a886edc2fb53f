//! Spans of requests, as a collector gets them.

mod client;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use client::{Shape, post, raw, request, served, start_with};
use serde_json::{Value as Json, json};
use server::{Options, Server};

/// A collector: what it is sent.
fn collector() -> (String, Receiver<Json>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    let (send, sent) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.expect("a connection"));
            let Some(body) = body(&mut stream) else { continue };
            if send.send(body).is_err() {
                break;
            }
            let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
            stream.get_mut().write_all(answer).expect("it reads");
        }
    });
    (address, sent)
}

fn body(stream: &mut BufReader<TcpStream>) -> Option<Json> {
    let (mut first, mut length) = (None, 0);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        if line.trim().is_empty() {
            break;
        }
        first.get_or_insert(line);
    }
    assert_eq!(first.as_deref().map(str::trim), Some("POST /v1/traces HTTP/1.1"));
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("the body");
    Some(serde_json::from_slice(&body).expect("JSON"))
}

fn start(collector: String) -> Server {
    let options = Options { collector: Some(collector), ..Options::default() };
    start_with(served(Shape::default(), |cpu| Box::new(cpu)), options)
}

/// The value of an attribute.
fn fact<'a>(of: &'a Json, name: &str) -> &'a Json {
    let all = of["attributes"].as_array().expect("attributes");
    let found = all.iter().find(|fact| fact["key"] == name).unwrap_or_else(|| panic!("no {name}: {of}"));
    let value = found["value"].as_object().expect("a value");
    value.values().next().expect("of some kind")
}

/// An integer, which JSON's mapping of protocol buffers may write as text.
fn number(value: &Json) -> i64 {
    value.as_i64().unwrap_or_else(|| value.as_str().and_then(|text| text.parse().ok()).expect("a number"))
}

#[test]
fn what_a_collector_gets() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let (address, sent) = collector();
    let server = start(address);
    let body = json!({ "prompt": "fn main() {", "n": 2, "max_tokens": 5, "stream": true, "seed": 1, "ignore_eos": true });
    let headers = [("traceparent", &*format!("00-{TRACE}-00f067aa0ba902b7-01")), ("x-request-id", "one")];
    let answer = raw(server.address(), &request("POST", "/v1/completions", &headers, &body.to_string()));
    assert_eq!(answer.status, 200);
    let refused = post(&server, "/v1/completions", &json!({ "prompt": "", "max_tokens": 1 }));
    assert_eq!(refused.status, 400);
    server.stop();

    let batches: Vec<Json> = sent.try_iter().collect();
    let each = |name: &'static str| move |of: &Json| of[name].as_array().expect("a list").clone();
    let of_resource = batches.iter().flat_map(each("resourceSpans"));
    let resources: Vec<Json> = of_resource.collect();
    assert_eq!(fact(&resources[0]["resource"], "service.name"), "tally");
    let spans: Vec<Json> =
        resources.iter().flat_map(each("scopeSpans")).flat_map(|scope| each("spans")(&scope)).collect();
    assert_eq!(spans.len(), 4, "two requests, two choices: {spans:?}");

    let of_request = |id: i64| {
        let is = |span: &&Json| span["kind"] == 2 && number(fact(span, "http.response.status_code")) == id;
        spans.iter().find(is).expect("a span for each request")
    };
    let root = of_request(200);
    assert_eq!(root["name"], "POST /v1/completions");
    assert_eq!(
        (root["traceId"].as_str(), root["parentSpanId"].as_str()),
        (Some(TRACE), Some("00f067aa0ba902b7"))
    );
    assert_eq!(fact(root, "tally.request.id"), "one");
    let choices: Vec<&Json> = spans.iter().filter(|span| span["parentSpanId"] == root["spanId"]).collect();
    assert_eq!(choices.len(), 2);
    let time = |of: &Json, name: &str| number(&of[name]);
    for choice in choices {
        assert_eq!((choice["name"].as_str(), choice["traceId"].as_str()), (Some("generate"), Some(TRACE)));
        assert_eq!(number(fact(choice, "gen_ai.usage.output_tokens")), 5);
        assert!(number(fact(choice, "gen_ai.usage.input_tokens")) > 0);
        assert_eq!(fact(choice, "tally.outcome"), "length");
        let events = choice["events"].as_array().expect("events");
        let names: Vec<&str> = events.iter().filter_map(|event| event["name"].as_str()).collect();
        assert_eq!(names, ["begun", "first token"]);
        let mut moments = vec![time(choice, "startTimeUnixNano")];
        moments.extend(events.iter().map(|event| time(event, "timeUnixNano")));
        moments.push(time(choice, "endTimeUnixNano"));
        assert!(moments.is_sorted(), "{moments:?}");
        assert!(time(root, "startTimeUnixNano") <= moments[0] && moments[3] <= time(root, "endTimeUnixNano"));
    }
    assert_ne!(of_request(400)["traceId"], TRACE, "a request without a trace begins one");
}

/// Nobody waits for a collector that is not there.
#[test]
fn without_a_collector() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let gone = format!("http://{}", listener.local_addr().expect("an address"));
    drop(listener);
    let server = start(gone);
    let answer = post(&server, "/v1/completions", &json!({ "prompt": "fn main() {", "max_tokens": 3 }));
    assert_eq!(answer.status, 200);
    let start = Instant::now();
    server.stop();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}
