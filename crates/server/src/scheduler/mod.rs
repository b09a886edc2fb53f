//! Continuous batching: which sequences run, what the next step computes, and what becomes of its logits.
//!
//! Owns the backend and its KV blocks. A step is one row of every sequence that decodes, and a piece of the prompts that are
//! being read. Nothing here changes a bit of any answer: not who shares a step, not how prompts are cut, not what was found
//! in the cache, not who was put back.
//!
//! **Memory.** A sequence is admitted when its prompt and one token more fit; its answer then grows block by block. Where
//! none is left, the last to come is put back: it lets go of its blocks, most of which stay findable, and computes again what
//! was lost, to the same bits. The first to come is never put back and fits alone, so that somebody always comes to an end.
//! Reserving the worst case in place of this would leave most memory unused: agents ask for 32,000 tokens and take 300.
//!
//! Knows nothing of text or HTTP; generic over the backend.

mod burst;
mod compute;
mod pace;
mod queue;
mod sequence;

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{NonFinite, PrefixCache, first_non_finite};
use model::{BLOCK, Backend, Chosen as Drawn, Fault, Lane, Step, forward};

use crate::job::{Job, JobError};
use crate::worker::Shared;
use compute::{Outcome, Part};
use pace::{Pace, share};
use queue::Queue;
use sequence::Refusal;
pub(crate) use sequence::Sequence;

/// Rows of a prompt whose logits are wanted that a step takes at most: with 151,936 tokens, 20 MB of logits.
const SCORED: usize = 32;

/// Blocks of a prompt that are worth a step to keep, when it is given up.
const SAVED: usize = 4;

/// Tokens of a sequence that are computed again, to find where its numbers went wrong.
const EXAMINED: usize = 2048;

/// What waits for its turn.
pub(crate) type Waiting = Queue<Sequence>;

/// See the module's documentation.
pub(crate) struct Scheduler<B> {
    backend: B,
    cache: PrefixCache,
    waiting: Waiting,
    /// In the order of arrival.
    running: Vec<Sequence>,
    pace: Pace,
    shared: Arc<Shared>,
    arrived: u64,
    /// When the next sequence whose numbers went wrong may be examined: others must not wait for that all the time.
    examines_from: Instant,
    /// Sequences for which the backend can choose tokens at a time, as far as is known.
    widest_burst: usize,
}

impl<B: Backend> Scheduler<B> {
    /// Takes a backend whose whole cache is this one's, and what waited for another.
    pub(crate) fn new(backend: B, waiting: Waiting, shared: Arc<Shared>) -> Scheduler<B> {
        let cache = PrefixCache::new(backend.kv_blocks());
        let pace = Pace::new(shared.limits.interleave);
        Scheduler {
            backend,
            cache,
            waiting,
            running: Vec::new(),
            pace,
            shared,
            arrived: 0,
            examines_from: Instant::now(),
            widest_burst: usize::MAX,
        }
    }

    /// Puts a job into the queue.
    pub(crate) fn add(&mut self, job: Job) {
        self.arrived += 1;
        self.waiting.push(job.owner, Sequence::new(job, self.arrived));
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.len() == 0
    }

    /// Ends everything that runs with `error`, and hands out what waits.
    pub(crate) fn dissolve(mut self, error: &JobError) -> Waiting {
        self.running.drain(..).for_each(|sequence| sequence.fail(error.clone()));
        self.waiting
    }

    /// Does what there is to do: at most one step.
    ///
    /// # Errors
    /// The backend's. What runs is then in no known state.
    pub(crate) fn turn(&mut self) -> Result<(), Fault> {
        self.drop_unwanted(Instant::now())?;
        self.admit();
        self.grow();
        if !self.burst()? {
            let parts = self.plan();
            if !parts.is_empty() {
                self.compute(parts)?;
            }
        }
        self.tell();
        Ok(())
    }

    /// Positions that a sequence can reach.
    pub(crate) fn context(&self) -> usize {
        self.backend.context().min(self.cache.total() * BLOCK)
    }

