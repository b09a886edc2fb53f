//! A request in no protocol's words, and its answer piece by piece. Joins the engine's tokens to text; each choice is
//! followed by a task of its own, which ends as soon as nobody reads the answer.

use std::sync::Arc;
use std::time::Instant;

use engine::{Sampler, SamplerParams};
use tokio::sync::{mpsc, watch};

use crate::error::ApiError;
use crate::grammar::{Grammar, Matcher, Since};
use crate::job::{Event, Finish, Job, JobError, Logprobs};
use crate::places::{Owner, Ticket};
use crate::service::Service;
use crate::spans::Span;
use crate::text::{Delta, Syntax, Text};
use crate::verify::{Outcome, Question};

/// Pieces that wait for a slow reader; beyond them its task waits, and tokens do.
const PIECES: usize = 64;

/// What is to be generated.
#[derive(Debug, Clone)]
pub(crate) struct Generation {
    /// Ids, at least one.
    pub(crate) prompt: Vec<u32>,
    /// Answers wanted, each with a seed of its own: the seed, the seed plus one, ...
    pub(crate) choices: usize,
    pub(crate) sampling: SamplerParams,
    /// As many as fit, where nothing is said.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) stop: Vec<String>,
    pub(crate) logprobs: Option<usize>,
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) grammar: Option<(Grammar, Since)>,
    /// The field that the grammar came from.
    pub(crate) grammar_field: &'static str,
    pub(crate) syntax: Syntax,
    /// Goes on where the model would end.
    pub(crate) ignore_end: bool,
    /// The answer ends with its first call.
    pub(crate) one_call: bool,
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// The request's id.
    pub(crate) id: Arc<str>,
    pub(crate) owner: Owner,
    /// Ends with the work on the request.
    pub(crate) span: Span,
}

/// A part of an answer.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Log-probabilities of the prompt's tokens, from the second on.
    Prompt(Vec<Logprobs>),
    /// A token was generated. What it means follows, at once or later.
    Token(u32, Option<Box<Logprobs>>),
    Delta(Delta),
    End(End),
    Failed(ApiError),
}

/// How an answer ended.
#[derive(Debug, Clone)]
pub(crate) struct End {
    pub(crate) why: Why,
    pub(crate) usage: Usage,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Why {
    /// The model ended it.
    Model,
    /// The model ended it after calling tools.
    Calls,
    /// This stop string came.
    StopString(String),
    /// As many tokens as asked for, or as there is room for.
    Length,
}

/// Tokens of a choice.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    /// Of the prompt, found in the cache.
    pub(crate) cached: usize,
    pub(crate) generated: usize,
    /// Of those generated, reasoning.
    pub(crate) reasoning: usize,
}

/// An answer that is being given. Dropping it ends the work.
pub(crate) struct Answer {
    pieces: mpsc::Receiver<(usize, Piece)>,
    pub(crate) choices: usize,
    pub(crate) seed: u64,
    /// In tokens.
    pub(crate) prompt: Vec<u32>,
}

impl Answer {
    /// The next piece of any choice; none when all have ended.
    pub(crate) async fn next(&mut self) -> Option<(usize, Piece)> {
        self.pieces.recv().await
    }

    /// The next piece if it is there already.
    pub(crate) fn ready(&mut self) -> Option<(usize, Piece)> {
        self.pieces.try_recv().ok()
    }
}

