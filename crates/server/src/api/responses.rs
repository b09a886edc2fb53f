//! OpenAI's responses, without state: nothing is stored, and what went before comes with the request. Source: the API
//! reference of OpenAI, "Responses", and what its Python client reads.

use std::sync::Arc;

use axum::Json as JsonBody;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::chat::{arguments, text};
use super::finished::finished;
use super::params::{Params, flat_format};
use super::tools::Offer;
use super::{id, read};
use crate::answer::{Caller, End, Piece, Why};
use crate::conversation::{Chat, now};
use crate::error::ApiError;
use crate::service::Service;
use crate::sse::{self, Events, Renderer};
use crate::text::Delta;

#[derive(Debug, Deserialize)]
struct Body {
    input: Json,
    #[serde(default)]
    instructions: Option<String>,
    #[serde(default)]
    max_output_tokens: Option<u64>,
    #[serde(default)]
    text: Option<TextBody>,
    #[serde(default)]
    reasoning: Option<ReasoningBody>,
    #[serde(default)]
    previous_response_id: Option<String>,
    #[serde(default)]
    background: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct TextBody {
    #[serde(default)]
    format: Option<Json>,
}

#[derive(Debug, Deserialize)]
struct ReasoningBody {
    #[serde(default)]
    effort: Option<String>,
}

/// `POST /v1/responses`.
pub(crate) async fn create(service: Arc<Service>, caller: Caller, body: Json) -> Result<Response, ApiError> {
    let params: Params = read(&body)?;
    let wants: Body = read(&body)?;
    if wants.previous_response_id.is_some() || wants.background == Some(true) {
        let message =
            "previous_response_id and background need a server that stores responses; send the whole input";
        return Err(ApiError::invalid("previous_response_id", message));
    }
    let mut generation = params.generation(&service)?;
    generation.choices = 1;
    generation.max_tokens = wants.max_output_tokens.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    generation.grammar_field = "text.format";
    let object = object(&service, &body, &generation.sampling, wants.max_output_tokens);
    let mut answer = service.chat(chat(wants, &read(&body)?)?, generation, &caller).await?;
    let mut items = Items { object, items: Vec::new(), open: None, number: 0 };
    items.object["seed"] = answer.seed.into();
    if params.streams() {
        return Ok(sse::respond(answer, items));
    }
    // The same items as a stream's, without the events that tell of them.
    let whole = finished(&mut answer).await?.pop().ok_or_else(|| ApiError::internal("there is no answer"))?;
    let out = &mut Events::default();
    let mut put = |delta| items.piece(0, Piece::Delta(delta), out);
    let nothing_else = whole.calls.is_empty() && whole.reasoning.is_empty();
    if !whole.reasoning.is_empty() {
        put(Delta::Reasoning(whole.reasoning));
    }
    if !whole.content.is_empty() || nothing_else {
        put(Delta::Content(whole.content));
    }
    for (index, call) in whole.calls.into_iter().enumerate() {
        put(Delta::Call { index, name: call.name });
        put(Delta::Arguments { index, json: call.arguments });
        if call.ended {
            put(Delta::CallEnd { index });
        }
    }
    items.piece(0, Piece::End(whole.end), out);
    Ok(JsonBody(items.object).into_response())
}

fn chat(wants: Body, offer: &Offer) -> Result<Chat, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = wants.instructions {
        messages.push(json!({ "role": "system", "content": instructions }));
    }
    match &wants.input {
        Json::String(text) => messages.push(json!({ "role": "user", "content": text })),
        Json::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                convert(&format!("input[{i}]"), item, &mut messages)?;
            }
        }
        _ => return Err(ApiError::invalid("input", "input: it is neither text nor a list of items")),
    }
    Ok(Chat {
        messages,
        tools: offer.tools()?,
        choice: offer.choice()?,
        parallel: offer.parallel(),
        thinking: wants.reasoning.and_then(|reasoning| reasoning.effort).map(|effort| effort != "none"),
        format: match wants.text.and_then(|text| text.format) {
            Some(format) => flat_format(&format)?,
            None => None,
        },
        ..Chat::default()
    })
}

