//! A device, its memory, a stream, launches and graphs, whatever machine runs them: a GPU through its driver, or the
//! emulator. Knows nothing of models, of CUDA's driver (`driver/gpu.rs`), or of how the emulator works
//! (`driver/emulated.rs`).

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Error;

mod emulated;
mod gpu;

pub use gpu::gpus;

/// Where a model can be put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A GPU, as the driver counts them.
    Gpu(usize),
    /// The CPU, running the kernels' sources (`crates/cuda/emulator`): the bits of a GPU without one, for those who write
    /// kernels. About a hundred times slower than the CPU backend. As a GPU of this compute capability (times ten), which
    /// decides on kernels and on their memory.
    Emulated(u32),
}

impl Place {
    /// What the emulator takes itself for unless told otherwise.
    pub const EMULATED: Place = Place::Emulated(90);
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Place::Gpu(ordinal) => write!(f, "cuda:{ordinal}"),
            Place::EMULATED => f.write_str("emulated"),
            Place::Emulated(arch) => write!(f, "emulated:{arch}"),
        }
    }
}

/// What is known of a GPU before anything is put on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Where it is.
    pub place: Place,
    /// The vendor's name.
    pub name: String,
    /// Compute capability, times ten: 90 for Hopper.
    pub arch: u32,
    /// Streaming multiprocessors.
    pub processors: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// CUDA version of the driver, times a thousand: 13000. 0 for the emulator.
    pub driver: u32,
}

/// A machine's own name for something it made: a module, a kernel, a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Handle(u64);

/// What runs kernels. Everything happens in the order in which it was asked for, as on one stream.
///
/// Addresses are the machine's, and ranges lie within what `alloc` gave out and `free` has not taken back: [`Memory`]
/// sees to that. Handles are used only with the machine that made them, and not after they were given back.
trait Machine: Send + Sync {
    /// Makes this thread work with this machine.
    fn bind(&self) -> Result<(), Error>;
    /// Bytes of memory that are free.
    fn free_memory(&self) -> Result<u64, Error>;
    /// Waits for everything that was asked for.
    fn synchronize(&self) -> Result<(), Error>;
    /// Whether everything that was asked for has been done.
    fn is_idle(&self) -> Result<bool, Error>;

    /// Uninitialised memory.
    fn alloc(&self, bytes: usize) -> Result<u64, Error>;
    fn free(&self, address: u64);
    /// Zeroes a range.
    fn clear(&self, address: u64, bytes: usize) -> Result<(), Error>;
    /// Copies from the host, whose memory may be used again on return.
    fn write(&self, address: u64, from: &[u8]) -> Result<(), Error>;
    /// Copies to the host.
    fn read(&self, address: u64, to: &mut [u8]) -> Result<(), Error>;
    /// Zeroed host memory, aligned to 16 bytes, that kernels write while the host looks on, and where they find it.
    fn pin(&self, bytes: usize) -> Result<(NonNull<u8>, u64), Error>;
    fn unpin(&self, host: NonNull<u8>);

    /// A module from a whole image, made by a [`crate::Compiler`] for this machine.
    fn load(&self, image: &[u8]) -> Result<Handle, Error>;
    fn unload(&self, module: Handle);
    /// A kernel of a module.
    fn function(&self, module: Handle, name: &str) -> Result<Handle, Error>;
    fn launch(&self, function: Handle, shape: Shape, arguments: &Arguments) -> Result<(), Error>;

    /// From here on launches and clearings are recorded, not run.
    fn begin_capture(&self) -> Result<(), Error>;
    /// Ends the recording: a graph.
    fn end_capture(&self) -> Result<Handle, Error>;
    /// Runs a graph.
    fn replay(&self, graph: Handle) -> Result<(), Error>;
    fn discard(&self, graph: Handle);

