//! The memory bandwidth of this machine: what bounds generation, which reads every weight it uses once a token.
//!
//! Measured is a streaming read: each thread sums up the 64-bit words of a part of its own, in order, all threads at
//! the same time, again and again. The parts are anonymous memory in huge pages, where the system has them, that the
//! thread has written itself (on a machine of several nodes they lie on its node), and together several times the
//! last-level cache, so that no pass finds anything of the one before. A pass lasts from the first thread's start to
//! the last one's end. The best pass is the bound: whatever else the machine does can only make a pass slower. Small
//! pages, in which mapped files come, are read up to a fifth slower: the bound is the machine's, not the page table's.

use std::hint::black_box;
use std::io;
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::Instant;

use memmap2::MmapMut;
use rayon::ThreadPool;

use crate::machine;

/// How many times the last-level caches the parts are together.
const CACHES: usize = 8;
/// Where the size of the caches is unknown, and at least: passes of some milliseconds.
const LEAST_BYTES: usize = 256 << 20;
/// At most: a machine with gigabytes of cache has other means.
const MOST_BYTES: usize = 4 << 30;
/// Passes of one measurement, after one that does not count.
const PASSES: usize = 8;

/// Passes over the memory.
#[derive(Default)]
pub(super) struct Bandwidth {
    /// Bytes that a pass reads.
    pub(super) bytes: u64,
    /// Bytes a second of each pass.
    pub(super) passes: Vec<f64>,
}

impl Bandwidth {
    /// The bound: bytes a second of the best pass.
    pub(super) fn bound(&self) -> f64 {
        self.passes.iter().copied().fold(0.0, f64::max)
    }

    /// Adds passes that were measured elsewhere: the bytes that each reads, and the bytes a second of each.
    pub(super) fn add(&mut self, (bytes, passes): (u64, Vec<f64>)) {
        self.bytes = bytes;
        self.passes.extend(passes);
    }

    /// Adds a few passes on all threads of `pool`; the memory is given back afterwards.
    pub(super) fn measure(&mut self, pool: &ThreadPool) -> io::Result<()> {
        let threads = pool.current_num_threads();
        let total = (CACHES * machine::last_level_cache().unwrap_or(0)).clamp(LEAST_BYTES, MOST_BYTES);
        let part = (total / threads).next_multiple_of(size_of::<u64>());
        let mut memory = MmapMut::map_anon(part * threads)?;
        // Refused by systems without huge pages, which measure with the pages that they have.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let parts: Vec<_> = memory.chunks_exact_mut(part).map(Mutex::new).collect();
        let barrier = Barrier::new(threads);
        let spans = pool.broadcast(|thread| {
            // Each part is locked by one thread, once.
            let mut part = parts[thread.index()].lock().unwrap_or_else(PoisonError::into_inner);
            read_passes(&mut part, &barrier)
        });
        self.bytes = (part * threads) as u64; // `usize` is at most 64 bits wide
        for pass in 1..=PASSES {
            let start = spans.iter().map(|thread| thread[pass].0).min();
            let end = spans.iter().map(|thread| thread[pass].1).max();
            if let (Some(start), Some(end)) = (start, end) {
                self.passes.push(self.bytes as f64 / (end - start).as_secs_f64());
            }
        }
        Ok(())
    }
}

/// One thread's part: start and end of each pass, the first of which does not count.
fn read_passes(part: &mut [u8], barrier: &Barrier) -> Vec<(Instant, Instant)> {
    // Untouched pages would all be the one page of zeros.
    part.fill(1);
    let words = black_box(&*part).as_chunks().0;
    let pass = |_| {
        barrier.wait();
        let start = Instant::now();
        black_box(words.iter().fold(0u64, |sum, &word| sum.wrapping_add(u64::from_ne_bytes(word))));
        (start, Instant::now())
    };
    (0..=PASSES).map(pass).collect()
}
