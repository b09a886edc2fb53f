//! One choice of an answer, followed from its submission to its end: tokens come from the engine, pieces go out. Ends as soon
//! as nobody reads them. Knows no protocol.

use std::sync::Arc;
use std::time::Instant;

use engine::Sampler;
use tokio::sync::{mpsc, watch};

use crate::answer::{Caller, End, Generation, Piece, Usage, Why};
use crate::error::ApiError;
use crate::grammar::Matcher;
use crate::job::{Event, Finish, Job, JobError, Logprobs};
use crate::places::Ticket;
use crate::service::Service;
use crate::spans::Span;
use crate::text::{Delta, Text};
use crate::verify::{Outcome, Question};

/// One choice, followed from its submission to its end.
pub(crate) struct Choice {
    /// From its submission on. Dropped before the request's own, which it is a part of.
    pub(crate) span: Span,
    pub(crate) service: Arc<Service>,
    pub(crate) generation: Generation,
    pub(crate) caller: Caller,
    /// What became of it.
    pub(crate) outcome: &'static str,
    pub(crate) index: usize,
    pub(crate) sampler: Sampler,
    pub(crate) matcher: Option<Matcher>,
    pub(crate) max_tokens: usize,
    pub(crate) ticket: Option<Ticket>,
    pub(crate) text: Text,
    pub(crate) usage: Usage,
    pub(crate) out: mpsc::Sender<(usize, Piece)>,
}

impl Choice {
    /// Follows the choice. The first of several tells the others when its prompt has been read: they then find it in the
    /// cache in place of reading it again.
    pub(crate) async fn follow(mut self, first: Option<watch::Sender<bool>>, begun: watch::Receiver<bool>) {
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
