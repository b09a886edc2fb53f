//! `tally run`: a prompt in, text out.

use std::path::PathBuf;

use anstyle::Style;
use engine::{ChatEncoder, ChatTemplate, Sampler, SamplerParams, Session};
use model::Backend;
use serde_json::json;
use signal_hook::consts::SIGINT;

use crate::answer::{Answer, End, Limits, Responder};
use crate::device::Device;
use crate::failure::Failure;
use crate::load::{self, Loaded, Running};
use crate::message::{Message, Role, conversation};
use crate::prompt_args::PromptArgs;
use crate::sampling::Sampling;
use crate::text_out::TextOut;
use crate::{clock, output};

/// Positions of the context that are there at least, if the model has them; a longer prompt gets more.
const CONTEXT: usize = 4096;
/// Room for the answer to a prompt that needs more than that.
const ROOM: usize = 2048;

const EXAMPLES: &str = "\
Examples:
  tally run -p 'fn main() {'                        the small model that ships
  tally run model.gguf -p 'Why is the sky blue?' --max-tokens 200
  git diff | tally run model.gguf --system 'Review this change.' -
  tally run model.gguf --raw --greedy -p '1, 2, 3,' --stop $'\\n'

The text goes to standard output and everything else to standard error. The last line there is of \
figures: tokens of the prompt and of the answer and how fast they were, the time from the start of the \
prompt to the first token, and the most memory that was resident, mapped weights included.

The same command gives the same text, on any machine and with any --threads; --seed changes it.

Exit codes: 0 done; 1 bad input; 2 wrong usage; 3 the model computed NaN or infinity; 74 the model file \
was cut short while in use; 130 Ctrl-C; 141 nobody reads standard output.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model; without one, the small one that ships.
    model: Option<PathBuf>,
    #[command(flatten)]
    prompt: PromptArgs,
    /// What the model is told before the prompt, as the chat template's system message.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as it stands, without the chat template; `<|im_start|>` and the like are control tokens.
    #[arg(long)]
    raw: bool,
    /// Print one JSON object when done: text, ids, why it ended, parameters, figures.
    #[arg(long)]
    json: bool,
    /// Leave out the line of figures, and notes.
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    engine: load::Options,
}

impl Args {
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        self.prompt.take_dash(&mut self.model);
        let text = self.prompt.text()?;
        let loaded = Loaded::open(&self.model)?;
        let prompt = self.ids(&loaded, &text)?;
        let params = self.sampling.params(&loaded)?;
        let sampler = Sampler::new(params.clone()).map_err(|error| Failure::new(error).at(&loaded.name))?;
        let room = self.limits.max_tokens().unwrap_or(ROOM);
        let wanted = CONTEXT.max(prompt.len().saturating_add(room));
        let Running { engine, device } = loaded.engine(&self.engine, wanted, self.quiet)?;
        let context = engine.context();
        if prompt.len() > context {
            let message = format!("the prompt has {} tokens, the context {context} positions", prompt.len());
            return Err(Failure::new(message).hint(loaded.context_hint(prompt.len())));
        }
        let (tokenizer, limits) = (&loaded.tokenizer, &self.limits);
        let mut responder = Responder { tokenizer, engine, session: Session::default(), sampler, limits };
        let answer = self.answer(&mut responder, &prompt)?;
        if self.json {
            output::json(&self.record(&loaded, device, &prompt, &params, &answer))?;
        } else if !self.quiet {
            figures(&params, &answer);
        }
        if answer.end == End::Interrupted {
            // Dies of the signal, so that a shell's loop ends too; a shell calls that exit code 130.
            let _ = signal_hook::low_level::emulate_default_handler(SIGINT);
        }
        Ok(())
    }

    /// The prompt's ids, through the chat template unless there is none or none is wanted.
    fn ids(&self, loaded: &Loaded, text: &str) -> Result<Vec<u32>, Failure> {
        let template = if self.raw { None } else { loaded.template()? };
        if let Some(template) = template {
            return self.chat_ids(loaded, &template, text);
        }
        if self.system.is_some() {
            let message =
                format!("{}: there is no chat template in the file, so no place for --system", loaded.name);
            return Err(Failure::new(message).hint("put everything into the prompt"));
        }
        if !self.raw && !self.quiet {
            eprintln!(
                "note: {} has no chat template; the prompt is continued as it stands, as with --raw",
                loaded.name
            );
        }
        Ok(engine::raw_prompt(&loaded.tokenizer, text)?)
    }

    fn chat_ids(&self, loaded: &Loaded, template: &ChatTemplate, text: &str) -> Result<Vec<u32>, Failure> {
        let system = self.system.iter().map(|text| Message::new(Role::System, text));
        let messages: Vec<_> = system.chain([Message::new(Role::User, text)]).collect();
        let encoder = ChatEncoder::new(&loaded.tokenizer, template)?;
        Ok(encoder.encode(&conversation(&messages, clock::now()))?)
    }

    /// Answers, writing the text as it comes unless it is to be part of a JSON object.
    fn answer(
        &self,
        responder: &mut Responder<'_, Box<dyn Backend>>,
        prompt: &[u32],
    ) -> Result<Answer, Failure> {
        if self.json {
            return responder.answer(prompt, |_| Ok(()));
        }
        let mut out = TextOut::stdout();
        let answer = responder.answer(prompt, |text| out.write(text));
        // Whatever ended the text, what follows begins a line.
        out.end()?;
        answer
    }

    fn record(
        &self,
        loaded: &Loaded,
        device: Device,
        prompt: &[u32],
        params: &SamplerParams,
        answer: &Answer,
    ) -> serde_json::Value {
        json!({
            "model": loaded.name,
            "prompt_ids": prompt,
            "text": answer.text,
            "ids": answer.ids,
            "end": answer.end.name(),
            "stop_string": if let End::StopString(string) = &answer.end { Some(string) } else { None },
            "sampling": {
                "temperature": decimal(params.temperature),
                "top_k": params.top_k,
                "top_p": decimal(params.top_p),
                "min_p": decimal(params.min_p),
                "repeat_penalty": decimal(params.repeat_penalty),
                "repeat_last_n": params.penalty_window,
                "presence_penalty": decimal(params.presence_penalty),
                "frequency_penalty": decimal(params.frequency_penalty),
                "seed": params.seed,
            },
            "device": device.to_string(),
            "activations": self.engine.activations().name(),
            "figures": answer.figures.json(),
        })
    }
}

/// The last line on standard error. That it is closed is no failure.
fn figures(params: &SamplerParams, answer: &Answer) {
    let dim = Style::new().dimmed();
    let seed = if params.is_greedy() { "greedy".into() } else { format!("seed {}", params.seed) };
    anstream::eprintln!("{dim}{}; {seed}; {}{dim:#}", answer.figures, answer.end);
}

/// The f64 that is written like `x`: 0.7, not 0.699999988079071.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
