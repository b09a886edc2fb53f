//! The parameters that the protocols share, checked, as far as they say how tokens are chosen. Knows no messages.

use std::collections::BTreeMap;

use engine::SamplerParams;
use serde::Deserialize;
use serde_json::{Number, Value as Json};

use super::random;
use crate::answer::Generation;
use crate::error::ApiError;
use crate::grammar::{Grammar, Since};
use crate::service::Service;
use crate::text::Syntax;

/// The most stop strings of a request, and the longest of them in bytes.
const STOPS: (usize, usize) = (16, 1024);
/// The most likeliest tokens that are told of.
const TOP_LOGPROBS: u64 = 20;
/// How far a bias may go, as OpenAI has it.
const BIAS: f32 = 100.0;

/// Fields of OpenAI's requests, and those that other servers added. Fields that are not here are not looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Params {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: Option<Number>,
    logit_bias: Option<BTreeMap<String, f32>>,
    stop: Option<OneOrMany>,
    pub(crate) max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    n: Option<u64>,
    ignore_eos: Option<bool>,
    pub(crate) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Params {
    /// What is to be generated, but for the prompt and what it is held to.
    pub(crate) fn generation(&self, service: &Service) -> Result<Generation, ApiError> {
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        Ok(Generation {
            prompt: Vec::new(),
            choices: usize::try_from(self.n.unwrap_or(1)).unwrap_or(usize::MAX),
            sampling: self.sampling(service)?,
            max_tokens: max_tokens.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
            stop: self.stop()?,
            logprobs: None,
            prompt_logprobs: None,
            grammar: None,
            grammar_field: "response_format",
            syntax: Syntax::default(),
            ignore_end: self.ignore_eos.unwrap_or(false),
            one_call: false,
        })
    }

    /// Whether the answer is to be streamed.
    pub(crate) fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream tells the tokens that were used.
    pub(crate) fn includes_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    fn sampling(&self, service: &Service) -> Result<SamplerParams, ApiError> {
        let defaults = &service.sampling;
        // OpenAI's penalties look at the whole text.
        let penalises = self.presence_penalty.is_some() || self.frequency_penalty.is_some();
        Ok(SamplerParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            // 0 and -1 both mean all.
            top_k: self.top_k.map_or(defaults.top_k, |k| usize::try_from(k.max(0)).unwrap_or(usize::MAX)),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            repeat_penalty: self.repetition_penalty.unwrap_or(defaults.repeat_penalty),
            penalty_window: if penalises { usize::MAX } else { defaults.penalty_window },
            logit_bias: self.bias(service)?,
            ids: service.ids_in_use,
            seed: self.seed()?,
        })
    }

    /// The seed; without one any of 2^32, which the answer tells.
    fn seed(&self) -> Result<u64, ApiError> {
        match &self.seed {
            None => Ok(random() >> 32),
            Some(seed) => {
                // Negative ones are taken by their bits.
                let seed = seed.as_u64().or_else(|| Some(seed.as_i64()? as u64));
                seed.ok_or_else(|| ApiError::invalid("seed", "seed: it must be an integer of 64 bits"))
            }
        }
    }

    fn bias(&self, service: &Service) -> Result<BTreeMap<u32, f32>, ApiError> {
        let mut all = service.sampling.logit_bias.clone();
        let wrong = |message: String| Err(ApiError::invalid("logit_bias", format!("logit_bias: {message}")));
        for (id, &bias) in self.logit_bias.iter().flatten() {
            let known = |&id: &u32| id < service.ids_in_use;
            let Some(id) = id.parse().ok().filter(known) else {
                return wrong(format!("{id:?} is no token id"));
            };
            if !(-BIAS..=BIAS).contains(&bias) {
                return wrong(format!("{bias} is not from -{BIAS} to {BIAS}"));
            }
            all.insert(id, bias);
        }
        Ok(all)
    }

    fn stop(&self) -> Result<Vec<String>, ApiError> {
        let stop = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(string)) => vec![string.clone()],
            Some(OneOrMany::Many(strings)) => strings.clone(),
        };
        check_stop("stop", stop)
    }
}