impl Service {
    /// Begins to answer.
    ///
    /// # Errors
    /// What is wrong with the request, or that there is no room for it now.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        generation: Generation,
        caller: &Caller,
    ) -> Result<Answer, ApiError> {
        let Generation { prompt, choices, sampling, grammar, .. } = &generation;
        if *choices == 0 || *choices > self.options.max_choices {
            let most = self.options.max_choices;
            return Err(ApiError::invalid("n", format!("n is {choices}; it must be from 1 to {most}")));
        }
        // Before the prompt is looked at: an engine that is not there has no context.
        let tickets = self.engine.reserve(caller.owner, *choices).map_err(|why| self.unavailable(why))?;
        let max_tokens = self.room(prompt.len(), generation.max_tokens)?;
        let sampler = |i: u64| {
            let seed = sampling.seed.wrapping_add(i);
            Sampler::new(SamplerParams { seed, ..sampling.clone() })
                .map_err(|error| ApiError::invalid(parameter(&error), error.to_string()))
        };
        // Checked before anything is asked of the engine.
        sampler(0)?;
        let matcher = match grammar {
            Some((grammar, since)) => Some(self.matcher(grammar.clone(), since.clone(), &generation).await?),
            None => None,
        };
        let (send, pieces) = mpsc::channel(PIECES);
        let (first, begun) = watch::channel(false);
        let mut first = Some(first);
        for (index, ticket) in tickets.into_iter().enumerate() {
            let text = Text::new(self.tokenizer().clone(), &generation.stop, generation.syntax.clone())
                .map_err(|error| ApiError::invalid("stop", error.to_string()))?;
            let choice = Choice {
                service: self.clone(),
                generation: generation.clone(),
                caller: caller.clone(),
                span: Span::default(),
                outcome: "cancelled",
                index,
                sampler: sampler(index as u64)?, // exact: few choices
                matcher: matcher.as_ref().map(Matcher::fork),
                max_tokens,
                ticket: Some(ticket),
                text,
                usage: Usage { prompt: prompt.len(), ..Usage::default() },
                out: send.clone(),
            };
            tokio::spawn(choice.follow(first.take(), begun.clone()));
        }
        Ok(Answer { pieces, choices: *choices, seed: sampling.seed, prompt: generation.prompt })
    }

    /// Tokens that an answer may have.
    fn room(&self, prompt: usize, wanted: Option<usize>) -> Result<usize, ApiError> {
        let context = self.engine.shared().context();
        if prompt == 0 {
            return Err(ApiError::invalid("prompt", "the prompt is empty"));
        }
        if prompt > context {
            let message = format!("the prompt has {prompt} tokens; the context has {context}");
            let error = ApiError::invalid("messages", message);
            return Err(ApiError { code: "context_length_exceeded", ..error });
        }
        // The last token is chosen and needs no place.
        let room = context - prompt + 1;
        match wanted {
            Some(0) => Err(ApiError::invalid("max_tokens", "max_tokens is 0; it must be at least 1")),
            wanted => Ok(wanted.map_or(room, |wanted| wanted.min(room))),
        }
    }

    async fn matcher(
        self: &Arc<Self>,
        grammar: Grammar,
        since: Since,
        generation: &Generation,
    ) -> Result<Matcher, ApiError> {
        let (service, field) = (self.clone(), generation.grammar_field);
        let made = self.blocking(move || service.grammars()?.matcher(&grammar, since)).await?;
        made.map_err(|error| ApiError::invalid(field, format!("{field}: {error}")))
    }
}

/// The field of a request that the sampler's parameter comes from.
fn parameter(error: &engine::SamplerError) -> &'static str {
    match error {
        engine::SamplerError::Parameter { name: "repeat_penalty", .. } => "repetition_penalty",
        engine::SamplerError::Parameter { name, .. } => name,
        _ => "logit_bias",
    }
}

/// One choice, followed from its submission to its end.
struct Choice {
    /// From its submission on. Dropped before the request's own, which it is a part of.
    span: Span,
    service: Arc<Service>,
    generation: Generation,
    caller: Caller,
    /// What became of it.
    outcome: &'static str,
    index: usize,
    sampler: Sampler,
    matcher: Option<Matcher>,
    max_tokens: usize,
    ticket: Option<Ticket>,
    text: Text,
    usage: Usage,
    out: mpsc::Sender<(usize, Piece)>,
}

impl Choice {
    /// Follows the choice. The first of several tells the others when its prompt has been read: they then find it in the
    /// cache in place of reading it again.
    async fn follow(mut self, first: Option<watch::Sender<bool>>, begun: watch::Receiver<bool>) {
        self.run(first, begun).await;
        self.span.count("tally.choice", self.index);
        self.span.count("gen_ai.usage.input_tokens", self.usage.prompt);
        self.span.count("tally.usage.cached_tokens", self.usage.cached);
        self.span.count("gen_ai.usage.output_tokens", self.usage.generated);
        self.span.fact("tally.outcome", self.outcome);
    }

    async fn run(&mut self, first: Option<watch::Sender<bool>>, mut begun: watch::Receiver<bool>) {
        if first.is_none() {
            tokio::select! {
                biased;
                () = self.out.closed() => return,
                // That the sender is gone is as good.
                _ = begun.wait_for(|begun| *begun) => {}
            }
        }
        let start = Instant::now();
        self.span = self.caller.span.part("generate");
        let (send, mut events) = mpsc::unbounded_channel();
        let job = self.job(send, start);
        let mut verification = self.verification(&job);
        let service = self.service.clone();
        service.engine.submit(job);
        let mut last = None;
        loop {
            let event = tokio::select! {
                biased;
                () = self.out.closed() => return,
                event = events.recv() => event,
            };
            let went_on = match event {
                Some(Event::Begun { cached }) => {
                    self.usage.cached = cached;
                    self.span.event("begun");
                    true
                }
                Some(Event::Prompt(scored)) => self.send(Piece::Prompt(scored)).await,
                Some(Event::Token { id, logprobs }) => {
                    if let Some(first) = &first {
                        first.send_replace(true);
                    }
                    self.time(start, &mut last);
                    if let Some((_, tokens)) = &mut verification {
                        tokens.push(id);
                    }
                    self.token(id, logprobs).await
                }
                Some(Event::End(finish, checksum)) => {
                    self.end(finish).await;
                    if let (Some((question, tokens)), Some(verifier)) =
                        (verification.take(), &service.verifier)
                    {
                        let outcome = Outcome { tokens, finish, checksum };
                        tokio::spawn(verifier.clone().compare(question, outcome));
                    }
                    false
                }
                Some(Event::Failed(error)) => self.fail(error).await,
                None => self.fail(JobError::Engine("it is gone".into())).await,
            };
            if !went_on {
                return;
            }
        }
    }

