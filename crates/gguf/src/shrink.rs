//! What happens when a mapped file is cut short: a message in place of a bare "Bus error".

use std::io;

/// What is printed; the file cannot be named, since nothing may be looked up inside a signal handler.
const MESSAGE: &[u8] =
    b"error: a mapped model file was cut short, or its disk failed, while it was in use; restore it and retry\n";

/// The exit status, `EX_IOERR` of sysexits.h.
const STATUS: libc::c_int = 74;

/// Makes the process print one line and exit with status 74 when it reads a mapped file beyond where the file
/// was cut short in the meantime. Without it, the process dies of SIGBUS. For the command line to call once.
pub fn exit_on_shrink() -> io::Result<()> {
    // SAFETY: all-zero is a valid `sigaction`: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize; // how the C interface takes a handler
    // On the thread's alternate stack where it has one, and once: a second fault takes its default course.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESETHAND;
    // SAFETY: `action` is initialised, its handler has the signature that SA_SIGINFO asks for, and does only
    // what is safe in a signal handler.
    match unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the system passes a valid `siginfo_t` with SA_SIGINFO.
    if unsafe { (*info).si_code } != libc::BUS_ADRERR {
        // A misaligned access or a memory failure, not a file: return, fault again, and die of it (SA_RESETHAND).
        return;
    }
    // SAFETY: `write` and `_exit` are async-signal-safe, and the message is valid for its length. A failed
    // write changes nothing about the exit.
    unsafe {
        libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
        libc::_exit(STATUS);
    }
}
