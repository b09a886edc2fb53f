//! A server on a free port with the model that ships, or with a backend that misbehaves, and an HTTP client of a few lines:
//! what goes over the wire is in the test's hand.

#![allow(dead_code, reason = "each test uses a part")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cpu::Cpu;
use engine::{ChatTemplate, SamplerParams, Tokenizer};
use model::{Backend, Model};
use serde_json::{Value as Json, json};
use server::{Options, Served, Server};

/// The longest that any answer may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The model that ships.
pub(crate) fn file() -> gguf::File {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tally-rust-Q4_K_M.gguf");
    gguf::File::open(&path).expect("the model ships with the repository")
}

/// How the backend of a test is.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// KV blocks of 64 positions.
    pub(crate) blocks: usize,
    /// Rows of a step.
    pub(crate) rows: usize,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape { blocks: 128, rows: 256 }
    }
}

/// What is served, its backend wrapped by `wrap`.
pub(crate) fn served(shape: Shape, wrap: impl Fn(Cpu) -> Box<dyn Backend> + Send + Sync + 'static) -> Served {
    let file = file();
    let tokenizer = Arc::new(Tokenizer::from_metadata(file.metadata()).expect("a tokenizer"));
    let template = ChatTemplate::from_metadata(file.metadata(), &tokenizer).expect("a template");
    let source = file.metadata().str("tokenizer.chat_template").expect("a template").to_owned();
    let model = Arc::new(Model::load(&file).expect("a model"));
    let factory = move || {
        let options = cpu::Options {
            threads: 2,
            kv_blocks: shape.blocks,
            max_rows: shape.rows,
            ..cpu::Options::for_context(2048)
        };
        Cpu::new(model.clone(), &options).map(&wrap).map_err(|error| error.to_string())
    };
    Served {
        name: "tally-rust".into(),
        tokenizer,
        template: Some((template, source)),
        sampling: SamplerParams { temperature: 0.7, top_k: 20, top_p: 0.8, ..SamplerParams::default() },
        created: 1_700_000_000,
        factory: Arc::new(factory),
        verify: None,
        facts: json!({ "device": "cpu" }),
    }
}

/// A server that is ready.
pub(crate) fn start_with(served: Served, options: Options) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let server = Server::start(listener, served, options).expect("it starts");
    assert!(server.wait_until_ready(PATIENCE), "{:?}", server.trouble());
    server
}

/// A server that is ready, with everything as usual.
pub(crate) fn start() -> Server {
    start_with(served(Shape::default(), |cpu| Box::new(cpu)), Options::default())
}

/// A response.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Json {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of all events but `[DONE]`, and whether that came last.
    #[track_caller]
    pub(crate) fn events(&self) -> (Vec<Json>, bool) {
        let data: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let done = data.last() == Some(&"[DONE]");
        let events = data.iter().filter(|line| **line != "[DONE]");
        (events.map(|line| serde_json::from_str(line).expect("JSON")).collect(), done)
    }
}

/// Sends `request` as it stands, and reads the response to its end.
pub(crate) fn raw(address: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(request).expect("the server reads");
    read(&mut BufReader::new(stream))
}

/// Reads one response.
pub(crate) fn read(stream: &mut impl BufRead) -> Answer {
    let mut line = String::new();
    stream.read_line(&mut line).expect("a status line");
    let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status: {line:?}"));
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).expect("headers");
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let find = |wanted: &str| headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone());
    let mut body = Vec::new();
    if let Some(length) = find("content-length") {
        body.resize(length.parse().expect("a length"), 0);
        stream.read_exact(&mut body).expect("the body");
    } else if find("transfer-encoding").as_deref() == Some("chunked") {
        while let Some(chunk) = chunk(stream) {
            body.extend(chunk);
        }
    }
    Answer { status, headers, body: String::from_utf8(body).expect("UTF-8") }
}

/// The next chunk of a response's body; none at its end.
pub(crate) fn chunk(stream: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    stream.read_line(&mut line).expect("a chunk's length");
    let length = usize::from_str_radix(line.trim(), 16).expect("a chunk's length");
    let mut chunk = vec![0; length + 2];
    stream.read_exact(&mut chunk).expect("a chunk");
    chunk.truncate(length);
    (length > 0).then_some(chunk)
}

/// The head and body of a request.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str(&format!("content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    text.into_bytes()
}

/// `POST` with a JSON body.
pub(crate) fn post(server: &Server, path: &str, body: &Json) -> Answer {
    raw(server.address(), &request("POST", path, &[], &body.to_string()))
}

/// `GET`.
pub(crate) fn get(server: &Server, path: &str) -> Answer {
    raw(server.address(), &request("GET", path, &[], ""))
}

/// The number of a metric without labels.
#[track_caller]
pub(crate) fn metric(server: &Server, name: &str) -> f64 {
    let text = get(server, "/metrics").body;
    let line = text.lines().find(|line| line.split(' ').next() == Some(name));
    let value = line.and_then(|line| line.split(' ').nth(1)?.parse().ok());
    value.unwrap_or_else(|| panic!("no metric {name}:\n{text}"))
}

/// Waits until `holds`.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(30), "it never came to be: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