/// An item of the input to messages as templates take them; calls join the message of the assistant before them.
fn convert(field: &str, item: &Json, out: &mut Vec<Json>) -> Result<(), ApiError> {
    let wrong = |what: String| ApiError::invalid(field, format!("{field}: {what}"));
    let of = |name: &str| item[name].as_str();
    match of("type").unwrap_or("message") {
        "message" => {
            let role = match of("role") {
                Some("developer") => "system",
                Some(role @ ("system" | "user" | "assistant")) => role,
                other => return Err(wrong(format!("no such role: {other:?}"))),
            };
            out.push(json!({ "role": role, "content": text(field, &item["content"])? }));
        }
        "function_call" => {
            let name = of("name").ok_or_else(|| wrong("a call has no name".into()))?;
            let call = json!({ "id": item["call_id"], "type": "function", "function": {
                "name": name, "arguments": arguments(&item["arguments"]),
            } });
            match out.last_mut().filter(|last| last["role"] == "assistant") {
                Some(last) => match last["tool_calls"].as_array_mut() {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                },
                None => out.push(json!({ "role": "assistant", "content": "", "tool_calls": [call] })),
            }
        }
        "function_call_output" => {
            let output = text(field, &item["output"])?;
            out.push(json!({ "role": "tool", "content": output, "tool_call_id": item["call_id"] }));
        }
        // What the model thought before is not told to it again.
        "reasoning" => {}
        other => return Err(wrong(format!("items of type {other:?} are not known"))),
    }
    Ok(())
}

/// The response before anything was said.
fn object(service: &Service, body: &Json, sampling: &engine::SamplerParams, most: Option<u64>) -> Json {
    let or = |name: &str, default: Json| match &body[name] {
        Json::Null => default,
        given => given.clone(),
    };
    json!({
        "id": id("resp_"), "object": "response", "created_at": now(), "status": "in_progress", "background": false,
        "error": null, "incomplete_details": null, "instructions": body["instructions"], "max_output_tokens": most,
        "model": service.name, "output": [], "parallel_tool_calls": or("parallel_tool_calls", true.into()),
        "previous_response_id": null, "reasoning": or("reasoning", json!({ "effort": null, "summary": null })),
        "store": false, "temperature": sampling.temperature, "text": or("text", json!({ "format": { "type": "text" } })),
        "tool_choice": or("tool_choice", "auto".into()), "tools": or("tools", json!([])), "top_p": sampling.top_p,
        "truncation": "disabled", "usage": null, "metadata": or("metadata", json!({})),
    })
}

/// The items of a response, and the events that tell of them.
struct Items {
    object: Json,
    items: Vec<Json>,
    /// The last item is still growing, and is of this sort.
    open: Option<Open>,
    /// Of the next event.
    number: u64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Open {
    Reasoning,
    Message,
    Call,
}

impl Items {
    fn event(&mut self, kind: &str, mut fields: Json, out: &mut Events) {
        fields["type"] = kind.into();
        fields["sequence_number"] = self.number.into();
        self.number += 1;
        out.named(kind, &fields);
    }

    /// Where the last item is, for events about it.
    fn place(&self) -> Json {
        let last = self.items.len() - 1;
        json!({ "output_index": last, "item_id": self.items[last]["id"] })
    }

    fn place_with(&self, more: Json) -> Json {
        let mut place = self.place();
        if let (Json::Object(place), Json::Object(more)) = (&mut place, more) {
            place.extend(more);
        }
        place
    }

    fn open(&mut self, kind: Open, item: Json, out: &mut Events) {
        if self.open == Some(kind) && kind != Open::Call {
            return;
        }
        self.close(out);
        self.items.push(item.clone());
        self.open = Some(kind);
        let index = self.items.len() - 1;
        self.event("response.output_item.added", json!({ "output_index": index, "item": item }), out);
        let part = match kind {
            Open::Reasoning => json!({ "type": "reasoning_text", "text": "" }),
            Open::Message => json!({ "type": "output_text", "text": "", "annotations": [], "logprobs": [] }),
            Open::Call => return,
        };
        let fields = self.place_with(json!({ "content_index": 0, "part": part }));
        self.event("response.content_part.added", fields, out);
        self.items[index]["content"] = json!([part]);
    }

    /// Appends to the text of the last item.
    fn grow(&mut self, kind: &str, more: &str, out: &mut Events) {
        let fields = self.place_with(json!({ "content_index": 0, "delta": more, "logprobs": [] }));
        self.event(kind, fields, out);
        let last = self.items.last_mut().expect("an item is open");
        append(&mut last["content"][0]["text"], more);
    }

