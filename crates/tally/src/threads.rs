//! `--threads`: how many threads a command computes on. No result depends on it.

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::failure::Failure;

/// The argument, to be flattened into a command's.
#[derive(clap::Args)]
pub(crate) struct Threads {
    /// Threads to compute on [default: one for each core]. The result is the same for any number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl Threads {
    /// That many threads; 0 means one for each core, as rayon and the backends take it.
    pub(crate) fn count(&self) -> usize {
        self.threads.map_or(0, usize::from)
    }

    /// A pool of that many threads.
    pub(crate) fn pool(&self) -> Result<ThreadPool, Failure> {
        let threads = ThreadPoolBuilder::new().num_threads(self.count());
        let pool = threads.thread_name(|i| format!("tally-{i}")).build();
        pool.map_err(|error| {
            Failure::new(format!("cannot start threads: {error}")).hint("try fewer --threads")
        })
    }
}
