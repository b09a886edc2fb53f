//! An answer as server-sent events (WHATWG HTML, "Server-sent events"). Knows no protocol: renderers say what is sent.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value as Json;

use crate::answer::{Answer, Piece};

/// How long nothing is sent before a comment is, by which everyone between knows that the connection lives.
const SILENCE: Duration = Duration::from_secs(10);

/// Turns pieces into events.
pub(crate) trait Renderer: Send + 'static {
    /// What comes first.
    fn begin(&mut self, out: &mut Events);
    /// A piece of a choice.
    fn piece(&mut self, choice: usize, piece: Piece, out: &mut Events);
    /// What comes last, unless something failed.
    fn end(&mut self, out: &mut Events);
}

/// Events that go out together.
#[derive(Debug, Default)]
pub(crate) struct Events {
    text: String,
    /// Nothing follows these.
    pub(crate) over: bool,
}

impl Events {
    /// An event without a name.
    pub(crate) fn data(&mut self, data: &Json) {
        self.raw(&data.to_string());
    }

    /// A named event.
    pub(crate) fn named(&mut self, name: &str, data: &Json) {
        self.text.push_str("event: ");
        self.text.push_str(name);
        self.text.push('\n');
        self.data(data);
    }

    /// An event of one line.
    pub(crate) fn raw(&mut self, line: &str) {
        self.text.push_str("data: ");
        self.text.push_str(line);
        self.text.push_str("\n\n");
    }
}

/// The whole response.
pub(crate) fn respond(answer: Answer, renderer: impl Renderer) -> Response {
    let state = State { answer, renderer, stage: Stage::Begin };
    let body = stream::unfold(state, |mut state| async move {
        let text = state.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(text)), state))
    });
    let headers =
        [(header::CONTENT_TYPE, "text/event-stream; charset=utf-8"), (header::CACHE_CONTROL, "no-cache")];
    // nginx buffers responses unless told not to.
    let unbuffered = [("x-accel-buffering", "no")];
    (headers, unbuffered, Body::from_stream(body)).into_response()
}

struct State<R> {
    answer: Answer,
    renderer: R,
    stage: Stage,
}

enum Stage {
    Begin,
    Pieces,
    Over,
}

impl<R: Renderer> State<R> {
    /// What goes out next; none when all is said.
    async fn next(&mut self) -> Option<String> {
        let mut out = Events::default();
        loop {
            match self.stage {
                Stage::Over => return None,
                Stage::Begin => {
                    self.renderer.begin(&mut out);
                    self.stage = Stage::Pieces;
                }
                Stage::Pieces => match tokio::time::timeout(SILENCE, self.answer.next()).await {
                    Err(_) => return Some(": alive\n\n".into()),
                    Ok(None) => {
                        self.renderer.end(&mut out);
                        self.stage = Stage::Over;
                    }
                    Ok(Some((choice, piece))) => {
                        self.renderer.piece(choice, piece, &mut out);
                        // Whatever is there already goes out in one write.
                        while !out.over
                            && let Some((choice, piece)) = self.answer.ready()
                        {
                            self.renderer.piece(choice, piece, &mut out);
                        }
                        if out.over {
                            self.stage = Stage::Over;
                        }
                    }
                },
            }
            if !out.text.is_empty() {
                return Some(out.text);
            }
        }
    }
}
