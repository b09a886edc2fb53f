//! Every field that says what is generated means what it says: the server's answer is that of the engine's own sampler with
//! these parameters, over the same model, a token at a time. In chat and in plain completions, whole and streamed.

mod client;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use client::{Shape, file, post, served, start};
use cpu::Cpu;
use engine::{ChatEncoder, Conversation, Engine, Sampler, SamplerParams, Session, TokenLogprob, Tokenizer};
use model::Model;
use serde_json::{Value as Json, json};
use server::Server;

/// Longer than 64 tokens, which is how far back `repetition_penalty` looks; with characters of several bytes.
const PROMPT: &str = "// naïve: 1 → 2\nfn main() {\n    let mut total = 0;\n    for i in 0..10 {\n        total += i;\n    }\n    \
                      println!(\"{total}\");\n}\n\nfn sum(values: &[u32]) -> u32 {\n    let mut total = 0;\n";
const TOKENS: usize = 40;
const TOP: usize = 5;
const SEED: u64 = 34;

/// The model that ships, and what is said of it by the engine alone.
struct Alone {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    /// Of a chat with [`PROMPT`] as its one message.
    chat: Vec<u32>,
}

/// A token with its log-probability and those of the likeliest in its place.
type Scored = (u32, TokenLogprob, Vec<TokenLogprob>);

impl Alone {
    fn new() -> Alone {
        let known = served(Shape::default(), |cpu| Box::new(cpu));
        let (template, _) = known.template.expect("it ships with one");
        let conversation = Conversation {
            messages: vec![json!({ "role": "user", "content": PROMPT })],
            add_generation_prompt: true,
            ..Conversation::default()
        };
        let encoder = ChatEncoder::new(known.tokenizer.clone(), Arc::new(template)).expect("a template");
        let chat = encoder.encode(&conversation).expect("a prompt");
        let model = Arc::new(Model::load(&file()).expect("the model that ships"));
        Alone { model, tokenizer: known.tokenizer, chat }
    }

    fn engine(&self) -> Engine<Cpu> {
        let options = cpu::Options { threads: 2, ..cpu::Options::for_context(2048) };
        Engine::new(Cpu::new(self.model.clone(), &options).expect("a backend"))
    }

    fn plain(&self) -> Vec<u32> {
        engine::raw_prompt(&self.tokenizer, PROMPT).expect("a prompt")
    }

    /// What follows `prompt`, up to an id of `ends`.
    fn says(&self, prompt: &[u32], params: &SamplerParams, count: usize, ends: &[u32]) -> Vec<Scored> {
        let (mut engine, mut session) = (self.engine(), Session::default());
        let mut sampler = Sampler::new(params.clone()).expect("parameters in range");
        let (mut text, mut fed, mut said) = (prompt.to_vec(), 0, Vec::new());
        while said.len() < count {
            let _ =
                engine.feed(&mut session, &text[fed..], |_| ControlFlow::Continue(())).expect("it computes");
            fed = text.len();
            let logits = engine.logits().expect("logits");
            let token = sampler.sample(logits, &text, text.len() as u64).expect("a token");
            if ends.contains(&token) {
                break;
            }
            let (chosen, top) = engine::logprobs(logits, token, TOP, u32::MAX).expect("numbers");
            said.push((token, chosen, top));
            text.push(token);
        }
        said
    }

    fn text(&self, said: &[Scored]) -> String {
        let ids: Vec<u32> = said.iter().map(|(id, _, _)| *id).collect();
        self.tokenizer.decode(&ids).expect("tokens")
    }
}

/// As the server of the tests has it, where a request says nothing.
fn defaults() -> SamplerParams {
    SamplerParams { temperature: 0.7, top_k: 20, top_p: 0.8, seed: SEED, ..SamplerParams::default() }
}

fn with(more: Json, of: &[(&str, Json)]) -> Json {
    let mut body = json!({ "seed": SEED, "max_tokens": TOKENS, "ignore_eos": true });
    let fields = body.as_object_mut().expect("an object");
    fields.extend(of.iter().map(|(name, value)| (name.to_string(), value.clone())));
    fields.extend(more.as_object().expect("an object").clone());
    body
}

/// Of every choice its text, and why it ended; of the answer the tokens that were counted.
type Told = (Vec<(String, String)>, u64);