    /// Ends the last item, which is whole.
    fn close(&mut self, out: &mut Events) {
        self.close_as("completed", out);
    }

    fn close_as(&mut self, status: &str, out: &mut Events) {
        let Some(open) = self.open.take() else { return };
        let last = self.items.len() - 1;
        self.items[last]["status"] = status.into();
        let part = self.items[last]["content"][0].clone();
        match open {
            Open::Reasoning | Open::Message => {
                let kind = if open == Open::Message { "output_text" } else { "reasoning_text" };
                let fields =
                    self.place_with(json!({ "content_index": 0, "text": part["text"], "logprobs": [] }));
                self.event(&format!("response.{kind}.done"), fields, out);
                let fields = self.place_with(json!({ "content_index": 0, "part": part }));
                self.event("response.content_part.done", fields, out);
            }
            Open::Call => {
                let item = &self.items[last];
                let fields = json!({ "arguments": item["arguments"], "name": item["name"] });
                let fields = self.place_with(fields);
                self.event("response.function_call_arguments.done", fields, out);
            }
        }
        let fields = json!({ "output_index": last, "item": self.items[last] });
        self.event("response.output_item.done", fields, out);
    }

    /// The response as it ended.
    fn finish(&mut self, end: &End) {
        let (status, details) = match end.why {
            Why::Length => ("incomplete", json!({ "reason": "max_output_tokens" })),
            _ => ("completed", Json::Null),
        };
        let usage = &end.usage;
        self.object["status"] = status.into();
        self.object["incomplete_details"] = details;
        self.object["output"] = std::mem::take(&mut self.items).into();
        self.object["usage"] = json!({
            "input_tokens": usage.prompt, "input_tokens_details": { "cached_tokens": usage.cached },
            "output_tokens": usage.generated, "output_tokens_details": { "reasoning_tokens": usage.reasoning },
            "total_tokens": usage.prompt + usage.generated,
        });
    }
}

fn append(text: &mut Json, more: &str) {
    if let Json::String(text) = text {
        text.push_str(more);
    }
}

impl Renderer for Items {
    fn begin(&mut self, out: &mut Events) {
        for kind in ["response.created", "response.in_progress"] {
            let fields = json!({ "response": self.object });
            self.event(kind, fields, out);
        }
    }

    fn piece(&mut self, _: usize, piece: Piece, out: &mut Events) {
        match piece {
            Piece::Prompt(_) | Piece::Token(..) => {}
            Piece::Delta(Delta::Reasoning(text)) => {
                let item = json!({ "id": id("rs_"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress" });
                self.open(Open::Reasoning, item, out);
                self.grow("response.reasoning_text.delta", &text, out);
            }
            Piece::Delta(Delta::Content(text)) => {
                let item = json!({
                    "id": id("msg_"), "type": "message", "role": "assistant", "content": [], "status": "in_progress",
                });
                self.open(Open::Message, item, out);
                self.grow("response.output_text.delta", &text, out);
            }
            Piece::Delta(Delta::Call { name, .. }) => {
                let item = json!({
                    "id": id("fc_"), "type": "function_call", "call_id": id("call_"), "name": name, "arguments": "",
                    "status": "in_progress",
                });
                self.open(Open::Call, item, out);
            }
            Piece::Delta(Delta::Arguments { json, .. }) => {
                let fields = self.place_with(json!({ "delta": json }));
                self.event("response.function_call_arguments.delta", fields, out);
                append(&mut self.items.last_mut().expect("a call is open")["arguments"], &json);
            }
            Piece::Delta(Delta::CallEnd { .. }) => self.close(out),
            Piece::End(end) => {
                // What the limit cut off is not whole.
                self.close_as(if end.why == Why::Length { "incomplete" } else { "completed" }, out);
                self.finish(&end);
            }
            Piece::Failed(error) => {
                self.object["status"] = "failed".into();
                self.object["error"] = json!({ "code": error.code, "message": error.message });
                let fields = json!({ "response": self.object });
                self.event("response.failed", fields, out);
                out.over = true;
            }
        }
    }

    fn end(&mut self, out: &mut Events) {
        let word = self.object["status"].as_str().unwrap_or("completed");
        let kind = format!("response.{word}");
        let fields = json!({ "response": self.object });
        self.event(&kind, fields, out);
    }
}
