//! The engine's thread: one thread that owns the backend and everything that depends on it. Knows nothing of text or HTTP.
//!
//! The backend is made on the thread that uses it, and made again after a panic or a fault of the device: what ran fails with
//! a clear error, what waited waits on. After [`RESTARTS`] failures in a row without a step between that succeeded, the
//! engine is dead, and so is the server's health.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use model::Backend;

use crate::capture::Captures;
use crate::job::{Job, JobError};
use crate::metrics::Metrics;
use crate::places::{Owner, Places, Ticket};
use crate::scheduler::{Scheduler, Waiting};

/// Failures in a row after which no new backend is made.
const RESTARTS: usize = 3;
/// How often an idle engine looks whether it should end.
const IDLE: Duration = Duration::from_millis(200);

/// Makes the backend, on the engine's thread.
pub type Factory = Arc<dyn Fn() -> Result<Box<dyn Backend>, String> + Send + Sync>;

/// What bounds the engine.
#[derive(Debug, Clone)]
pub struct EngineLimits {
    /// Where sequences are written down whose numbers went wrong; none: nowhere.
    pub captures: Option<Captures>,
    /// Sequences that run at a time.
    pub running: usize,
    /// Sequences that wait at a time; more are refused.
    pub waiting: usize,
    /// What reading prompts may add to a step in which others decode.
    pub interleave: Duration,
}

impl Default for EngineLimits {
    fn default() -> EngineLimits {
        EngineLimits { captures: None, running: 64, waiting: 256, interleave: Duration::from_millis(50) }
    }
}

/// How the engine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Health {
    /// The backend is being made.
    Loading,
    Ready,
    /// No new requests; what runs comes to its end.
    Draining,
    /// It failed too often.
    Dead,
}

/// What the engine's thread and everybody else know.
pub(crate) struct Shared {
    pub(crate) limits: EngineLimits,
    pub(crate) metrics: Metrics,
    places: Arc<Places>,
    /// Jobs on their way to the engine's thread.
    arriving: AtomicUsize,
    health: AtomicU8,
    /// Positions that a sequence can reach; 0 until the backend is there.
    context: AtomicUsize,
    /// Everything is to end now.
    stop: AtomicBool,
    /// The last thing that went wrong.
    trouble: Mutex<Option<String>>,
}

impl Shared {
    pub(crate) fn health(&self) -> Health {
        match self.health.load(Ordering::Acquire) {
            0 => Health::Loading,
            1 => Health::Ready,
            2 => Health::Draining,
            _ => Health::Dead,
        }
    }

    fn set_health(&self, health: Health) {
        // A server that drains does not become ready again.
        let keep =
            |now: u8| (now != Health::Draining as u8 || health == Health::Dead).then_some(health as u8);
        let _ = self.health.fetch_update(Ordering::AcqRel, Ordering::Acquire, keep);
    }

    /// Positions that a sequence can reach.
    pub(crate) fn context(&self) -> usize {
        self.context.load(Ordering::Acquire)
    }

    /// Sequences that wait, whether the engine has heard of them or not.
    pub(crate) fn waiting(&self) -> usize {
        self.places.taken()
    }

    /// Whether the engine's thread should look up: jobs have come that it has not heard of, or it is to end.
    pub(crate) fn has_news(&self) -> bool {
        self.arriving.load(Ordering::Acquire) > 0 || self.stop.load(Ordering::Acquire)
    }

    /// What went wrong last.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, trouble: &str) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble.to_owned());
    }
}

/// The way to the engine's thread.
#[derive(Clone)]
pub(crate) struct Engine {
    inbox: Sender<Job>,
    shared: Arc<Shared>,
}

/// Why a request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unavailable {
    /// The queue is full.
    Busy,
    /// Still loading, or ending.
    NotReady,
    /// The engine is dead.
    Dead,
}

