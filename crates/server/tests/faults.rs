//! What is promised when something goes wrong: in the engine, in the numbers, in what clients send.

mod client;
#[path = "../../engine/tests/over_cpu/mod.rs"]
mod over_cpu;

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use client::{Answer, Shape, get, metric, post, raw, read, request, served, start, start_with, until};
use cpu::Cpu;
use model::{Backend, Buffer, Fault, Model, Site, Stage, Step};
use over_cpu::{Ahead, over_cpu};
use serde_json::{Value as Json, json};
use server::{Options, Server};

/// A token that no test's prompt has by chance; as a prompt's first it plants the fault.
const POISON: u32 = 4000;

/// What happens to a sequence that begins with the poison.
#[derive(Clone, Copy, PartialEq)]
enum What {
    Panic,
    DeviceFault,
    /// The hidden state of a middle layer becomes NaN.
    Nan,
    /// One value of it is another, in its last bit.
    Off,
}

struct Faulty {
    cpu: Cpu,
    what: What,
    /// Rows of the step that are poisoned.
    rows: Vec<usize>,
    /// Blocks of poisoned sequences: a poisoned sequence is known by its first block.
    first_blocks: Vec<u32>,
}

impl Backend for Faulty {
    over_cpu!();
    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        for row in &step.rows {
            let first = step.tables[row.sequence as usize][0];
            if row.position == 0 {
                self.first_blocks.retain(|&block| block != first);
                if row.token == POISON {
                    self.first_blocks.push(first);
                }
            }
        }
        let poisoned = |row: &model::Row| self.first_blocks.contains(&step.tables[row.sequence as usize][0]);
        self.rows = step.rows.iter().enumerate().filter(|(_, row)| poisoned(row)).map(|(i, _)| i).collect();
        self.cpu.begin(step)
    }
    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.cpu.run(site)?;
        if site != (Site { stage: Stage::AttnOut, layer: Some(3) }) || self.rows.is_empty() {
            return Ok(());
        }
        match self.what {
            What::Panic => panic!("planted"),
            What::DeviceFault => Err(Fault::Device { site, source: "planted".into() }),
            What::Off => {
                let mut x = self.cpu.read(Buffer::X)?;
                let hidden = self.cpu.model().config.hidden;
                self.rows.iter().for_each(|&row| x[row * hidden] = x[row * hidden].next_up());
                self.cpu.write(Buffer::X, &x)
            }
            What::Nan => {
                let mut x = self.cpu.read(Buffer::X)?;
                let hidden = self.cpu.model().config.hidden;
                self.rows.iter().for_each(|&row| x[row * hidden] = f32::NAN);
                self.cpu.write(Buffer::X, &x)
            }
        }
    }
    fn logits(&mut self) -> Result<&[f32], Fault> {
        self.cpu.logits()
    }
}

fn faulty(what: What) -> Server {
    let wrap =
        move |cpu| Box::new(Faulty { cpu, what, rows: vec![], first_blocks: vec![] }) as Box<dyn Backend>;
    start_with(served(Shape::default(), wrap), Options::default())
}

/// As [`faulty`], of a backend that chooses tokens itself.
fn faulty_ahead(what: What) -> Server {
    let wrap = move |cpu| {
        let faulty = Faulty { cpu, what, rows: vec![], first_blocks: vec![] };
        Box::new(Ahead::new(faulty, 16, Arc::default())) as Box<dyn Backend>
    };
    start_with(served(Shape::default(), wrap), Options::default())
}

fn poisoned(stream: bool) -> Json {
    let ids: Vec<u32> = std::iter::once(POISON).chain(300..430).collect();
    json!({ "prompt": ids, "max_tokens": 4, "seed": 1, "stream": stream })
}

fn healthy(max_tokens: usize) -> Json {
    json!({ "prompt": "fn main() {", "max_tokens": max_tokens, "seed": 1, "ignore_eos": true })
}

fn text(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["choices"][0]["text"].as_str().expect("text").to_owned()
}

#[test]
fn nan_fails_its_request_alone() {
    for server in [faulty(What::Nan), faulty_ahead(What::Nan)] {
        check_nan(server);
    }
}