/// The answer at `path`, whole and streamed, which have to agree.
#[track_caller]
fn ask(server: &Server, path: &str, more: Json) -> Told {
    let chat = path.ends_with("chat/completions");
    let prompt = match chat {
        true => ("messages", json!([{ "role": "user", "content": PROMPT }])),
        false => ("prompt", PROMPT.into()),
    };
    let mut body = with(more, &[prompt]);
    let whole = post(server, path, &body);
    assert_eq!(whole.status, 200, "{body}: {}", whole.body);
    let whole = whole.json();
    let word = |value: &Json| value.as_str().unwrap_or_default().to_owned();
    let told: Vec<(String, String)> = whole["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .enumerate()
        .map(|(i, choice)| {
            assert_eq!(choice["index"], i);
            let text = if chat { &choice["message"]["content"] } else { &choice["text"] };
            (word(text), word(&choice["finish_reason"]))
        })
        .collect();
    let count = whole["usage"]["completion_tokens"].as_u64().expect("a number");

    (body["stream"], body["stream_options"]) = (true.into(), json!({ "include_usage": true }));
    let (events, done) = post(server, path, &body).events();
    assert!(done);
    let mut streamed: BTreeMap<u64, (String, String)> = BTreeMap::new();
    for choice in events.iter().flat_map(|event| event["choices"].as_array().expect("choices")) {
        let (text, why) = streamed.entry(choice["index"].as_u64().expect("a number")).or_default();
        text.push_str(&word(if chat { &choice["delta"]["content"] } else { &choice["text"] }));
        why.push_str(&word(&choice["finish_reason"]));
    }
    assert_eq!(streamed.into_values().collect::<Vec<_>>(), told, "{body}: streamed");
    assert_eq!(events[events.len() - 1]["usage"]["completion_tokens"], count);
    (told, count)
}

const PATHS: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];

/// Fields, and the sampler's parameters that they stand for.
#[test]
fn how_tokens_are_chosen() {
    let (alone, server) = (Alone::new(), start());
    let whole = |params: SamplerParams| SamplerParams { penalty_window: usize::MAX, ..params };
    let cases: Vec<(Json, SamplerParams)> = vec![
        (json!({}), defaults()),
        (
            json!({ "seed": 1, "temperature": 1.4, "top_p": 1 }),
            SamplerParams { seed: 1, temperature: 1.4, top_p: 1.0, ..defaults() },
        ),
        // By its bits.
        (
            json!({ "seed": -1, "temperature": 1.4, "top_p": 1 }),
            SamplerParams { seed: u64::MAX, temperature: 1.4, top_p: 1.0, ..defaults() },
        ),
        (json!({ "temperature": 0 }), SamplerParams { temperature: 0.0, ..defaults() }),
        (
            json!({ "temperature": 1.4, "top_p": 1, "top_k": 0 }),
            SamplerParams { temperature: 1.4, top_p: 1.0, top_k: 0, ..defaults() },
        ),
        (
            json!({ "temperature": 1.4, "top_p": 0.6, "top_k": -1 }),
            SamplerParams { temperature: 1.4, top_p: 0.6, top_k: 0, ..defaults() },
        ),
        (
            json!({ "temperature": 1.4, "top_p": 1, "top_k": 3 }),
            SamplerParams { temperature: 1.4, top_p: 1.0, top_k: 3, ..defaults() },
        ),
        (
            json!({ "temperature": 1.4, "top_p": 1, "top_k": 0, "min_p": 0.3 }),
            SamplerParams { temperature: 1.4, top_p: 1.0, top_k: 0, min_p: 0.3, ..defaults() },
        ),
        (json!({ "presence_penalty": 1.9 }), whole(SamplerParams { presence_penalty: 1.9, ..defaults() })),
        (json!({ "frequency_penalty": 0.8 }), whole(SamplerParams { frequency_penalty: 0.8, ..defaults() })),
        (json!({ "repetition_penalty": 1.4 }), SamplerParams { repeat_penalty: 1.4, ..defaults() }),
        (
            json!({ "repetition_penalty": 1.4, "presence_penalty": 0.5 }),
            whole(SamplerParams { repeat_penalty: 1.4, presence_penalty: 0.5, ..defaults() }),
        ),
        (
            json!({ "logit_bias": { "300": 7.5, "301": 7, "302": -100 } }),
            SamplerParams { logit_bias: [(300, 7.5), (301, 7.0), (302, -100.0)].into(), ..defaults() },
        ),
    ];
    for path in PATHS {
        let prompt = if path == PATHS[0] { alone.plain() } else { alone.chat.clone() };
        assert!(prompt.len() > 64, "{} tokens", prompt.len());
        let mut texts = Vec::new();
        for (fields, params) in &cases {
            let want = alone.text(&alone.says(&prompt, params, TOKENS, &[]));
            let (told, count) = ask(&server, path, fields.clone());
            assert_eq!(told, [(want.clone(), "length".to_owned())], "{path} {fields}");
            assert_eq!(count as usize, TOKENS);
            texts.push(want);
        }
        // Every field changed something: else nobody would notice that it is not looked at.
        for (i, text) in texts.iter().enumerate() {
            let same = texts.iter().position(|other| other == text);
            assert_eq!(same, Some(i), "{path}: {} says what another does", cases[i].0);
        }
    }
    server.stop();
}

