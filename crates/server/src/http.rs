//! Requests in, responses out: routes, bodies, ids, and the connections themselves with their limits. Knows no protocol's
//! fields.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Router};
use futures_util::FutureExt;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::Value as Json;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::answer::Caller;
use crate::api::{chat, completions, messages, plain, responses};
use crate::error::ApiError;
use crate::gate::Gate;
use crate::metrics::Answered;
use crate::patience::Patient;
use crate::service::Service;
use crate::spans::Span;

/// Every route: method, path as axum and OpenAPI write it.
pub(crate) const ROUTES: &[(&str, &str)] = &[
    ("get", "/"),
    ("get", "/page.css"),
    ("get", "/page.js"),
    ("get", "/health"),
    ("get", "/load"),
    ("get", "/metrics"),
    ("get", "/openapi.json"),
    ("get", "/version"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/detokenize"),
    ("post", "/tokenize"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/messages"),
    ("post", "/v1/messages/count_tokens"),
    ("post", "/v1/responses"),
];

#[derive(Clone)]
struct App {
    service: Arc<Service>,
    gate: Arc<Gate>,
}

impl App {
    /// The span of a request that does something; pages and metrics are asked for all the time.
    fn span(&self, method: &Method, route: &'static str, asked: &HeaderMap, id: &str) -> Span {
        match &self.service.spans {
            Some(spans) if method == Method::POST => spans.request(method.as_str(), route, asked, id),
            _ => Span::default(),
        }
    }
}

/// The routes of `service`.
pub(crate) fn router(service: Arc<Service>) -> Router {
    let gate = Arc::new(Gate::new(&service.options));
    let app = App { service, gate };
    let mut router = Router::new();
    for &(_, path) in ROUTES {
        router = router.route(path, route(path));
    }
    router
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is no such route") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "this route takes another method",
            )
        })
        .layer(middleware::from_fn_with_state(app.clone(), around))
        .with_state(app)
}

/// What answers at `path`.
fn route(path: &'static str) -> MethodRouter<App> {
    macro_rules! told {
        ($tell:expr) => {
            get(|State(app): State<App>| async move { $tell(&app.service) })
        };
    }
    macro_rules! made {
        ($make:path) => {
            post(|State(app): State<App>, request: Request| async move {
                let caller = caller(&request);
                let body = read(&app.service, request).await?;
                $make(app.service, caller, body).await
            })
        };
    }
    match path {
        "/" => file(crate::page::HTML, "text/html; charset=utf-8"),
        "/page.css" => file(crate::page::CSS, "text/css; charset=utf-8"),
        "/page.js" => file(crate::page::JS, "text/javascript; charset=utf-8"),
        "/health" => told!(plain::health),
        "/load" => told!(plain::load),
        "/metrics" => told!(plain::metrics),
        "/openapi.json" => get(|| async { plain::openapi() }),
        "/version" => told!(plain::version),
        "/v1/models" => told!(plain::models),
        "/v1/models/{model}" => get(|State(app): State<App>, Path(name): Path<String>| async move {
            plain::one_model(&app.service, &name)
        }),
        "/detokenize" => made!(detokenize),
        "/tokenize" => made!(tokenize),
        "/v1/chat/completions" => made!(chat::create),
        "/v1/completions" => made!(completions::create),
        "/v1/messages" => made!(messages::create),
        "/v1/messages/count_tokens" => made!(messages::count),
        "/v1/responses" => made!(responses::create),
        _ => unreachable!("every route of the table has an answer"),
    }
}

async fn tokenize(service: Arc<Service>, _: Caller, body: Json) -> Result<Response, ApiError> {
    completions::tokenize(service, body).await
}

async fn detokenize(service: Arc<Service>, _: Caller, body: Json) -> Result<Response, ApiError> {
    completions::detokenize(service, body).await
}

/// A part of the page, which asks nothing of any other host.
fn file(text: &'static str, kind: &'static str) -> MethodRouter<App> {
    get(move || async move {
        let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
        let headers = [
            (header::CONTENT_TYPE, kind),
            (header::CONTENT_SECURITY_POLICY, policy),
            (header::CACHE_CONTROL, "no-cache"),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        ];
        (headers, text)
    })
}