fn check_nan(server: Server) {
    let want = text(&post(&server, "/v1/completions", &healthy(200)));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| post(&server, "/v1/completions", &healthy(200)));
        for i in 0..3 {
            let failed = post(&server, "/v1/completions", &poisoned(false));
            assert_eq!(failed.status, 500, "{}", failed.body);
            let error = &failed.json()["error"];
            assert_eq!(error["code"], "numeric_fault");
            let message = error["message"].as_str().expect("text");
            assert!(message.contains("NaN"), "{message}");
            // Not every fault in a row is examined: that takes time from others.
            assert!(i > 0 || message.contains("blk.3.attn_out.x"), "{message}");
        }
        assert_eq!(text(&other.join().expect("answered")), want, "who shared the batch");
    });
    assert_eq!(metric(&server, "tally_numeric_faults_total"), 3.0);
    assert!(metric(&server, "tally_kv_blocks_quarantined") >= 3.0);
    // In a stream: an error, no answer, and no end that looks like one.
    let streamed = post(&server, "/v1/completions", &poisoned(true));
    let (events, done) = streamed.events();
    assert!(!done, "{}", streamed.body);
    assert_eq!(events.last().expect("an error")["error"]["code"], "numeric_fault");
    assert!(events.iter().all(|event| event["choices"].is_null()), "nothing was said: {}", streamed.body);
    assert_eq!(get(&server, "/health").status, 200, "the process lives");
    assert_eq!(text(&post(&server, "/v1/completions", &healthy(200))), want);
    server.stop();
}

#[test]
fn a_panic_fails_what_runs_and_no_more() {
    for what in [What::Panic, What::DeviceFault] {
        let server = faulty(what);
        let want = text(&post(&server, "/v1/completions", &healthy(8)));
        for _ in 0..5 {
            let failed = post(&server, "/v1/completions", &poisoned(false));
            assert_eq!(
                (failed.status, &failed.json()["error"]["code"]),
                (500, &json!("engine_fault")),
                "{}",
                failed.body
            );
            assert!(failed.body.contains("planted"), "{}", failed.body);
            until("it is loaded again", || get(&server, "/health").status == 200);
            assert_eq!(text(&post(&server, "/v1/completions", &healthy(8))), want, "the next request works");
        }
        assert_eq!(metric(&server, "tally_engine_failures_total"), 5.0);
        server.stop();
    }
}

#[test]
fn an_engine_that_cannot_be_made_is_told_of() {
    let made = Arc::new(AtomicUsize::new(0));
    let mut served = served(Shape::default(), |cpu| Box::new(cpu));
    let (good, count) = (served.factory.clone(), made.clone());
    served.factory = Arc::new(move || match count.fetch_add(1, Ordering::Relaxed) {
        0 | 1 => good().map(|_| panic!("no memory")),
        _ => Err("no such device".into()),
    });
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let server = Server::start(listener, served, Options::default()).expect("it starts");
    assert!(!server.wait_until_ready(Duration::from_secs(60)));
    assert_eq!(made.load(Ordering::Relaxed), 3);
    let health = get(&server, "/health");
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("failed")));
    assert!(health.body.contains("no such device"), "{}", health.body);
    assert_eq!(post(&server, "/v1/completions", &healthy(1)).status, 503);
    server.stop();
}