/// Stop strings within their bounds.
pub(crate) fn check_stop(field: &str, stop: Vec<String>) -> Result<Vec<String>, ApiError> {
    let (most, longest) = STOPS;
    let wrong = |message: String| Err(ApiError::invalid(field, format!("{field}: {message}")));
    if stop.len() > most {
        return wrong(format!("{} strings, more than {most}", stop.len()));
    }
    match stop.iter().find(|string| string.is_empty() || string.len() > longest) {
        Some(string) => {
            wrong(format!("a string of {} bytes; it must have from 1 to {longest}", string.len()))
        }
        None => Ok(stop),
    }
}

/// How many of the likeliest tokens are told of.
pub(crate) fn top_logprobs(field: &str, top: u64) -> Result<usize, ApiError> {
    match usize::try_from(top) {
        Ok(n) if top <= TOP_LOGPROBS => Ok(n),
        _ => Err(ApiError::invalid(field, format!("{field} is {top}; it must be from 0 to {TOP_LOGPROBS}"))),
    }
}

/// What an answer is held to, by OpenAI's `response_format` and vLLM's fields.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Format {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<Structured>,
    guided_json: Option<Json>,
    guided_regex: Option<String>,
    guided_grammar: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    r#type: String,
    json_schema: Option<Json>,
    // Responses has them one level higher.
    schema: Option<Json>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Structured {
    json: Option<Json>,
    regex: Option<String>,
    grammar: Option<String>,
    choice: Option<Vec<String>>,
    json_object: Option<bool>,
}

impl Format {
    /// The grammar, if there is one.
    pub(crate) fn grammar(self) -> Result<Option<Grammar>, ApiError> {
        let structured = self.structured_outputs.unwrap_or_default();
        let found = match self.response_format {
            Some(format) => format.grammar()?,
            None => None,
        };
        let any = structured.json_object.filter(|&any| any).map(|_| any_object());
        let json = self.guided_json.or(structured.json).map(parsed).transpose()?.map(Grammar::Schema);
        let regex = self.guided_regex.or(structured.regex).map(Grammar::Regex);
        let lark = self.guided_grammar.or(structured.grammar).map(Grammar::Lark);
        let choice = structured.choice.as_deref().map(alternatives);
        Ok(found.or(json).or(regex).or(lark).or(choice).or(any))
    }
}

impl ResponseFormat {
    pub(crate) fn grammar(self) -> Result<Option<Grammar>, ApiError> {
        match self.r#type.as_str() {
            "text" => Ok(None),
            "json_object" => Ok(Some(any_object())),
            "json_schema" => {
                let schema = self.json_schema.map(|mut schema| schema["schema"].take()).or(self.schema);
                match schema {
                    Some(schema) if schema.is_object() || schema.is_boolean() => {
                        Ok(Some(Grammar::Schema(schema)))
                    }
                    _ => Err(ApiError::invalid(
                        "response_format",
                        "response_format: json_schema.schema is no schema",
                    )),
                }
            }
            "regex" | "grammar" | "structural_tag" => Err(ApiError::invalid(
                "response_format",
                "response_format: use structured_outputs.regex or structured_outputs.grammar",
            )),
            other => {
                Err(ApiError::invalid("response_format", format!("response_format: no such type: {other:?}")))
            }
        }
    }
}

/// A grammar for Responses' `text.format`, whose fields lie flat.
pub(crate) fn flat_format(format: &Json) -> Result<Option<Grammar>, ApiError> {
    super::read::<ResponseFormat>(format)?.grammar()
}

/// When a grammar is in force that a request asks for.
pub(crate) fn from_start(grammar: Option<Grammar>) -> Option<(Grammar, Since)> {
    grammar.map(|grammar| (grammar, Since::Start))
}

fn any_object() -> Grammar {
    Grammar::Schema(serde_json::json!({ "type": "object" }))
}

/// One of `all`, as it stands.
fn alternatives(all: &[String]) -> Grammar {
    let quoted: Vec<String> = all.iter().map(|text| Json::from(text.as_str()).to_string()).collect();
    Grammar::Lark(format!("start: {}", quoted.join(" | ")))
}

/// Some clients send schemas as text.
fn parsed(schema: Json) -> Result<Json, ApiError> {
    match schema {
        Json::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::invalid("guided_json", format!("guided_json: {error}"))),
        other => Ok(other),
    }
}
