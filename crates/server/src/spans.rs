//! What became of requests, as spans for a collector: OTLP over HTTP, in JSON (opentelemetry.io, "OTLP Specification 1").
//! Nothing waits for a collector; what it does not take is lost. Knows no protocol's fields.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use axum::http::{HeaderMap, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::net::TcpStream;
use tokio::runtime::Handle;

/// How long the collector may take over a batch.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the last batch may take when the server ends.
const FAREWELL: Duration = Duration::from_secs(2);
/// The longest answer of a collector that is read.
const ANSWER: usize = 64 << 10;

/// Why spans cannot be sent. One line.
#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    /// It is no address.
    #[error(
        "the collector {0:?} is no address of the form http://HOST:PORT (there is no TLS: name a collector of your network)"
    )]
    Address(String),
    /// The exporter does not take it.
    #[error("the collector: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// The way to the collector.
pub(crate) struct Spans {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Spans {
    /// Sends spans to `collector`, an address to which `/v1/traces` is added; the bytes go out on `runtime`.
    pub(crate) fn start(collector: &str, model: &str, runtime: Handle) -> Result<Spans, CollectorError> {
        let wrong = || CollectorError::Address(collector.to_owned());
        let address: Uri = collector.parse().map_err(|_| wrong())?;
        if address.scheme_str() != Some("http") || address.host().is_none() {
            return Err(wrong());
        }
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Client { runtime })
            .with_endpoint(format!("{}/v1/traces", collector.trim_end_matches('/')))
            .with_timeout(PATIENCE)
            .build()?;
        let facts = [
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("gen_ai.request.model", model.to_owned()),
        ];
        let resource = Resource::builder().with_service_name("tally").with_attributes(facts).build();
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Spans { tracer: provider.tracer("tally"), provider })
    }

    /// A request arrives. Its span continues the trace that its `traceparent` names (W3C, "Trace Context").
    pub(crate) fn request(&self, method: &str, route: &'static str, headers: &HeaderMap, id: &str) -> Span {
        let parent =
            TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        let facts = [
            KeyValue::new("http.request.method", method.to_owned()),
            KeyValue::new("http.route", route),
            KeyValue::new("tally.request.id", id.to_owned()),
        ];
        let span = self.tracer.span_builder(format!("{method} {route}")).with_kind(SpanKind::Server);
        let span = span.with_attributes(facts).start_with_context(&self.tracer, &parent);
        Span(Some((self.tracer.clone(), parent.with_span(span))))
    }

    /// Sends what is left. Blocks for a while at most.
    pub(crate) fn stop(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FAREWELL) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// A part of the work on a request, from its beginning until its last clone is dropped. Without a collector: nothing.
#[derive(Clone, Default)]
pub(crate) struct Span(Option<(SdkTracer, Context)>);

impl Span {
    /// A part of this one begins.
    pub(crate) fn part(&self, name: &'static str) -> Span {
        let part = |(tracer, context): &(SdkTracer, Context)| {
            let span = tracer.start_with_context(name, context);
            (tracer.clone(), context.with_span(span))
        };
        Span(self.0.as_ref().map(part))
    }

    /// States a fact.
    pub(crate) fn fact(&self, name: &'static str, value: impl Into<Value>) {
        if let Some((_, context)) = &self.0 {
            context.span().set_attribute(KeyValue::new(name, value));
        }
    }

    /// States a count.
    pub(crate) fn count(&self, name: &'static str, count: usize) {
        self.fact(name, i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Something happened now.
    pub(crate) fn event(&self, name: &'static str) {
        if let Some((_, context)) = &self.0 {
            context.span().add_event(name, Vec::new());
        }
    }

    /// It went wrong.
    pub(crate) fn failed(&self, why: &str) {
        if let Some((_, context)) = &self.0 {
            context.span().set_status(Status::error(why.to_owned()));
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Span" } else { "no Span" })
    }
}

/// HTTP on the server's own runtime. The exporter has a thread of its own, which waits.
#[derive(Debug)]
struct Client {
    runtime: Handle,
}

impl HttpClient for Client {
    fn send_bytes<'s, 'f>(
        &'s self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'f>>
    where
        's: 'f,
        Self: 'f,
    {
        let sent = self.runtime.spawn(async { tokio::time::timeout(PATIENCE, send(request)).await });
        Box::pin(async move { sent.await?? })
    }
}

/// One request on a connection of its own: batches are seconds apart.
async fn send(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut head, body) = request.into_parts();
    let host = head.uri.authority().ok_or("the collector has no host")?.clone();
    let stream =
        TcpStream::connect((host.host().trim_matches(['[', ']']), host.port_u16().unwrap_or(80))).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    head.headers.insert(header::HOST, host.as_str().parse()?);
    head.uri = head.uri.path_and_query().map_or("/", |path| path.as_str()).parse()?;
    let response = sender.send_request(Request::from_parts(head, Full::new(body))).await?;
    let (head, body) = response.into_parts();
    let body = http_body_util::Limited::new(body, ANSWER).collect().await?.to_bytes();
    Ok(Response::from_parts(head, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let check = |address: &str, want: bool| {
            let found = Spans::start(address, "m", runtime.handle().clone());
            assert_eq!(found.is_ok(), want, "{address}: {:?}", found.err());
        };
        check("http://localhost:4318", true);
        check("http://[::1]:4318/", true);
        check("https://collector.example:4318", false);
        check("localhost:4318", false);
        check("", false);
        check("http://", false);
    }
}
