//! Penalties and biases of sequences whose tokens the GPU chooses (`kernels/sample_adjust.cuh`): their histories, which
//! grow on the device by what is chosen there. Knows nothing of the choice.

use std::sync::Arc;

use model::Adjustment;

use crate::Error;
use crate::driver::{Device, Memory, Plain, Ptr, size};

/// Places for the histories of all sequences, at most: 20 MB. More tokens than that in one batch have their keys and values
/// in 100 GB.
const MOST: usize = 1 << 20;
/// Biases and choices of a sequence beyond its context for which there is room: OpenAI allows 300 biases.
const BESIDE: usize = 512;

/// Places for up to `rows` sequences of up to `context` positions, with `blocks` KV blocks: each has one of its own at least.
pub(crate) fn places(rows: usize, blocks: usize, context: usize) -> usize {
    rows.min(blocks).saturating_mul(context + BESIDE).min(MOST)
}

/// `Adjustment` in sample.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct AdjustmentArg {
    repeat: f32,
    presence: f32,
    frequency: f32,
    window: u32,
    first: u32,
    entries: u32,
    seen: u32,
    counts: u32,
}
// SAFETY: numbers without padding.
unsafe impl Plain for AdjustmentArg {}

/// `Entry` in sample.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct EntryArg {
    id: u32,
    count: u32,
    bias: f32,
    raw: f32,
}
// SAFETY: numbers without padding.
unsafe impl Plain for EntryArg {}

/// Addresses of all this, null where no sequence is adjusted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Adjusted {
    pub(super) adjustment: Ptr,
    pub(super) entries: Ptr,
    pub(super) recent: Ptr,
}

/// What changes the logits of the sequences that are going on.
pub(super) struct Adjustments {
    adjustment: Memory<AdjustmentArg>,
    entries: Memory<EntryArg>,
    /// A ring of tokens for every sequence whose window is shorter than its history may become.
    recent: Memory<u32>,
    some: bool,
}

impl Adjustments {
    /// For up to `rows` sequences that take `places` together.
    pub(super) fn new(device: &Arc<Device>, rows: usize, places: usize) -> Result<Adjustments, Error> {
        let (entries, recent) = (device.alloc(places)?, device.alloc(places)?);
        Ok(Adjustments { adjustment: device.alloc(rows)?, entries, recent, some: false })
    }

    /// Bytes of device memory that `new` takes.
    pub(super) fn bytes(rows: usize, places: usize) -> usize {
        rows * size_of::<AdjustmentArg>() + places * (size_of::<EntryArg>() + size_of::<u32>())
    }

    /// Places that there are.
    pub(super) fn places(&self) -> usize {
        self.entries.len()
    }

    /// Whether any sequence is adjusted.
    pub(super) fn some(&self) -> bool {
        self.some
    }

    /// Takes up sequences of a vocabulary of `vocab`, each for up to `choices` choices.
    ///
    /// # Panics
    /// If they need more than [`Adjustments::places`], or a bias is on an id beyond the vocabulary.
    pub(super) fn start(
        &mut self,
        sequences: &[Option<&Adjustment>],
        choices: usize,
        vocab: usize,
    ) -> Result<(), Error> {
        self.some = sequences.iter().any(Option::is_some);
        if !self.some {
            return Ok(());
        }
        let (mut states, mut entries, mut recent) = (Vec::new(), Vec::new(), Vec::new());
        for &sequence in sequences {
            let Some(adjustment) = sequence else {
                states.push(AdjustmentArg::default());
                continue;
            };
            let (first, own) = (entries.len(), entries_of(adjustment, vocab));
            // Something leaves the window only if more may come than it holds.
            let counts = adjustment.window > 0;
            let slides = counts && adjustment.window < adjustment.recent.len() + choices;
            states.push(AdjustmentArg {
                repeat: adjustment.repeat,
                presence: adjustment.presence,
                frequency: adjustment.frequency,
                window: if slides { size(adjustment.window) } else { 0 },
                first: size(first),
                entries: size(own.len()),
                seen: size(adjustment.recent.len()),
                counts: u32::from(counts),
            });
            let end = first + adjustment.places(choices);
            entries.extend(own);
            entries.resize(end, EntryArg::default());
            if slides {
                recent.resize(first, 0);
                recent.extend_from_slice(&adjustment.recent);
            }
        }
        self.adjustment.write(0, &states)?;
        self.entries.write(0, &entries)?;
        self.recent.write(0, &recent)
    }

    pub(super) fn arg(&self) -> Adjusted {
        if !self.some {
            return Adjusted { adjustment: Ptr::NULL, entries: Ptr::NULL, recent: Ptr::NULL };
        }
        let Adjustments { adjustment, entries, recent, .. } = self;
        Adjusted { adjustment: adjustment.ptr(), entries: entries.ptr(), recent: recent.ptr() }
    }
}

/// The tokens that are biased or were seen, ids ascending. One beyond the vocabulary has no logit to adjust.
fn entries_of(adjustment: &Adjustment, vocab: usize) -> Vec<EntryArg> {
    let biases = adjustment.bias.iter().map(|&(id, bias)| {
        assert!((id as usize) < vocab, "a bias on token {id} of {vocab}");
        EntryArg { id, bias, ..EntryArg::default() }
    });
    let mut seen: Vec<u32> = adjustment.recent.iter().copied().filter(|&id| (id as usize) < vocab).collect();
    seen.sort_unstable();
    let counted = seen.chunk_by(|a, b| a == b);
    let counted =
        counted.map(|same| EntryArg { id: same[0], count: size(same.len()), ..EntryArg::default() });
    let mut all: Vec<EntryArg> = biases.chain(counted).collect();
    all.sort_unstable_by_key(|entry| entry.id);
    // Of two of an id, one has the bias and one the count.
    all.dedup_by(|later, first| {
        let same = later.id == first.id;
        if same {
            (first.count, first.bias) = (first.count + later.count, first.bias + later.bias);
        }
        same
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_seen_and_biased() {
        let check = |recent: &[u32], bias: &[(u32, f32)], want: &[(u32, u32, f32)]| {
            let adjustment = Adjustment {
                repeat: 1.1,
                presence: 0.0,
                frequency: 0.0,
                window: 100,
                recent: recent.to_vec(),
                bias: bias.to_vec(),
            };
            let got: Vec<_> = entries_of(&adjustment, 10).iter().map(|e| (e.id, e.count, e.bias)).collect();
            assert_eq!(got, want, "{recent:?} {bias:?}");
        };
        check(&[], &[], &[]);
        check(&[3, 1, 3, 12, 3], &[], &[(1, 1, 0.0), (3, 3, 0.0)]);
        check(&[3, 9], &[(0, 1.0), (3, -2.0)], &[(0, 0, 1.0), (3, 1, -2.0), (9, 1, 0.0)]);
    }
}