    /// Lets go of those to whom nobody listens, and of those whose time is over.
    fn drop_unwanted(&mut self, now: Instant) -> Result<(), Fault> {
        let keep = |sequence: &Sequence| sequence.is_wanted() && now < sequence.job.deadline;
        let mut gone = self.waiting.take_unless(keep);
        gone.extend(self.running.extract_if(.., |sequence| !keep(sequence)));
        for sequence in &gone {
            if sequence.is_wanted() {
                sequence.fail(JobError::TimedOut { tokens: sequence.generated() });
            } else {
                self.shared.metrics.cancelled.inc();
                tracing::debug!(request = &*sequence.job.id, tokens = sequence.generated(), "cancelled");
            }
        }
        let saved = self.save(&mut gone);
        gone.iter_mut().for_each(|sequence| self.cache.truncate(&mut sequence.table, 0));
        saved
    }

    /// Keeps what was read of prompts that are given up, for who asks again: an agent that was interrupted does. Their last rows
    /// are computed once more, with logits, which vouch for all before them as a whole prompt's do.
    fn save(&mut self, gone: &mut [Sequence]) -> Result<(), Fault> {
        let most = self.backend.max_rows();
        let worth = |sequence: &&mut Sequence| sequence.computed / BLOCK >= sequence.published + SAVED;
        let mut gone: Vec<&mut Sequence> = gone.iter_mut().filter(worth).take(most).collect();
        if gone.is_empty() {
            return Ok(());
        }
        let mut step = Step::default();
        // Sequences of a step are below 2^32.
        for (number, sequence) in (0..).zip(&mut gone) {
            sequence.computed -= 1;
            step.rows.extend(sequence.rows(1, number));
            step.tables.push(sequence.table.clone());
            step.logits.push(number);
            sequence.computed += 1;
        }
        forward(&mut self.backend, &step)?;
        let vocab = self.backend.model().config.vocab;
        for (sequence, logits) in gone.into_iter().zip(self.backend.logits()?.chunks_exact(vocab)) {
            if logits.iter().all(|logit| logit.is_finite()) {
                let Sequence { table, tokens, computed, published, .. } = sequence;
                self.cache.publish(table, &tokens[..*computed], *published);
            }
        }
        Ok(())
    }

    /// Lets those in whose turn it is, as long as there is room.
    fn admit(&mut self) {
        // Each has a row of every step.
        let most = self.shared.limits.running.min(self.backend.max_rows());
        while self.running.len() < most {
            let Some(mut sequence) = self.waiting.pop() else { break };
            // The last token is always computed: the next one is chosen by its logits.
            let known = if sequence.scores_prompt() { 0 } else { sequence.tokens.len() - 1 };
            sequence.table = self.cache.begin(&sequence.tokens[..known]);
            let cached = sequence.table.len();
            // One block for each that runs, so that who comes is not put back at once.
            let spare = if self.running.is_empty() { 0 } else { self.running.len() + 1 };
            let wanted = sequence.tokens.len().div_ceil(BLOCK);
            if self.cache.available() < wanted - cached + spare
                || self.cache.extend(&mut sequence.table, wanted).is_err()
            {
                self.cache.truncate(&mut sequence.table, 0);
                self.waiting.put_back(sequence);
                break;
            }
            sequence.published = cached;
            if sequence.begin(cached * BLOCK) {
                self.shared.metrics.begun(sequence.tokens.len(), cached * BLOCK);
            }
            let at = self.running.partition_point(|other| other.number < sequence.number);
            self.running.insert(at, sequence);
        }
    }

    /// Gives every sequence the blocks that its next rows need, putting back the last to come where there are too few.
    fn grow(&mut self) {
        let mut i = 0;
        while let Some(sequence) = self.running.get_mut(i) {
            let wanted = sequence.tokens.len().div_ceil(BLOCK);
            if self.cache.extend(&mut sequence.table, wanted).is_ok() {
                i += 1;
                continue;
            }
            let mut last = self.running.pop().expect("one is running");
            tracing::debug!(request = &*last.job.id, "put back for want of memory");
            self.shared.metrics.preemptions.inc();
            self.cache.truncate(&mut last.table, 0);
            (last.computed, last.published) = (0, 0);
            self.waiting.put_back(last);
        }
    }

