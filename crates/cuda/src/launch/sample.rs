//! Tokens chosen on the GPU (`kernels/sample.cu`): what `engine::Sampler` chooses.
//!
//! Everything that a draw depends on lies in device memory and goes on by itself, so the launches may be recorded with
//! the step that they feed and replayed. What was drawn comes back through a ring in pinned memory: the host reads it a
//! step late and never makes the GPU wait.

use std::sync::Arc;
use std::time::Duration;

use model::{Chosen, Lane};

use crate::Error;
use crate::driver::{Argument, Arguments, Device, Function, Memory, Plain, Ptr, Shape, size};
use crate::kernels::UnitOf;
use crate::launch::adjust::{Adjusted, Adjustments};
use crate::pinned::Pinned;

pub(crate) const UNIT: UnitOf = ("sample.cu", &NAMES);

const NAMES: [&str; 7] = [
    "sample_adjust",
    "sample_measure",
    "sample_histogram",
    "sample_collect",
    "sample_threshold",
    "sample_sum",
    "sample_draw",
];

/// As in `sample.cuh`.
pub(super) const SLICE_THREADS: u32 = 512;
pub(super) const SLICE: usize = 8 * SLICE_THREADS as usize;
pub(super) const ROW_THREADS: u32 = 1024;
pub(super) const BINS: usize = 1024;
pub(super) const LISTED: usize = 8192;
pub(super) const NO_TOKEN: u32 = u32::MAX;
/// Draws that may be asked for and not yet collected.
pub(crate) const RING: u32 = 8;

/// `Choice` in sample.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ChoiceArg {
    seed: u64,
    position: u64,
    /// 0 is greedy.
    inverse: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    number: u32,
    ids: u32,
}
// SAFETY: numbers without padding.
unsafe impl Plain for ChoiceArg {}

/// `Found` in sample.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct FoundArg {
    best: u64,
    threshold: u64,
    least: u32,
    nan: u32,
    infinite: u32,
    first: u32,
    listed: u32,
    unused: u32,
}
// SAFETY: numbers without padding.
unsafe impl Plain for FoundArg {}

impl FoundArg {
    /// Before anything is known.
    const NOTHING: FoundArg = FoundArg {
        best: 0,
        threshold: 0,
        least: u32::MAX,
        nan: 0,
        infinite: 0,
        first: u32::MAX,
        listed: 0,
        unused: 0,
    };
}

/// `Drawn` in sample.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct DrawnArg {
    /// `(number + 1) << 32 | token`.
    tagged: u64,
    nan: u32,
    infinite: u32,
    first: u32,
    unused: u32,
}
// SAFETY: numbers without padding.
unsafe impl Plain for DrawnArg {}

/// `Sampling` in sample.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SamplingArg {
    logits: Ptr,
    choice: Ptr,
    found: Ptr,
    count: Ptr,
    weight: Ptr,
    list: Ptr,
    sums: Ptr,
    ring: Ptr,
    adjustment: Ptr,
    entries: Ptr,
    recent: Ptr,
    rows: u32,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for SamplingArg {}

/// The arrays of a step that chosen tokens go to (`Feed` in sample.cuh).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Feed {
    /// `[T]`.
    pub(crate) token: Ptr,
    /// `[T]`.
    pub(crate) position: Ptr,
    /// `[R]`: the row of the step that a row of logits belongs to.
    pub(crate) wanted: Ptr,
}
// SAFETY: `repr(C)`, the fields of the twin.
unsafe impl Argument for Feed {}

impl Feed {
    /// The tokens are for the host alone.
    pub(crate) const NOWHERE: Feed = Feed { token: Ptr::NULL, position: Ptr::NULL, wanted: Ptr::NULL };
}

/// What of the sampler a batch needs, and whether any row is adjusted: what is launched, so a recording is good for one of
/// these.
pub(crate) type Needs = (Extent, bool);

/// How much is done to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Extent {
    /// Every row is greedy.
    Greedy,
    /// Some row draws, none from the likeliest only.
    Drawn,
    /// Some row has top-k or top-p.
    Ranked,
}

