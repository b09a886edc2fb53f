//! Ctrl-C and its kin: what is half-written goes away before the process does, and an answer can be stopped without
//! stopping the program.
//!
//! Owns how the process takes SIGINT, SIGTERM and SIGHUP. Knows nothing of what is written or answered.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

static STATE: Mutex<State> = Mutex::new(State { unfinished: Vec::new(), stop: None, all: false });

struct State {
    /// Files to remove before the process ends.
    unfinished: Vec<PathBuf>,
    /// What Ctrl-C sets, once, in place of ending the process.
    stop: Option<Arc<AtomicBool>>,
    /// Whether SIGTERM and SIGHUP do so as well.
    all: bool,
}

/// Nothing here panics while it holds the lock, so a poisoned one is as good as any.
fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes signals from now on, on a thread of its own. For `main` to call once.
///
/// A signal that whoever started the process told it to ignore stays ignored: `nohup` does that.
pub(crate) fn install() -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM].into_iter().filter(|&signal| !ignored(signal)))?;
    let watch = move || signals.forever().for_each(take);
    std::thread::Builder::new().name("signals".into()).spawn(watch)?;
    // A file too large for the limit of the user is an error of the write then, and not the end of the process.
    flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
    Ok(())
}

fn ignored(signal: libc::c_int) -> bool {
    // SAFETY: all-zero is a valid `sigaction`.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: asks for the disposition and sets none; `now` is valid for writing.
    let found = unsafe { libc::sigaction(signal, std::ptr::null(), &mut now) };
    found == 0 && now.sa_sigaction == libc::SIG_IGN
}

fn take(signal: libc::c_int) {
    let state = state();
    if let Some(stop) = &state.stop
        && (signal == SIGINT || state.all)
        && !stop.swap(true, Ordering::Relaxed)
    {
        return;
    }
    for path in &state.unfinished {
        // Finished in this very moment, perhaps; nothing is left to do about other failures.
        let _ = fs::remove_file(path);
    }
    let mut err = io::stderr().lock();
    if err.is_terminal() {
        // A progress bar may stand where the shell's prompt will.
        let _ = writeln!(err);
    }
    // Dies of the signal, so that a shell's loop ends too.
    let _ = emulate_default_handler(signal);
}

/// A file that is removed if the process is told to end while this lives.
pub(crate) struct Unfinished(PathBuf);

impl Unfinished {
    /// Runs `create`, which returns a file's path along with whatever writes it. No signal gets in between.
    pub(crate) fn create<T, E>(
        create: impl FnOnce() -> Result<(T, PathBuf), E>,
    ) -> Result<(T, Unfinished), E> {
        let mut state = state();
        let (writer, path) = create()?;
        state.unfinished.push(path.clone());
        Ok((writer, Unfinished(path)))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        state().unfinished.retain(|path| *path != self.0);
    }
}

/// While this lives, Ctrl-C asks to stop in place of ending the process; a second Ctrl-C ends it all the same.
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Catches Ctrl-C from now on.
    pub(crate) fn catch() -> Stop {
        let stop = Arc::new(AtomicBool::new(false));
        state().stop = Some(stop.clone());
        Stop(stop)
    }

    /// Catches SIGTERM and SIGHUP as well: a server has things to bring to their end.
    pub(crate) fn catch_all() -> Stop {
        let stop = Stop::catch();
        self::state().all = true;
        stop
    }

    /// Whether Ctrl-C was pressed since.
    pub(crate) fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        let mut state = state();
        (state.stop, state.all) = (None, false);
    }
}