/// What every request goes through: its id, the gate, the count of answers.
async fn around(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let id = request_id(&request);
    let asked = request.headers().clone();
    let route = ROUTES.iter().find(|(_, known)| *known == path).map_or("other", |(_, known)| known);
    let peer = request.extensions().get::<SocketAddr>().expect("every connection has a peer").ip();
    let mut response = match app.gate.admit(&path, &asked, peer) {
        _ if method == Method::OPTIONS => preflight(&app, &method, &asked),
        Ok(owner) => {
            let span = app.span(&method, route, &asked, &id);
            request.extensions_mut().insert(Caller { id: id.clone(), owner, span: span.clone() });
            // A panic of ours is one request's, not the connection's.
            let response = match std::panic::AssertUnwindSafe(next.run(request)).catch_unwind().await {
                Ok(response) => response,
                Err(_) => ApiError::internal("the server panicked on this request").into_response(),
            };
            span.fact("http.response.status_code", i64::from(response.status().as_u16()));
            if let Some(error) =
                response.extensions().get::<ApiError>().filter(|error| error.status.is_server_error())
            {
                span.failed(&error.message);
            }
            response
        }
        Err(error) => error.into_response(),
    };
    if path.starts_with("/v1/messages") {
        response = in_anthropics_shape(response);
    }
    let status = response.status().as_u16();
    let headers = response.headers_mut();
    app.gate.cors(&asked, headers);
    headers.extend(
        HeaderValue::from_str(&id).ok().map(|id| (header::HeaderName::from_static("x-request-id"), id)),
    );
    app.service.engine.shared().metrics.requests.get_or_create(&Answered { route, status }).inc();
    tracing::info!(request = &*id, %method, path, status, ms = start.elapsed().as_secs_f64() * 1e3, "answered");
    response
}

fn preflight(app: &App, method: &Method, asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    if !app.gate.preflight(method, asked, response.headers_mut()) {
        response = ApiError::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            "this route takes another method",
        )
        .into_response();
    }
    response
}

/// Errors carry themselves as an extension until their shape is known.
fn in_anthropics_shape(response: Response) -> Response {
    match response.extensions().get::<ApiError>() {
        Some(error) => error.with(&error.anthropic()),
        None => response,
    }
}

/// The id that the client gave, if it is a sensible one, or a new one.
fn request_id(request: &Request) -> Arc<str> {
    let of_id = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let given = request.headers().get("x-request-id").and_then(|id| id.to_str().ok());
    match given.filter(|id| (1..=64).contains(&id.len()) && id.chars().all(of_id)) {
        Some(id) => id.into(),
        None => crate::api::id("req_").into(),
    }
}

fn caller(request: &Request) -> Caller {
    request.extensions().get::<Caller>().cloned().expect("every request went through the gate")
}

/// The body, as JSON.
async fn read(service: &Service, request: Request) -> Result<Json, ApiError> {
    let bytes = receive(request.into_body(), service.options.body, service.options.read_timeout).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let error = ApiError::invalid("", format!("the body is no JSON: {error}"));
        ApiError { code: "invalid_json", ..error }
    })
}

async fn receive(body: Body, limit: usize, time: Duration) -> Result<Bytes, ApiError> {
    let body = Limited::new(body, limit).collect();
    match tokio::time::timeout(time, body).await {
        Err(_) => {
            let message = format!("the body was not here after {time:?}");
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message))
        }
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the body has more than {limit} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message))
        }
        Ok(Err(_)) => Err(ApiError::invalid("", "the body broke off")),
    }
}

/// Takes connections until `stop` says so, then lets those that are open come to their end for as long as they may.
pub(crate) async fn serve(listener: TcpListener, service: Arc<Service>, mut stop: watch::Receiver<bool>) {
    let router = router(service.clone());
    let open = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(service.options.connections));
    loop {
        let place = places.clone().acquire_owned().await.expect("it is never closed");
        let (stream, peer) = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                // Out of descriptors, say: others will close.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        // A token is a small write, and must not wait for the next.
        let _ = stream.set_nodelay(true);
        let stream = Patient::new(stream, service.options.write_timeout);
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(service.options.read_timeout)
            .max_buf_size(64 << 10);
        let router = router.clone().layer(Extension(peer));
        let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
        let connection = open.watch(connection);
        tokio::spawn(async move {
            // How a connection ends is its client's affair.
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    service.engine.drain();
    tracing::info!("stopping: no new requests");
    if tokio::time::timeout(service.options.drain, open.shutdown()).await.is_err() {
        tracing::warn!("some requests were not done in time, and are ended");
    }
    service.engine.stop();
    if let Some(verifier) = &service.verifier {
        verifier.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The OpenAPI document and the routes are two lists of the same.
    #[test]
    fn every_route_is_described() {
        let document: Json = serde_json::from_str(plain::OPENAPI).expect("JSON");
        let mut described: Vec<(&str, &str)> = Vec::new();
        for (path, item) in document["paths"].as_object().expect("paths") {
            described.extend(
                item.as_object().expect("methods").keys().map(|method| (method.as_str(), path.as_str())),
            );
        }
        let mut routes = ROUTES.to_vec();
        described.sort_unstable();
        routes.sort_unstable();
        assert_eq!(described, routes);
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        // References lead somewhere.
        let text = document.to_string();
        for reference in
            text.split("\"$ref\":\"#").skip(1).map(|rest| &rest[..rest.find('"').expect("a quote")])
        {
            assert!(document.pointer(reference).is_some(), "{reference}");
        }
    }
}