impl Extent {
    fn of(Lane { choice, .. }: &Lane) -> Extent {
        match choice.inverse_temperature {
            None => Extent::Greedy,
            Some(_) if choice.top_k > 0 || choice.top_p < 1.0 => Extent::Ranked,
            Some(_) => Extent::Drawn,
        }
    }
}

/// The sequences whose tokens the GPU chooses.
pub(crate) struct Sampling {
    kernels: [Function; NAMES.len()],
    vocab: usize,
    capacity: usize,
    choice: Memory<ChoiceArg>,
    found: Memory<FoundArg>,
    count: Memory<u32>,
    weight: Memory<u64>,
    list: Memory<u64>,
    sums: Memory<u64>,
    ring: Pinned<DrawnArg>,
    adjustments: Adjustments,
    rows: usize,
    extent: Extent,
    /// Choices that are yet to come at most, where they are kept.
    choices: usize,
    /// Draws launched, and draws collected, since the beginning; wrapping.
    asked: u32,
    collected: u32,
}

impl Sampling {
    /// For up to `rows` sequences over a vocabulary of `vocab`, with so many places for their histories; `get` finds a kernel of [`UNIT`].
    pub(crate) fn new(
        device: &Arc<Device>,
        get: impl Fn(&'static str) -> Function,
        vocab: usize,
        rows: usize,
        places: usize,
    ) -> Result<Sampling, Error> {
        let adjustments = Adjustments::new(device, rows, places)?;
        Ok(Sampling {
            adjustments,
            choices: 0,
            kernels: NAMES.map(get),
            vocab,
            capacity: rows,
            choice: device.alloc(rows)?,
            found: device.alloc(rows)?,
            count: device.alloc(rows * BINS)?,
            weight: device.alloc(rows * BINS)?,
            list: device.alloc(rows * LISTED)?,
            sums: device.alloc(rows * vocab.div_ceil(SLICE))?,
            ring: Pinned::new(device, RING as usize * rows)?,
            rows: 0,
            extent: Extent::Greedy,
            asked: 0,
            collected: 0,
        })
    }

    /// Bytes of device memory that `new` takes.
    pub(crate) fn bytes(vocab: usize, rows: usize, places: usize) -> usize {
        let row = size_of::<ChoiceArg>() + size_of::<FoundArg>() + 12 * BINS + 8 * LISTED;
        rows * (row + 8 * vocab.div_ceil(SLICE)) + Adjustments::bytes(rows, places)
    }

    /// Places that there are for histories.
    pub(crate) fn places(&self) -> usize {
        self.adjustments.places()
    }

    /// Takes up sequences: row `i` of the logits is chosen from as `lanes[i]` says, up to `choices` times. Draws not yet
    /// collected are forgotten.
    ///
    /// # Panics
    /// If there are more than `new` was told, if their histories take more than [`Sampling::places`], or a bias is on an id
    /// beyond the vocabulary.
    pub(crate) fn start(&mut self, lanes: &[Lane], choices: usize) -> Result<(), Error> {
        assert!(lanes.len() <= self.capacity, "{} sequences for {}", lanes.len(), self.capacity);
        let arg = |Lane { choice, position, .. }: &Lane| ChoiceArg {
            seed: choice.seed,
            position: u64::from(*position),
            inverse: choice.inverse_temperature.unwrap_or(0.0),
            top_k: choice.top_k,
            top_p: choice.top_p,
            min_p: choice.min_p,
            number: self.asked,
            ids: choice.ids.min(size(self.vocab)),
        };
        self.choice.write(0, &lanes.iter().map(arg).collect::<Vec<_>>())?;
        let adjustments: Vec<_> = lanes.iter().map(|lane| lane.adjustment.as_ref()).collect();
        self.adjustments.start(&adjustments, choices, self.vocab)?;
        // The kernels leave these as they want to find them; a run that failed half way does not.
        self.found.write(0, &vec![FoundArg::NOTHING; lanes.len()])?;
        self.count.clear()?;
        self.weight.clear()?;
        (self.rows, self.choices) = (lanes.len(), choices);
        self.extent = lanes.iter().map(Extent::of).max().unwrap_or(Extent::Greedy);
        self.collected = self.asked;
        Ok(())
    }

    /// What `launch` launches.
    pub(crate) fn needs(&self) -> Needs {
        (self.extent, self.adjustments.some())
    }

    /// Whether one more token may be chosen: there is a place for it where histories are kept.
    pub(crate) fn may_choose(&self) -> bool {
        self.choices > 0 || !self.adjustments.some()
    }

    /// Chooses a token of every sequence from `logits` (`[R, V]`), writes it and its position to the step that it goes
    /// to, and goes one position on. May be recorded; whoever replays it calls [`Sampling::note`].
    pub(crate) fn launch(&self, device: &Device, logits: Ptr, feed: Feed) -> Result<(), Error> {
        let slices = Shape::new(1, SLICE_THREADS).grid(self.vocab.div_ceil(SLICE), self.rows, 1);
        let rows = Shape::new(self.rows, ROW_THREADS);
        let [adjust, measure, histogram, collect, threshold, sum, draw] = self.kernels;
        let ranked = [(histogram, slices), (collect, slices), (threshold, rows)];
        if self.adjustments.some() {
            adjust.launch(device, rows, Arguments::default().push(self.arg(logits)))?;
        }
        let list: &[(Function, Shape)] = match self.extent {
            Extent::Greedy => &[(measure, slices)],
            Extent::Drawn => &[(measure, slices), (sum, slices)],
            Extent::Ranked => &[&[(measure, slices)], &ranked[..], &[(sum, slices)]].concat(),
        };
        for (kernel, shape) in list {
            kernel.launch(device, *shape, Arguments::default().push(self.arg(logits)))?;
        }
        draw.launch(device, rows, Arguments::default().push(self.arg(logits)).push(feed))
    }

    /// A draw is on its way: launched, or part of a recording that was replayed.
    ///
    /// # Panics
    /// If more than [`RING`] have not been collected.
    pub(crate) fn note(&mut self) {
        self.asked = self.asked.wrapping_add(1);
        self.choices = self.choices.saturating_sub(1);
        assert!(
            self.asked.wrapping_sub(self.collected) <= RING,
            "draws are overwritten before they are collected"
        );
    }

    /// The oldest draw not yet collected, waiting for it if need be.
    ///
    /// # Panics
    /// If none is on its way.
    pub(crate) fn collect(&mut self, device: &Device) -> Result<Vec<Chosen>, Error> {
        assert!(self.collected != self.asked, "nothing was asked for");
        let slot = (self.collected % RING) as usize * self.capacity;
        let chosen = (slot..slot + self.rows).map(|at| self.wait(device, at)).collect::<Result<_, _>>()?;
        self.collected = self.collected.wrapping_add(1);
        Ok(chosen)
    }

    fn wait(&self, device: &Device, at: usize) -> Result<Chosen, Error> {
        /// Looks at the ring before the GPU is asked how it does: some tens of microseconds.
        const LOOKS: u32 = 1000;
        let wanted = self.collected.wrapping_add(1);
        let arrived = |flag: u64| (flag >> 32) as u32 == wanted; // the upper half
        loop {
            for _ in 0..LOOKS {
                let flag = self.ring.flag(at);
                if arrived(flag) {
                    return Ok(self.chosen(at, flag as u32)); // the lower half
                }
                std::hint::spin_loop();
            }
            // A GPU that failed will not write any more; one that is idle has written.
            if device.is_idle()? && !arrived(self.ring.flag(at)) {
                return Err(Error::Driver {
                    what: "waiting for a token",
                    name: "none".into(),
                    text: "the GPU is idle and has drawn none".into(),
                });
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    fn chosen(&self, at: usize, token: u32) -> Chosen {
        if token != NO_TOKEN {
            return Chosen::Token(token);
        }
        let DrawnArg { nan, infinite, first, .. } = self.ring.read(at);
        Chosen::NonFinite { nan, infinite, first }
    }

    fn arg(&self, logits: Ptr) -> SamplingArg {
        let Adjusted { adjustment, entries, recent } = self.adjustments.arg();
        SamplingArg {
            logits,
            choice: self.choice.ptr(),
            found: self.found.ptr(),
            count: self.count.ptr(),
            weight: self.weight.ptr(),
            list: self.list.ptr(),
            sums: self.sums.ptr(),
            ring: self.ring.ptr(),
            adjustment,
            entries,
            recent,
            rows: size(self.capacity),
        }
    }
}