/// How many choices, how long they are, and what ends them.
#[test]
fn where_answers_end() {
    let (alone, server) = (Alone::new(), start());
    for path in PATHS {
        let prompt = if path == PATHS[0] { alone.plain() } else { alone.chat.clone() };
        let says = |seed: u64, count: usize| {
            alone.text(&alone.says(&prompt, &SamplerParams { seed, ..defaults() }, count, &[]))
        };
        let length = |text: String| (text, "length".to_owned());
        let (told, count) = ask(&server, path, json!({ "n": 3 }));
        assert_eq!(told, [SEED, SEED + 1, SEED + 2].map(|seed| length(says(seed, TOKENS))), "{path}");
        assert_eq!(count as usize, 3 * TOKENS);
        for field in ["max_tokens", "max_completion_tokens"] {
            for count in [1, 7] {
                let (told, counted) = ask(&server, path, json!({ field: count }));
                assert_eq!(
                    (told, counted),
                    (vec![length(says(SEED, count))], count as u64),
                    "{path} {field}"
                );
            }
        }
        // Stop strings that begin and end within tokens; none is told.
        let text = says(SEED, TOKENS);
        let part = |from: usize, to: usize| text.chars().skip(from).take(to - from).collect::<String>();
        for stop in [json!(part(9, 14)), json!([part(30, 33), "never"]), json!([part(20, 28), part(22, 25)])]
        {
            let all: Vec<String> = match &stop {
                Json::String(one) => vec![one.clone()],
                list => serde_json::from_value(list.clone()).expect("texts"),
            };
            // Of two that overlap, the one that is whole first.
            let found = all.iter().filter_map(|stop| Some((text.find(stop.as_str())?, stop.len())));
            let (end, _) = found.min_by_key(|(at, length)| at + length).expect("one comes");
            let (told, _) = ask(&server, path, json!({ "stop": stop }));
            assert_eq!(told, [(text[..end].to_owned(), "stop".to_owned())], "{path} {stop}");
        }
        // The model's own end.
        let ends = alone.tokenizer.eos();
        let params = |seed| SamplerParams { seed, temperature: 1.0, ..defaults() };
        let seed = (0..200).find(|&seed| alone.says(&prompt, &params(seed), 20, ends).len() < 20);
        let Some(seed) = seed else { continue };
        let said = alone.says(&prompt, &params(seed), 20, ends);
        let fields = json!({ "seed": seed, "temperature": 1, "max_tokens": 20, "ignore_eos": false });
        let (told, count) = ask(&server, path, fields);
        assert_eq!(told, [(alone.text(&said), "stop".to_owned())], "{path}");
        assert!([said.len(), said.len() + 1].contains(&(count as usize)), "{count}");
    }
    server.stop();
}

fn near(told: &Json, want: f64) {
    let told = told.as_f64().expect("a number");
    assert!((told - want).abs() < 1e-9, "{told} is not {want}");
}

