//! `tally serve`: a model over HTTP. Opens the model, decides who may ask, and waits for the signal to end; everything else is
//! the server crate's.

use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::{env, fs};

use clap::ValueEnum;
use model::Backend;
use serde_json::json;
use server::{Captures, EngineLimits, Factory, Options, Served, Server};
use tracing_subscriber::filter::LevelFilter;

use crate::device::{self, Device, Request};
use crate::failure::Failure;
use crate::interrupt::Stop;
use crate::load::{Loaded, Place};
use crate::sampling::Sampling;
use crate::{clock, source};

/// Positions of the context, where the model has more.
const CONTEXT: usize = 32_768;
/// How often it is looked whether to end.
const LOOK: Duration = Duration::from_millis(50);
/// Where a collector listens that is told nothing else (OTLP's own default).
const COLLECTOR: &str = "http://localhost:4318";
/// What clients call the model that ships.
const SHIPPED: &str = "tally-rust";
/// Names by which a server on this machine is asked.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

const EXAMPLES: &str = "\
Examples:
  tally serve                                          the small model that ships, at http://127.0.0.1:8080
  tally serve model.gguf --device cuda --ctx 65536 --cache 8
  tally serve model.gguf --host 0.0.0.0 --api-key-file keys.txt
  curl localhost:8080/v1/chat/completions -d '{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}'
  OPENAI_BASE_URL=http://localhost:8080/v1 OPENAI_API_KEY=none python3 agent.py
  ANTHROPIC_BASE_URL=http://localhost:8080 ANTHROPIC_AUTH_TOKEN=none claude

A browser finds a page to talk to the model at /, programs find OpenAI's protocols under /v1/chat/completions, \
/v1/completions and /v1/responses, Anthropic's under /v1/messages; docs/serve.md describes them all.

The text of an answer depends on the model, the request and its seed, and on nothing else: not on who else asks at the same \
time, and not on what is in the cache.

SIGTERM and Ctrl-C let running requests come to their end; a second Ctrl-C ends at once. Exit codes: 0 stopped; 1 it could \
not be started, or the engine failed; 2 wrong usage.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model; without one, the small one that ships.
    model: Option<PathBuf>,
    /// The address to listen at; any but this machine's own needs an API key.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// The port to listen at; 0 for any that is free.
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// What clients call the model [default: the file's name].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    door: Door,
    #[command(flatten)]
    capacity: Capacity,
    #[command(flatten)]
    logs: Logs,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Who may ask")]
struct Door {
    /// A key that clients must send; may be repeated. Others on this machine can see it: prefer a file.
    #[arg(long, value_name = "KEY", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    api_key: Vec<String>,
    /// A file of keys, one a line.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// A web origin whose pages may ask, `https://app.example` say, or `*`; may be repeated.
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// Another name that this server is asked by; may be repeated. Without keys only this machine's own names are answered.
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Capacity")]
struct Capacity {
    /// Positions of one request's context, prompt and answer together [default: the model's, at most 32768].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// Memory for the keys and values of so many full contexts; what is not in use keeps beginnings of texts.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    cache: u32,
    /// Requests that are worked on at the same time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    running: u32,
    /// Requests that wait; more are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    queue: u32,
    /// How long a request may take, waiting included, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
    /// How long running requests may go on when the server is told to stop, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain: u32,
    /// What reading prompts may add to the time between two tokens of the others, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    interleave: u32,
    /// Compute every N-th answer again on the CPU, in the background, and compare it bit for bit; a difference is an alarm in
    /// /health and /metrics.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    verify: Option<u32>,
    /// The largest request body, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    body: u32,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Logs")]
struct Logs {
    /// A folder into which requests are written whose numbers went wrong, for `tally replay`.
    #[arg(long, value_name = "DIR")]
    captures: Option<PathBuf>,
    /// What is logged: off, error, warn, info (every request) or debug.
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log: LevelFilter,
    /// How: lines for people, or JSON objects for programs.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Send spans of requests to an OpenTelemetry collector, by OTLP over HTTP [default URL: what OTEL_EXPORTER_OTLP_ENDPOINT
    /// says, else http://localhost:4318].
    #[arg(long, value_name = "URL", num_args = 0..=1, require_equals = true)]
    otlp: Option<Option<String>>,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let keys = self.door.keys()?;
        let address = self.address(!keys.is_empty())?;
        self.logs.install();
        let loaded = Loaded::open(&self.model)?;
        let served = self.served(&loaded)?;
        let listener = TcpListener::bind(address)
            .map_err(|error| Failure::new(format!("cannot listen at {address}: {error}")))?;
        let stop = Stop::catch_all();
        let server =
            Server::start(listener, served, self.options(keys, address.ip())).map_err(Failure::new)?;
        // For whoever started it on any free port: the address is told before the model is loaded.
        device::note(format_args!("{} at http://{}", self.shown_name(), server.address()));
        let mut told = false;
        while !stop.requested() {
            if server.is_dead() {
                let why = server.trouble().unwrap_or_default();
                server.stop();
                return Err(Failure::new(format!("the engine failed: {why}")));
            }
            if !told && server.wait_until_ready(LOOK) {
                device::note(format_args!("ready"));
                told = true;
            }
            thread::sleep(LOOK);
        }
        device::note(format_args!("stopping"));
        server.stop();
        Ok(())
    }

