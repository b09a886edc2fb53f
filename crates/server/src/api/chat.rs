//! OpenAI's chat completions. Source: the API reference of OpenAI, "Chat", and what its Python client reads.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json as JsonBody;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::finished::{finished, total};
use super::params::{Format, Params, top_logprobs};
use super::tools::Offer;
use super::{id, read};
use crate::answer::{Caller, Piece, Usage, Why};
use crate::conversation::{Chat, now};
use crate::error::ApiError;
use crate::job::Logprobs;
use crate::service::Service;
use crate::sse::{self, Events, Renderer};
use crate::text::Delta;

#[derive(Debug, Deserialize)]
struct Body {
    messages: Vec<Json>,
    #[serde(default)]
    logprobs: Option<bool>,
    #[serde(default)]
    top_logprobs: Option<u64>,
    #[serde(default)]
    reasoning_effort: Option<String>,
    #[serde(default)]
    chat_template_kwargs: Option<Map<String, Json>>,
}

/// `POST /v1/chat/completions`.
pub(crate) async fn create(service: Arc<Service>, caller: Caller, body: Json) -> Result<Response, ApiError> {
    let (params, format): (Params, Format) = (read(&body)?, read(&body)?);
    let wants = read::<Body>(&body)?;
    let mut generation = params.generation(&service)?;
    if wants.logprobs == Some(true) {
        generation.logprobs = Some(top_logprobs("top_logprobs", wants.top_logprobs.unwrap_or(0))?);
    }
    let chat = chat(wants, &read(&body)?, format)?;
    let mut answer = service.chat(chat, generation, &caller).await?;
    let head = Head { id: id("chatcmpl-"), created: now(), model: service.name.clone(), seed: answer.seed };
    if params.streams() {
        let renderer = Stream {
            service,
            head,
            includes_usage: params.includes_usage(),
            choices: BTreeMap::new(),
            count: answer.choices,
        };
        return Ok(sse::respond(answer, renderer));
    }
    let all = finished(&mut answer).await?;
    let usage = total(all.iter().map(|whole| whole.end.usage));
    let choices: Vec<Json> = all
        .into_iter()
        .enumerate()
        .map(|(index, whole)| {
            let mut message = json!({ "role": "assistant", "content": whole.content, "refusal": null });
            if !whole.reasoning.is_empty() {
                message["reasoning_content"] = whole.reasoning.into();
            }
            if !whole.calls.is_empty() {
                let call = |call: &super::finished::Call| {
                    let function = json!({ "name": call.name, "arguments": call.arguments });
                    json!({ "id": id("call_"), "type": "function", "function": function })
                };
                message["tool_calls"] = whole.calls.iter().map(call).collect();
                if message["content"] == "" {
                    message["content"] = Json::Null;
                }
            }
            let logprobs: Vec<Json> = whole
                .tokens
                .iter()
                .filter_map(|(_, logprobs)| Some(entry(&service, logprobs.as_ref()?)))
                .collect();
            let wanted = whole.tokens.iter().any(|(_, logprobs)| logprobs.is_some());
            json!({
                "index": index, "message": message, "finish_reason": reason(&whole.end.why),
                "logprobs": if wanted { json!({ "content": logprobs, "refusal": null }) } else { Json::Null },
            })
        })
        .collect();
    let mut object = head.object("chat.completion");
    object["choices"] = choices.into();
    object["usage"] = usage_json(&usage);
    Ok(JsonBody(object).into_response())
}

/// The conversation that a request describes.
fn chat(wants: Body, offer: &Offer, format: Format) -> Result<Chat, ApiError> {
    Ok(Chat {
        messages: messages(&wants.messages)?,
        tools: offer.tools()?,
        choice: offer.choice()?,
        parallel: offer.parallel(),
        thinking: wants.reasoning_effort.map(|effort| effort != "none"),
        variables: wants.chat_template_kwargs.unwrap_or_default(),
        format: format.grammar()?,
    })
}

/// Messages as templates take them.
fn messages(messages: &[Json]) -> Result<Vec<Json>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages: there are none"));
    }
    messages.iter().enumerate().map(|(i, message)| one_message(&format!("messages[{i}]"), message)).collect()
}

fn one_message(field: &str, message: &Json) -> Result<Json, ApiError> {
    let wrong = |what: &str| ApiError::invalid(field, format!("{field}: {what}"));
    let fields = message.as_object().ok_or_else(|| wrong("it is no object"))?;
    let role = match fields.get("role").and_then(Json::as_str) {
        // The newer name of the same.
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool" | "function")) => role,
        Some(other) => return Err(wrong(&format!("no such role: {other:?}"))),
        None => return Err(wrong("role is missing")),
    };
    let content = match fields.get("content") {
        None | Some(Json::Null) if role == "assistant" => String::new(),
        content => text(field, content.unwrap_or(&Json::Null))?,
    };
    let mut out = json!({ "role": role, "content": content });
    for name in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(value @ Json::String(_)) = fields.get(name) {
            out[name] = value.clone();
        }
    }
    if let Some(Json::String(reasoning)) = fields.get("reasoning") {
        out["reasoning_content"] = reasoning.as_str().into();
    }
    if let Some(Json::Array(calls)) = fields.get("tool_calls").filter(|calls| !calls.is_null()) {
        let call = |call: &Json| {
            let name =
                call["function"]["name"].as_str().ok_or_else(|| wrong("a call has no function.name"))?;
            Ok::<_, ApiError>(json!({ "id": call["id"], "type": "function", "function": {
                "name": name, "arguments": arguments(&call["function"]["arguments"]),
            } }))
        };
        out["tool_calls"] = calls.iter().map(call).collect::<Result<_, _>>()?;
    }
    Ok(out)
}