/// What is sent, the status that is promised, and a word of the message.
#[test]
fn malformed_requests() {
    let server = start();
    let chat = "/v1/chat/completions";
    let say = |more: &str| {
        format!(r#"{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1{more}}}"#)
    };
    let deep = format!(r#"{{"messages": {}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let long = format!(r#"{{"prompt": "{}", "max_tokens": 1}}"#, "word ".repeat(100_000));
    let tool = |tool: &str| say(&format!(r#", "tools": [{tool}]"#));
    let cases: Vec<(&str, &str, String, u16, &str)> = vec![
        ("POST", chat, "{".into(), 400, "no JSON"),
        ("POST", chat, "".into(), 400, "no JSON"),
        ("POST", chat, "[1]".into(), 400, "expected"),
        ("POST", chat, r#"{"messages": 3}"#.into(), 400, "messages"),
        ("POST", chat, r#"{"messages": []}"#.into(), 400, "messages"),
        ("POST", chat, r#"{"messages": [{"role": "user"}]}"#.into(), 400, "messages[0]"),
        ("POST", chat, r#"{"messages": [{"role": "king", "content": ""}]}"#.into(), 400, "king"),
        (
            "POST",
            chat,
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#.into(),
            400,
            "image_url",
        ),
        ("POST", chat, say(r#", "temperature": 1e400"#), 400, "number"),
        ("POST", chat, say(r#", "temperature": 1e300"#), 400, "temperature"),
        ("POST", chat, say(r#", "temperature": -1"#), 400, "temperature"),
        ("POST", chat, say(r#", "top_p": 0"#), 400, "top_p"),
        ("POST", chat, say(r#", "n": 0"#), 400, "n"),
        ("POST", chat, say(r#", "n": 1000000"#), 400, "n"),
        ("POST", chat, say(r#", "n": 99999999999999999999999"#), 400, "n"),
        ("POST", chat, say(r#", "seed": 1.5"#), 400, "seed"),
        ("POST", chat, say(r#", "stop": """#), 400, "stop"),
        ("POST", chat, say(&format!(r#", "stop": ["{}"]"#, "x".repeat(2000))), 400, "stop"),
        ("POST", chat, say(&format!(r#", "stop": [{}"x"]"#, r#""x","#.repeat(40))), 400, "stop"),
        ("POST", chat, say(r#", "logit_bias": {"x": 1}"#), 400, "logit_bias"),
        ("POST", chat, say(r#", "logit_bias": {"99999": 1}"#), 400, "logit_bias"),
        ("POST", chat, say(r#", "logit_bias": {"1": 1e30}"#), 400, "logit_bias"),
        ("POST", chat, say(r#", "logprobs": true, "top_logprobs": 1000"#), 400, "top_logprobs"),
        ("POST", chat, say(r#", "response_format": {"type": "poem"}"#), 400, "poem"),
        (
            "POST",
            chat,
            say(r#", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}"#),
            400,
            "response_format",
        ),
        ("POST", chat, say(r#", "guided_regex": "(""#), 400, "response_format"),
        ("POST", chat, say(r#", "guided_grammar": "start: nothing""#), 400, "response_format"),
        ("POST", chat, say(&format!(r#", "guided_regex": "{}""#, "a".repeat(300_000))), 400, "bytes"),
        ("POST", chat, say(r#", "tool_choice": "required""#), 400, "tool_choice"),
        (
            "POST",
            chat,
            say(r#", "tool_choice": {"type": "function", "function": {"name": "x"}}"#),
            400,
            "tool_choice",
        ),
        ("POST", chat, tool(r#"{"type": "browser"}"#), 400, "tools[0]"),
        ("POST", chat, tool(r#"{"type": "function", "function": {"name": "a b"}}"#), 400, "tools[0]"),
        ("POST", chat, tool(r#"{"type": "function", "function": {"name": "<tool_call>"}}"#), 400, "tools[0]"),
        ("POST", chat, deep, 400, "recursion"),
        ("POST", "/v1/completions", long, 400, "context"),
        ("POST", "/v1/completions", r#"{"prompt": ""}"#.into(), 400, "empty"),
        ("POST", "/v1/completions", r#"{"prompt": [99999999]}"#.into(), 400, "token"),
        ("POST", "/v1/completions", r#"{"prompt": [-1]}"#.into(), 400, "prompt"),
        ("POST", "/v1/completions", r#"{"prompt": "a", "max_tokens": 0}"#.into(), 400, "max_tokens"),
        (
            "POST",
            "/v1/messages",
            r#"{"messages": [{"role": "user", "content": "a"}]}"#.into(),
            400,
            "max_tokens",
        ),
        ("POST", "/v1/messages", r#"{"max_tokens": 1, "messages": []}"#.into(), 400, "messages"),
        (
            "POST",
            "/v1/messages",
            r#"{"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}"#.into(),
            400,
            "image",
        ),
        ("POST", "/v1/responses", r#"{"input": 3}"#.into(), 400, "input"),
        (
            "POST",
            "/v1/responses",
            r#"{"input": "a", "previous_response_id": "r"}"#.into(),
            400,
            "previous_response_id",
        ),
        ("POST", "/tokenize", r#"{}"#.into(), 400, "content"),
        ("POST", "/detokenize", r#"{"tokens": [99999]}"#.into(), 400, "tokens"),
        ("GET", chat, "".into(), 405, "method"),
        ("POST", "/health", "".into(), 405, "method"),
        ("GET", "/nowhere", "".into(), 404, "route"),
        ("GET", "/v1/models/other", "".into(), 404, "other"),
    ];
    for (method, path, body, status, word) in cases {
        let answer = raw(server.address(), &request(method, path, &[], &body));
        let shown: String = body.chars().take(120).collect();
        assert_eq!(answer.status, status, "{method} {path} {shown}: {}", answer.body);
        let error = answer.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert!(error.contains(word), "{method} {path} {shown}: {word:?} is not in {error:?}");
        let anthropics = answer.json()["type"] == "error";
        assert_eq!(anthropics, path.starts_with("/v1/messages"), "{path}: {}", answer.body);
        assert!(!error.contains('\n') && error.len() < 400, "{path}: {error}");
    }
    assert!(!text(&post(&server, "/v1/completions", &healthy(2))).is_empty(), "the next request works");
    assert_eq!(metric(&server, "tally_engine_failures_total"), 0.0);
    server.stop();
}

#[test]
fn malformed_connections() {
    let options = Options { body: 4096, read_timeout: Duration::from_millis(400), ..Options::default() };
    let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), options);
    let head = |length: usize| {
        format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n")
    };
    let open = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(server.address()).expect("the server listens");
        stream.write_all(bytes).expect("it reads");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        stream
    };
    // Too large, told at once; not UTF-8; no HTTP.
    let large = read(&mut BufReader::new(open((head(5000) + &"x".repeat(5000)).as_bytes())));
    assert_eq!((large.status, &large.json()["error"]["code"]), (413, &json!("body_too_large")));
    let wrong = [head(13).as_bytes(), b"{\"prompt\":\"\xFF\x80"].concat();
    assert_eq!(read(&mut BufReader::new(open(&wrong))).status, 400);
    assert_eq!(read(&mut BufReader::new(open(b"nonsense\r\n\r\n"))).status, 400);
    // A body that is cut short, and one that comes slowly.
    let mut cut = open((head(100) + "{").as_bytes());
    cut.shutdown(std::net::Shutdown::Write).expect("half closed");
    is_closed(&mut cut);
    let slow = read(&mut BufReader::new(open((head(100) + "{").as_bytes())));
    assert_eq!((slow.status, &slow.json()["error"]["code"]), (408, &json!("body_timeout")));
    // A head that never ends: the connection is closed.
    is_closed(&mut open(b"POST / HTTP/1.1\r\nhost: x\r\nx: "));
    // Nor does one keep its place that says nothing, at once or after an answer.
    is_closed(&mut open(b""));
    let mut silent = open(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!(read(&mut BufReader::new(&silent)).status, 200);
    is_closed(&mut silent);
    assert!(!text(&post(&server, "/v1/completions", &healthy(2))).is_empty(), "the next request works");
    server.stop();
}

/// The server ends the connection, whatever it says before, and long before the client's patience does.
#[track_caller]
fn is_closed(stream: &mut TcpStream) {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
}

#[test]
fn timeouts_and_stopping() {
    let options = Options { request_timeout: Duration::from_millis(300), ..Options::default() };
    let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), options);
    let late = post(&server, "/v1/completions", &healthy(2000));
    assert_eq!((late.status, &late.json()["error"]["code"]), (504, &json!("timeout")), "{}", late.body);
    server.stop();

    // What runs when the server is told to stop comes to its end, and nothing new is taken.
    let server = start();
    let address = server.address();
    let running = std::thread::spawn(move || {
        raw(address, &request("POST", "/v1/completions", &[], &healthy(60).to_string()))
    });
    until("it runs", || metric(&server, "tally_running") == 1.0);
    server.stop();
    assert!(!text(&running.join().expect("answered")).is_empty());
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");

    // For so long and no longer.
    let options = Options { drain: Duration::from_millis(50), ..Options::default() };
    let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), options);
    let address = server.address();
    let running = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).expect("the server listens");
        stream
            .write_all(&request("POST", "/v1/completions", &[], &healthy(2000).to_string()))
            .expect("it reads");
        let mut rest = String::new();
        let _ = stream.read_to_string(&mut rest);
        rest
    });
    until("it runs", || metric(&server, "tally_running") == 1.0);
    let start = std::time::Instant::now();
    server.stop();
    assert!(start.elapsed() < Duration::from_secs(5));
    let rest = running.join().expect("it ended");
    assert!(rest.is_empty() || rest.contains("shutting_down"), "{rest}");
}

/// Every other answer is computed again, and compared in every bit of its logits.
#[test]
fn answers_are_verified() {
    for (what, differs) in [(None, false), (Some(What::Off), true)] {
        let mut both = served(Shape::default(), |cpu| Box::new(cpu));
        let second = served(Shape { blocks: 40, rows: 32 }, move |cpu| match what {
            Some(what) => {
                Box::new(Faulty { cpu, what, rows: vec![], first_blocks: vec![] }) as Box<dyn Backend>
            }
            None => Box::new(cpu),
        });
        both.verify = Some((second.factory, 2));
        let server = start_with(both, Options::default());
        for i in 0..6 {
            let mut body = poisoned(i % 3 == 0);
            body["guided_regex"] = if i % 2 == 0 { "[a-z]{9}".into() } else { Json::Null };
            assert_eq!(post(&server, "/v1/completions", &body).status, 200);
        }
        until("they are compared", || metric(&server, "tally_verified_total") == 3.0);
        let mismatches = metric(&server, "tally_verify_mismatches_total");
        assert_eq!(mismatches, if differs { 3.0 } else { 0.0 });
        let health = get(&server, "/health");
        assert_eq!(health.status, 200);
        assert_eq!(health.json()["alarm"].is_string(), differs, "{}", health.body);
        server.stop();
    }
}
