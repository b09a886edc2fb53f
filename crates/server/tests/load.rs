//! The same bits, whoever else asks: answers given under load, with too little memory for all and with others that hang up,
//! are those given alone.

mod client;

use std::collections::VecDeque;
use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use cpu::Cpu;
use engine::{Sampler, SamplerParams};
use model::{Backend, Buffer, Chooser, Chosen, Fault, Lane, Model, Row, Site, Step, forward};

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

fn check(
    shape: Shape,
    running: usize,
    interleave: Duration,
    question: fn(usize) -> Json,
    wrap: fn(Cpu) -> Box<dyn Backend>,
) -> Server {
    const REQUESTS: usize = 32;
    let alone = start();
    let want: Vec<String> = (0..REQUESTS).map(|i| ask(&alone, &question(i))).collect();
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
                    if i >= 3 * REQUESTS {
                        break;
                    }
                    match i % 3 {
                        2 => hang_up(server, &question(i), client),
                        _ => assert_eq!(
                            ask(server, &question(i % REQUESTS)),
                            want[i % REQUESTS],
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
    let server = check(Shape::default(), 16, Duration::from_millis(20), question, plain);
    assert!(metric(&server, "tally_cached_tokens_total") > 0.0, "beginnings were shared");
    assert!(metric(&server, "tally_cancelled_total") > 0.0, "others hung up");
    server.stop();
}

#[test]
fn the_same_bits_with_too_little_memory() {
    // 34 blocks hold one longest context and little more.
    let server = check(Shape { blocks: 34, rows: 64 }, 12, Duration::from_millis(1), long_question, plain);
    assert!(metric(&server, "tally_preemptions_total") > 0.0, "somebody was put back");
    server.stop();
}

fn plain(cpu: Cpu) -> Box<dyn Backend> {
    Box::new(cpu)
}

/// The CPU as a backend that chooses tokens itself, a step ahead of who collects them, as a GPU does.
struct Ahead {
    cpu: Cpu,
    lanes: Vec<Lane>,
    chosen: VecDeque<Vec<Chosen>>,
}

impl Backend for Ahead {
    fn model(&self) -> &Model {
        self.cpu.model()
    }
    fn max_rows(&self) -> usize {
        self.cpu.max_rows()
    }
    fn context(&self) -> usize {
        self.cpu.context()
    }
    fn kv_blocks(&self) -> usize {
        self.cpu.kv_blocks()
    }
    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.cpu.begin(step)
    }
    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.cpu.run(site)
    }
    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        self.cpu.read(buffer)
    }
    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
        self.cpu.write(buffer, values)
    }
    fn logits(&mut self) -> Result<&[f32], Fault> {
        self.cpu.logits()
    }
    fn chooser(&mut self) -> Option<&mut dyn Chooser> {
        Some(self)
    }
}

static BURSTS: AtomicUsize = AtomicUsize::new(0);

impl Chooser for Ahead {
    fn start(&mut self, lanes: &[Lane]) -> Result<(), Fault> {
        if lanes.len() > 6 {
            return Err(Fault::Capacity { what: "a number of sequences", got: lanes.len(), limit: 6 });
        }
        BURSTS.fetch_add(1, Ordering::Relaxed);
        self.chosen.clear();
        self.lanes = lanes.to_vec();
        Ok(())
    }

    fn advance(&mut self) -> Result<(), Fault> {
        let vocab = self.cpu.model().config.vocab;
        let furthest = self.lanes.iter().map(|lane| lane.position as usize).max().expect("a lane");
        let (mut step, mut chosen) = (Step::default(), Vec::new());
        let logits = self.cpu.logits()?.to_vec();
        assert_eq!(logits.len(), self.lanes.len() * vocab, "a row for each lane");
        for (sequence, (lane, logits)) in (0..).zip(self.lanes.iter_mut().zip(logits.chunks(vocab))) {
            let choice = &lane.choice;
            let params = SamplerParams {
                temperature: choice.inverse_temperature.map_or(0.0, |t| 1.0 / t),
                top_k: choice.top_k as usize,
                top_p: choice.top_p,
                min_p: choice.min_p,
                seed: choice.seed,
                ..SamplerParams::default()
            };
            let mut sampler = Sampler::new(params).expect("valid");
            let token = sampler.sample(logits, &[], u64::from(lane.position)).expect("numbers");
            chosen.push(Chosen::Token(token));
            assert!(furthest < lane.table.len() * 64, "a place for the furthest position in every table");
            step.rows.push(Row { token, position: lane.position, sequence });
            step.tables.push(lane.table.clone());
            step.logits.push(sequence);
            lane.position += 1;
        }
        self.chosen.push_back(chosen);
        forward(&mut self.cpu, &step)
    }

    fn collect(&mut self) -> Result<Vec<Chosen>, Fault> {
        Ok(self.chosen.pop_front().expect("no more is collected than was asked for"))
    }
}

/// Requests that need nothing of the logits but their choice.
fn free_question(i: usize) -> Json {
    let mut body = question(i);
    body["logprobs"] = false.into();
    body["presence_penalty"] = Json::Null;
    body["max_tokens"] = (20 + i % 5 * 31).into();
    body
}

#[test]
fn the_same_bits_where_the_backend_chooses() {
    let ahead = |cpu| Box::new(Ahead { cpu, lanes: vec![], chosen: VecDeque::new() }) as Box<dyn Backend>;
    let server = check(Shape::default(), 16, Duration::from_millis(20), free_question, ahead);
    // Under load prompts are read all the time; with few clients the backend chooses.
    let before = BURSTS.load(Ordering::Relaxed);
    let alone = start();
    thread::scope(|scope| {
        for i in 0..3 {
            let (server, alone) = (&server, &alone);
            scope.spawn(move || {
                assert_eq!(ask(server, &free_question(i)), ask(alone, &free_question(i)), "{i}")
            });
        }
    });
    alone.stop();
    let bursts = BURSTS.load(Ordering::Relaxed) - before;
    assert!(bursts > 0, "it did choose: {before}, {bursts}");
    server.stop();
}
