//! One who asks much does not keep others from being answered: clients that can be told apart take turns, by their key, or by
//! their address where there are no keys.

mod client;

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};

use client::{Answer, Shape, read, request, served, start_with, until};
use serde_json::{Value as Json, json};
use server::{EngineLimits, Options, Server};

/// Whoever is asked as: a source address of this machine, or a key.
#[derive(Clone, Copy)]
enum Who {
    Address([u8; 4]),
    Key(&'static str),
}

fn connect(server: &Server, from: [u8; 4]) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
    let connected = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((from, 0)))?;
        socket.connect(server.address()).await?.into_std()
    });
    let stream: TcpStream = connected.expect("all of 127.0.0.0/8 is this machine");
    stream.set_nonblocking(false).expect("a socket");
    stream
}

fn ask(server: &Server, who: Who, tokens: usize) -> BufReader<TcpStream> {
    let body: Json = json!({ "prompt": "fn main() {", "max_tokens": tokens, "seed": 1, "ignore_eos": true });
    let (from, key) = match who {
        Who::Address(from) => (from, "none"),
        Who::Key(key) => ([127, 0, 0, 1], key),
    };
    let mut stream = connect(server, from);
    let key = [("x-api-key", key)];
    stream.write_all(&request("POST", "/v1/completions", &key, &body.to_string())).expect("it reads");
    BufReader::new(stream)
}

fn answer(stream: &mut BufReader<TcpStream>) -> Answer {
    read(stream)
}

/// `greedy` has one request running and the queue full; `other` comes late.
fn check(keys: &[&str], greedy: Who, other: Who) {
    let engine = EngineLimits { running: 1, waiting: 6, ..EngineLimits::default() };
    let keys = keys.iter().map(|&key| key.to_owned()).collect();
    let served = served(Shape::default(), |cpu| Box::new(cpu));
    let server = start_with(served, Options { engine, keys, ..Options::default() });
    let waiting = || load(&server, "waiting");
    let _running = ask(&server, greedy, 400);
    until("it runs", || load(&server, "running") == 1);
    let mut queued: Vec<_> = (0..6).map(|_| ask(&server, greedy, 100)).collect();
    until("the queue is full", || waiting() == 6);
    assert_eq!(
        answer(&mut ask(&server, greedy, 4)).status,
        429,
        "there is no place for one who has them all"
    );

    let late = answer(&mut ask(&server, other, 4));
    assert_eq!(late.status, 200, "{}", late.body);
    assert!(waiting() >= 4, "it did not wait behind all of them: {} are left", waiting());
    for stream in &mut queued {
        assert_eq!(answer(stream).status, 200, "nor did it take anybody's place");
    }
    server.stop();

    fn load(server: &Server, name: &str) -> u64 {
        let mut stream = connect(server, [127, 0, 0, 1]);
        stream.write_all(&request("GET", "/load", &[("x-api-key", "one")], "")).expect("it reads");
        read(&mut BufReader::new(stream)).json()[name].as_u64().expect("a number")
    }
}

#[test]
fn between_keys() {
    check(&["one", "two"], Who::Key("one"), Who::Key("two"));
}

#[test]
fn between_addresses() {
    if !cfg!(target_os = "linux") {
        println!("did not run: other systems have one loopback address");
        return;
    }
    check(&[], Who::Address([127, 0, 0, 1]), Who::Address([127, 0, 0, 2]));
}