impl Engine {
    /// Starts the thread. It ends some time after the last `Engine` is gone, or at [`Engine::stop`].
    pub(crate) fn start(
        factory: Factory,
        limits: EngineLimits,
        metrics: Metrics,
    ) -> std::io::Result<(Engine, JoinHandle<()>)> {
        let (inbox, jobs) = channel();
        let shared = Arc::new(Shared {
            limits,
            metrics,
            places: Arc::default(),
            arriving: AtomicUsize::new(0),
            health: AtomicU8::new(Health::Loading as u8),
            context: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            trouble: Mutex::new(None),
        });
        let worker = Worker { factory, jobs, shared: shared.clone() };
        let thread = thread::Builder::new().name("engine".into()).spawn(move || worker.run())?;
        Ok((Engine { inbox, shared }, thread))
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Places in the queue for `n` sequences of `owner`.
    pub(crate) fn reserve(&self, owner: Owner, n: usize) -> Result<Vec<Ticket>, Unavailable> {
        match self.shared.health() {
            Health::Ready => {
                self.shared.places.take(owner, n, self.shared.limits.waiting).ok_or(Unavailable::Busy)
            }
            Health::Loading | Health::Draining => Err(Unavailable::NotReady),
            Health::Dead => Err(Unavailable::Dead),
        }
    }

    /// Hands a job over. That the engine is gone shows by the closed channel of events.
    pub(crate) fn submit(&self, job: Job) {
        self.shared.arriving.fetch_add(1, Ordering::AcqRel);
        let _ = self.inbox.send(job);
    }

    /// Takes no new requests.
    pub(crate) fn drain(&self) {
        self.shared.set_health(Health::Draining);
    }

    /// Ends everything that runs or waits, after the current step.
    pub(crate) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
    }
}

struct Worker {
    factory: Factory,
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(self) {
        let (mut waiting, mut failures) = (Waiting::default(), 0);
        while failures < RESTARTS {
            let why = match self.make() {
                Ok(backend) => {
                    let scheduler = Scheduler::new(backend, waiting, self.shared.clone());
                    self.shared.context.store(scheduler.context(), Ordering::Release);
                    self.shared.set_health(Health::Ready);
                    let (left, outcome) = self.serve(scheduler, &mut failures);
                    waiting = left;
                    match outcome {
                        Ok(()) => return,
                        Err(why) => why,
                    }
                }
                Err(why) => why,
            };
            failures += 1;
            tracing::error!(error = why, failures, "the engine failed");
            self.shared.note(&why);
            self.shared.metrics.engine_failures.inc();
        }
        self.shared.set_health(Health::Dead);
        let error = JobError::Engine(self.shared.trouble().unwrap_or_default());
        while let Some(sequence) = waiting.pop() {
            sequence.fail(error.clone());
        }
        // Whoever had a place in the queue already is told as well.
        while !self.shared.stop.load(Ordering::Acquire) {
            match self.jobs.recv_timeout(IDLE) {
                Ok(job) => drop(job.events.send(crate::job::Event::Failed(error.clone()))),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn make(&self) -> Result<Box<dyn Backend>, String> {
        match catch_unwind(AssertUnwindSafe(|| (self.factory)())) {
            Ok(made) => made,
            Err(panic) => Err(message(&*panic)),
        }
    }

    /// Serves until told to stop, or until something fails; returns what waits.
    fn serve(
        &self,
        mut scheduler: Scheduler<Box<dyn Backend>>,
        failures: &mut usize,
    ) -> (Waiting, Result<(), String>) {
        let outcome = loop {
            if !self.receive(&mut scheduler) {
                let waiting = scheduler.dissolve(&JobError::Stopping);
                return (Self::turn_away(waiting, &JobError::Stopping), Ok(()));
            }
            // What a panic leaves behind is not looked at but for those who wait, which a step does not touch.
            match catch_unwind(AssertUnwindSafe(|| scheduler.turn())) {
                Ok(Ok(())) => *failures = 0,
                Ok(Err(fault)) => break fault.to_string(),
                Err(panic) => break message(&*panic),
            }
        };
        // Before anybody hears of it: who then asks again is told to wait.
        self.shared.set_health(Health::Loading);
        (scheduler.dissolve(&JobError::Engine(outcome.clone())), Err(outcome))
    }

    /// Takes in what has arrived, waiting for it if there is nothing to do; false when it is time to end.
    fn receive(&self, scheduler: &mut Scheduler<Box<dyn Backend>>) -> bool {
        loop {
            if self.shared.stop.load(Ordering::Acquire) {
                return false;
            }
            if scheduler.is_idle() {
                match self.jobs.recv_timeout(IDLE) {
                    Ok(job) => self.add(job, scheduler),
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            }
            while let Ok(job) = self.jobs.try_recv() {
                self.add(job, scheduler);
            }
            return true;
        }
    }

    fn add(&self, job: Job, scheduler: &mut Scheduler<Box<dyn Backend>>) {
        self.shared.arriving.fetch_sub(1, Ordering::AcqRel);
        scheduler.add(job);
    }

    fn turn_away(mut waiting: Waiting, error: &JobError) -> Waiting {
        while let Some(sequence) = waiting.pop() {
            sequence.fail(error.clone());
        }
        waiting
    }
}

/// What a panic said.
fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("a panic: {}", text.unwrap_or("without a message"))
}
