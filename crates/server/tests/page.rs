//! The page in a real browser: it asks, streams, stops and asks again, shows markdown and nothing that a model could make of
//! it, and draws the load; it asks no other server.

#[allow(dead_code, reason = "shared with the tests of the report's page")]
#[path = "../../report/tests/chromium/mod.rs"]
mod chromium;
mod client;
#[path = "../../engine/tests/over_cpu/mod.rs"]
mod over_cpu;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chromium::Chromium;
use client::{Shape, metric, served, start, start_with, until};
use model::{Backend, Row};
use over_cpu::Bent;
use serde_json::Value as Json;
use server::{Options, Server};

fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn open(size: [u32; 2], server: &Server) -> Option<Chromium> {
    let mut chromium = Chromium::start(&chromium::found()?, scratch(), size);
    chromium.visit(&format!("http://{}/", server.address()));
    Some(chromium)
}

#[track_caller]
fn wait(chromium: &mut Chromium, claim: &str) {
    let since = Instant::now();
    while chromium.value(claim) != true {
        let page = chromium.value("document.body.innerText");
        assert!(since.elapsed() < Duration::from_secs(60), "it never came to be: {claim}\n{page}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn set(chromium: &mut Chromium, id: &str, value: &str) {
    let value = Json::from(value);
    chromium.value(&format!(
        "(() => {{ const e = document.getElementById('{id}'); e.value = {value}; e.dispatchEvent(new Event('input')) }})()"
    ));
}

const LAST: &str = "document.querySelector('.turn:last-child .text').innerText";
const DONE: &str =
    "document.getElementById('stop').hidden && document.querySelectorAll('.turn .about').length > 0";

#[test]
fn a_conversation() {
    let server = start();
    let Some(mut chromium) = open([1200, 800], &server) else { return };
    wait(&mut chromium, "document.getElementById('state').textContent === 'ok'");
    assert_eq!(chromium.value("document.getElementById('model').textContent"), "tally-rust");
    assert_eq!(chromium.value("document.getElementById('send').disabled"), true, "nothing to send");
    chromium.click("#show-settings");
    set(&mut chromium, "max_tokens", "30");
    set(&mut chromium, "seed", "7");
    set(&mut chromium, "prompt", "fn main() {\n");
    chromium.click("#send");
    wait(&mut chromium, DONE);
    let first = chromium.value(LAST);
    assert!(first.as_str().is_some_and(|text| !text.is_empty()), "{first}");
    let about = chromium.value("document.querySelector('.turn:last-child .about').innerText");
    assert!(about.as_str().is_some_and(|text| text.contains("seed 7") && text.contains("tokens")), "{about}");

    // The same question with the same seed: the same answer.
    chromium.click(".turn:last-child .about button");
    wait(&mut chromium, DONE);
    assert_eq!(chromium.value(LAST), first);
    assert_eq!(chromium.value("document.querySelectorAll('.turn').length"), 2);

    wait(&mut chromium, "document.querySelectorAll('#rate-line path').length === 2");
    let load = chromium.value("document.getElementById('figures').innerText");
    assert!(load.as_str().is_some_and(|text| text.contains("Running") && text.contains("of 64")), "{load}");
    chromium.click("#new");
    assert_eq!(chromium.value("document.querySelectorAll('.turn').length"), 0);
    assert_eq!(chromium.complaints(), [""; 0]);
    let wide = chromium.value("document.documentElement.scrollWidth - innerWidth");
    assert!(wide.as_i64().is_some_and(|wide| wide <= 0), "{wide} pixels too wide");
    server.stop();
}

/// Text is shown while it is being written; stopped in the middle, it stays, and the work ends.
#[test]
fn stopped_in_the_middle() {
    let ends: Arc<[u32]> = served(Shape::default(), |cpu| Box::new(cpu)).tokenizer.eos().into();
    // Takes its time, and comes to no end by itself.
    let wrap = move |cpu| {
        let ends = ends.clone();
        let bend = move |_: &Row, logits: &mut [f32]| {
            std::thread::sleep(Duration::from_millis(30));
            ends.iter().for_each(|&end| logits[end as usize] = f32::MIN);
        };
        Box::new(Bent::new(cpu, bend)) as Box<dyn Backend>
    };
    let server = start_with(served(Shape::default(), wrap), Options::default());
    let Some(mut chromium) = open([900, 700], &server) else { return };
    set(&mut chromium, "prompt", "fn main() {");
    chromium.click("#send");
    wait(&mut chromium, &format!("document.querySelectorAll('.turn').length === 2 && {LAST}.length > 8"));
    assert_eq!(chromium.value("document.getElementById('stop').hidden"), false, "it is being written");
    let early = chromium.value(LAST).as_str().expect("text").to_owned();
    wait(&mut chromium, &format!("{LAST}.length > {}", early.chars().count() + 8));
    assert_eq!(metric(&server, "tally_cancelled_total"), 0.0);
    chromium.click("#stop");
    wait(&mut chromium, DONE);
    let about = chromium.value("document.querySelector('.turn:last-child .about').innerText");
    assert!(about.as_str().is_some_and(|text| text.contains("stopped")), "{about}");
    assert!(
        chromium.value(LAST).as_str().is_some_and(|text| text.len() > early.len()),
        "what was said stays"
    );
    until("the engine heard of it", || metric(&server, "tally_cancelled_total") == 1.0);
    assert_eq!(chromium.complaints(), [""; 0]);
    server.stop();
}

/// Markdown as the page shows it: text, and the elements that it becomes.
#[test]
fn markdown() {
    let server = start();
    let Some(mut chromium) = open([900, 700], &server) else { return };
    for (text, want) in [
        ("plain", "<p>plain</p>"),
        (
            "a **b** *c* `d<e>` ~~f~~",
            "<p>a <strong>b</strong> <em>c</em> <code>d&lt;e&gt;</code> <del>f</del></p>",
        ),
        ("# A\n\ntext\nmore", "<h3>A</h3><p>text<br>more</p>"),
        ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
        ("3. a\n4. b", "<ol start=\"3\"><li>a</li><li>b</li></ol>"),
        ("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
        ("---", "<hr>"),
        (
            "|a|b|\n|-|-|\n|1|2|",
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
        ),
        // Whatever looks like markup stays text, and only web addresses become links.
        ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        (
            "[x](https://a.example)",
            "<p><a href=\"https://a.example\" rel=\"noopener noreferrer\" target=\"_blank\">x</a></p>",
        ),
        ("snake_case_name and 2 * 3 * 4", "<p>snake_case_name and 2 * 3 * 4</p>"),
    ] {
        let shown = format!(
            "(() => {{ const d = document.createElement('div'); d.append(markdown({})); return d.innerHTML }})()",
            Json::from(text)
        );
        assert_eq!(chromium.value(&shown), want, "{text}");
    }
    let fence = "markdown('```rust\\nfn f() {}\\n```').querySelector('code').outerHTML";
    assert_eq!(chromium.value(fence), "<code data-language=\"rust\">fn f() {}</code>");
    let open = "markdown('```\\n<b>unfinished').querySelector('code').textContent";
    assert_eq!(chromium.value(open), "<b>unfinished", "while it is being written");
    assert_eq!(chromium.complaints(), [""; 0]);
    server.stop();
}

#[test]
fn a_key_is_asked_for() {
    let options = Options { keys: vec!["sesame".into()], ..Options::default() };
    let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), options);
    let Some(mut chromium) = open([900, 700], &server) else { return };
    wait(&mut chromium, "document.getElementById('state').textContent === 'key needed'");
    set(&mut chromium, "key", "sesame");
    wait(&mut chromium, "document.getElementById('state').textContent === 'ok'");
    server.stop();
}

/// Pictures to look at; `just screenshots` puts them into docs/.
#[test]
#[ignore = "writes pictures and checks nothing"]
fn pictures() {
    let server = start();
    let Some(mut chromium) = open([1180, 720], &server) else { return };
    wait(&mut chromium, "document.getElementById('state').textContent === 'ok'");
    set(&mut chromium, "max_tokens", "90");
    set(&mut chromium, "seed", "11");
    for prompt in ["What does `Vec::push` do?", "impl Iterator for Counter {\n    type Item = u32;\n"] {
        set(&mut chromium, "prompt", prompt);
        chromium.click("#send");
        wait(&mut chromium, DONE);
    }
    std::thread::sleep(Duration::from_secs(3));
    for scheme in ["light", "dark"] {
        chromium.scheme(scheme);
        let path = scratch().join(format!("serve-{scheme}.png.base64"));
        fs::write(&path, chromium.screenshot()).expect("writable");
        println!("{}", path.display());
    }
    server.stop();
}
