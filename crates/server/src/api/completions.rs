//! OpenAI's completions: plain text, continued. Source: the API reference of OpenAI, "Completions".

use std::sync::Arc;

use axum::Json as JsonBody;
use axum::response::{IntoResponse, Response};
use engine::{Specials, raw_prompt};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::chat::{Head, usage_json};
use super::finished::{Whole, finished, total};
use super::params::{Format, Params, from_start, top_logprobs};
use super::{id, read};
use crate::answer::{Caller, Piece, Usage, Why};
use crate::conversation::now;
use crate::error::ApiError;
use crate::job::Logprobs;
use crate::service::Service;
use crate::sse::{self, Events, Renderer};
use crate::text::Delta;

#[derive(Debug, Deserialize)]
struct Body {
    prompt: Prompt,
    #[serde(default)]
    suffix: Option<String>,
    #[serde(default)]
    echo: Option<bool>,
    #[serde(default)]
    logprobs: Option<u64>,
    #[serde(default)]
    best_of: Option<u64>,
}

/// Text or ids. Several prompts in one request are not taken.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts([String; 1]),
    Lists([Vec<u32>; 1]),
}

/// `POST /v1/completions`.
pub(crate) async fn create(service: Arc<Service>, caller: Caller, body: Json) -> Result<Response, ApiError> {
    let (params, format): (Params, Format) = (read(&body)?, read(&body)?);
    let wants = read::<Body>(&body)?;
    if wants.suffix.is_some_and(|suffix| !suffix.is_empty()) || wants.best_of.is_some_and(|n| n > 1) {
        return Err(ApiError::invalid("suffix", "suffix and best_of are not supported"));
    }
    let mut generation = params.generation(&service)?;
    let echo = wants.echo.unwrap_or(false);
    // OpenAI's default.
    generation.max_tokens = generation.max_tokens.or(Some(16));
    // To be scored only: one token is generated, and not told.
    let silent = echo && generation.max_tokens == Some(0);
    if silent {
        generation.max_tokens = Some(1);
    }
    if let Some(top) = wants.logprobs {
        generation.logprobs = Some(top_logprobs("logprobs", top)?);
        generation.prompt_logprobs = generation.logprobs.filter(|_| echo);
    }
    generation.grammar = from_start(format.grammar()?);
    generation.prompt = ids(&service, wants.prompt).await?;
    let mut answer = service.answer(generation, &caller).await?;
    let head = Head { id: id("cmpl-"), created: now(), model: service.name.clone(), seed: answer.seed };
    let shown = if echo { answer.prompt.clone() } else { Vec::new() };
    if params.streams() {
        let state =
            State { told: Told::new(service, shown), usage: None, waiting: Vec::new(), prompt: Vec::new() };
        let renderer = Stream {
            head,
            includes_usage: params.includes_usage(),
            choices: (0..answer.choices).map(|_| state.fresh()).collect(),
            silent,
        };
        return Ok(sse::respond(answer, renderer));
    }
    let all = finished(&mut answer).await?;
    let usage = total(all.iter().map(|whole| whole.end.usage));
    let wanted = wants.logprobs.is_some();
    let choices: Vec<Json> = all
        .iter()
        .enumerate()
        .map(|(index, whole)| {
            let mut told = Told::new(service.clone(), shown.clone());
            let mut text = told.prompt_text();
            let mut logprobs = told.begin(if wanted { &all[0].prompt } else { &[] });
            if !silent {
                text.push_str(&whole.content);
                whole.tokens.iter().for_each(|(id, found)| told.token(*id, found.as_deref(), &mut logprobs));
            }
            let logprobs = if wanted { logprobs.json() } else { Json::Null };
            json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason(whole, silent) })
        })
        .collect();
    let mut object = head.object("text_completion");
    object["choices"] = choices.into();
    object["usage"] = usage_json(&usage);
    Ok(JsonBody(object).into_response())
}

fn reason(whole: &Whole, silent: bool) -> &'static str {
    if silent { "length" } else { word(&whole.end.why) }
}

fn word(why: &Why) -> &'static str {
    if *why == Why::Length { "length" } else { "stop" }
}