    /// What the next step computes.
    fn plan(&self) -> Vec<Part> {
        let most = self.backend.max_rows();
        let decodes = |sequence: &Sequence| sequence.pending() == 1 && !sequence.scores_prompt();
        let of = |wanted: bool| (0..self.running.len()).filter(move |&i| decodes(&self.running[i]) == wanted);
        let mut parts: Vec<Part> =
            of(true).take(most).map(|index| Part { index, rows: 1, logits: 1 }).collect();
        let reading: Vec<usize> = of(false).collect();
        let pending = |&i: &usize| {
            let sequence = &self.running[i];
            if sequence.scores_prompt() { sequence.pending().min(SCORED) } else { sequence.pending() }
        };
        let pending: Vec<usize> = reading.iter().map(pending).collect();
        let shares = share(&pending, self.pace.rows(parts.len(), most));
        for (index, rows) in reading.into_iter().zip(shares).filter(|&(_, rows)| rows > 0) {
            let sequence = &self.running[index];
            let logits = match sequence.scores_prompt() {
                true => rows,
                // Only the end of a prompt needs the head, which costs as much as a few layers.
                false => usize::from(rows == sequence.pending()),
            };
            parts.push(Part { index, rows, logits });
        }
        parts
    }

    /// Goes on with `sequence`, or ends it.
    fn settle(&mut self, mut sequence: Sequence, outcome: Outcome, context: usize) -> Option<Sequence> {
        let chosen = match outcome {
            Outcome::Reading => return Some(sequence),
            Outcome::Chosen(chosen) => chosen,
            Outcome::Refused(refusal) => {
                self.refuse(sequence, refusal);
                return None;
            }
        };
        // Logits that are numbers vouch for the keys and values that they were computed from.
        let Sequence { table, tokens, computed, published, .. } = &mut sequence;
        *published = self.cache.publish(table, &tokens[..*computed], *published);
        let (before, accepted) = (sequence.tokens.len(), sequence.accept(chosen, context));
        self.shared.metrics.generated(sequence.tokens.len() - before);
        match accepted {
            Ok(None) => return Some(sequence),
            Ok(Some(finish)) => {
                sequence.end(finish);
                self.cache.truncate(&mut sequence.table, 0);
            }
            Err(refusal) => self.refuse(sequence, refusal),
        }
        None
    }

    fn refuse(&mut self, mut sequence: Sequence, refusal: Refusal) {
        match refusal {
            Refusal::Choice(why) => {
                self.cache.truncate(&mut sequence.table, 0);
                sequence.fail(JobError::Choice(why));
            }
            Refusal::Numeric(what) => {
                let found = self.examine(&sequence);
                self.cache.quarantine(&mut sequence.table);
                self.shared.metrics.numeric_faults.inc();
                let site = found.as_ref().map_or("head.logits".to_owned(), NonFinite::to_string);
                tracing::error!(request = &*sequence.job.id, what, site, "numeric fault");
                if let Some(capture) = &self.shared.limits.captures {
                    capture.write(&sequence.job.id, &sequence.tokens, found.as_ref());
                }
                sequence.fail(JobError::NumericFault { what, site });
            }
        }
    }

    /// Looks for the place where the numbers of `sequence` went wrong, by computing it again; none where that would take too
    /// long, or where they do not go wrong again.
    fn examine(&mut self, sequence: &Sequence) -> Option<NonFinite> {
        let start = Instant::now();
        if start < self.examines_from {
            return None;
        }
        let tokens = &sequence.tokens[..sequence.computed.min(EXAMINED)];
        let found = first_non_finite(&mut self.backend, tokens, &sequence.table);
        // No more than a tenth of the time goes into this.
        self.examines_from = Instant::now() + 9 * start.elapsed().min(Duration::from_secs(60));
        found.unwrap_or_else(|fault| {
            tracing::error!(%fault, "cannot examine a numeric fault");
            None
        })
    }

    /// Says how things are, for whoever looks at the load.
    fn tell(&self) {
        self.shared.metrics.load(self.running.len(), self.waiting.len(), &self.cache);
    }
}
