//! The emulator as a machine: kernels compiled for this CPU (`compile/emulated.rs`), run by `emulator/runtime.h`.
//!
//! Stricter than a GPU. Fresh memory is garbage; around every allocation, and behind a block's shared memory, lie fences
//! that are looked at after each launch; a launch's arguments must have the number and sizes of the kernel's; every thread
//! of a dependent launch must wait for what it depends on. What a GPU leaves open varies from launch to launch: the order
//! of threads, how late an asynchronous copy comes, and which warp is slow. It runs a launch when it is asked for, so nothing
//! is ever pending.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use std::{env, fs, process, thread};

use libloading::{Library, Symbol};

use super::{Arguments, Gpu, Handle, Machine, Place, Shape};
use crate::Error;

/// Processors: a number that divides no shape evenly. As many blocks run at a time, as the backend expects of a GPU.
const PROCESSORS: usize = 5;
/// What the emulator says it has; the host's memory is what it takes.
const MEMORY: u64 = 64 << 30;
/// Dynamic and static shared memory of a block at most: sm_90's.
const MAX_SHARED: u32 = 227 << 10;
/// Threads of a block at most, and the stack of each: `MAX_THREADS` and `STACK` of `runtime.h`.
const MAX_THREADS: u32 = 1024;
const STACK: usize = 64 << 10;
/// Bytes before and after an allocation that nobody may write.
const FENCE: usize = 256;
/// What memory holds before it is written: `POISON` of `runtime.h`.
const POISON: u8 = 0xcd;

/// The twin of `Launch` in `runtime.h`.
#[repr(C)]
struct Launch {
    kernel: *const c_char,
    arguments: *const *const c_void,
    sizes: *const usize,
    count: usize,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    dependent: u32,
    schedule: u32,
    stacks: *mut u8,
    message: *mut c_char,
    message_bytes: usize,
    next: AtomicU64,
    progress: AtomicU64,
    failed: AtomicU64,
}

// SAFETY: what the pointers lead to outlives the launch; what its workers share is written atomically, the message by
// the first that fails, and each has stacks of its own.
unsafe impl Sync for Launch {}

/// A kernel's entry: a worker's share of a launch. `failed` tells whether it went well.
type Entry = unsafe extern "C" fn(*const Launch, u32);

/// A CPU that takes itself for a GPU.
pub(super) struct Emulator {
    state: Mutex<State>,
    stacks: Block,
}

#[derive(Default)]
struct State {
    modules: Vec<Option<Library>>,
    kernels: Vec<Kernel>,
    graphs: Vec<Option<Vec<Work>>>,
    recording: Option<Vec<Work>>,
    /// By address.
    memory: BTreeMap<u64, Block>,
    launches: u32,
}

/// A kernel of a module, which is kept beside it.
#[derive(Clone)]
struct Kernel {
    name: String,
    entry: Entry,
}

/// What a graph records.
#[derive(Clone)]
enum Work {
    Launch(Handle, Shape, Arguments),
    Clear(u64, usize),
}

pub(super) fn open(arch: u32) -> (Gpu, Emulator) {
    let gpu = Gpu {
        place: Place::Emulated(arch),
        name: "the emulator".into(),
        arch,
        processors: PROCESSORS,
        memory: MEMORY,
        driver: 0,
    };
    // Pages are taken as stacks are used.
    let stacks = Block::new(PROCESSORS * MAX_THREADS as usize * STACK, STACK);
    (gpu, Emulator { state: Mutex::default(), stacks })
}

/// An owned piece of memory.
struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owned memory, reached through the machine alone.
unsafe impl Send for Block {}
// SAFETY: as above: by one launch at a time, under the lock of `State`.
unsafe impl Sync for Block {}

impl Block {
    /// Uninitialised.
    fn new(bytes: usize, align: usize) -> Block {
        let layout = Layout::from_size_align(bytes, align).expect("sizes of allocations are far below 2^63");
        // SAFETY: `bytes` is not 0, nowhere in this file.
        let start = NonNull::new(unsafe { alloc(layout) });
        Block { start: start.unwrap_or_else(|| handle_alloc_error(layout)), layout }
    }

    /// With fences around `bytes` bytes, all of it poison.
    fn fenced(bytes: usize) -> Block {
        let block = Block::new(bytes + 2 * FENCE, FENCE);
        // SAFETY: the whole block.
        unsafe { block.start.write_bytes(POISON, block.layout.size()) };
        block
    }

    /// The first byte between the fences.
    fn inside(&self) -> NonNull<u8> {
        // SAFETY: a fenced block is longer than a fence.
        unsafe { self.start.add(FENCE) }
    }