    /// Milliseconds from before the first to after the last of what `work` asks for.
    fn time(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f32, Error>;
}

/// A machine in use, on which everything of a backend runs in order.
pub(crate) struct Device {
    pub(crate) gpu: Gpu,
    machine: Box<dyn Machine>,
    launches: Mutex<Launches>,
}

/// What becomes of launches.
#[derive(Debug, Default)]
enum Launches {
    #[default]
    Made,
    /// Made, and their kernels noted.
    Noted(Vec<&'static str>),
    /// Made if they are of this kernel, and counted.
    Only { kernel: &'static str, made: usize },
}

impl Device {
    pub(crate) fn open(place: Place) -> Result<Arc<Device>, Error> {
        let (gpu, machine): (Gpu, Box<dyn Machine>) = match place {
            Place::Gpu(ordinal) => {
                let (gpu, machine) = gpu::open(ordinal)?;
                (gpu, Box::new(machine))
            }
            Place::Emulated(arch) => {
                let (gpu, machine) = emulated::open(arch);
                (gpu, Box::new(machine))
            }
        };
        Ok(Arc::new(Device { gpu, machine, launches: Mutex::default() }))
    }

    /// Makes this thread work on this device: first in whatever a user of the backend calls.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        self.machine.bind()
    }

    /// Free bytes of the device's memory.
    pub(crate) fn free_memory(&self) -> Result<u64, Error> {
        self.bind()?;
        self.machine.free_memory()
    }

    /// Waits for everything on the stream.
    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        self.machine.synchronize()
    }

    /// Whether everything on the stream has run; an error if the device failed at it.
    pub(crate) fn is_idle(&self) -> Result<bool, Error> {
        self.machine.is_idle()
    }

    /// Memory for `len` values, uninitialised.
    pub(crate) fn alloc<T: Plain>(self: &Arc<Device>, len: usize) -> Result<Memory<T>, Error> {
        let address = self.machine.alloc((len * size_of::<T>()).max(16))?;
        let allocation = Arc::new(Allocation { device: self.clone(), address });
        Ok(Memory { allocation, address, len, _values: PhantomData })
    }

    /// Memory for `len` zeros.
    pub(crate) fn zeros<T: Plain>(self: &Arc<Device>, len: usize) -> Result<Memory<T>, Error> {
        let memory = self.alloc(len)?;
        memory.clear()?;
        Ok(memory)
    }

    /// Memory with these values.
    pub(crate) fn upload<T: Plain>(self: &Arc<Device>, values: &[T]) -> Result<Memory<T>, Error> {
        let memory = self.alloc(values.len())?;
        memory.write(0, values)?;
        Ok(memory)
    }

    /// Host memory of `bytes` zeros that kernels write while the host looks on, and its address for them; for
    /// `pinned.rs`, which gives it back.
    pub(crate) fn pin(&self, bytes: usize) -> Result<(NonNull<u8>, Ptr), Error> {
        self.machine.pin(bytes.max(16)).map(|(host, address)| (host, Ptr(address)))
    }

    /// Takes back what `pin` gave, after everything on the stream.
    pub(crate) fn unpin(&self, host: NonNull<u8>) {
        self.machine.unpin(host);
    }

    /// Starts recording what is launched on the stream instead of running it.
    pub(crate) fn begin_capture(&self) -> Result<(), Error> {
        self.machine.begin_capture()
    }

    /// Ends the recording.
    pub(crate) fn end_capture(self: &Arc<Device>) -> Result<Graph, Error> {
        Ok(Graph { graph: self.machine.end_capture()?, device: self.clone() })
    }

    /// Does `work` and tells the kernels that it launched, in order.
    pub(crate) fn noting<T>(&self, work: impl FnOnce() -> T) -> (T, Vec<&'static str>) {
        self.set_launches(Launches::Noted(Vec::new()));
        let result = work();
        let Launches::Noted(kernels) = self.set_launches(Launches::Made) else {
            unreachable!("nothing else sets it while `work` runs")
        };
        (result, kernels)
    }

