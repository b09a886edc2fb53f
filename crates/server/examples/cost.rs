//! What the server costs by itself: it serves a backend that computes nothing and takes a set time for every step, as a GPU
//! does, and clients read streams over HTTP. Whatever is missing of the backend's own pace is the server's.
//!
//! ```sh
//! cargo run --release -p server --example cost -- 1 8 32 64       # numbers of streams, each measured
//! cargo run --release -p server --example cost -- serve 1 64      # serves, for tools/gpu/serve_speed.py --at PORT
//! ```
//!
//! Prints, for each number of streams: the backend's pace and what arrived, in tokens a second; and the processor time that
//! the server's threads took for each token, in microseconds.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use engine::{ChatTemplate, SamplerParams, Tokenizer};
use model::{Backend, Buffer, Chooser, Chosen, Fault, Lane, Model, Site, Stage, Step};
use serde_json::json;
use server::{EngineLimits, Options, Served, Server};

/// Tokens of a prompt and of an answer, as BENCH.md measures them.
const PROMPT: usize = 512;
const ANSWER: usize = 128;
/// Positions of a stream.
const CONTEXT: usize = PROMPT + ANSWER + 64;
/// The most streams.
const STREAMS: usize = 64;

/// Milliseconds of a step of so many rows, about those of an H200 with the shape of Qwen3-30B-A3B (BENCH.md).
const STEPS: [(usize, f64); 6] = [(1, 1.4), (8, 5.0), (32, 9.7), (64, 13.0), (512, 25.0), (2048, 70.0)];

fn cost(rows: usize) -> Duration {
    let mut pairs = STEPS.windows(2).map(|pair| (pair[0], pair[1]));
    let (low, high) = pairs.rfind(|(low, _)| low.0 <= rows).unwrap_or((STEPS[0], STEPS[1]));
    let part = (rows - low.0) as f64 / (high.0 - low.0) as f64; // exact: small numbers
    Duration::from_secs_f64((low.1 + part * (high.1 - low.1)) * 1e-3)
}

/// A backend by the clock: letters for every sequence.
struct Clock {
    model: Arc<Model>,
    logits: Vec<f32>,
    rows: usize,
    /// When the device has done all that it was asked for.
    free: Instant,
    lanes: usize,
    /// What was chosen, and when that is known.
    chosen: VecDeque<Instant>,
    drawn: u32,
    letters: Arc<[u32]>,
}

impl Clock {
    fn spend(&mut self, rows: usize) -> Instant {
        let start = self.free.max(Instant::now());
        self.free = start + cost(rows);
        start
    }
}

fn sleep_until(then: Instant) {
    thread::sleep(then.saturating_duration_since(Instant::now()));
}

impl Backend for Clock {
    fn model(&self) -> &Model {
        &self.model
    }
    fn max_rows(&self) -> usize {
        2048
    }
    fn context(&self) -> usize {
        CONTEXT
    }
    fn kv_blocks(&self) -> usize {
        (STREAMS + 1) * CONTEXT.div_ceil(model::BLOCK)
    }
    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.rows = step.rows.len();
        let vocab = self.model.config.vocab;
        self.logits.clear();
        self.logits.resize(step.logits.len() * vocab, 0.0);
        for row in self.logits.chunks_exact_mut(vocab) {
            row[self.letters[0] as usize] = 40.0;
        }
        Ok(())
    }
    fn run(&mut self, site: Site) -> Result<(), Fault> {
        if site.stage == Stage::Head {
            self.spend(self.rows);
        }
        Ok(())
    }
    fn read(&mut self, _: Buffer) -> Result<Vec<f32>, Fault> {
        Ok(self.logits.clone())
    }
    fn write(&mut self, _: Buffer, _: &[f32]) -> Result<(), Fault> {
        Ok(())
    }
    fn logits(&mut self) -> Result<&[f32], Fault> {
        sleep_until(self.free);
        Ok(&self.logits)
    }
    fn chooser(&mut self) -> Option<&mut dyn Chooser> {
        Some(self)
    }
}

impl Chooser for Clock {
    fn places(&self) -> usize {
        STREAMS * CONTEXT
    }

    fn start(&mut self, lanes: &[Lane]) -> Result<(), Fault> {
        self.lanes = lanes.len();
        self.chosen.clear();
        Ok(())
    }

