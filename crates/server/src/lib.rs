//! Models over HTTP: continuous batching over the engine, the protocols of OpenAI and Anthropic, tools, metrics, a page.

mod answer;
mod api;
mod capture;
mod choice;
mod conversation;
mod error;
mod gate;
mod grammar;
mod http;
mod job;
mod metrics;
mod page;
mod patience;
mod places;
mod scheduler;
mod service;
mod spans;
mod sse;
mod text;
mod tool_grammar;
mod verify;
mod worker;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

pub use capture::Captures;
use service::Service;
pub use service::{Options, Served};
pub use spans::CollectorError;
use spans::Spans;
use worker::{Engine, Health};
pub use worker::{EngineLimits, Factory};

/// A server that runs. Dropped, it ends without waiting for anybody.
pub struct Server {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    http: Option<JoinHandle<()>>,
    engine: Option<JoinHandle<()>>,
    service: Arc<Service>,
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The system.
    #[error("cannot serve: {0}")]
    Io(#[from] io::Error),
    /// The chat template.
    #[error(transparent)]
    Template(#[from] engine::ChatError),
    /// The collector of spans.
    #[error(transparent)]
    Collector(#[from] CollectorError),
}

impl Server {
    /// Serves `served` at `listener`, from now on; `/health` says when the model is loaded.
    ///
    /// # Errors
    /// Where a thread cannot be started, the template's vocabulary not be searched, or spans not be sent where they should.
    pub fn start(
        listener: std::net::TcpListener,
        served: Served,
        options: Options,
    ) -> Result<Server, StartError> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        // Connections cost little; the engine's threads should have the cores.
        let runtime =
            Builder::new_multi_thread().worker_threads(2).thread_name("http").enable_all().build()?;
        let spans = match &options.collector {
            Some(collector) => Some(Spans::start(collector, &served.name, runtime.handle().clone())?),
            None => None,
        };
        let (handle, engine) =
            Engine::start(served.factory.clone(), options.engine.clone(), metrics::Metrics::new())?;
        let verifier = match &served.verify {
            Some((factory, every)) => {
                let metrics = handle.shared().metrics.clone();
                Some(Arc::new(verify::Verifier::start(factory.clone(), *every, metrics)?))
            }
            None => None,
        };
        let service = Arc::new(Service::new(served, options, handle, verifier, spans)?);
        let (stop, stopped) = watch::channel(false);
        let served = service.clone();
        let http = std::thread::Builder::new()
            .name("http".into())
            .spawn(move || run(runtime, listener, served, stopped))?;
        Ok(Server { address, stop, http: Some(http), engine: Some(engine), service })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until the model is loaded; false if it could not be, with the reason in `/health`.
    pub fn wait_until_ready(&self, at_most: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < at_most {
            match self.service.engine.shared().health() {
                Health::Ready => return true,
                Health::Loading => std::thread::sleep(Duration::from_millis(10)),
                Health::Draining | Health::Dead => return false,
            }
        }
        false
    }

    /// Whether the engine has failed for good.
    pub fn is_dead(&self) -> bool {
        self.service.engine.shared().health() == Health::Dead
    }

    /// What went wrong last with the engine.
    pub fn trouble(&self) -> Option<String> {
        self.service.engine.shared().trouble()
    }

    /// Takes no new requests, lets those that run come to their end for as long as they may, and ends.
    pub fn stop(mut self) {
        self.stop.send_replace(true);
        // A panic there is told of where it happens.
        let _ = self.http.take().map(JoinHandle::join);
        let _ = self.engine.take().map(JoinHandle::join);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        self.service.engine.stop();
    }
}

fn run(
    runtime: Runtime,
    listener: std::net::TcpListener,
    service: Arc<Service>,
    stop: watch::Receiver<bool>,
) {
    let known = service.clone();
    runtime.block_on(async move {
        match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => http::serve(listener, known, stop).await,
            Err(error) => tracing::error!(%error, "cannot listen"),
        }
    });
    if let Some(spans) = &service.spans {
        spans.stop();
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
}
