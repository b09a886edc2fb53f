//! Backends for tests, over the CPU's: what all of them pass on to it, and one that chooses tokens itself. Tests of the
//! engine and of the server share them.

#![allow(dead_code, reason = "each test uses a part")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cpu::Cpu;
use engine::{Sampler, SamplerError, SamplerParams};
use model::{BLOCK, Backend, Buffer, Chooser, Chosen, Fault, Lane, Model, Row, Site, Step, forward};

/// What a backend with a field `cpu` passes on to it.
macro_rules! over_cpu {
    () => {
        fn model(&self) -> &Model {
            self.cpu.model()
        }
        fn max_rows(&self) -> usize {
            self.cpu.max_rows()
        }
        fn context(&self) -> usize {
            self.cpu.context()
        }
        fn kv_blocks(&self) -> usize {
            self.cpu.kv_blocks()
        }
        fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
            self.cpu.read(buffer)
        }
        fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
            self.cpu.write(buffer, values)
        }
    };
}
#[allow(unused_imports, reason = "not every test has a backend of its own")]
pub(crate) use over_cpu;

/// The CPU, but that `bend` changes the logits of every row that has some.
pub(crate) struct Bent<F> {
    cpu: Cpu,
    bend: F,
    /// Of the step, those with logits.
    rows: Vec<Row>,
    logits: Vec<f32>,
}

impl<F> Bent<F> {
    pub(crate) fn new(cpu: Cpu, bend: F) -> Bent<F> {
        Bent { cpu, bend, rows: vec![], logits: vec![] }
    }
}

impl<F: FnMut(&Row, &mut [f32]) + Send> Backend for Bent<F> {
    over_cpu!();
    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.rows = step.logits.iter().map(|&row| step.rows[row as usize]).collect();
        self.cpu.begin(step)
    }
    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.cpu.run(site)
    }
    fn logits(&mut self) -> Result<&[f32], Fault> {
        let vocab = self.cpu.model().config.vocab;
        self.logits = self.cpu.logits()?.to_vec();
        self.rows
            .iter()
            .zip(self.logits.chunks_exact_mut(vocab))
            .for_each(|(row, logits)| (self.bend)(row, logits));
        Ok(&self.logits)
    }
}

/// What a backend was asked for.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// Steps that the host put together.
    pub(crate) steps: AtomicUsize,
    /// Rows of logits that were copied to the host.
    pub(crate) logits: AtomicUsize,
    /// Times that sequences were taken up.
    pub(crate) starts: AtomicUsize,
    /// Choices, of one token for every sequence.
    pub(crate) draws: AtomicUsize,
}

impl Asked {
    pub(crate) fn add(count: &AtomicUsize) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// What histories may take together.
const PLACES: usize = 1 << 14;

/// The CPU, or what stands before it, as a backend that chooses tokens itself, a step ahead of who collects them, as a GPU
/// does: the contract of [`Chooser`] by the engine's own sampler.
pub(crate) struct Ahead<B> {
    cpu: B,
    /// Sequences at a time.
    most: usize,
    /// What their histories may take.
    places: usize,
    lanes: Vec<Lane>,
    chosen: VecDeque<Vec<Chosen>>,
    asked: Arc<Asked>,
}

impl<B: Backend> Ahead<B> {
    /// For at most so many sequences at a time.
    pub(crate) fn new(cpu: B, most: usize, asked: Arc<Asked>) -> Ahead<B> {
        Ahead { cpu, most, places: PLACES, lanes: Vec::new(), chosen: VecDeque::new(), asked }
    }

    /// With so many places for histories.
    #[allow(dead_code, reason = "not every test asks for another number")]
    pub(crate) fn remembering(self, places: usize) -> Ahead<B> {
        Ahead { places, ..self }
    }
}

impl<B: Backend> Backend for Ahead<B> {
    over_cpu!();
    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        Asked::add(&self.asked.steps);
        self.cpu.begin(step)
    }
    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.cpu.run(site)
    }
    fn logits(&mut self) -> Result<&[f32], Fault> {
        let vocab = self.cpu.model().config.vocab;
        let logits = self.cpu.logits()?;
        self.asked.logits.fetch_add(logits.len() / vocab, Ordering::Relaxed);
        Ok(logits)
    }
    fn chooser(&mut self) -> Option<&mut dyn Chooser> {
        Some(self)
    }
}

