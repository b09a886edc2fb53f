//! The CUDA driver: a device, its memory, a stream, launches and graphs. With `compile.rs` the only file that knows
//! cudarc; knows nothing of models.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};

use crate::Error;

/// The oldest driver whose CUDA version runs what NVRTC 12 and 13 make.
const OLDEST_DRIVER: i32 = 12_000;

/// The error of `what` in words.
pub(crate) fn failed(what: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let text = |s: Result<&std::ffi::CStr, DriverError>| s.map(|s| s.to_string_lossy().into_owned());
        Error::Driver {
            what,
            name: text(error.error_name()).unwrap_or_else(|_| "unknown".into()),
            text: text(error.error_string()).unwrap_or_else(|_| "no description".into()),
        }
    }
}

/// What is known of a GPU before anything is put on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Index among the GPUs the driver shows.
    pub ordinal: usize,
    /// The vendor's name.
    pub name: String,
    /// Compute capability, times ten: 90 for Hopper.
    pub arch: u32,
    /// Streaming multiprocessors.
    pub processors: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// CUDA version of the driver, times a thousand: 13000.
    pub driver: u32,
}

/// The GPUs of this machine; fails if there is no usable driver. An empty list is a driver without a GPU.
pub fn gpus() -> Result<Vec<Gpu>, Error> {
    let count = start()?;
    (0..count).map(|ordinal| describe(ordinal).map(|(gpu, _)| gpu)).collect()
}

/// Loads and initialises the driver; the number of GPUs.
fn start() -> Result<usize, Error> {
    // SAFETY: loads a library by name to see whether it is there.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    match result::init() {
        Err(DriverError(sys::cudaError_enum::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        other => other.map_err(failed("starting the driver"))?,
    }
    let found = driver_version()?;
    if found < OLDEST_DRIVER {
        return Err(Error::OldDriver { found: format!("{}.{}", found / 1000, found % 1000 / 10), need: "12.0" });
    }
    let count = result::device::get_count().map_err(failed("counting GPUs"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn driver_version() -> Result<i32, Error> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("asking for the driver's version"))?;
    Ok(version)
}

fn describe(ordinal: usize) -> Result<(Gpu, sys::CUdevice), Error> {
    // A count of GPUs fits an i32.
    let device = result::device::get(ordinal as i32).map_err(failed("opening the GPU"))?;
    let attribute = |which| {
        // SAFETY: `device` is valid, as the driver has just said.
        unsafe { result::device::get_attribute(device, which) }
            .map(|v| v as u32)
            .map_err(failed("asking the GPU"))
    };
    let gpu = Gpu {
        ordinal,
        name: result::device::get_name(device).map_err(failed("asking the GPU"))?,
        arch: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.map_err(failed("asking the GPU"))? as u64,
        driver: driver_version()?.unsigned_abs(),
    };
    Ok((gpu, device))
}

/// A GPU in use: its primary context and one stream, on which everything of a backend runs in order.
pub(crate) struct Device {
    pub(crate) gpu: Gpu,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: the handles may be used from any thread; every entry point makes the context current first.
unsafe impl Send for Device {}
// SAFETY: as above; the driver serialises calls on one stream.
unsafe impl Sync for Device {}

impl Device {
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Device>, Error> {
        let count = start()?;
        if ordinal >= count {
            return Err(Error::NoDevice { asked: ordinal, count });
        }
        let (gpu, device) = describe(ordinal)?;
        if gpu.arch < 80 {
            return Err(Error::OldDevice { name: gpu.name, arch: gpu.arch });
        }
        // SAFETY: a valid device; released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("opening the GPU"))?;
        // SAFETY: a context that was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed("opening the GPU"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("creating a stream"))?;
        Ok(Arc::new(Device { gpu, device, context, stream }))
    }

    /// Makes this thread work on this GPU: first in whatever a user of the backend calls.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("switching to the GPU"))
    }

    /// Free bytes of the GPU's memory.
    pub(crate) fn free_memory(&self) -> Result<u64, Error> {
        self.bind()?;
        Ok(result::mem_get_info().map_err(failed("asking for free memory"))?.0 as u64)
    }

    /// Waits for everything on the stream.
    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("running kernels"))
    }

    /// The stream.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Memory for `len` values, uninitialised.
    pub(crate) fn alloc<T: Plain>(self: &Arc<Device>, len: usize) -> Result<Memory<T>, Error> {
        let bytes = (len * size_of::<T>()).max(16);
        // SAFETY: the context is current (`open`, `bind`).
        let ptr = unsafe { result::malloc_sync(bytes) }.map_err(failed("allocating memory"))?;
        Ok(Memory { device: self.clone(), ptr, len, _values: PhantomData })
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

    /// Starts recording what is launched on the stream instead of running it.
    pub(crate) fn begin_capture(&self) -> Result<(), Error> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid and not being recorded: `Cuda` pairs this with `end_capture`.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("recording a graph"))
    }

    /// Ends the recording.
    pub(crate) fn end_capture(self: &Arc<Device>) -> Result<Graph, Error> {
        // SAFETY: as in `begin_capture`.
        let graph =
            unsafe { result::stream::end_capture(self.stream) }.map_err(failed("recording a graph"))?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: a graph that was just recorded; both handles are destroyed once, here and in `Graph::drop`.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result();
            let _ = result::graph::destroy(graph);
            made
        };
        made.map_err(failed("instantiating a graph"))?;
        Ok(Graph { device: self.clone(), exec })
    }
}