    /// Bytes between the fences.
    fn len(&self) -> usize {
        self.layout.size() - 2 * FENCE
    }

    /// Whether nobody has written to the fences.
    fn is_sound(&self) -> bool {
        // SAFETY: both fences lie within the block, initialised by `fenced`, and no kernel runs now.
        let fence = |at| unsafe { std::slice::from_raw_parts(self.start.add(at).as_ptr(), FENCE) };
        [fence(0), fence(FENCE + self.len())].into_iter().flatten().all(|&b| b == POISON)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated once with this layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// An address as the machine's callers have it.
fn address(at: NonNull<u8>) -> u64 {
    at.as_ptr().expose_provenance() as u64
}

fn pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize) // made from a pointer, by `address`
}

fn failed(what: &str, text: impl Into<String>) -> Error {
    Error::Emulated { what: what.into(), text: text.into() }
}

impl Emulator {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is half done when somebody panics with the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what cannot be recorded, as CUDA does.
    fn unrecorded(&self, what: &str) -> Result<MutexGuard<'_, State>, Error> {
        let state = self.state();
        if state.recording.is_some() { Err(failed(what, "not while a graph is recorded")) } else { Ok(state) }
    }

    fn allocate(&self, bytes: usize) -> NonNull<u8> {
        let block = Block::fenced(bytes);
        let inside = block.inside();
        self.state().memory.insert(address(inside), block);
        inside
    }

    fn release(&self, address: u64) {
        self.state().memory.remove(&address);
    }

    /// Runs one piece of work now.
    fn run(&self, state: &mut State, work: &Work) -> Result<(), Error> {
        let (function, shape, arguments) = match work {
            Work::Launch(function, shape, arguments) => (function, shape, arguments),
            &Work::Clear(address, bytes) => {
                // SAFETY: within one allocation, as the trait asks.
                unsafe { pointer(address).write_bytes(0, bytes) };
                return Ok(());
            }
        };
        let kernel = &state.kernels[index(*function)];
        check(shape).map_err(|text| failed(&kernel.name, text))?;
        let name = CString::new(kernel.name.as_str()).expect("kernel names are literals");
        let (addresses, sizes) = arguments.addresses();
        let mut message = [0u8; 400];
        let launch = Launch {
            kernel: name.as_ptr(),
            arguments: addresses.as_ptr(),
            sizes: sizes.as_ptr(),
            count: addresses.len(),
            grid: shape.grid,
            block: shape.block,
            shared: shape.shared,
            dependent: u32::from(shape.dependent),
            schedule: schedule(state.launches),
            stacks: self.stacks.start.as_ptr(),
            message: message.as_mut_ptr().cast(),
            message_bytes: message.len(),
            next: AtomicU64::new(0),
            progress: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        };
        let blocks = shape.grid.iter().map(|&n| u64::from(n)).product::<u64>();
        let (launch, entry) = (&launch, kernel.entry);
        // SAFETY: the entry of a loaded kernel, which compares the arguments with its parameters; everything outlives the
        // call; every worker has a number of its own, and the state is locked: stacks are used by one.
        let work = |worker| unsafe { entry(launch, worker) };
        thread::scope(|scope| {
            for worker in (1..PROCESSORS as u32).take_while(|&w| u64::from(w) < blocks) {
                scope.spawn(move || work(worker));
            }
            work(0);
        });
        if launch.failed.load(Ordering::Relaxed) != 0 {
            let text = CStr::from_bytes_until_nul(&message).unwrap_or_default().to_string_lossy();
            return Err(failed(&kernel.name, text));
        }
        if let Some(block) = state.memory.values().find(|block| !block.is_sound()) {
            let text = format!("it wrote outside an allocation of {} bytes", block.len());
            return Err(failed(&kernel.name, text));
        }
        state.launches += 1;
        Ok(())
    }

    /// Runs work now, or records it.
    fn take(&self, work: Work) -> Result<(), Error> {
        let mut state = self.state();
        if let Some(recording) = &mut state.recording {
            recording.push(work);
            return Ok(());
        }
        self.run(&mut state, &work)
    }
}

/// What a GPU leaves open, for the n-th launch: `DESCENDING`, `LATE` and `SLOW` of `runtime.h` in all combinations, with
/// each of 32 warps, without a period that a step's launches might have.
fn schedule(n: u32) -> u32 {
    n.wrapping_mul(0x9e37_79b1) >> 24
}