#[test]
fn log_probabilities_in_chat() {
    let (alone, server) = (Alone::new(), start());
    let want = alone.says(&alone.chat, &defaults(), TOKENS, &[]);
    let messages = ("messages", json!([{ "role": "user", "content": PROMPT }]));
    let body = with(json!({ "logprobs": true, "top_logprobs": TOP }), &[messages]);
    let answer = post(&server, "/v1/chat/completions", &body).json();
    let told = answer["choices"][0]["logprobs"]["content"].as_array().expect("a list");
    assert_eq!(told.len(), want.len());
    let check = |told: &Json, want: &TokenLogprob| {
        let bytes = alone.tokenizer.token_bytes(want.id).expect("a token");
        assert_eq!(told["bytes"], json!(bytes));
        assert_eq!(told["token"], String::from_utf8_lossy(bytes).as_ref());
        near(&told["logprob"], want.logprob);
    };
    for (told, (_, chosen, top)) in told.iter().zip(&want) {
        check(told, chosen);
        let list = told["top_logprobs"].as_array().expect("a list");
        assert_eq!(list.len(), TOP);
        list.iter().zip(top).for_each(|(told, want)| check(told, want));
    }
    let mut streaming = body;
    streaming["stream"] = true.into();
    let (events, _) = post(&server, "/v1/chat/completions", &streaming).events();
    let lists = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(lists.flatten().cloned().collect::<Vec<_>>(), *told, "streamed");
    server.stop();
}

/// A prompt told again, with what the model made of it; alone, and before an answer.
#[test]
fn echo() {
    let (alone, server) = (Alone::new(), start());
    let prompt = alone.plain();
    let (mut engine, mut session, mut rows) = (alone.engine(), Session::default(), Vec::new());
    let each = |_, logits: &[f32]| {
        rows.push(logits.to_vec());
        ControlFlow::Continue(())
    };
    engine.score(&mut session, &prompt, 1, each).expect("logits");
    let said = alone.says(&prompt, &defaults(), TOKENS, &[]);
    for count in [0, TOKENS] {
        let body =
            with(json!({ "echo": true, "logprobs": TOP, "max_tokens": count }), &[("prompt", PROMPT.into())]);
        let answer = post(&server, "/v1/completions", &body).json();
        let choice = &answer["choices"][0];
        let text = format!("{PROMPT}{}", alone.text(&said[..count]));
        assert_eq!(choice["text"], text);
        let lists = &choice["logprobs"];
        let list = |name: &str| lists[name].as_array().expect("a list").clone();
        let (tokens, logprobs, offsets) = (list("tokens"), list("token_logprobs"), list("text_offset"));
        assert_eq!(tokens.len(), prompt.len() + count);
        assert_eq!((logprobs.len(), offsets.len()), (tokens.len(), tokens.len()));
        assert_eq!(logprobs[0], Json::Null, "nothing comes before the first");
        for (i, &id) in prompt.iter().enumerate().skip(1) {
            near(&logprobs[i], engine::logprobs(&rows[i - 1], id, 0, u32::MAX).expect("numbers").0.logprob);
        }
        for ((_, chosen, top), i) in said[..count].iter().zip(prompt.len()..) {
            near(&logprobs[i], chosen.logprob);
            let top_of = lists["top_logprobs"][i].as_object().expect("the likeliest");
            for token in top {
                let bytes = alone.tokenizer.token_bytes(token.id).expect("a token");
                near(&top_of[String::from_utf8_lossy(bytes).as_ref()], token.logprob);
            }
        }
        // Offsets count characters.
        let characters: Vec<char> = text.chars().collect();
        for (token, offset) in tokens.iter().zip(&offsets) {
            let (token, at) = (token.as_str().expect("text"), offset.as_u64().expect("a number") as usize);
            if !token.contains(char::REPLACEMENT_CHARACTER) {
                let end = at + token.chars().count();
                assert_eq!(characters[at..end].iter().collect::<String>(), token, "at {at} of {text:?}");
            }
        }
        // The same in pieces.
        let mut streaming = body;
        streaming["stream"] = true.into();
        let (events, done) = post(&server, "/v1/completions", &streaming).events();
        assert!(done);
        let of = |name: &str| {
            let lists = events.iter().filter_map(|event| event["choices"][0]["logprobs"][name].as_array());
            lists.flatten().cloned().collect::<Vec<_>>()
        };
        assert_eq!((of("tokens"), of("text_offset")), (tokens, offsets));
        let pieces = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
        assert_eq!(pieces.collect::<String>(), text);
    }
    server.stop();
}
