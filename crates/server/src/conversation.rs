//! A conversation to what is to be generated: rendered by the model's template, with the tools it may or must call and the
//! form its answer must have. Knows no protocol.

use std::sync::Arc;

use axum::http::StatusCode;
use engine::{ChatError, Conversation};
use serde_json::{Map, Value as Json, json};

use crate::answer::{Answer, Caller, Generation};
use crate::error::ApiError;
use crate::grammar::{Grammar, Since};
use crate::service::{Service, Template};
use crate::text::{Syntax, Tool, Tools, tag};
use crate::tool_grammar::{Whole, calls};

/// The most tools of a request.
const MOST_TOOLS: usize = 256;

/// A conversation to continue.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chat {
    /// As templates take them: contents are strings, arguments of calls objects.
    pub(crate) messages: Vec<Json>,
    pub(crate) tools: Vec<Tool>,
    pub(crate) choice: ToolChoice,
    /// Whether there may be several calls in one answer.
    pub(crate) parallel: bool,
    /// Whether a thinking model shall think; `None` leaves it to the template.
    pub(crate) thinking: Option<bool>,
    /// Further variables of the template.
    pub(crate) variables: Map<String, Json>,
    /// What the answer is held to.
    pub(crate) format: Option<Grammar>,
}

/// Whether tools are called.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) enum ToolChoice {
    #[default]
    Auto,
    None,
    Required,
    Named(String),
}

impl Service {
    /// The ids of a conversation, ready for the answer.
    pub(crate) async fn encode(self: &Arc<Self>, chat: &Chat) -> Result<Vec<u32>, ApiError> {
        self.template()?;
        let offered = chat.choice != ToolChoice::None;
        let function = |tool: &Tool| {
            let mut function = json!({ "name": tool.name });
            if let Some(description) = &tool.description {
                function["description"] = description.as_str().into();
            }
            function["parameters"] = tool.parameters.clone();
            json!({ "type": "function", "function": function })
        };
        let conversation = Conversation {
            messages: chat.messages.clone(),
            tools: chat.tools.iter().filter(|_| offered).map(function).collect(),
            add_generation_prompt: true,
            enable_thinking: chat.thinking,
            variables: chat.variables.clone(),
            now: now(),
        };
        let service = self.clone();
        let encoded = self.blocking(move || match &service.template {
            Some(template) => template.encoder.encode(&conversation).map_err(refused),
            None => Err(no_template()),
        });
        encoded.await?
    }

    fn template(&self) -> Result<&Template, ApiError> {
        self.template.as_ref().ok_or_else(no_template)
    }

    /// Begins to answer a conversation. `generation` says the rest: its prompt, grammar and syntax are filled in here.
    pub(crate) async fn chat(
        self: &Arc<Self>,
        chat: Chat,
        mut generation: Generation,
        caller: &Caller,
    ) -> Result<Answer, ApiError> {
        let template = self.template()?;
        if chat.tools.len() > MOST_TOOLS {
            let message = format!("there are {} tools, more than {MOST_TOOLS}", chat.tools.len());
            return Err(ApiError::invalid("tools", message));
        }
        generation.prompt = self.encode(&chat).await?;
        let tail = generation.prompt.len().saturating_sub(8);
        let tail = self.tokenizer().decode(&generation.prompt[tail..]).unwrap_or_default();
        let begins_in_reasoning = template.reasons && tail.trim_end().ends_with(tag::THINK);
        if let Some(Held { grammar, since, field }) = held(&chat, template)? {
            let after_reasoning = since == Since::Start && begins_in_reasoning;
            let since = if after_reasoning { Since::Once(tag::END_THINK) } else { since };
            generation.grammar = Some((grammar, since));
            generation.grammar_field = field;
        }
        generation.one_call = !chat.parallel;
        let tools = if chat.choice == ToolChoice::None { Tools::default() } else { Tools(chat.tools) };
        generation.syntax =
            Syntax { reasoning: template.reasons, begins_in_reasoning, tools: Arc::new(tools) };
        self.answer(generation, caller).await
    }
}

/// What an answer is held to.
struct Held {
    grammar: Grammar,
    since: Since,
    /// The field of the request that says so.
    field: &'static str,
}

fn held(chat: &Chat, template: &Template) -> Result<Option<Held>, ApiError> {
    let all: Vec<&Tool> = chat.tools.iter().collect();
    let several = if chat.parallel { Whole::Calls } else { Whole::Call };
    let lark =
        |tools: &[&Tool], whole, or: Option<&Grammar>| Grammar::Lark(calls(tools, template.calls, whole, or));
    let held = |grammar, since, field| Some(Held { grammar, since, field });
    Ok(match (&chat.choice, &chat.format) {
        (ToolChoice::Required, _) if all.is_empty() => {
            let message = "tool_choice demands a call, and there are no tools";
            return Err(ApiError::invalid("tool_choice", message));
        }
        (ToolChoice::Required, _) => held(lark(&all, several, None), Since::Start, "tools"),
        (ToolChoice::Named(name), _) => {
            let Some(tool) = chat.tools.iter().find(|tool| tool.name == *name) else {
                let message = format!("tool_choice names {name:?}, which is none of the tools");
                return Err(ApiError::invalid("tool_choice", message));
            };
            held(lark(&[tool], Whole::Call, None), Since::Start, "tools")
        }
        (ToolChoice::Auto, Some(format)) if !all.is_empty() => {
            held(lark(&all, several, Some(format)), Since::Start, "response_format")
        }
        (_, Some(format)) => held(format.clone(), Since::Start, "response_format"),
        // Strict tools are free to be called or not; a call that begins is held to the schemas.
        (ToolChoice::Auto, None) if all.iter().any(|tool| tool.strict) => {
            held(lark(&all, Whole::RestOfCall, None), Since::Each(tag::CALL), "tools")
        }
        _ => None,
    })
}

fn no_template() -> ApiError {
    let message = "the model has no chat template; /v1/completions continues plain text";
    ApiError::new(StatusCode::BAD_REQUEST, "no_chat_template", message)
}

fn refused(error: ChatError) -> ApiError {
    let message = error.to_string();
    match error {
        ChatError::Refused(_) | ChatError::Template(_) | ChatError::TooLong { .. } | ChatError::NoMark => {
            ApiError::invalid("messages", message)
        }
        ChatError::Budget { .. } | ChatError::TooSlow { .. } => {
            ApiError { code: "template_budget", ..ApiError::invalid("messages", message) }
        }
        ChatError::Busy { .. } | ChatError::Thread(_) => {
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "template_busy", message).retry(5)
        }
        _ => ApiError::internal(message),
    }
}

/// Seconds since 1970, UTC.
pub(crate) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
