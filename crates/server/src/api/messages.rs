//! Anthropic's messages, which Claude Code and its like speak. Source: Anthropic's API reference, "Messages" and "Streaming
//! Messages", and what its Python client reads.

use std::sync::Arc;

use axum::Json as JsonBody;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::finished::{Whole, finished};
use super::params::{Params, check_stop};
use super::tools::tool;
use super::{id, read};
use crate::answer::{Caller, Generation, Piece, Usage, Why};
use crate::conversation::{Chat, ToolChoice};
use crate::error::ApiError;
use crate::service::Service;
use crate::sse::{self, Events, Renderer};
use crate::text::{Delta, Tool};

#[derive(Debug, Deserialize)]
struct Body {
    messages: Vec<Message>,
    #[serde(default)]
    system: Option<Json>,
    #[serde(default)]
    tools: Option<Vec<ToolBody>>,
    #[serde(default)]
    tool_choice: Option<Choice>,
    #[serde(default)]
    stop_sequences: Option<Vec<String>>,
    #[serde(default)]
    thinking: Option<Thinking>,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    content: Json,
}

#[derive(Debug, Deserialize)]
struct ToolBody {
    #[serde(default)]
    r#type: Option<String>,
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    input_schema: Option<Json>,
    #[serde(default)]
    strict: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    r#type: String,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    disable_parallel_tool_use: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Thinking {
    r#type: String,
}

/// `POST /v1/messages`.
pub(crate) async fn create(service: Arc<Service>, caller: Caller, body: Json) -> Result<Response, ApiError> {
    let params: Params = read(&body)?;
    let wants: Body = read(&body)?;
    if params.max_tokens.is_none() {
        return Err(ApiError::invalid("max_tokens", "max_tokens: Field required"));
    }
    let mut generation: Generation = params.generation(&service)?;
    generation.choices = 1;
    generation.stop = check_stop("stop_sequences", wants.stop_sequences.clone().unwrap_or_default())?;
    let mut answer = service.chat(chat(wants)?, generation, &caller).await?;
    let head = Head { id: id("msg_"), model: service.name.clone(), prompt: answer.prompt.len() };
    if params.streams() {
        return Ok(sse::respond(answer, Stream { head, open: None, blocks: 0 }));
    }
    let whole = finished(&mut answer).await?.pop().ok_or_else(|| ApiError::internal("there is no answer"))?;
    let mut message = head.message();
    message["content"] = content(&whole);
    let (reason, string) = stop_reason(&whole.end.why);
    message["stop_reason"] = reason.into();
    message["stop_sequence"] = string;
    message["usage"] = usage_json(&whole.end.usage);
    Ok(JsonBody(message).into_response())
}

/// `POST /v1/messages/count_tokens`.
pub(crate) async fn count(service: Arc<Service>, _: Caller, body: Json) -> Result<Response, ApiError> {
    let ids = service.encode(&chat(read(&body)?)?).await?;
    Ok(JsonBody(json!({ "input_tokens": ids.len() })).into_response())
}

/// The blocks of a whole answer.
fn content(whole: &Whole) -> Json {
    let mut blocks = Vec::new();
    if !whole.reasoning.is_empty() {
        blocks.push(json!({ "type": "thinking", "thinking": whole.reasoning, "signature": SIGNATURE }));
    }
    if !whole.content.is_empty() || (whole.calls.is_empty() && whole.reasoning.is_empty()) {
        blocks.push(json!({ "type": "text", "text": whole.content }));
    }
    for call in &whole.calls {
        // A call that was cut off is no object: it is told as what it is.
        let input = serde_json::from_str::<Json>(&call.arguments).ok().filter(Json::is_object);
        let input = input.unwrap_or_else(|| json!({ "incomplete": call.arguments }));
        blocks.push(json!({ "type": "tool_use", "id": id("toolu_"), "name": call.name, "input": input }));
    }
    blocks.into()
}

/// Clients hand it back with the thinking; it means nothing here.
const SIGNATURE: &str = "tally";