async fn ids(service: &Arc<Service>, prompt: Prompt) -> Result<Vec<u32>, ApiError> {
    let (text, ids) = match prompt {
        Prompt::Text(text) | Prompt::Texts([text]) => (text, None),
        Prompt::Ids(ids) | Prompt::Lists([ids]) => (String::new(), Some(ids)),
    };
    let Some(ids) = ids else {
        let known = service.clone();
        let encoded = service.blocking(move || raw_prompt(known.tokenizer(), &text)).await?;
        return encoded.map_err(|error| ApiError::invalid("prompt", error.to_string()));
    };
    match ids.iter().find(|&&id| service.tokenizer().token_bytes(id).is_err()) {
        Some(id) => Err(ApiError::invalid("prompt", format!("prompt: there is no token {id}"))),
        None => Ok(ids),
    }
}

/// `POST /tokenize` and `/detokenize`.
pub(crate) async fn tokenize(service: Arc<Service>, body: Json) -> Result<Response, ApiError> {
    #[derive(Deserialize)]
    struct Wants {
        #[serde(alias = "prompt", alias = "text")]
        content: String,
        #[serde(default, alias = "add_special_tokens")]
        add_special: Option<bool>,
        #[serde(default)]
        parse_special: Option<bool>,
    }
    let wants: Wants = read(&body)?;
    let known = service.clone();
    let specials = if wants.parse_special.unwrap_or(true) { Specials::Parse } else { Specials::AsText };
    let ids = service.blocking(move || {
        let mut ids =
            Vec::from_iter(known.tokenizer().bos_to_add().filter(|_| wants.add_special == Some(true)));
        ids.extend(known.tokenizer().encode(&wants.content, specials)?);
        Ok::<_, engine::TokenizerError>(ids)
    });
    let ids = ids.await?.map_err(|error| ApiError::invalid("content", error.to_string()))?;
    let body =
        json!({ "tokens": ids, "count": ids.len(), "max_model_len": service.engine.shared().context() });
    Ok(JsonBody(body).into_response())
}

/// See [`tokenize`].
pub(crate) async fn detokenize(service: Arc<Service>, body: Json) -> Result<Response, ApiError> {
    #[derive(Deserialize)]
    struct Wants {
        tokens: Vec<u32>,
    }
    let wants: Wants = read(&body)?;
    let text = service.tokenizer().decode(&wants.tokens);
    let text = text.map_err(|error| ApiError::invalid("tokens", format!("tokens: {error}")))?;
    Ok(JsonBody(json!({ "content": text, "prompt": text })).into_response())
}

/// Log-probabilities as completions tell them: lists side by side.
#[derive(Debug, Default)]
struct Lists {
    tokens: Vec<Json>,
    logprobs: Vec<Json>,
    top: Vec<Json>,
    offsets: Vec<usize>,
}