    /// Does `work` without the launches of all kernels but this one, and tells how many were made.
    pub(crate) fn only<T>(&self, kernel: &'static str, work: impl FnOnce() -> T) -> (T, usize) {
        self.set_launches(Launches::Only { kernel, made: 0 });
        let result = work();
        let Launches::Only { made, .. } = self.set_launches(Launches::Made) else {
            unreachable!("nothing else sets it while `work` runs")
        };
        (result, made)
    }

    fn set_launches(&self, launches: Launches) -> Launches {
        std::mem::replace(&mut self.launches.lock().unwrap_or_else(PoisonError::into_inner), launches)
    }

    /// Milliseconds on the device from before the first to after the last of what `work` launches.
    pub(crate) fn time(&self, mut work: impl FnMut() -> Result<(), Error>) -> Result<f32, Error> {
        self.machine.time(&mut work)
    }
}

/// Values that mean the same as bytes on host and device.
///
/// # Safety
/// Every bit pattern is a valid value and there is no padding.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for i8 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

/// Values as bytes.
fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` values have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Values as bytes to be overwritten.
fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and all bits are a `Plain` value.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// What the machine gave out, and takes back when nobody has a part of it any more.
struct Allocation {
    device: Arc<Device>,
    address: u64,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.device.machine.free(self.address);
    }
}

/// What a part of an allocation begins at a multiple of: what the driver promises of an allocation.
pub(crate) const PART_ALIGN: usize = 256;

/// Device memory of `len` values: an allocation, or a part of one.
pub(crate) struct Memory<T> {
    allocation: Arc<Allocation>,
    address: u64,
    len: usize,
    _values: PhantomData<T>,
}

impl<T: Plain> Memory<T> {
    /// Address of the first value.
    pub(crate) fn ptr(&self) -> Ptr {
        Ptr(self.address)
    }

    /// Address of value `index`.
    pub(crate) fn at(&self, index: usize) -> Ptr {
        debug_assert!(index <= self.len);
        Ptr(self.address + (index * size_of::<T>()) as u64)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Zeroes everything, in order with the stream.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        self.allocation.device.machine.clear(self.address, self.len * size_of::<T>())
    }

    /// Copies `values` to `offset`, in order with the stream; returns when the host's copy may be reused.
    pub(crate) fn write(&self, offset: usize, values: &[T]) -> Result<(), Error> {
        assert!(offset + values.len() <= self.len, "a copy of {} to {offset} of {}", values.len(), self.len);
        if values.is_empty() {
            return Ok(());
        }
        self.allocation.device.machine.write(self.at(offset).0, bytes_of(values))
    }

    /// Copies `len` values from `offset` to the host, after everything on the stream.
    pub(crate) fn read(&self, offset: usize, out: &mut [T]) -> Result<(), Error> {
        assert!(offset + out.len() <= self.len, "a copy of {} from {offset} of {}", out.len(), self.len);
        if out.is_empty() {
            return Ok(());
        }
        self.allocation.device.machine.read(self.at(offset).0, bytes_of_mut(out))
    }
}

impl Memory<u8> {
    /// The bytes from `at` on as `len` values of another type. Nothing keeps two parts apart, or a part from the whole:
    /// whoever hands them out knows when which of them is in use.
    pub(crate) fn part<U: Plain>(&self, at: usize, len: usize) -> Memory<U> {
        assert!(at.is_multiple_of(PART_ALIGN), "a part at {at}");
        assert!(at + len * size_of::<U>() <= self.len, "{len} values at {at} of {}", self.len);
        let (allocation, address) = (self.allocation.clone(), self.at(at).0);
        Memory { allocation, address, len, _values: PhantomData }
    }
}

/// A device address as a kernel's argument.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ptr(pub(crate) u64);

impl Ptr {
    pub(crate) const NULL: Ptr = Ptr(0);
}

/// A value that a kernel takes by copy: laid out as its twin in `kernels/prelude.cuh`.
///
/// # Safety
/// `repr(C)` or a primitive, and the same fields as on the device.
pub(crate) unsafe trait Argument: Copy {}
// SAFETY: an address.
unsafe impl Argument for Ptr {}
// SAFETY: a primitive.
unsafe impl Argument for u32 {}
// SAFETY: a primitive.
unsafe impl Argument for u64 {}
// SAFETY: a primitive.
unsafe impl Argument for f32 {}

/// The arguments of a launch, in order.
#[derive(Default, Clone)]
pub(crate) struct Arguments {
    bytes: Vec<u8>,
    /// Of each argument, where it begins in `bytes` and how many it has.
    places: Vec<(usize, usize)>,
}

impl Arguments {
    pub(crate) fn push<A: Argument>(mut self, value: A) -> Arguments {
        // Slots are 16-byte aligned, which suits every argument.
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        self.places.push((self.bytes.len(), size_of::<A>()));
        // SAFETY: `Argument` types are plain old data; padding, if any, is copied but never looked at.
        let raw = unsafe { std::slice::from_raw_parts((&raw const value).cast::<u8>(), size_of::<A>()) };
        self.bytes.extend_from_slice(raw);
        self
    }

    /// Address and bytes of each argument, as long as `self` is left alone.
    fn addresses(&self) -> (Vec<*const c_void>, Vec<usize>) {
        let start = self.bytes.as_ptr();
        // SAFETY: places are inside `bytes`.
        let address = |&(at, _): &(usize, usize)| unsafe { start.add(at) }.cast();
        (self.places.iter().map(address).collect(), self.places.iter().map(|&(_, bytes)| bytes).collect())
    }
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
    /// Whether it may start before the launch ahead of it has ended (programmatic dependent launch); the kernel calls
    /// `wait_dependencies` before it reads anything that the stream has written.
    pub(crate) dependent: bool,
}

impl Shape {
    pub(crate) fn new(grid: usize, block: u32) -> Shape {
        Shape { grid: [size(grid), 1, 1], block, shared: 0, dependent: true }
    }

    pub(crate) fn grid(mut self, x: usize, y: usize, z: usize) -> Shape {
        self.grid = [x, y, z].map(size);
        self
    }

    pub(crate) fn shared(mut self, bytes: usize) -> Shape {
        self.shared = size(bytes);
        self
    }
}

/// A count as a kernel takes it.
pub(crate) fn size(n: usize) -> u32 {
    u32::try_from(n).expect("counts of a step are far below 2^32: Config bounds them")
}

/// A loaded module of kernels.
pub(crate) struct Module {
    device: Arc<Device>,
    module: Handle,
}

impl Module {
    /// Loads a whole image: compiled for this device just now, or read from the cache and checked against its hash.
    pub(crate) fn load(device: &Arc<Device>, image: &[u8]) -> Result<Module, Error> {
        device.bind()?;
        Ok(Module { module: device.machine.load(image)?, device: device.clone() })
    }

    /// The kernel called `name`.
    pub(crate) fn function(&self, name: &'static str) -> Result<Function, Error> {
        Ok(Function { handle: self.device.machine.function(self.module, name)?, name })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        self.device.machine.unload(self.module);
    }
}

/// A kernel. Lives as long as its module, which `Kernels` keeps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Function {
    handle: Handle,
    name: &'static str,
}

impl Function {
    /// Launches on the device's stream.
    pub(crate) fn launch(&self, device: &Device, shape: Shape, arguments: Arguments) -> Result<(), Error> {
        match &mut *device.launches.lock().unwrap_or_else(PoisonError::into_inner) {
            Launches::Made => {}
            Launches::Noted(kernels) => kernels.push(self.name),
            Launches::Only { kernel, .. } if *kernel != self.name => return Ok(()),
            Launches::Only { made, .. } => *made += 1,
        }
        device.machine.launch(self.handle, shape, &arguments)
    }
}

/// A recorded sequence of launches.
pub(crate) struct Graph {
    device: Arc<Device>,
    graph: Handle,
}

impl Graph {
    /// Runs the recording on the stream.
    pub(crate) fn launch(&self) -> Result<(), Error> {
        self.device.machine.replay(self.graph)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.device.machine.discard(self.graph);
    }
}
