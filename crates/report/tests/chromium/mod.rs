//! A headless Chromium, driven over its DevTools protocol: messages of JSON, each ended by a zero byte, on two pipes.
//! Of the protocol (<https://chromedevtools.github.io/devtools-protocol/>) as much as the tests need.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use serde_json::{Value, json};

/// On a machine whose cores are busy, a browser takes its time.
const PATIENCE: Duration = Duration::from_secs(90);

/// Browsers of this process: each has a profile of its own.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// The browser, on one page.
pub(crate) struct Chromium {
    process: Child,
    to: Option<ChildStdin>,
    from: Receiver<Value>,
    events: VecDeque<Value>,
    last: u64,
    session: String,
    profile: PathBuf,
    /// The server of a test, of which a page may ask: none for a page that needs no network.
    home: Option<String>,
}

/// The browser's program, or `None`, said plainly, where there is none; where `CI_NEEDS_CHROMIUM` is set that is a failure.
pub(crate) fn found() -> Option<PathBuf> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let places = env::split_paths(&folders).flat_map(|folder| names.map(|name| folder.join(name)));
    let program = places.into_iter().find(|path| path.is_file());
    if program.is_none() {
        assert!(env::var_os("CI_NEEDS_CHROMIUM").is_none(), "CI needs Chromium, and there is none on PATH");
        println!("NOT RUN: there is no Chromium on PATH (Debian: apt-get install chromium)");
    }
    program
}

impl Chromium {
    /// Starts `program` with a profile of its own in `scratch`, and opens an empty page of `width` by `height` pixels.
    pub(crate) fn start(program: &Path, scratch: &Path, size: [u32; 2]) -> Chromium {
        let profile =
            scratch.join(format!("chromium-{}-{}", std::process::id(), STARTED.fetch_add(1, Relaxed)));
        fs::create_dir_all(&profile).expect("the tests' directory can be written");
        let of_profile = [OsStr::new("--user-data-dir="), profile.as_os_str()].join(OsStr::new(""));
        // The protocol's pipes are descriptors 3 and 4, which a shell can put there without `unsafe`.
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#]).arg(program);
        // Its sandbox needs rights that a container withholds; what it opens is a file of ours.
        command.args([
            "--headless",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
        ]);
        command.args(["--no-first-run", "--disable-background-networking", "--disable-component-update"]);
        command.args([
            "--disable-sync",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--force-color-profile=srgb",
        ]);
        command.arg(of_profile).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("there is a shell");
        let (to, output) = (process.stdin.take(), process.stdout.take().expect("piped"));
        let (send, from) = channel();
        thread::spawn(move || {
            for message in BufReader::new(output).split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).expect("the protocol is JSON");
                if send.send(message).is_err() {
                    break;
                }
            }
        });
        let events = VecDeque::new();
        let mut chromium =
            Chromium { process, to, from, events, last: 0, session: String::new(), profile, home: None };
        let target = chromium.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = chromium.call("Target.attachToTarget", attach);
        chromium.session = session["sessionId"].as_str().expect("a session has an id").to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            chromium.call(&format!("{domain}.enable"), json!({}));
        }
        let metrics = json!({ "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": false });
        chromium.call("Emulation.setDeviceMetricsOverride", metrics);
        chromium
    }

    /// Calls a method and waits for its result.
    #[track_caller]
    pub(crate) fn call(&mut self, method: &str, params: Value) -> Value {
        self.last += 1;
        let mut message = json!({ "id": self.last, "method": method, "params": params });
        if !self.session.is_empty() {
            message["sessionId"] = self.session.as_str().into();
        }
        let to = self.to.as_mut().expect("open until the end");
        to.write_all(format!("{message}\0").as_bytes()).expect("the browser is there");
        loop {
            let mut answer = self.next();
            if answer["id"] == self.last {
                assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return answer["result"].take();
            }
            self.events.push_back(answer);
        }
    }

    #[track_caller]
    fn next(&mut self) -> Value {
        self.from.recv_timeout(PATIENCE).expect("the browser answers in time")
    }

    /// Opens a file, and waits until its script says that it is ready.
    pub(crate) fn open(&mut self, file: &Path, hash: &str) {
        let file = file.canonicalize().expect("the page was written");
        self.navigate(&format!("file://{}{hash}", file.display()));
    }

    /// Opens the page that a server of the test has at `url`, and waits likewise. The page may ask that server and no other.
    #[allow(
        dead_code,
        reason = "of the two tests that include this file, only the server's opens pages this way"
    )]
    pub(crate) fn visit(&mut self, url: &str) {
        self.home = Some(url.to_owned());
        self.navigate(url);
    }

    fn navigate(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url }));
        let since = Instant::now();
        loop {
            // In this order: what was thrown before it was ready is no reason to wait on.
            let complaints = self.complaints();
            if self.value("document.body?.dataset.ready ?? ''") == "true" {
                break;
            }
            assert!(
                complaints.is_empty() && since.elapsed() < PATIENCE,
                "the page is not ready: {complaints:?}"
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The value of an expression.
    #[track_caller]
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        let mut result =
            self.call("Runtime.evaluate", json!({ "expression": expression, "returnByValue": true }));
        assert!(result["exceptionDetails"].is_null(), "{expression}: {}", result["exceptionDetails"]);
        result["result"]["value"].take()
    }

    /// Presses and releases the mouse in the middle of what `selector` finds.
    #[track_caller]
    pub(crate) fn click(&mut self, selector: &str) {
        let middle = format!(
            "(() => {{ const e = document.querySelector({selector:?}); e.scrollIntoView({{block: 'center'}}); \
             const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] }})()"
        );
        let middle = self.value(&middle);
        for kind in ["mousePressed", "mouseReleased"] {
            let event =
                json!({ "type": kind, "x": middle[0], "y": middle[1], "button": "left", "clickCount": 1 });
            self.call("Input.dispatchMouseEvent", event);
        }
    }

    /// Presses and releases a key.
    pub(crate) fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({ "type": kind, "key": key }));
        }
    }

    /// Whatever the console heard of errors, what was thrown, and what was asked of a network.
    pub(crate) fn complaints(&mut self) -> Vec<String> {
        self.value("0"); // Whatever was on its way has arrived.
        let complaint = |event: &Value| match event["method"].as_str()? {
            "Runtime.exceptionThrown" => Some(event["params"].to_string()),
            "Runtime.consoleAPICalled" if event["params"]["type"] == "error" => {
                Some(event["params"].to_string())
            }
            "Log.entryAdded" if event["params"]["entry"]["level"] == "error" => {
                Some(event["params"].to_string())
            }
            "Network.requestWillBeSent" => {
                let url = event["params"]["request"]["url"].as_str()?;
                let own = ["file:", "data:", "about:"].iter().any(|scheme| url.starts_with(scheme))
                    || self.home.as_ref().is_some_and(|home| url.starts_with(home));
                (!own).then(|| format!("asked for {url}"))
            }
            _ => None,
        };
        self.events.iter().filter_map(complaint).collect()
    }

    /// Light or dark.
    pub(crate) fn scheme(&mut self, name: &str) {
        let feature = json!([{ "name": "prefers-color-scheme", "value": name }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": feature }));
    }

    /// The window as a PNG, in base64.
    pub(crate) fn screenshot(&mut self) -> String {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        shot["data"].as_str().expect("a picture").to_owned()
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // With its pipe closed it would end by itself, but not before the profile's directory is to go.
        self.to = None;
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.profile);
    }
}