/// Whether a GPU could take this shape.
fn check(shape: &Shape) -> Result<(), String> {
    if shape.block == 0 || shape.block > MAX_THREADS || !shape.block.is_multiple_of(32) {
        return Err(format!(
            "blocks of {} threads: it has to be a multiple of 32 up to {MAX_THREADS}",
            shape.block
        ));
    }
    if shape.grid.contains(&0) || shape.grid[1] > 65_535 || shape.grid[2] > 65_535 {
        return Err(format!("a grid of {:?} blocks", shape.grid));
    }
    if shape.shared > MAX_SHARED {
        return Err(format!("{} bytes of shared memory, of at most {MAX_SHARED}", shape.shared));
    }
    Ok(())
}

/// A handle is an index.
fn index(handle: Handle) -> usize {
    handle.0 as usize // made from one, by `handle`
}

fn handle(index: usize) -> Handle {
    Handle(index as u64)
}

impl Machine for Emulator {
    fn bind(&self) -> Result<(), Error> {
        Ok(())
    }

    fn free_memory(&self) -> Result<u64, Error> {
        let used: u64 = self.state().memory.values().map(|block| block.len() as u64).sum();
        Ok(MEMORY.saturating_sub(used))
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.unrecorded("waiting").map(drop)
    }

    fn is_idle(&self) -> Result<bool, Error> {
        self.unrecorded("asking whether all is done").map(|_| true)
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        Ok(address(self.allocate(bytes)))
    }

    fn free(&self, address: u64) {
        self.release(address);
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<(), Error> {
        self.take(Work::Clear(address, bytes))
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        let _state = self.unrecorded("copying from the host")?;
        // SAFETY: within one allocation, as the trait asks, which is no slice of the host's.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), pointer(address), from.len()) };
        Ok(())
    }

    fn read(&self, address: u64, to: &mut [u8]) -> Result<(), Error> {
        let _state = self.unrecorded("copying to the host")?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(pointer(address), to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn pin(&self, bytes: usize) -> Result<(NonNull<u8>, u64), Error> {
        let inside = self.allocate(bytes);
        // SAFETY: `bytes` bytes between fences.
        unsafe { inside.write_bytes(0, bytes) };
        Ok((inside, address(inside)))
    }

    fn unpin(&self, host: NonNull<u8>) {
        self.release(address(host));
    }

    fn load(&self, image: &[u8]) -> Result<Handle, Error> {
        let fail = |text: String| failed("loading kernels", text);
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tally-{}-{}.so", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        let written = fs::write(&path, image).map_err(|error| fail(error.to_string()));
        // SAFETY: a library that the emulator's compiler made of Tally's sources: nothing runs when it is loaded.
        let library =
            written.and_then(|()| unsafe { Library::new(&path) }.map_err(|error| fail(error.to_string())));
        // A loaded library needs its file no longer.
        let _ = fs::remove_file(&path);
        let mut state = self.state();
        state.modules.push(Some(library?));
        Ok(handle(state.modules.len() - 1))
    }

    fn unload(&self, module: Handle) {
        self.state().modules[index(module)] = None;
    }

    fn function(&self, module: Handle, name: &str) -> Result<Handle, Error> {
        let mut state = self.state();
        let library = state.modules[index(module)].as_ref().expect("a module that was not unloaded");
        // SAFETY: `EMULATOR_KERNEL` defines entries of this type.
        let entry: Result<Symbol<'_, Entry>, _> =
            unsafe { library.get(format!("emulate_{name}").as_bytes()) };
        let entry = *entry.map_err(|error| failed(name, error.to_string()))?;
        state.kernels.push(Kernel { name: name.into(), entry });
        Ok(handle(state.kernels.len() - 1))
    }

    fn launch(&self, function: Handle, shape: Shape, arguments: &Arguments) -> Result<(), Error> {
        self.take(Work::Launch(function, shape, arguments.clone()))
    }

    fn begin_capture(&self) -> Result<(), Error> {
        self.unrecorded("recording a graph")?.recording = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Handle, Error> {
        let mut state = self.state();
        let recorded = state.recording.take();
        state.graphs.push(Some(recorded.ok_or_else(|| failed("recording a graph", "nothing was begun"))?));
        Ok(handle(state.graphs.len() - 1))
    }

    fn replay(&self, graph: Handle) -> Result<(), Error> {
        let mut state = self.unrecorded("replaying a graph")?;
        let graph = state.graphs[index(graph)].clone().expect("a graph that was not discarded");
        graph.iter().try_for_each(|work| self.run(&mut state, work))
    }

    fn discard(&self, graph: Handle) {
        self.state().graphs[index(graph)] = None;
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f32, Error> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f32() * 1e3)
    }
}
