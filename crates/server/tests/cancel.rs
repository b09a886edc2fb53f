//! A client that hangs up is noticed while it waits, while its prompt is read and while its answer is written; nobody else
//! notices anything.

mod client;
#[path = "../../engine/tests/over_cpu/mod.rs"]
mod over_cpu;

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use client::{Shape, metric, post, request, served, start_with, until};
use cpu::Cpu;
use model::{Backend, Buffer, Fault, Model, Site, Step};
use over_cpu::{Ahead, over_cpu};
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

/// A backend that stops in the middle of a step until it may go on, and counts rows.
struct Halting {
    cpu: Cpu,
    rows: Arc<AtomicUsize>,
    /// From so many rows on a step stands still, while this is true.
    halts: Arc<AtomicBool>,
}

/// Rows after which a step stands still.
const HALT: usize = 100;

impl Backend for Halting {
    over_cpu!();
    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        let rows = self.rows.fetch_add(step.rows.len(), Ordering::SeqCst) + step.rows.len();
        while rows > HALT && self.halts.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        self.cpu.begin(step)
    }
    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.cpu.run(site)
    }
    fn logits(&mut self) -> Result<&[f32], Fault> {
        self.cpu.logits()
    }
}

/// Within one chunk: whoever hangs up while a step is computed has no rows in the next one, be it of a prompt or of an answer.
#[test]
fn within_a_step() {
    let long = "fn main() { let x = 1; }\n".repeat(140);
    for (prompt, of, chooses) in [
        (long.as_str(), "a prompt", false),
        ("fn main() {", "an answer", false),
        ("fn main() {", "an answer that the backend goes on with by itself", true),
    ] {
        let (rows, halts) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
        let wrap = {
            let (rows, halts) = (rows.clone(), halts.clone());
            move |cpu| {
                let halting = Halting { cpu, rows: rows.clone(), halts: halts.clone() };
                match chooses {
                    true => Box::new(Ahead::new(halting, 8, Arc::default())) as Box<dyn Backend>,
                    false => Box::new(halting),
                }
            }
        };
        let engine = EngineLimits { interleave: Duration::from_millis(1), ..EngineLimits::default() };
        let server = start_with(
            served(Shape { blocks: 128, rows: 16 }, wrap),
            Options { engine, ..Options::default() },
        );
        let stream = ask(&server, &body(prompt, 1900));
        until("a step stands still", || rows.load(Ordering::SeqCst) > HALT);
        let before = rows.load(Ordering::SeqCst);
        drop(stream);
        // Long enough for the connection's end to be noticed, which the engine looks for between two steps.
        thread::sleep(Duration::from_millis(500));
        assert_eq!(rows.load(Ordering::SeqCst), before, "it stands still");
        halts.store(false, Ordering::SeqCst);
        until("it is given up", || metric(&server, "tally_cancelled_total") == 1.0 && is_idle(&server));
        // One row more may be computed, to keep what was read of the prompt.
        let more = rows.load(Ordering::SeqCst) - before;
        assert!(more <= 1, "{more} rows of {of} after its client had gone");
        server.stop();
    }
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
