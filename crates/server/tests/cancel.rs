//! A client that hangs up is noticed while it waits, while its prompt is read and while its answer is written; nobody else
//! notices anything.

mod client;

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use client::{Shape, metric, post, request, served, start_with, until};
use serde_json::{Value as Json, json};
use server::{EngineLimits, Options, Server};

/// A server whose steps read 16 rows of a prompt at a time, `running` requests at once.
fn slow(running: usize) -> Server {
    let shape = Shape { blocks: 128, rows: 16 };
    let engine = EngineLimits { running, waiting: 4, interleave: Duration::from_millis(1), captures: None };
    start_with(served(shape, |cpu| Box::new(cpu)), Options { engine, ..Options::default() })
}

fn body(prompt: &str, max_tokens: usize) -> Json {
    json!({ "prompt": prompt, "max_tokens": max_tokens, "stream": true, "ignore_eos": true, "seed": 1 })
}

fn ask(server: &Server, body: &Json) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).expect("the server listens");
    stream.write_all(&request("POST", "/v1/completions", &[], &body.to_string())).expect("it reads");
    stream
}

/// Waits for the first token.
fn first_token(stream: &TcpStream) {
    let mut stream = BufReader::new(stream);
    let mut seen = String::new();
    let mut byte = [0];
    while !seen.contains("data: ") {
        stream.read_exact(&mut byte).expect("a token comes");
        seen.push(char::from(byte[0]));
    }
}

fn is_idle(server: &Server) -> bool {
    metric(server, "tally_running") == 0.0 && metric(server, "tally_waiting") == 0.0
}

#[test]
fn while_decoding() {
    let server = slow(4);
    let stream = ask(&server, &body("fn main() {", 1900));
    first_token(&stream);
    drop(stream);
    until("it is given up", || metric(&server, "tally_cancelled_total") == 1.0 && is_idle(&server));
    assert!(metric(&server, "tally_generated_tokens_total") < 1000.0, "long before its end");
    server.stop();
}

#[test]
fn while_its_prompt_is_read() {
    let server = slow(4);
    let long = "fn main() { let x = 1; }\n".repeat(140);
    let stream = ask(&server, &body(&long, 8));
    until("some blocks are read", || metric(&server, "tally_prompt_rows_total") >= 320.0);
    let rows = metric(&server, "tally_prompt_rows_total");
    drop(stream);
    until("it is given up", || metric(&server, "tally_cancelled_total") == 1.0 && is_idle(&server));
    let rows = metric(&server, "tally_prompt_rows_total") - rows;
    let prompt = metric(&server, "tally_prompt_tokens_total");
    assert!(rows < prompt / 2.0, "{rows} of {prompt} rows were computed all the same");
    assert_eq!(metric(&server, "tally_generated_tokens_total"), 0.0);

    // What was read is there for whoever asks again, and changes nothing.
    let mut again = body(&long, 8);
    again["stream"] = false.into();
    let answer = post(&server, "/v1/completions", &again).json();
    assert!(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() >= Some(256), "{answer}");
    let fresh = slow(4);
    let want = post(&fresh, "/v1/completions", &again).json();
    assert_eq!(want["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(answer["choices"], want["choices"]);
    fresh.stop();
    server.stop();
}

#[test]
fn while_it_waits_and_when_the_queue_is_full() {
    let server = slow(1);
    let running = ask(&server, &body("fn main() {", 1900));
    first_token(&running);
    let waiting: Vec<TcpStream> = (0..4).map(|_| ask(&server, &body("fn f() {", 4))).collect();
    until("four wait", || metric(&server, "tally_waiting") == 4.0);

    let refused = post(&server, "/v1/completions", &body("fn g() {", 4));
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    let seconds: u64 = refused.header("retry-after").expect("a time").parse().expect("seconds");
    assert!((1..=30).contains(&seconds));

    drop(waiting);
    until("they are given up", || metric(&server, "tally_cancelled_total") == 4.0);
    assert_eq!(metric(&server, "tally_running"), 1.0, "who runs goes on");
    drop(running);
    until("nobody is left", || is_idle(&server));
    let start = Instant::now();
    let next = post(&server, "/v1/completions", &body("fn h() {", 2));
    assert_eq!(next.status, 200);
    assert!(start.elapsed() < Duration::from_secs(5));
    server.stop();
}

/// Who asks and then reads nothing: the answer stands still once the connection's buffers are full, and is given up.
#[test]
fn while_nobody_reads() {
    let shape = Shape { blocks: 128, rows: 64 };
    let options = Options { write_timeout: Duration::from_millis(500), ..Options::default() };
    let server = start_with(served(shape, |cpu| Box::new(cpu)), options);
    // Some kilobytes a token: more than the system's buffers take.
    let body = json!({
        "messages": [{ "role": "user", "content": "fn main() {" }], "n": 4, "max_tokens": 1500, "stream": true,
        "ignore_eos": true, "seed": 1, "logprobs": true, "top_logprobs": 20,
    });
    let mut stream = TcpStream::connect(server.address()).expect("the server listens");
    stream.write_all(&request("POST", "/v1/chat/completions", &[], &body.to_string())).expect("it reads");
    until("they run", || metric(&server, "tally_running") == 4.0);
    until("they are given up", || metric(&server, "tally_cancelled_total") == 4.0 && is_idle(&server));
    assert!(metric(&server, "tally_generated_tokens_total") < 5900.0, "before their end");
    // Whoever reads, however slowly at times, gets the whole of it.
    let mut slow =
        ask(&server, &json!({ "prompt": "fn main() {", "max_tokens": 300, "stream": true, "seed": 1 }));
    std::thread::sleep(Duration::from_millis(1500));
    let mut text = String::new();
    slow.read_to_string(&mut text).expect("text");
    assert!(text.contains("[DONE]"), "{text}");
    drop(stream);
    server.stop();
}
