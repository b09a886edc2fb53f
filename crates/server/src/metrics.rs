//! What is counted, for Prometheus and for whoever looks at the load. Decides nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::PrefixCache;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use serde_json::{Value as Json, json};

/// How long back the rates of [`Metrics::snapshot`] look.
const WINDOW: Duration = Duration::from_secs(5);

/// A request's route and outcome.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Answered {
    pub(crate) route: &'static str,
    pub(crate) status: u16,
}

/// All metrics. Cheap to clone: every clone counts the same.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: std::sync::Arc<Registry>,
    pub(crate) requests: Family<Answered, Counter>,
    pub(crate) prompt_tokens: Counter,
    pub(crate) cached_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    pub(crate) cancelled: Counter,
    pub(crate) preemptions: Counter,
    pub(crate) numeric_faults: Counter,
    pub(crate) engine_failures: Counter,
    pub(crate) verified: Counter,
    pub(crate) mismatches: Counter,
    pub(crate) first_token: Histogram,
    pub(crate) next_token: Histogram,
    step: Histogram,
    running: Gauge,
    waiting: Gauge,
    blocks: Gauge,
    available: Gauge,
    idle: Gauge,
    quarantined: Gauge,
    rows_prompt: Counter,
    rate: std::sync::Arc<Rate>,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        let mut registry = Registry::with_prefix("tally");
        macro_rules! metric {
            ($metric:expr, $name:literal, $help:literal) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let seconds = || {
            Histogram::new([
                0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
            ])
        };
        Metrics {
            requests: metric!(Family::default(), "requests", "Requests answered, by route and status"),
            prompt_tokens: metric!(Counter::default(), "prompt_tokens", "Tokens of admitted prompts"),
            cached_tokens: metric!(
                Counter::default(),
                "cached_tokens",
                "Tokens of prompts found in the cache"
            ),
            generated_tokens: metric!(Counter::default(), "generated_tokens", "Tokens generated"),
            cancelled: metric!(
                Counter::default(),
                "cancelled",
                "Sequences to which nobody listened any more"
            ),
            preemptions: metric!(Counter::default(), "preemptions", "Sequences put back for want of memory"),
            numeric_faults: metric!(
                Counter::default(),
                "numeric_faults",
                "Sequences whose logits were NaN or infinite"
            ),
            engine_failures: metric!(
                Counter::default(),
                "engine_failures",
                "Panics and device faults of the engine"
            ),
            verified: metric!(
                Counter::default(),
                "verified",
                "Requests computed again on the CPU and compared"
            ),
            mismatches: metric!(Counter::default(), "verify_mismatches", "Compared requests that differed"),
            first_token: metric!(
                seconds(),
                "first_token_seconds",
                "From a request's arrival to its first token"
            ),
            next_token: metric!(seconds(), "next_token_seconds", "Between two tokens of a sequence"),
            step: metric!(seconds(), "step_seconds", "Duration of a step of the engine"),
            running: metric!(Gauge::default(), "running", "Sequences in the batch"),
            waiting: metric!(Gauge::default(), "waiting", "Sequences in the queue"),
            blocks: metric!(Gauge::default(), "kv_blocks", "KV blocks of 64 positions"),
            available: metric!(
                Gauge::default(),
                "kv_blocks_available",
                "KV blocks free or kept for their text alone"
            ),
            idle: metric!(Gauge::default(), "kv_blocks_idle", "KV blocks kept for their text alone"),
            quarantined: metric!(
                Gauge::default(),
                "kv_blocks_quarantined",
                "KV blocks out of circulation after a fault"
            ),
            rows_prompt: metric!(Counter::default(), "prompt_rows", "Rows of prompts computed"),
            rate: Default::default(),
            registry: std::sync::Arc::new(registry),
        }
    }

    /// A step with `prompt` rows of prompts.
    pub(crate) fn step(&self, prompt: usize, elapsed: Duration) {
        self.step.observe(elapsed.as_secs_f64());
        // `usize` is at most 64 bits wide, here and below.
        self.rows_prompt.inc_by(prompt as u64);
        self.rate.add(0, prompt as u64);
    }

    /// A sequence was admitted, with so many tokens of its prompt in the cache.
    pub(crate) fn begun(&self, prompt: usize, cached: usize) {
        self.prompt_tokens.inc_by(prompt as u64);
        self.cached_tokens.inc_by(cached as u64);
    }

    /// So many tokens were generated.
    pub(crate) fn generated(&self, tokens: usize) {
        self.generated_tokens.inc_by(tokens as u64);
        self.rate.add(tokens as u64, 0);
    }

    /// How the engine is loaded.
    pub(crate) fn load(&self, running: usize, waiting: usize, cache: &PrefixCache) {
        let set = |gauge: &Gauge, n: usize| {
            gauge.set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        set(&self.running, running);
        set(&self.waiting, waiting);
        set(&self.blocks, cache.total());
        set(&self.available, cache.available());
        set(&self.idle, cache.idle());
        set(&self.quarantined, cache.quarantined());
    }

    /// In Prometheus' text format (OpenMetrics).
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a string takes everything");
        text
    }

    /// Numbers for the page.
    pub(crate) fn snapshot(&self) -> Json {
        let (generated, prompt) = self.rate.per_second();
        json!({
            "running": self.running.get(),
            "waiting": self.waiting.get(),
            "tokens_per_second": generated,
            "prompt_tokens_per_second": prompt,
            "kv_blocks": self.blocks.get(),
            "kv_blocks_available": self.available.get(),
            "kv_blocks_idle": self.idle.get(),
            "kv_blocks_quarantined": self.quarantined.get(),
            "prompt_tokens": self.prompt_tokens.get(),
            "cached_tokens": self.cached_tokens.get(),
            "generated_tokens": self.generated_tokens.get(),
            "cancelled": self.cancelled.get(),
            "preemptions": self.preemptions.get(),
            "numeric_faults": self.numeric_faults.get(),
            "engine_failures": self.engine_failures.get(),
            "verified": self.verified.get(),
            "verify_mismatches": self.mismatches.get(),
        })
    }
}

/// Tokens of the last seconds, in slots of one second each.
struct Rate {
    start: Instant,
    slots: Mutex<[(u64, u64, u64); 8]>,
    now: AtomicU64,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate { start: Instant::now(), slots: Mutex::default(), now: AtomicU64::new(0) }
    }
}

impl Rate {
    fn add(&self, generated: u64, prompt: u64) {
        let second = self.start.elapsed().as_secs();
        self.now.store(second, Ordering::Relaxed);
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut slots[(second % 8) as usize]; // below 8
        if slot.0 != second {
            *slot = (second, 0, 0);
        }
        slot.1 += generated;
        slot.2 += prompt;
    }

    /// Over the last whole seconds, and the begun one.
    fn per_second(&self) -> (f64, f64) {
        let elapsed = self.start.elapsed();
        let second = elapsed.as_secs();
        let from = second.saturating_sub(WINDOW.as_secs() - 1);
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = slots.iter().filter(|slot| (from..=second).contains(&slot.0));
        let (generated, prompt) = recent.fold((0, 0), |(g, p), slot| (g + slot.1, p + slot.2));
        let span = (elapsed.as_secs_f64() - from as f64).max(1.0); // exact: seconds since the start
        (generated as f64 / span, prompt as f64 / span)
    }
}
