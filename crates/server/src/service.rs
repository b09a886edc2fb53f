//! What is served and with which bounds: the one value that every route has. Knows no protocol.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::http::StatusCode;
use engine::{ChatEncoder, ChatTemplate, SamplerParams, Tokenizer};
use tokio::sync::Semaphore;

use crate::error::ApiError;
use crate::grammar::{GrammarError, Grammars};
use crate::spans::Spans;
use crate::verify::Verifier;
use crate::worker::{Engine, EngineLimits, Factory, Health, Unavailable};

/// A model to serve.
pub struct Served {
    /// What clients call it.
    pub name: String,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template and that one's source; without one there are no conversations.
    pub template: Option<(ChatTemplate, String)>,
    /// How tokens are chosen where a request does not say. Rows of the head beyond the vocabulary are biased away.
    pub sampling: SamplerParams,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// Makes the backend; again after a failure.
    pub factory: Factory,
    /// Makes another backend, on which every so many answers are computed again and compared bit for bit.
    pub verify: Option<(Factory, u64)>,
    /// What `/version` tells beside the version: device, arithmetic.
    pub facts: serde_json::Value,
}

/// How a model is served.
#[derive(Debug, Clone)]
pub struct Options {
    /// What bounds the engine.
    pub engine: EngineLimits,
    /// Any of these opens the door; none: it is open.
    pub keys: Vec<String>,
    /// Web origins that may ask from a browser, `*` for all; none: only the server's own page.
    pub origins: Vec<String>,
    /// Names in the `Host` header that are answered; none: all.
    pub hosts: Vec<String>,
    /// The largest body, in bytes.
    pub body: usize,
    /// The most answers to one request.
    pub max_choices: usize,
    /// How long a request may take, waiting included.
    pub request_timeout: Duration,
    /// How long its head, and then its body, may take to arrive.
    pub read_timeout: Duration,
    /// How long an answer may wait for its reader: nothing of it could be written for so long.
    pub write_timeout: Duration,
    /// How long running requests may go on when the server is told to stop.
    pub drain: Duration,
    /// Connections at a time.
    pub connections: usize,
    /// Where spans of requests are sent, by OTLP over HTTP: `http://localhost:4318`, say.
    pub collector: Option<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            engine: EngineLimits::default(),
            keys: Vec::new(),
            origins: Vec::new(),
            hosts: Vec::new(),
            body: 32 << 20,
            max_choices: 16,
            request_timeout: Duration::from_secs(1800),
            read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            drain: Duration::from_secs(30),
            connections: 1024,
            collector: None,
        }
    }
}

/// How a model writes calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallForm {
    /// Qwen3-Coder's.
    Xml,
    /// Hermes', which Qwen3 and Qwen2.5 use.
    Json,
}

/// A chat template, and what its source tells of the model.
pub(crate) struct Template {
    pub(crate) encoder: ChatEncoder<Arc<Tokenizer>, Arc<ChatTemplate>>,
    pub(crate) calls: CallForm,
    /// Whether the model may reason between `<think>` and `</think>`.
    pub(crate) reasons: bool,
}

/// See the module's documentation.
pub(crate) struct Service {
    pub(crate) options: Options,
    pub(crate) engine: Engine,
    pub(crate) name: String,
    pub(crate) created: i64,
    pub(crate) sampling: SamplerParams,
    pub(crate) template: Option<Template>,
    pub(crate) facts: serde_json::Value,
    pub(crate) verifier: Option<Arc<Verifier>>,
    pub(crate) spans: Option<Spans>,
    tokenizer: Arc<Tokenizer>,
    /// Of the tokenizer: ids below this may be chosen.
    pub(crate) ids_in_use: u32,
    grammars: OnceLock<Result<Grammars, GrammarError>>,
    /// Requests whose text is being worked on outside the engine: rendered, encoded, compiled.
    working: Semaphore,
}

impl Service {
    /// Joins a model to its engine.
    pub(crate) fn new(
        served: Served,
        options: Options,
        engine: Engine,
        verifier: Option<Arc<Verifier>>,
        spans: Option<Spans>,
    ) -> Result<Service, engine::ChatError> {
        let tokenizer = served.tokenizer;
        let template = match served.template {
            None => None,
            Some((template, source)) => Some(Template {
                encoder: ChatEncoder::new(tokenizer.clone(), Arc::new(template))?,
                calls: if source.contains("<function=") { CallForm::Xml } else { CallForm::Json },
                reasons: source.contains("</think>"),
            }),
        };
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Ok(Service {
            options,
            engine,
            name: served.name,
            created: served.created,
            sampling: served.sampling,
            template,
            facts: served.facts,
            verifier,
            spans,
            ids_in_use: tokenizer.ids_in_use(),
            tokenizer,
            grammars: OnceLock::new(),
            working: Semaphore::new(2 * cores),
        })
    }

    pub(crate) fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The vocabulary as grammars need it, prepared when the first one comes.
    pub(crate) fn grammars(&self) -> Result<&Grammars, GrammarError> {
        self.grammars.get_or_init(|| Grammars::new(self.tokenizer.clone())).as_ref().map_err(Clone::clone)
    }

    /// Does `work` on a thread where it may take its time; few at once, so that text cannot take the engine's cores.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let _permit = self.working.acquire().await.expect("it is never closed");
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|_| ApiError::internal("a worker of the server panicked"))
    }

    /// Why there is no place for a request.
    pub(crate) fn unavailable(&self, why: Unavailable) -> ApiError {
        let error = ApiError::from(why);
        if why != Unavailable::Busy {
            return error;
        }
        // As many rounds as there are batches of those who wait, a few seconds each.
        let rounds = self.engine.shared().waiting().div_ceil(self.options.engine.running.max(1));
        error.retry(u64::try_from(2 * rounds).unwrap_or(30).clamp(1, 30))
    }

    /// What `/health` says.
    pub(crate) fn health(&self) -> (StatusCode, serde_json::Value) {
        let shared = self.engine.shared();
        let (status, word) = match shared.health() {
            Health::Loading => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
            Health::Ready => (StatusCode::OK, "ok"),
            Health::Draining => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
            Health::Dead => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
        };
        let body = serde_json::json!({
            "status": word,
            "trouble": shared.trouble(),
            "alarm": match shared.metrics.mismatches.get() {
                0 => None,
                n => Some(format!("{n} of {} answers differed when computed again", shared.metrics.verified.get())),
            },
        });
        (status, body)
    }
}