/// The arguments of a past call as an object, as templates take them; what is none is told as it stands.
pub(super) fn arguments(arguments: &Json) -> Json {
    match arguments {
        Json::String(text) => match serde_json::from_str::<Json>(text) {
            Ok(object @ Json::Object(_)) => object,
            _ if text.trim().is_empty() => json!({}),
            _ => json!({ "arguments": text }),
        },
        Json::Null => json!({}),
        other => other.clone(),
    }
}

/// A content, whole or in parts, as text.
pub(super) fn text(field: &str, content: &Json) -> Result<String, ApiError> {
    let wrong = |what: String| ApiError::invalid(field, format!("{field}: {what}"));
    match content {
        Json::String(text) => Ok(text.clone()),
        Json::Array(parts) => parts
            .iter()
            .map(|part| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text" | "input_text" | "output_text"), Some(text)) => Ok(text),
                (Some("refusal"), _) => Ok(part["refusal"].as_str().unwrap_or_default()),
                (Some(other), _) => {
                    Err(wrong(format!("content of type {other:?} is not known to this model")))
                }
                (None, _) => Err(wrong("a part of the content has no type".into())),
            })
            .collect(),
        _ => Err(wrong("content is missing".into())),
    }
}

/// What is the same in all objects of an answer.
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: i64,
    pub(super) model: String,
    pub(super) seed: u64,
}

impl Head {
    /// The beginning of an object. The seed is told, so that an answer can be had again.
    pub(super) fn object(&self, kind: &str) -> Json {
        json!({
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "seed": self.seed,
            "system_fingerprint": format!("tally-{}", env!("CARGO_PKG_VERSION")),
        })
    }
}

/// OpenAI's word for why an answer ended.
fn reason(why: &Why) -> &'static str {
    match why {
        Why::Model | Why::StopString(_) => "stop",
        Why::Calls => "tool_calls",
        Why::Length => "length",
    }
}

/// OpenAI's account of tokens.
pub(super) fn usage_json(usage: &Usage) -> Json {
    json!({
        "prompt_tokens": usage.prompt, "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": { "cached_tokens": usage.cached },
        "completion_tokens_details": { "reasoning_tokens": usage.reasoning },
    })
}

/// A token's log-probability as chat completions tell it.
fn entry(service: &Service, logprobs: &Logprobs) -> Json {
    let one = |token: &engine::TokenLogprob| {
        let bytes = service.tokenizer().token_bytes(token.id).unwrap_or_default();
        json!({ "token": String::from_utf8_lossy(bytes), "logprob": token.logprob, "bytes": bytes })
    };
    let mut entry = one(&logprobs.chosen);
    entry["top_logprobs"] = logprobs.top.iter().map(one).collect();
    entry
}

/// Chunks of a stream.
struct Stream {
    service: Arc<Service>,
    head: Head,
    includes_usage: bool,
    /// Usage of the choices that have ended, and log-probabilities not yet sent.
    choices: BTreeMap<usize, (Option<Usage>, Vec<Json>)>,
    count: usize,
}

impl Stream {
    fn chunk(&mut self, choice: usize, delta: Json, finish: Option<&str>) -> Json {
        let pending = self.choices.entry(choice).or_default();
        let logprobs = match std::mem::take(&mut pending.1) {
            entries if entries.is_empty() => Json::Null,
            entries => json!({ "content": entries, "refusal": null }),
        };
        let mut chunk = self.head.object("chat.completion.chunk");
        chunk["choices"] =
            json!([{ "index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish }]);
        if self.includes_usage {
            chunk["usage"] = Json::Null;
        }
        chunk
    }
}

impl Renderer for Stream {
    fn begin(&mut self, out: &mut Events) {
        for choice in 0..self.count {
            let chunk = self.chunk(choice, json!({ "role": "assistant", "content": "" }), None);
            out.data(&chunk);
        }
    }

    fn piece(&mut self, choice: usize, piece: Piece, out: &mut Events) {
        let delta = match piece {
            Piece::Prompt(_) | Piece::Delta(Delta::CallEnd { .. }) => return,
            Piece::Token(_, logprobs) => {
                if let Some(logprobs) = logprobs {
                    let entry = entry(&self.service, &logprobs);
                    self.choices.entry(choice).or_default().1.push(entry);
                }
                return;
            }
            Piece::Delta(Delta::Reasoning(text)) => json!({ "reasoning_content": text }),
            Piece::Delta(Delta::Content(text)) => json!({ "content": text }),
            Piece::Delta(Delta::Call { index, name }) => json!({ "tool_calls": [{
                "index": index, "id": id("call_"), "type": "function", "function": { "name": name, "arguments": "" },
            }] }),
            Piece::Delta(Delta::Arguments { index, json }) => {
                json!({ "tool_calls": [{ "index": index, "function": { "arguments": json } }] })
            }
            Piece::End(end) => {
                let chunk = self.chunk(choice, json!({}), Some(reason(&end.why)));
                out.data(&chunk);
                self.choices.entry(choice).or_default().0 = Some(end.usage);
                return;
            }
            Piece::Failed(error) => {
                out.data(&error.openai());
                out.over = true;
                return;
            }
        };
        let chunk = self.chunk(choice, delta, None);
        out.data(&chunk);
    }

    fn end(&mut self, out: &mut Events) {
        if self.includes_usage {
            let mut chunk = self.head.object("chat.completion.chunk");
            chunk["choices"] = json!([]);
            chunk["usage"] = usage_json(&total(self.choices.values().filter_map(|(usage, _)| *usage)));
            out.data(&chunk);
        }
        out.raw("[DONE]");
    }
}