    /// Always false: nothing follows.
    async fn fail(&mut self, error: JobError) -> bool {
        self.span.failed(&error.to_string());
        self.outcome = "failed";
        self.send(Piece::Failed(error.into())).await;
        false
    }

    /// What is needed to compute this choice again, if it is one of those that are.
    fn verification(&self, job: &Job) -> Option<(Question, Vec<u32>)> {
        if !job.checksum {
            return None;
        }
        let question = Question {
            // It is looked at when the request is long done.
            caller: Caller { span: Span::default(), ..self.caller.clone() },
            prompt: job.prompt.clone(),
            ends: job.ends.clone(),
            max_tokens: job.max_tokens,
            sampler: job.sampler.clone(),
            grammar: job.grammar.as_ref().map(Matcher::fork),
        };
        Some((question, Vec::new()))
    }

    fn job(&mut self, events: mpsc::UnboundedSender<Event>, start: Instant) -> Job {
        let Generation { logprobs, prompt_logprobs, ignore_end, .. } = self.generation;
        Job {
            id: self.caller.id.clone(),
            owner: self.caller.owner,
            prompt: std::mem::take(&mut self.generation.prompt),
            ends: if ignore_end { Arc::default() } else { self.service.tokenizer().eos().into() },
            max_tokens: self.max_tokens,
            sampler: self.sampler.clone(),
            logprobs,
            prompt_logprobs: prompt_logprobs.filter(|_| self.index == 0),
            grammar: self.matcher.take(),
            checksum: self.service.verifier.as_ref().is_some_and(|verifier| verifier.wants_next()),
            deadline: start + self.service.options.request_timeout,
            ticket: self.ticket.take(),
            events,
        }
    }

    fn time(&self, start: Instant, last: &mut Option<Instant>) {
        let now = Instant::now();
        let metrics = &self.service.engine.shared().metrics;
        match last {
            None => {
                self.span.event("first token");
                metrics.first_token.observe((now - start).as_secs_f64());
            }
            Some(last) => metrics.next_token.observe((now - *last).as_secs_f64()),
        }
        *last = Some(now);
    }

    /// Takes a token; false if the answer is over.
    async fn token(&mut self, id: u32, logprobs: Option<Box<Logprobs>>) -> bool {
        self.usage.generated += 1;
        self.usage.reasoning += usize::from(self.text.is_reasoning());
        if !self.send(Piece::Token(id, logprobs)).await {
            return false;
        }
        let deltas = match self.text.push(id) {
            Ok(deltas) => deltas,
            Err(error) => {
                self.send(Piece::Failed(ApiError::internal(error.to_string()))).await;
                return false;
            }
        };
        let mut called = false;
        for delta in deltas {
            called = self.generation.one_call && matches!(delta, Delta::CallEnd { .. });
            if !self.send(Piece::Delta(delta)).await {
                return false;
            }
            // A token may hold the end of a call and the beginning of another.
            if called {
                break;
            }
        }
        if called {
            self.over(Why::Calls).await;
            return false;
        }
        if self.text.stopped().is_some() {
            // What the engine computed in the meantime is dropped with its channel.
            self.end(Finish::Stop).await;
            return false;
        }
        true
    }

    async fn end(&mut self, finish: Finish) {
        for delta in self.text.finish(finish == Finish::Length) {
            if !self.send(Piece::Delta(delta)).await {
                return;
            }
        }
        let why = match (self.text.stopped(), finish) {
            (Some(index), _) => Why::StopString(self.generation.stop[index].clone()),
            (None, Finish::Length) => Why::Length,
            (None, Finish::Stop) if self.text.calls() > 0 => Why::Calls,
            (None, Finish::Stop) => Why::Model,
        };
        self.over(why).await;
    }

    async fn over(&mut self, why: Why) {
        self.outcome = match why {
            Why::Model => "stop",
            Why::Calls => "tool_calls",
            Why::StopString(_) => "stop_string",
            Why::Length => "length",
        };
        self.send(Piece::End(End { why, usage: self.usage })).await;
    }

    /// False if nobody reads any more.
    async fn send(&self, piece: Piece) -> bool {
        self.out.send((self.index, piece)).await.is_ok()
    }
}
