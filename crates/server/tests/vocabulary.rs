//! A model whose head has more rows than the tokenizer has tokens, as Qwen's have: whoever chooses, and however it is told to,
//! nothing is chosen, listed or biased that is no token.

mod client;
#[path = "../../engine/tests/over_cpu/mod.rs"]
mod over_cpu;

use std::sync::Arc;

use client::{Shape, post, served, start_with};
use cpu::Cpu;
use engine::Tokenizer;
use gguf::Dtype;
use model::{Backend, Model};
use over_cpu::Ahead;
use serde_json::{Value as Json, json};
use server::{Options, Served, Server};

/// Tokens in use, tokens, and rows of the head.
const IN_USE: usize = 300;
const TOKENS: usize = 320;
const ROWS: usize = 512;

/// Random weights, so that of two tokens one would be none; the tokenizer ends with tokens that are not in use.
fn padded(wrap: impl Fn(Cpu) -> Box<dyn Backend> + Send + Sync + 'static) -> Served {
    let mut shape = synth::Shape::named("tiny-moe").expect("a shape of the list");
    shape.config.vocab = IN_USE;
    let mut metadata = synth::metadata(&shape, 1);
    let mut tokens = metadata.strings("tokenizer.ggml.tokens").expect("tokens").to_vec();
    let mut types = metadata.i32s("tokenizer.ggml.token_type").expect("types").to_vec();
    tokens.extend((IN_USE..TOKENS).map(|id| format!("[PAD{id}]")));
    types.resize(TOKENS, 5);
    metadata.set("tokenizer.ggml.tokens", tokens);
    metadata.set("tokenizer.ggml.token_type", types);
    shape.config.vocab = ROWS;
    let dtype = |spec: &model::Spec| if spec.dims.len() == 1 { Dtype::F32 } else { Dtype::Q8_0 };
    let model: Arc<Model> = Arc::new(synth::model(&shape, 1, dtype));
    let factory = move || {
        let options = cpu::Options { threads: 1, ..cpu::Options::for_context(512) };
        Cpu::new(model.clone(), &options).map(&wrap).map_err(|error| error.to_string())
    };
    Served {
        tokenizer: Arc::new(Tokenizer::from_metadata(&metadata).expect("a tokenizer")),
        template: None,
        factory: Arc::new(factory),
        ..served(Shape::default(), |cpu| Box::new(cpu))
    }
}

fn ask(server: &Server, more: Json) -> Json {
    let mut body = json!({
        "prompt": [72, 101, 108], "max_tokens": 60, "seed": 5, "temperature": 1.5, "top_p": 1, "top_k": 0, "ignore_eos": true,
    });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let answer = post(server, "/v1/completions", &body);
    assert_eq!(answer.status, 200, "{more}: {}", answer.body);
    let answer = answer.json();
    assert!(!answer.to_string().contains("[PAD"), "{more}: {answer}");
    answer
}

#[test]
fn nothing_is_chosen_that_is_no_token() {
    let backends: [fn(Cpu) -> Box<dyn Backend>; 2] =
        [|cpu| Box::new(cpu), |cpu| Box::new(Ahead::new(cpu, 8, Arc::default()))];
    let texts = backends.map(|wrap| {
        let server = start_with(padded(wrap), Options::default());
        let texts = [
            json!({}),
            json!({ "temperature": 0 }),
            json!({ "top_k": 40, "top_p": 0.9 }),
            json!({ "min_p": 0.01, "repetition_penalty": 1.2 }),
            json!({ "logit_bias": { "299": 5 }, "frequency_penalty": 1 }),
        ]
        .map(|more| ask(&server, more)["choices"][0]["text"].clone());
        server.stop();
        texts
    });
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn nothing_is_listed_biased_or_allowed_that_is_no_token() {
    let server = start_with(padded(|cpu| Box::new(cpu)), Options::default());
    // As many likeliest tokens as may be asked for: of 512 rows about 8 would be none.
    let answer = ask(&server, json!({ "logprobs": 20, "echo": true }));
    let listed = &answer["choices"][0]["logprobs"];
    assert_eq!(listed["tokens"].as_array().expect("tokens").len(), 63, "{listed}");
    for top in listed["top_logprobs"].as_array().expect("a list").iter().skip(1) {
        // Tokens that spell alike, as bytes that are no character do, are one.
        assert!(!top.as_object().expect("likeliest ones").contains_key(""), "{top}");
    }
    // Held to a form in which a token not in use could be spelled.
    let form = json!({ "structured_outputs": { "regex": "(\\[PAD31[0-9]\\]){4}x" } });
    let body = json!({ "prompt": [72], "max_tokens": 60, "seed": 1, "temperature": 1, "structured_outputs": form["structured_outputs"] });
    let answer = post(&server, "/v1/completions", &body).json();
    assert!(
        answer["usage"]["completion_tokens"].as_u64() > Some(4 * 8),
        "spelled letter by letter: {answer}"
    );
    for id in [IN_USE, TOKENS, ROWS] {
        let body = json!({ "prompt": [72], "logit_bias": { id.to_string(): 1 } });
        let answer = post(&server, "/v1/completions", &body);
        assert_eq!(answer.status, 400, "a bias on {id}: {}", answer.body);
    }
    for id in [TOKENS, ROWS] {
        assert_eq!(
            post(&server, "/v1/completions", &json!({ "prompt": [id] })).status,
            400,
            "a prompt of {id}"
        );
    }
    server.stop();
}
