//! The official Python clients of OpenAI and Anthropic against the server: whole answers, streams, tools, errors. What they
//! check is in `clients.py`. And schemathesis, which makes requests of the OpenAPI document.

mod client;

use std::env;
use std::path::Path;
use std::process::Command;

use client::{Shape, get, metric, served, start_with};
use server::Options;

/// Where `.ci/run` puts the wheels.
const WHEELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/clients");

/// Python, if it has what `imports` names.
fn python(imports: &str) -> Option<Command> {
    let python = || {
        let mut python = Command::new("python3");
        let paths = env::var_os("PYTHONPATH").unwrap_or_default();
        let paths = env::split_paths(&paths).chain([WHEELS.into()]);
        python.env("PYTHONPATH", env::join_paths(paths).expect("no path has a colon"));
        // A proxy has no business between a test and its server.
        python.env("NO_PROXY", "*").env("no_proxy", "*");
        python
    };
    let found = python().args(["-c", &format!("import {imports}")]).output();
    let found = found.is_ok_and(|out| out.status.success());
    if !found {
        assert!(env::var_os("CI_NEEDS_CLIENTS").is_none(), "CI needs Python with {imports}");
        println!("NOT RUN: no {imports} (pip install --target target/clients openai anthropic schemathesis)");
    }
    found.then(python)
}

#[test]
fn official_clients() {
    let Some(mut python) = python("openai, anthropic") else { return };
    let options = Options { keys: vec!["sesame".into()], ..Options::default() };
    let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), options);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients.py");
    let out = python.arg(script).arg(format!("http://{}", server.address())).output().expect("Python runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{stdout}\n{stderr}");
    assert!(stdout.trim_end().ends_with("all checks passed"), "{stdout}");
    server.stop();
}

/// Requests that the OpenAPI document allows, and some that it does not: no answer is a 500, and each is of a status and form
/// that the document names.
#[test]
fn schemathesis() {
    let Some(mut python) = python("schemathesis") else { return };
    let server = start_with(served(Shape::default(), |cpu| Box::new(cpu)), Options::default());
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,\
                  response_schema_conformance,unsupported_method";
    let out = python
        .args(["-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"])
        .arg(format!("http://{}/openapi.json", server.address()))
        .args(["--max-time", "45", "-n", "15", "--request-timeout", "60", "--seed", "1", "-c", checks])
        .current_dir(env!("CARGO_TARGET_TMPDIR"))
        .output()
        .expect("Python runs");
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&out.stderr));
    // Not a run that tested nothing.
    assert!(stdout.contains("Selected: 16/16"), "{stdout}");
    assert_eq!(get(&server, "/health").status, 200);
    assert_eq!(metric(&server, "tally_engine_failures_total"), 0.0);
    server.stop();
}