impl Lists {
    fn json(self) -> Json {
        json!({
            "tokens": self.tokens, "token_logprobs": self.logprobs, "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}

/// What was told of a choice so far.
struct Told {
    service: Arc<Service>,
    /// The prompt, if it is to be told too.
    prompt: Vec<u32>,
    /// Characters begun so far: a token may end within one.
    offset: usize,
}

impl Told {
    fn new(service: Arc<Service>, prompt: Vec<u32>) -> Told {
        Told { service, prompt, offset: 0 }
    }

    fn prompt_text(&self) -> String {
        self.service.tokenizer().decode(&self.prompt).unwrap_or_default()
    }

    /// The lists of the prompt; of its first token nothing can be said.
    fn begin(&mut self, scored: &[Logprobs]) -> Lists {
        let mut lists = Lists::default();
        let prompt = std::mem::take(&mut self.prompt);
        if !scored.is_empty() || prompt.len() == 1 {
            for (i, &id) in prompt.iter().enumerate() {
                self.token(id, i.checked_sub(1).and_then(|i| scored.get(i)), &mut lists);
            }
        } else {
            self.offset = prompt.iter().map(|&id| self.characters(id)).sum();
        }
        self.prompt = prompt;
        lists
    }

    fn bytes(&self, id: u32) -> &[u8] {
        self.service.tokenizer().token_bytes(id).unwrap_or_default()
    }

    fn token(&mut self, id: u32, found: Option<&Logprobs>, lists: &mut Lists) {
        let name = |id: u32| String::from_utf8_lossy(self.bytes(id)).into_owned();
        lists.tokens.push(name(id).into());
        lists.logprobs.push(found.map_or(Json::Null, |found| found.chosen.logprob.into()));
        let top = found.map(|found| {
            let all = found.top.iter().chain([&found.chosen]);
            all.map(|token| (name(token.id), Json::from(token.logprob))).collect::<Map<_, _>>()
        });
        lists.top.push(top.map_or(Json::Null, Json::Object));
        lists.offsets.push(self.offset);
        self.offset += self.characters(id);
    }

    /// Characters that begin in a token: bytes that continue none.
    fn characters(&self, id: u32) -> usize {
        self.bytes(id).iter().filter(|&&byte| byte & 0xC0 != 0x80).count()
    }
}

struct State {
    told: Told,
    usage: Option<Usage>,
    /// Tokens whose log-probabilities were not sent.
    waiting: Vec<(u32, Box<Logprobs>)>,
    prompt: Vec<Logprobs>,
}

impl State {
    fn fresh(&self) -> State {
        let told = Told::new(self.told.service.clone(), self.told.prompt.clone());
        State { told, usage: None, waiting: Vec::new(), prompt: Vec::new() }
    }
}

struct Stream {
    head: Head,
    includes_usage: bool,
    choices: Vec<State>,
    silent: bool,
}

impl Stream {
    fn chunk(&mut self, choice: usize, text: &str, finish: Option<&str>, out: &mut Events) {
        let state = &mut self.choices[choice];
        let mut lists = Lists::default();
        for (id, found) in std::mem::take(&mut state.waiting) {
            state.told.token(id, Some(&found), &mut lists);
        }
        let logprobs = if lists.tokens.is_empty() { Json::Null } else { lists.json() };
        self.put(choice, text, logprobs, finish, out);
    }

    fn put(&self, choice: usize, text: &str, logprobs: Json, finish: Option<&str>, out: &mut Events) {
        let mut chunk = self.head.object("text_completion");
        chunk["choices"] =
            json!([{ "index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish }]);
        if self.includes_usage {
            chunk["usage"] = Json::Null;
        }
        out.data(&chunk);
    }

    /// The prompt, told with the first token: by then its log-probabilities are known.
    fn echo(&mut self, choice: usize, out: &mut Events) {
        let state = &mut self.choices[choice];
        let scored = std::mem::take(&mut state.prompt);
        let text = state.told.prompt_text();
        let lists = state.told.begin(&scored);
        state.told.prompt = Vec::new();
        let logprobs = if lists.tokens.is_empty() { Json::Null } else { lists.json() };
        self.put(choice, &text, logprobs, None, out);
    }
}

impl Renderer for Stream {
    fn begin(&mut self, _: &mut Events) {}

    fn piece(&mut self, choice: usize, piece: Piece, out: &mut Events) {
        match piece {
            Piece::Prompt(scored) => self.choices[choice].prompt.extend(scored),
            Piece::Token(id, logprobs) => {
                if !self.choices[choice].told.prompt.is_empty() {
                    self.echo(choice, out);
                }
                if !self.silent {
                    self.choices[choice].waiting.extend(logprobs.map(|logprobs| (id, logprobs)));
                }
            }
            Piece::Delta(Delta::Content(text)) if !self.silent => self.chunk(choice, &text, None, out),
            Piece::Delta(_) => {}
            Piece::End(end) => {
                let word = if self.silent { "length" } else { word(&end.why) };
                self.choices[choice].usage = Some(end.usage);
                self.chunk(choice, "", Some(word), out);
            }
            Piece::Failed(error) => {
                out.data(&error.openai());
                out.over = true;
            }
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.includes_usage {
            let mut chunk = self.head.object("text_completion");
            chunk["choices"] = json!([]);
            chunk["usage"] = usage_json(&total(self.choices.iter().filter_map(|state| state.usage)));
            out.data(&chunk);
        }
        out.raw("[DONE]");
    }
}
