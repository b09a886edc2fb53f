//! Where the backend can choose tokens, next to nothing passes between it and the host: what the server asks of it is counted,
//! with the requests that `tools/gpu/serve_speed.py` measures.

mod client;
#[path = "../../engine/tests/over_cpu/mod.rs"]
mod over_cpu;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use client::{Shape, metric, post, served, start_with, until};
use model::Backend;
use over_cpu::{Ahead, Asked};
use serde_json::json;
use server::{EngineLimits, Options, Server};

const PROMPT: usize = 100;
const TOKENS: usize = 96;
/// A request for so many tokens is one for their log-probabilities as well.
const LOGPROBS: usize = 50;

/// `streams` requests at once, `running` at a time, the `i`-th with `tokens(i)` tokens: what the backend was asked for. The
/// texts are those of a backend that cannot choose.
fn check(streams: usize, running: usize, tokens: fn(usize) -> usize) -> Arc<Asked> {
    check_with(1 << 14, streams, running, tokens)
}

/// [`check`] with a backend that has so many places for histories.
fn check_with(places: usize, streams: usize, running: usize, tokens: fn(usize) -> usize) -> Arc<Asked> {
    let asked = Arc::new(Asked::default());
    let wrap = {
        let asked = asked.clone();
        move |cpu| Box::new(Ahead::new(cpu, 64, asked.clone()).remembering(places)) as Box<dyn Backend>
    };
    let ask_all = |served| {
        let engine = EngineLimits { running, ..EngineLimits::default() };
        let server = start_with(served, Options { engine, ..Options::default() });
        let texts = thread::scope(|scope| {
            let one = |i| {
                (
                    i,
                    scope.spawn({
                        let server = &server;
                        move || ask(server, i, tokens(i))
                    }),
                )
            };
            let all: Vec<_> = (0..streams).map(one).collect();
            all.into_iter().map(|(i, one)| (i, one.join().expect("it ends"))).collect::<Vec<_>>()
        });
        until("all blocks come back", || {
            metric(&server, "tally_kv_blocks_available") == metric(&server, "tally_kv_blocks")
        });
        server.stop();
        texts
    };
    let shape = Shape::default();
    assert_eq!(ask_all(served(shape, wrap)), ask_all(served(shape, |cpu| Box::new(cpu))));
    asked
}

/// The text of the `i`-th stream.
fn ask(server: &Server, i: usize, tokens: usize) -> String {
    let prompt: Vec<usize> = (0..PROMPT).map(|at| 100 + (at * 31 + i * 977) % 1800).collect();
    let mut body = json!({
        "prompt": prompt, "max_tokens": tokens, "stream": true, "seed": i, "temperature": 0.8, "ignore_eos": true,
        "stream_options": { "include_usage": true },
    });
    // As Qwen3-Coder asks for by default, as OpenAI has them, and not at all.
    match i % 4 {
        1 => body["repetition_penalty"] = 1.05.into(),
        2 => (body["frequency_penalty"], body["presence_penalty"]) = (0.7.into(), 0.3.into()),
        3 => body["logit_bias"] = json!({ "300": 4, "301": -100 }),
        _ => {}
    }
    if tokens == LOGPROBS {
        body["logprobs"] = 2.into();
    }
    let (events, done) = post(server, "/v1/completions", &body).events();
    assert!(done, "{events:?}");
    let usage = &events[events.len() - 1]["usage"];
    assert_eq!(usage["completion_tokens"], tokens, "{usage}");
    events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect()
}

fn get(count: &AtomicUsize) -> usize {
    count.load(Ordering::Relaxed)
}

#[test]
fn a_stream() {
    let asked = check(1, 4, |_| TOKENS);
    assert_eq!(get(&asked.logits), 0, "no logits come to the host");
    assert!(get(&asked.starts) <= 2, "its prompt's draw, and a burst: {asked:?}");
    assert_eq!(get(&asked.draws), TOKENS, "each token is chosen once");
}

#[test]
fn streams_together() {
    let asked = check(8, 8, |_| TOKENS);
    assert_eq!(get(&asked.logits), 0, "{asked:?}");
    // Prompts come in one after the other; then all decode.
    assert!(get(&asked.draws) < TOKENS + 60, "{asked:?}");
    assert!(get(&asked.starts) < 40, "{asked:?}");
}

/// Who waits for others to end does not keep these from going on by themselves.
#[test]
fn with_a_queue() {
    let asked = check(6, 2, |_| TOKENS);
    assert_eq!(get(&asked.logits), 0, "{asked:?}");
    assert!(get(&asked.starts) < 40, "{asked:?}");
    assert!(get(&asked.draws) < 3 * (TOKENS + 30), "{asked:?}");
}

/// Of many, a few may end without the others beginning anew.
#[test]
fn one_after_the_other() {
    let asked = check(16, 16, |i| TOKENS + i);
    assert_eq!(get(&asked.logits), 0, "{asked:?}");
    assert!(get(&asked.starts) < 60, "{asked:?}");
}

/// One of many wants what only the host can give it: its logits come, and hardly anybody else's.
#[test]
fn one_that_the_host_chooses_for() {
    let asked = check(9, 9, |i| if i == 4 { LOGPROBS } else { TOKENS });
    // While there were few others yet, these were chosen beside it.
    assert!((LOGPROBS..2 * LOGPROBS).contains(&get(&asked.logits)), "{asked:?}");
}

/// Where the backend has no room for all histories, the host chooses for some, and by the logits of few others.
#[test]
fn histories_too_long() {
    let asked = check_with(400, 8, 8, |_| TOKENS);
    assert!((TOKENS..4 * TOKENS).contains(&get(&asked.logits)), "{asked:?}");
    assert!(get(&asked.draws) >= TOKENS, "{asked:?}");
}

/// What goes on as ballast writes into no block that is another's: it ends with its block full, so that whatever it computes
/// beyond its end goes elsewhere.
#[test]
fn ballast() {
    let asked = check(16, 16, |i| if i % 8 == 1 { 192 - PROMPT } else { 192 - PROMPT + 60 });
    assert!(get(&asked.starts) < 60, "{asked:?}");
}
