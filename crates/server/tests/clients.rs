//! The official Python clients of OpenAI and Anthropic against the server: whole answers, streams, tools, errors. What they
//! check is in `clients.py`.

mod client;

use std::env;
use std::path::Path;
use std::process::Command;

use client::{Shape, served, start_with};
use server::Options;

/// Where `.ci/run` puts the wheels.
const WHEELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/clients");

/// Python, if it has the clients.
fn python() -> Option<Command> {
    let python = || {
        let mut python = Command::new("python3");
        let paths = env::var_os("PYTHONPATH")
            .into_iter()
            .flat_map(|paths| env::split_paths(&paths).collect::<Vec<_>>());
        let paths = env::join_paths(paths.chain([WHEELS.into()])).expect("no path has a colon");
        // A proxy has no business between a test and its server.
        python.env("PYTHONPATH", paths).env("NO_PROXY", "*").env("no_proxy", "*");
        python
    };
    let found =
        python().args(["-c", "import openai, anthropic"]).output().is_ok_and(|out| out.status.success());
    if !found {
        assert!(
            env::var_os("CI_NEEDS_CLIENTS").is_none(),
            "CI needs the Python clients of OpenAI and Anthropic"
        );
        println!(
            "NOT RUN: there are no Python clients (pip install --target target/clients openai anthropic)"
        );
    }
    found.then(python)
}

#[test]
fn official_clients() {
    let Some(mut python) = python() else { return };
    let options = Options { keys: vec!["sesame".into()], ..Options::default() };
    let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), options);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients.py");
    let out = python.arg(script).arg(format!("http://{}", server.address())).output().expect("Python runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{stdout}\n{stderr}");
    assert!(stdout.trim_end().ends_with("all checks passed"), "{stdout}");
    server.stop();
}
