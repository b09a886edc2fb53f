//! `tally serve` as a process: what it refuses, what it answers, and how it ends.

mod models;
mod process;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStderr, Command, Stdio};

use process::{Directory, command, tally};

/// A server that is ready, at a port of its own.
struct Served {
    process: Child,
    address: String,
    stderr: BufReader<ChildStderr>,
}

fn serve(args: &[&str]) -> Served {
    let mut command = command();
    command.args(["serve", "--device", "cpu", "--port", "0"]).args(args).stderr(Stdio::piped());
    let mut process = command.spawn().expect("it starts");
    let mut stderr = BufReader::new(process.stderr.take().expect("piped"));
    let mut address = None;
    loop {
        let mut line = String::new();
        assert!(stderr.read_line(&mut line).expect("text") > 0, "it ended before it was ready");
        if let Some((_, found)) = line.trim().split_once(" at http://") {
            address = Some(found.to_owned());
        }
        if line.trim() == "ready" {
            break;
        }
    }
    Served { process, address: address.expect("the address is told first"), stderr }
}

fn ask(served: &Served, request: &str) -> String {
    let mut stream = TcpStream::connect(&served.address).expect("it listens");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("text");
    answer
}

fn get(served: &Served, path: &str, headers: &str) -> String {
    ask(served, &format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n"))
}

impl Served {
    /// Sends a signal by name; the exit code and the rest of standard error.
    fn signal(mut self, name: &str) -> (Option<i32>, String) {
        let kill = Command::new("kill").args([&format!("-{name}"), &self.process.id().to_string()]).status();
        assert!(kill.expect("there is a kill").success());
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).expect("text");
        (self.process.wait().expect("it ends").code(), rest)
    }
}

#[test]
fn what_is_refused() {
    for host in ["0.0.0.0", "::"] {
        tally(["serve", "--port", "0", "--host", host]).hinted().fails(2, "there is no key");
    }
    tally(["serve", "--port", "0", "--host", "nowhere.invalid"]).fails(1, "--host nowhere.invalid");
    tally(["serve", "--port", "0", "--api-key-file", "/nonexistent"]).fails(1, "/nonexistent");
    tally(["serve", "--port", "0", "--ctx", "99999"]).fails(1, "at most 2048 positions");
    tally(["serve", "--port", "0", "no such model.gguf"]).hinted().fails(1, "no such model.gguf");
    tally(["serve", "--port", "0", "--otlp=https://collector.example"]).fails(1, "there is no TLS");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("an address").port().to_string();
    tally(["serve", "--device", "cpu", "--port", &port]).fails(1, "cannot listen at 127.0.0.1:");
}

#[test]
fn it_answers_and_ends() {
    for signal in ["TERM", "INT"] {
        let served = serve(&[]);
        let body = r#"{"prompt": "fn main() {", "max_tokens": 4}"#;
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = ask(&served, &request);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"completion_tokens\":4"), "{answer}");
        let models = get(&served, "/v1/models", "");
        assert!(models.contains("\"id\":\"tally-rust\""), "{models}");
        let other =
            ask(&served, "GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n");
        assert!(other.starts_with("HTTP/1.1 403"), "{other}");
        let (code, rest) = served.signal(signal);
        assert_eq!((code, rest.trim()), (Some(0), "stopping"), "{signal}");
    }
}

#[test]
fn keys_from_a_file_open_other_addresses() {
    let folder = Directory::new();
    let file = folder.file("keys.txt");
    std::fs::write(&file, "# who may ask\nsesame\n\nopen\n").expect("writable");
    let served =
        serve(&["--host", "0.0.0.0", "--api-key-file", &file, "--log", "info", "--log-format", "json"]);
    let served = Served { address: served.address.replace("0.0.0.0", "127.0.0.1"), ..served };
    assert!(get(&served, "/v1/models", "").starts_with("HTTP/1.1 401"));
    assert!(get(&served, "/v1/models", "x-api-key: open\r\n").starts_with("HTTP/1.1 200"));
    assert!(get(&served, "/health", "").starts_with("HTTP/1.1 200"));
    let (code, log) = served.signal("TERM");
    assert_eq!(code, Some(0));
    let lines = log.lines().filter(|line| line.starts_with('{'));
    let lines: Vec<serde_json::Value> = lines.map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let statuses: Vec<_> = lines.iter().filter_map(|line| line["status"].as_u64()).collect();
    assert_eq!(statuses, [401, 200, 200], "{log}");
    assert!(!log.contains("sesame") && !log.contains("open\""), "no key is logged: {log}");
}

/// A model with a NaN among its weights: the request fails, is written down, and fails again where it did.
#[test]
fn a_capture_is_replayed() {
    let directory = Directory::new();
    let model = models::tiny(&directory, "m.gguf", false);
    models::break_a_scale(&model);
    let captures = directory.file("captures");
    let served = serve(&[&model, "--captures", &captures]);
    let body = r#"{"prompt": "x y z", "max_tokens": 4}"#;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: one";
    let answer = ask(&served, &format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    assert!(answer.starts_with("HTTP/1.1 500") && answer.contains("numeric_fault"), "{answer}");
    assert!(answer.contains("blk.1.attn_out.x") && answer.contains("x-request-id: one"), "{answer}");
    assert_eq!(served.signal("TERM").0, Some(0));

    let capture = format!("{captures}/one.json");
    let replay = || tally(["replay", &capture, "--model", &model]);
    replay().hinted().fails(3, "blk.1.attn_out.x has NaN at index");
    let shipped = tally(["replay", &capture]).ok();
    assert!(shipped.contains("all values are numbers (then: blk.1.attn_out.x)"), "{shipped}");
    for (text, message) in [
        ("{", "no JSON"),
        ("{}", "`format` and `version`"),
        (r#"{"format": "tally-capture", "version": 2}"#, "`format` and `version`"),
        (r#"{"format": "tally-capture", "version": 1, "tokens": [-1]}"#, "`tokens`"),
        (r#"{"format": "tally-capture", "version": 1, "tokens": []}"#, "`tokens`"),
        (r#"{"format": "tally-capture", "version": 1, "tokens": [4000000]}"#, "outside the vocabulary"),
    ] {
        std::fs::write(&capture, text).expect("writable");
        replay().fails(1, message);
    }
}