fn choose(lane: &mut Lane, logits: &[f32]) -> Chosen {
    let choice = &lane.choice;
    let mut params = SamplerParams {
        temperature: choice.inverse_temperature.map_or(0.0, |t| 1.0 / t),
        top_k: choice.top_k as usize,
        top_p: choice.top_p,
        min_p: choice.min_p,
        seed: choice.seed,
        ids: choice.ids,
        ..SamplerParams::default()
    };
    if let Some(adjustment) = &lane.adjustment {
        params.repeat_penalty = adjustment.repeat;
        params.presence_penalty = adjustment.presence;
        params.frequency_penalty = adjustment.frequency;
        params.penalty_window = adjustment.window;
        params.logit_bias = adjustment.bias.iter().copied().collect();
    }
    let history = lane.adjustment.as_ref().map_or(&[][..], |adjustment| &adjustment.recent);
    let mut sampler = Sampler::new(params).expect("a choice comes from parameters that were checked");
    match sampler.sample(logits, history, u64::from(lane.position)) {
        Ok(token) => {
            lane.adjustment.iter_mut().for_each(|adjustment| adjustment.recent.push(token));
            Chosen::Token(token)
        }
        Err(SamplerError::NonFinite { nan, infinite, first, .. }) => {
            let count = |n: usize| u32::try_from(n).expect("a vocabulary's ids are u32");
            Chosen::NonFinite { nan: count(nan), infinite: count(infinite), first: count(first) }
        }
        Err(error) => panic!("{error}"),
    }
}

impl<B: Backend> Chooser for Ahead<B> {
    fn places(&self) -> usize {
        self.places
    }

    fn start(&mut self, lanes: &[Lane]) -> Result<(), Fault> {
        if lanes.len() > self.most {
            return Err(Fault::Capacity {
                what: "a number of sequences",
                got: lanes.len(),
                limit: self.most,
            });
        }
        let draws = 1 + lanes.iter().map(|lane| lane.table.len() * BLOCK).min().unwrap_or(0);
        let adjustments = lanes.iter().filter_map(|lane| Some((lane, lane.adjustment.as_ref()?)));
        let needed =
            adjustments.map(|(lane, a)| a.places(draws.saturating_sub(lane.position as usize).max(1)));
        assert!(needed.sum::<usize>() <= self.places, "who asks has looked before");
        Asked::add(&self.asked.starts);
        self.chosen.clear();
        self.lanes = lanes.to_vec();
        Ok(())
    }

    fn advance(&mut self) -> Result<(), Fault> {
        Asked::add(&self.asked.draws);
        let vocab = self.cpu.model().config.vocab;
        let logits = self.cpu.logits()?;
        assert_eq!(logits.len(), self.lanes.len() * vocab, "a row for each lane");
        let rows = self.lanes.iter_mut().zip(logits.chunks_exact(vocab));
        let chosen: Vec<Chosen> = rows.map(|(lane, logits)| choose(lane, logits)).collect();
        // A token for a place that does not exist is chosen, and not fed.
        let places = self.lanes.iter().map(|lane| lane.table.len() * BLOCK).min().unwrap_or(0);
        let furthest = self.lanes.iter().map(|lane| lane.position as usize).max().unwrap_or(0);
        if furthest < places.min(self.cpu.context()) {
            let mut step = Step::default();
            for (sequence, (lane, chosen)) in (0..).zip(self.lanes.iter().zip(&chosen)) {
                // A sequence whose numbers went wrong goes on with any token: nobody wants it.
                let token = if let Chosen::Token(token) = *chosen { token } else { 0 };
                step.rows.push(Row { token, position: lane.position, sequence });
                step.tables.push(lane.table.clone());
                step.logits.push(sequence);
            }
            forward(&mut self.cpu, &step)?;
        }
        self.lanes.iter_mut().for_each(|lane| lane.position += 1);
        self.chosen.push_back(chosen);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Chosen>, Fault> {
        Ok(self.chosen.pop_front().expect("no more is collected than was asked for"))
    }
}