    /// Where to listen; not beyond this machine without a key.
    fn address(&self, has_keys: bool) -> Result<SocketAddr, Failure> {
        let cannot = |why: &dyn std::fmt::Display| Failure::new(format!("--host {}: {why}", self.host));
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let mut found = (host, self.port).to_socket_addrs().map_err(|error| cannot(&error))?;
        let address = found.next().ok_or_else(|| cannot(&"no such address"))?;
        if !address.ip().is_loopback() && !has_keys {
            let message = format!("--host {}: others could ask this server, and there is no key", self.host);
            return Err(Failure::usage(message).hint("add --api-key-file FILE, or listen at 127.0.0.1"));
        }
        Ok(address)
    }

    fn shown_name(&self) -> String {
        let of_file = || Some(self.model.as_deref().map(Path::file_stem)??.to_string_lossy().into_owned());
        self.name.clone().or_else(of_file).unwrap_or_else(|| SHIPPED.into())
    }

    fn served(&self, loaded: &Loaded) -> Result<Served, Failure> {
        let context = self.capacity.context(loaded)?;
        let request = Request {
            context,
            // A u32 fits: the crate runs on 64 bits, as the map of a model does.
            sequences: self.capacity.cache as usize,
            threads: self.place.threads().count(),
            activations: self.place.activations(),
            kernels: self.place.kernels(),
        };
        let (model, wish) = (loaded.model().clone(), self.place.device());
        let request_again = request.clone();
        let factory = move || {
            let placed =
                request.place(&model, wish, device::note).map_err(|failure| failure.message().to_owned())?;
            tracing::info!(device = %placed.device, facts = %placed.facts, context = request.context, "loaded");
            Ok::<Box<dyn Backend>, String>(placed.backend)
        };
        let verify =
            self.capacity.verify.map(|every| (self.second(&request_again, loaded), u64::from(every)));
        let source = loaded.metadata().opt_str("tokenizer.chat_template")?.unwrap_or_default().to_owned();
        Ok(Served {
            name: self.shown_name(),
            tokenizer: Arc::new(loaded.fresh_tokenizer()?),
            template: loaded.template()?.map(|template| (template, source)),
            sampling: self.sampling.params(loaded)?,
            created: clock::now(),
            factory: Arc::new(factory),
            verify,
            facts: json!({
                "file": source::name(&self.model), "activations": self.place.activations().name(),
                "context": context,
            }),
        })
    }

    /// Makes the backend on which answers are computed again: the CPU, for one at a time.
    fn second(&self, request: &Request, loaded: &Loaded) -> Factory {
        let (request, model) = (Request { sequences: 1, ..request.clone() }, loaded.model().clone());
        Arc::new(move || match request.place_on(&model, Device::Cpu) {
            Ok(placed) => Ok(placed.backend),
            Err(failure) => Err(failure.message().to_owned()),
        })
    }

    fn captures(&self) -> Option<Captures> {
        let facts = json!({
            "model": source::name(&self.model), "activations": self.place.activations().name(),
        });
        self.logs.captures.clone().map(|folder| Captures::new(folder, facts))
    }

    fn options(&self, keys: Vec<String>, ip: IpAddr) -> Options {
        let Capacity { running, queue, timeout, drain, interleave, body, .. } = self.capacity;
        let mut hosts = self.door.allow_host.clone();
        // Who has a key may ask by any name; without one, a page elsewhere must not reach this machine by a name of its own.
        if keys.is_empty() && ip.is_loopback() {
            hosts.extend(LOOPBACK.map(String::from));
        }
        Options {
            engine: EngineLimits {
                // A u32 fits, as above.
                running: running as usize,
                waiting: queue as usize,
                interleave: Duration::from_millis(interleave.into()),
                captures: self.captures(),
            },
            keys,
            origins: self.door.cors.clone(),
            hosts,
            body: (body as usize) << 20,
            request_timeout: Duration::from_secs(timeout.into()),
            drain: Duration::from_secs(drain.into()),
            collector: self.logs.collector(),
            ..Options::default()
        }
    }
}

impl Door {
    fn keys(&self) -> Result<Vec<String>, Failure> {
        let mut keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let text = fs::read_to_string(path)
                .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            let before = keys.len();
            keys.extend(lines.map(String::from));
            if keys.len() == before {
                let message = format!("{}: there is no key in it", path.display());
                return Err(Failure::new(message).hint("one key a line"));
            }
        }
        Ok(keys)
    }
}

impl Capacity {
    fn context(&self, loaded: &Loaded) -> Result<usize, Failure> {
        let limit = loaded.context();
        // A u32 fits, as above.
        let context = self.ctx.map_or(limit.min(CONTEXT), |ctx| ctx as usize);
        if context > limit {
            let message = format!("--ctx {context}: {} was made for at most {limit} positions", loaded.name);
            return Err(Failure::new(message));
        }
        Ok(context)
    }
}

impl Logs {
    /// Where spans go, if they are wanted. The variable is the one that every program of the kind looks at, once it is asked to.
    fn collector(&self) -> Option<String> {
        let usual = || env::var("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap_or_else(|_| COLLECTOR.into());
        self.otlp.clone().map(|url| url.unwrap_or_else(usual))
    }

    /// To standard error. That somebody else did so before is no failure.
    fn install(&self) {
        let builder = tracing_subscriber::fmt().with_max_level(self.log).with_writer(std::io::stderr);
        let _ = match self.log_format {
            LogFormat::Text => builder.with_target(false).try_init(),
            LogFormat::Json => builder.json().flatten_event(true).try_init(),
        };
    }
}