    fn advance(&mut self) -> Result<(), Fault> {
        let known = self.spend(self.lanes);
        self.chosen.push_back(known);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Chosen>, Fault> {
        sleep_until(self.chosen.pop_front().expect("no more is collected than was asked for"));
        self.drawn += 1;
        let letter = self.letters[self.drawn as usize % self.letters.len()];
        Ok(vec![Chosen::Token(letter); self.lanes])
    }
}

fn serve() -> Server {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tally-rust-Q4_K_M.gguf");
    let file = gguf::File::open(&path).expect("the model ships with the repository");
    let tokenizer = Arc::new(Tokenizer::from_metadata(file.metadata()).expect("a tokenizer"));
    let template = ChatTemplate::from_metadata(file.metadata(), &tokenizer).expect("a template");
    let source = file.metadata().str("tokenizer.chat_template").expect("a template").to_owned();
    let model = Arc::new(Model::load(&file).expect("a model"));
    let is_letters = |&id: &u32| {
        tokenizer
            .token_bytes(id)
            .is_ok_and(|bytes| !bytes.is_empty() && bytes.iter().all(u8::is_ascii_lowercase))
    };
    // A vocabulary's ids are u32.
    let letters: Arc<[u32]> = (0..tokenizer.vocab_len() as u32).filter(is_letters).take(100).collect();
    let factory = move || {
        let (model, letters) = (model.clone(), letters.clone());
        let clock = Clock {
            model,
            letters,
            logits: vec![],
            rows: 0,
            free: Instant::now(),
            lanes: 0,
            chosen: VecDeque::new(),
            drawn: 0,
        };
        Ok(Box::new(clock) as Box<dyn Backend>)
    };
    let served = Served {
        name: "clock".into(),
        tokenizer,
        template: Some((template, source)),
        sampling: SamplerParams { temperature: 0.7, top_k: 20, top_p: 0.8, ..SamplerParams::default() },
        created: 0,
        factory: Arc::new(factory),
        verify: None,
        facts: json!({}),
    };
    let engine = EngineLimits { running: STREAMS, ..EngineLimits::default() };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let server =
        Server::start(listener, served, Options { engine, ..Options::default() }).expect("it starts");
    assert!(server.wait_until_ready(Duration::from_secs(60)), "{:?}", server.trouble());
    server
}

/// Asks, and says when each piece of the answer came and how many tokens were in it.
fn ask(address: SocketAddr, stream: usize, together: &Barrier) -> Vec<(Instant, usize)> {
    let prompt: Vec<usize> =
        (0..PROMPT).map(|i| 100 + (i * 31 + stream * 7919 + i * i * stream) % 1800).collect();
    let body = json!({
        "prompt": prompt, "max_tokens": ANSWER, "stream": true, "seed": stream, "temperature": 0.8, "ignore_eos": true,
    });
    let body = body.to_string();
    let mut connection = TcpStream::connect(address).expect("it listens");
    together.wait();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + &body).as_bytes()).expect("it reads");
    let (mut arrivals, mut text, mut bytes) = (vec![(Instant::now(), 0)], String::new(), [0; 1 << 16]);
    loop {
        let read = connection.read(&mut bytes).expect("it answers");
        if read == 0 {
            break arrivals;
        }
        text.push_str(&String::from_utf8_lossy(&bytes[..read]));
        let whole = text.rfind("\n\n").map_or(0, |at| at + 2);
        let events: String = text.drain(..whole).collect();
        // The last event has no text, only why the answer ended.
        let tokens = events.matches("\"text\":\"").count() - events.matches("\"text\":\"\"").count();
        if tokens > 0 {
            arrivals.push((Instant::now(), tokens));
        }
    }
}

/// Processor time of this process's threads, in microseconds, by name; those of the clients are `client`.
fn processor_time() -> BTreeMap<String, f64> {
    let mut all = BTreeMap::new();
    for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let nanoseconds =
            read("schedstat").split(' ').next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
        *all.entry(read("comm").trim().to_owned()).or_default() += nanoseconds * 1e-3;
    }
    all
}

/// Tokens a second of a stream, from the first to the last of its arrivals between two moments.
fn rate(arrivals: &[(Instant, usize)], from: Instant, until: Instant) -> f64 {
    let mut within = arrivals.iter().filter(|(at, _)| (from..=until).contains(at));
    let Some(&(first, _)) = within.next() else { return 0.0 };
    let (last, tokens) = within.fold((first, 0), |(_, sum), &(at, tokens)| (at, sum + tokens));
    // Exact: few tokens. At least a nanosecond, so that a stream without time has no rate.
    tokens as f64 / (last - first).as_secs_f64().max(1e-9)
}

fn measure(address: SocketAddr, streams: usize) {
    let together = Arc::new(Barrier::new(streams));
    let before = processor_time();
    let client = |stream| {
        let together = together.clone();
        let client = thread::Builder::new().name("client".into());
        client.spawn(move || ask(address, stream, &together)).expect("a thread")
    };
    let clients: Vec<_> = (0..streams).map(client).collect();
    let arrivals: Vec<_> = clients.into_iter().map(|client| client.join().expect("it ends")).collect();
    let after = processor_time();
    let tokens: usize = arrivals.iter().flatten().map(|(_, tokens)| tokens).sum();
    assert_eq!(tokens, streams * ANSWER, "a piece of text for every token");
    let from = arrivals.iter().map(|all| all[1].0).max().expect("a stream");
    let until = arrivals.iter().map(|all| all[all.len() - 1].0).min().expect("a stream");
    let rate: f64 = arrivals.iter().map(|all| rate(&all[1..], from, until)).sum();
    let pace = streams as f64 / cost(streams).as_secs_f64(); // exact: few streams
    let first = arrivals.iter().map(|all| all[1].0 - all[0].0).max().expect("a stream");
    println!(
        "{streams} streams: {rate:.0} of {pace:.0} tok/s ({:.1}% cost), first token after {first:.0?}",
        100.0 * (1.0 - rate / pace)
    );
    for (name, time) in after {
        let time = time - before.get(&name).copied().unwrap_or(0.0);
        if time > 0.0 && name != "client" {
            println!("    {name}: {:.1} us a token", time / tokens as f64); // exact: few tokens
        }
    }
}

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let server = serve();
    if args.first().is_some_and(|first| first == "serve") {
        println!("at http://{}", server.address());
        println!("ready");
        loop {
            thread::park();
        }
    }
    if args.is_empty() {
        args = ["1", "8", "32", "64"].map(String::from).into();
    }
    for streams in args {
        let streams = streams.parse().ok().filter(|streams| (1..=STREAMS).contains(streams));
        measure(server.address(), streams.expect("a number of streams, up to 64"));
    }
    server.stop();
}
