//! The same bits, whoever else asks: answers given under load, with too little memory for all and with others that hang up,
//! are those given alone.

mod client;
#[path = "../../engine/tests/over_cpu/mod.rs"]
mod over_cpu;

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use cpu::Cpu;
use model::Backend;
use over_cpu::{Ahead, Asked};

use client::{Shape, metric, post, request, served, start, start_with, until};
use serde_json::{Value as Json, json};
use server::{EngineLimits, Options, Server};

const SOURCES: [&str; 4] = [
    "fn main() {\n",
    "impl Iterator for Counter {\n    type Item = u32;\n\n    fn next(&mut self) -> Option<u32> {\n",
    "/// Returns the number of elements in the vector.\npub fn len(&self) -> usize {\n",
    "use std::collections::HashMap;\n\nfn count(words: &[&str]) -> HashMap<String, usize> {\n",
];

/// The `i`-th of many requests: prompts of a few tokens to some hundred, some of which begin alike, greedy and not, with
/// penalties and without.
fn question(i: usize) -> Json {
    let long = SOURCES[i % 4].repeat(1 + i % 9 * 3);
    let mut body = json!({
        "messages": [{ "role": "user", "content": long + SOURCES[i / 2 % 4] }],
        "max_tokens": 8 + i % 5 * 11, "seed": i * 7919, "logprobs": true,
    });
    match i % 3 {
        0 => body["temperature"] = 0.into(),
        1 => body["temperature"] = 1.into(),
        _ => body["presence_penalty"] = 0.5.into(),
    }
    body
}

/// What must be equal: text, reason, and every log-probability in all its digits.
fn essence(answer: &Json) -> String {
    let choice = &answer["choices"][0];
    assert!(choice.is_object(), "{answer}");
    let usage = &answer["usage"];
    format!("{choice} {} {}", usage["prompt_tokens"], usage["completion_tokens"])
}

fn ask(server: &Server, body: &Json) -> String {
    let answer = post(server, "/v1/chat/completions", body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    essence(&answer.json())
}

/// Asks in a stream, and hangs up after `pieces` of it.
fn hang_up(server: &Server, body: &Json, pieces: usize) {
    let mut body = body.clone();
    body["stream"] = true.into();
    let mut stream = TcpStream::connect(server.address()).expect("the server listens");
    stream.write_all(&request("POST", "/v1/chat/completions", &[], &body.to_string())).expect("it reads");
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    for _ in 0..8 + pieces {
        line.clear();
        if std::io::BufRead::read_line(&mut stream, &mut line).is_err() || line.is_empty() {
            break;
        }
    }
}

/// As [`question`], with an answer of several blocks.
fn long_question(i: usize) -> Json {
    let mut body = question(i);
    body["max_tokens"] = (100 + i % 5 * 50).into();
    body["ignore_eos"] = true.into();
    body
}

/// `requests` of them alone, and then all at once.
fn check(
    requests: usize,
    shape: Shape,
    running: usize,
    interleave: Duration,
    question: fn(usize) -> Json,
    wrap: impl Fn(Cpu) -> Box<dyn Backend> + Send + Sync + 'static,
) -> Server {
    let alone = start();
    let want: Vec<String> = (0..requests).map(|i| ask(&alone, &question(i))).collect();
    alone.stop();

    let engine = EngineLimits { running, waiting: 256, interleave, captures: None };
    let options = Options { engine, ..Options::default() };
    let server = start_with(served(shape, wrap), options);
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for client in 0..16 {
            let (server, want, next) = (&server, &want, &next);
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= 3 * requests {
                        break;
                    }
                    match i % 3 {
                        2 => hang_up(server, &question(i), client),
                        _ => assert_eq!(
                            ask(server, &question(i % requests)),
                            want[i % requests],
                            "request {i}"
                        ),
                    }
                }
            });
        }
    });
    until("all blocks come back", || {
        metric(&server, "tally_running") == 0.0
            && metric(&server, "tally_kv_blocks_available") == metric(&server, "tally_kv_blocks")
    });
    server
}

#[test]
fn the_same_bits_under_load() {
    let server = check(32, Shape::default(), 16, Duration::from_millis(20), question, plain);
    assert!(metric(&server, "tally_cached_tokens_total") > 0.0, "beginnings were shared");
    assert!(metric(&server, "tally_cancelled_total") > 0.0, "others hung up");
    server.stop();
}

#[test]
fn the_same_bits_with_too_little_memory() {
    // 34 blocks hold one longest context and little more.
    let server =
        check(32, Shape { blocks: 34, rows: 64 }, 12, Duration::from_millis(1), long_question, plain);
    assert!(metric(&server, "tally_preemptions_total") > 0.0, "somebody was put back");
    server.stop();
}

fn plain(cpu: Cpu) -> Box<dyn Backend> {
    Box::new(cpu)
}

/// Requests that need nothing of the logits but their choice.
fn free_question(i: usize) -> Json {
    let mut body = question(i);
    body["logprobs"] = false.into();
    body["presence_penalty"] = Json::Null;
    body["max_tokens"] = (20 + i % 5 * 31).into();
    body
}

/// As [`free_question`], but for some that need more.
fn mixed_question(i: usize) -> Json {
    if i % 5 == 4 { question(i) } else { free_question(i) }
}

#[test]
fn the_same_bits_where_the_backend_chooses() {
    for (question, most) in
        [(free_question as fn(usize) -> Json, 16), (free_question, 6), (mixed_question, 16)]
    {
        let asked = Arc::new(Asked::default());
        let wrap = {
            let asked = asked.clone();
            move |cpu| Box::new(Ahead::new(cpu, most, asked.clone())) as Box<dyn Backend>
        };
        let server = check(16, Shape::default(), 16, Duration::from_millis(20), question, wrap);
        assert!(asked.draws.load(Ordering::Relaxed) > 0, "it did choose");
        server.stop();
    }
}

#[test]
fn the_same_bits_where_the_backend_chooses_and_memory_is_short() {
    let ahead = |cpu| Box::new(Ahead::new(cpu, 16, Arc::default())) as Box<dyn Backend>;
    let long = |i| {
        let mut body = long_question(i);
        body["logprobs"] = false.into();
        body
    };
    let server = check(20, Shape { blocks: 34, rows: 64 }, 12, Duration::from_millis(1), long, ahead);
    assert!(metric(&server, "tally_preemptions_total") > 0.0, "somebody was put back");
    server.stop();
}