fn chat(wants: Body) -> Result<Chat, ApiError> {
    let mut messages = Vec::new();
    if let Some(system) = wants.system.filter(|system| !system.is_null()) {
        let text = text("system", &system)?;
        if !text.is_empty() {
            messages.push(json!({ "role": "system", "content": text }));
        }
    }
    if wants.messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages: at least one message is required"));
    }
    for (i, message) in wants.messages.iter().enumerate() {
        convert(&format!("messages.{i}"), message, &mut messages)?;
    }
    let (choice, parallel) = match &wants.tool_choice {
        None => (ToolChoice::Auto, true),
        Some(choice) => {
            let parallel = !choice.disable_parallel_tool_use.unwrap_or(false);
            let wrong = |message: &str| ApiError::invalid("tool_choice", format!("tool_choice: {message}"));
            let choice = match (choice.r#type.as_str(), &choice.name) {
                ("auto", _) => ToolChoice::Auto,
                ("any", _) => ToolChoice::Required,
                ("none", _) => ToolChoice::None,
                ("tool", Some(name)) => ToolChoice::Named(name.clone()),
                ("tool", None) => return Err(wrong("name: Field required")),
                (other, _) => return Err(wrong(&format!("no such type: {other:?}"))),
            };
            (choice, parallel)
        }
    };
    let tools =
        wants.tools.into_iter().flatten().enumerate().map(|(i, body)| one_tool(&format!("tools.{i}"), body));
    Ok(Chat {
        messages,
        tools: tools.collect::<Result<_, _>>()?,
        choice,
        parallel,
        thinking: wants.thinking.map(|thinking| thinking.r#type != "disabled"),
        ..Chat::default()
    })
}

fn one_tool(field: &str, body: ToolBody) -> Result<Tool, ApiError> {
    match body.r#type.as_deref() {
        None | Some("custom" | "function") => {}
        Some(other) => {
            let message = format!("{field}: tools of type {other:?} run at Anthropic's, not here");
            return Err(ApiError::invalid(field, message));
        }
    }
    tool(field, body.name, body.description, body.input_schema, body.strict)
}

/// A message to those that templates take: results of tools become messages of their own.
fn convert(field: &str, message: &Message, out: &mut Vec<Json>) -> Result<(), ApiError> {
    let wrong = |what: String| ApiError::invalid(field, format!("{field}: {what}"));
    let role = message.role.as_str();
    if !["user", "assistant", "system"].contains(&role) {
        return Err(wrong(format!("role: Input should be 'user' or 'assistant', not {role:?}")));
    }
    let blocks = match &message.content {
        Json::String(text) => {
            out.push(json!({ "role": role, "content": text }));
            return Ok(());
        }
        Json::Array(blocks) => blocks,
        _ => return Err(wrong("content: it is neither text nor a list of blocks".into())),
    };
    let (mut said, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
    for block in blocks {
        let of = |name: &str| block[name].as_str();
        match of("type") {
            Some("text") => said.push_str(of("text").unwrap_or_default()),
            Some("thinking") => thought.push_str(of("thinking").unwrap_or_default()),
            Some("redacted_thinking") => {}
            Some("tool_use") => calls.push(json!({ "id": block["id"], "type": "function", "function": {
                "name": of("name").ok_or_else(|| wrong("a tool_use has no name".into()))?,
                "arguments": block["input"],
            } })),
            Some("tool_result") => {
                let result = match &block["content"] {
                    Json::Null => String::new(),
                    content => text(field, content)?,
                };
                out.push(json!({ "role": "tool", "content": result, "tool_call_id": block["tool_use_id"] }));
            }
            Some(other) => {
                return Err(wrong(format!("content of type {other:?} is not known to this model")));
            }
            None => return Err(wrong("a block of the content has no type".into())),
        }
    }
    let says_nothing = said.is_empty() && calls.is_empty() && thought.is_empty();
    if says_nothing && blocks.iter().any(|block| block["type"] == "tool_result") {
        return Ok(());
    }
    let mut converted = json!({ "role": role, "content": said });
    if !calls.is_empty() {
        converted["tool_calls"] = calls.into();
    }
    if !thought.is_empty() {
        converted["reasoning_content"] = thought.into();
    }
    out.push(converted);
    Ok(())
}

/// Text, whole or in blocks.
fn text(field: &str, content: &Json) -> Result<String, ApiError> {
    match content {
        Json::String(text) => Ok(text.clone()),
        Json::Array(blocks) => {
            let texts: Option<Vec<&str>> = blocks.iter().map(|block| block["text"].as_str()).collect();
            let message = format!("{field}: only blocks of type \"text\" are known to this model");
            texts.map(|texts| texts.join("\n")).ok_or_else(|| ApiError::invalid(field, message))
        }
        _ => Err(ApiError::invalid(field, format!("{field}: it is neither text nor a list of blocks"))),
    }
}

fn stop_reason(why: &Why) -> (&'static str, Json) {
    match why {
        Why::Model => ("end_turn", Json::Null),
        Why::Calls => ("tool_use", Json::Null),
        Why::StopString(string) => ("stop_sequence", string.as_str().into()),
        Why::Length => ("max_tokens", Json::Null),
    }
}

/// Anthropic's account of tokens: what was found in the cache is counted apart.
fn usage_json(usage: &Usage) -> Json {
    json!({
        "input_tokens": usage.prompt - usage.cached, "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0, "output_tokens": usage.generated,
    })
}

struct Head {
    id: String,
    model: String,
    prompt: usize,
}

impl Head {
    /// A message that says nothing yet.
    fn message(&self) -> Json {
        let usage = Usage { prompt: self.prompt, ..Usage::default() };
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [],
            "stop_reason": null, "stop_sequence": null, "usage": usage_json(&usage),
        })
    }
}

