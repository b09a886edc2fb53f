//! Progress on standard error: a bar that is gone when the work is done, and never there where standard error is no
//! terminal. Knows nothing of the work.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar for work of known size. Shared by the threads that do it; cleared when dropped, hence before any error is
/// printed.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Work measured in bytes, shown with their rate.
    pub(crate) fn bytes(what: &'static str, total: u64) -> Progress {
        Progress::styled(
            what,
            total,
            "{msg} {wide_bar} {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left",
        )
    }

    /// Work measured in steps, such as tokens.
    pub(crate) fn steps(what: &'static str, total: u64) -> Progress {
        Progress::styled(what, total, "{msg} {wide_bar} {pos} of {len}, {per_sec}, {eta} left")
    }

    fn styled(what: &'static str, total: u64, template: &str) -> Progress {
        // Indicatif draws to standard error, and not at all where that is no terminal.
        let style = ProgressStyle::with_template(template).expect("the templates above are well-formed");
        Progress(ProgressBar::new(total).with_style(style).with_message(what))
    }

    /// Counts `n` more bytes or steps as done.
    pub(crate) fn add(&self, n: u64) {
        self.0.inc(n);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