impl Device {
    /// Milliseconds on the GPU from before the first to after the last of what `work` launches.
    pub(crate) fn time(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<f32, Error> {
        let (start, end) = (Event::new()?, Event::new()?);
        start.record(self)?;
        work()?;
        end.record(self)?;
        self.synchronize()?;
        // SAFETY: both events were recorded, and the stream was waited for.
        unsafe { result::event::elapsed(start.0, end.0) }.map_err(failed("timing kernels"))
    }
}

/// A point on the stream.
struct Event(sys::CUevent);

impl Event {
    fn new() -> Result<Event, Error> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        event.map(Event).map_err(failed("timing kernels"))
    }

    fn record(&self, device: &Device) -> Result<(), Error> {
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(self.0, device.stream) }.map_err(failed("timing kernels"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe {
            let _ = result::event::destroy(self.0);
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the last user of stream and context is gone; a failure here can help no one.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
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

/// Device memory of `len` values.
pub(crate) struct Memory<T> {
    device: Arc<Device>,
    ptr: sys::CUdeviceptr,
    len: usize,
    _values: PhantomData<T>,
}

// SAFETY: a device address; access goes through the stream.
unsafe impl<T> Send for Memory<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Memory<T> {}

impl<T: Plain> Memory<T> {
    /// Address of the first value.
    pub(crate) fn ptr(&self) -> Ptr {
        Ptr(self.ptr)
    }

    /// Address of value `index`.
    pub(crate) fn at(&self, index: usize) -> Ptr {
        debug_assert!(index <= self.len);
        Ptr(self.ptr + (index * size_of::<T>()) as u64)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Zeroes everything, in order with the stream.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        // SAFETY: the range is this allocation.
        unsafe { result::memset_d8_async(self.ptr, 0, self.len * size_of::<T>(), self.device.stream) }
            .map_err(failed("clearing memory"))
    }

    /// Copies `values` to `offset`, in order with the stream; returns when the host's copy may be reused.
    pub(crate) fn write(&self, offset: usize, values: &[T]) -> Result<(), Error> {
        assert!(offset + values.len() <= self.len, "a copy of {} to {offset} of {}", values.len(), self.len);
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: in range; pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(self.at(offset).0, values, self.device.stream) }
            .map_err(failed("copying to the GPU"))
    }

    /// Copies `len` values from `offset` to the host, after everything on the stream.
    pub(crate) fn read(&self, offset: usize, out: &mut [T]) -> Result<(), Error> {
        assert!(offset + out.len() <= self.len, "a copy of {} from {offset} of {}", out.len(), self.len);
        if out.is_empty() {
            return Ok(());
        }
        // SAFETY: in range; the copy is waited for before `out` can be used.
        unsafe { result::memcpy_dtoh_async(out, self.at(offset).0, self.device.stream) }
            .map_err(failed("copying from the GPU"))?;
        self.device.synchronize()
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; the driver waits for kernels that use it.
        unsafe {
            let _ = result::ctx::set_current(self.device.context);
            let _ = result::memory_free(self.ptr);
        }
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
#[derive(Default)]
pub(crate) struct Arguments {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Arguments {
    pub(crate) fn push<A: Argument>(mut self, value: A) -> Arguments {
        // Slots are 16-byte aligned, which suits every argument.
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        self.starts.push(self.bytes.len());
        // SAFETY: `Argument` types are plain old data; padding, if any, is copied but never looked at.
        let raw = unsafe { std::slice::from_raw_parts((&raw const value).cast::<u8>(), size_of::<A>()) };
        self.bytes.extend_from_slice(raw);
        self
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
    module: sys::CUmodule,
}

// SAFETY: a handle, used through the driver only.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    pub(crate) fn load(device: &Arc<Device>, image: &[u8]) -> Result<Module, Error> {
        device.bind()?;
        // SAFETY: a whole cubin: compiled just now, or read from the cache and checked against its hash.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(failed("loading kernels"))?;
        Ok(Module { device: device.clone(), module })
    }

    /// The kernel called `name`.
    pub(crate) fn function(&self, name: &str) -> Result<Function, Error> {
        let name = CString::new(name).expect("kernel names are literals");
        // SAFETY: a loaded module.
        let function = unsafe { result::module::get_function(self.module, name) }
            .map_err(failed("looking up a kernel"))?;
        Ok(Function { function })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once, its functions are owned beside it.
        unsafe {
            let _ = result::ctx::set_current(self.device.context);
            let _ = result::module::unload(self.module);
        }
    }
}

/// A kernel. Lives as long as its module, which `Kernels` keeps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Function {
    function: sys::CUfunction,
}

// SAFETY: a handle, used through the driver only.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Allows `bytes` of dynamic shared memory, beyond the 48 KiB that need no asking.
    pub(crate) fn allow_shared(&self, bytes: usize) -> Result<(), Error> {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a valid function; the driver checks the value.
        unsafe { result::function::set_function_attribute(self.function, attribute, size(bytes) as i32) }
            .map_err(failed("asking for shared memory"))
    }

    /// Blocks of this kernel that fit on one processor at a time.
    pub(crate) fn occupancy(&self, block: u32, shared: usize) -> Result<usize, Error> {
        // SAFETY: a valid function.
        let n = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(self.function, block as i32, shared)
        };
        Ok(usize::try_from(n.map_err(failed("asking for the occupancy"))?).unwrap_or(0))
    }

    /// Launches on the device's stream.
    pub(crate) fn launch(&self, device: &Device, shape: Shape, mut arguments: Arguments) -> Result<(), Error> {
        let base = arguments.bytes.as_mut_ptr();
        // SAFETY: starts are offsets into `bytes`, which lives until the launch has copied its parameters.
        let mut params: Vec<*mut c_void> =
            arguments.starts.iter().map(|&at| unsafe { base.add(at) }.cast()).collect();
        let dependent = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let mut attributes = [dependent];
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: device.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(shape.dependent && device.gpu.arch >= 90),
        };
        // SAFETY: parameters match the kernel's signature (`Argument`, and the tests that run every kernel); buffers
        // live as long as the backend, which waits for the stream before it drops them.
        unsafe {
            sys::cuLaunchKernelEx(&config, self.function, params.as_mut_ptr(), std::ptr::null_mut()).result()
        }
        .map_err(failed("launching a kernel"))
    }
}

/// A recorded sequence of launches.
pub(crate) struct Graph {
    device: Arc<Device>,
    exec: sys::CUgraphExec,
}

// SAFETY: a handle, used through the driver only.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    /// Runs the recording on the stream.
    pub(crate) fn launch(&self) -> Result<(), Error> {
        // SAFETY: instantiated once, alive.
        unsafe { result::graph::launch(self.exec, self.device.stream) }.map_err(failed("replaying a graph"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe {
            let _ = result::graph::exec_destroy(self.exec);
        }
    }
}