/// The sort of block that is open.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Open {
    Thinking,
    Text,
    ToolUse,
}

struct Stream {
    head: Head,
    open: Option<Open>,
    /// Blocks begun.
    blocks: usize,
}

impl Stream {
    fn open(&mut self, kind: Open, block: impl FnOnce() -> Json, out: &mut Events) {
        if self.open == Some(kind) && kind != Open::ToolUse {
            return;
        }
        self.close(out);
        let event = json!({ "type": "content_block_start", "index": self.blocks, "content_block": block() });
        out.named("content_block_start", &event);
        self.open = Some(kind);
        self.blocks += 1;
    }

    fn delta(&self, delta: &Json, out: &mut Events) {
        let event = json!({ "type": "content_block_delta", "index": self.blocks - 1, "delta": delta });
        out.named("content_block_delta", &event);
    }

    fn close(&mut self, out: &mut Events) {
        let Some(open) = self.open.take() else { return };
        if open == Open::Thinking {
            self.delta(&json!({ "type": "signature_delta", "signature": SIGNATURE }), out);
        }
        out.named("content_block_stop", &json!({ "type": "content_block_stop", "index": self.blocks - 1 }));
    }
}

impl Renderer for Stream {
    fn begin(&mut self, out: &mut Events) {
        out.named("message_start", &json!({ "type": "message_start", "message": self.head.message() }));
        out.named("ping", &json!({ "type": "ping" }));
    }

    fn piece(&mut self, _: usize, piece: Piece, out: &mut Events) {
        match piece {
            Piece::Prompt(_) | Piece::Token(..) => {}
            Piece::Delta(Delta::Reasoning(text)) => {
                self.open(
                    Open::Thinking,
                    || json!({ "type": "thinking", "thinking": "", "signature": "" }),
                    out,
                );
                self.delta(&json!({ "type": "thinking_delta", "thinking": text }), out);
            }
            Piece::Delta(Delta::Content(text)) => {
                self.open(Open::Text, || json!({ "type": "text", "text": "" }), out);
                self.delta(&json!({ "type": "text_delta", "text": text }), out);
            }
            Piece::Delta(Delta::Call { name, .. }) => {
                let block = || json!({ "type": "tool_use", "id": id("toolu_"), "name": name, "input": {} });
                self.open(Open::ToolUse, block, out);
            }
            Piece::Delta(Delta::Arguments { json, .. }) => {
                self.delta(&json!({ "type": "input_json_delta", "partial_json": json }), out);
            }
            Piece::Delta(Delta::CallEnd { .. }) => self.close(out),
            Piece::End(end) => {
                if self.blocks == 0 {
                    self.open(Open::Text, || json!({ "type": "text", "text": "" }), out);
                }
                self.close(out);
                let (reason, string) = stop_reason(&end.why);
                let event = json!({
                    "type": "message_delta", "delta": { "stop_reason": reason, "stop_sequence": string },
                    "usage": usage_json(&end.usage),
                });
                out.named("message_delta", &event);
            }
            Piece::Failed(error) => {
                out.named("error", &error.anthropic());
                out.over = true;
            }
        }
    }

    fn end(&mut self, out: &mut Events) {
        out.named("message_stop", &json!({ "type": "message_stop" }));
    }
}
