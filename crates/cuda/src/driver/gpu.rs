//! GPUs through the CUDA driver. With `compile.rs` the only file that knows cudarc.

use std::ffi::{CString, c_void};
use std::ptr::NonNull;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};

use super::{Arguments, Gpu, Handle, Machine, Place, Shape};
use crate::Error;

/// The oldest driver whose CUDA version runs what NVRTC 12 and 13 make.
const OLDEST_DRIVER: i32 = 12_000;

/// The error of `what` in words.
fn failed(what: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let text = |s: Result<&std::ffi::CStr, DriverError>| s.map(|s| s.to_string_lossy().into_owned());
        let name = text(error.error_name()).unwrap_or_else(|_| "unknown".into());
        let text = text(error.error_string()).unwrap_or_else(|_| "no description".into());
        if is_lost(error.0) { Error::Lost { what, name, text } } else { Error::Driver { what, name, text } }
    }
}

/// Whether an error ends the process's use of the GPU: every later call returns it again (CUDA Driver API, `CUresult`:
/// "the process must be terminated and relaunched"), or the GPU is not there any more.
fn is_lost(error: sys::cudaError_enum) -> bool {
    use sys::cudaError_enum::*;
    matches!(
        error,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUDA_ERROR_UNKNOWN
    )
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
        return Err(Error::OldDriver {
            found: format!("{}.{}", found / 1000, found % 1000 / 10),
            need: "12.0",
        });
    }
    let count = result::device::get_count().map_err(failed("counting GPUs"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn driver_version() -> Result<i32, Error> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(failed("asking for the driver's version"))?;
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
        place: Place::Gpu(ordinal),
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

/// Dynamic shared memory that a launch gets without asking.
const FREE_SHARED: u32 = 48 << 10;

/// A GPU in use: its primary context and one stream.
pub(super) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Whether launches may overlap the end of the one ahead (sm_90 on).
    overlaps: bool,
}

// SAFETY: the handles may be used from any thread; every entry point makes the context current first.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver serialises calls on one stream.
unsafe impl Sync for Driver {}

/// Opens GPU `ordinal`.
pub(super) fn open(ordinal: usize) -> Result<(Gpu, Driver), Error> {
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
    keep_stacks_small();
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
        .map_err(failed("creating a stream"))?;
    let overlaps = gpu.arch >= 90;
    Ok((gpu, Driver { device, context, stream, overlaps }))
}

/// Bytes of stack for a thread, of which the driver reserves one for every thread that can be resident: its default of
/// 1 KiB is 0.27 GB on an H200. The largest frame of a kernel is 96 bytes, of registers that were spilled (`cuobjdump
/// --dump-resource-usage`); one that needs more gets it at its launch (CUDA Driver API, `cuCtxSetLimit`).
const STACK: usize = 128;

/// Asks the current context for [`STACK`].
fn keep_stacks_small() {
    // SAFETY: a context is current. A driver that does not do it reserves more than it must, and nothing else differs.
    let _ = unsafe { sys::cuCtxSetLimit(sys::CUlimit_enum::CU_LIMIT_STACK_SIZE, STACK) };
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: the last user of stream and context is gone; a failure here can help no one.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Machine for Driver {
    fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("switching to the GPU"))
    }

    fn free_memory(&self) -> Result<u64, Error> {
        Ok(result::mem_get_info().map_err(failed("asking for free memory"))?.0 as u64)
    }

    fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("running kernels"))
    }

    fn is_idle(&self) -> Result<bool, Error> {
        // SAFETY: the stream lives as long as `self`.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::cudaError_enum::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true).map_err(failed("running kernels")),
        }
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        // SAFETY: the context is current (`open`, `bind`).
        unsafe { result::malloc_sync(bytes) }.map_err(failed("allocating memory"))
    }

    fn free(&self, address: u64) {
        // SAFETY: allocated once, freed once; the driver waits for kernels that use it.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::memory_free(address);
        }
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the range is within one allocation.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream) }.map_err(failed("clearing memory"))
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        // SAFETY: in range; pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(address, from, self.stream) }.map_err(failed("copying to the GPU"))
    }

    fn read(&self, address: u64, to: &mut [u8]) -> Result<(), Error> {
        // SAFETY: in range; the copy is waited for before `to` can be used.
        unsafe { result::memcpy_dtoh_async(to, address, self.stream) }
            .map_err(failed("copying from the GPU"))?;
        self.synchronize()
    }

    fn pin(&self, bytes: usize) -> Result<(NonNull<u8>, u64), Error> {
        self.bind()?;
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the context is current; freed in `unpin`.
        let host =
            unsafe { result::malloc_host(bytes, flags) }.map_err(failed("allocating pinned memory"))?;
        let host = NonNull::new(host.cast::<u8>()).expect("the driver does not hand out null");
        let mut mapped = 0;
        // SAFETY: as many bytes as were allocated; the allocation is mapped, as the flags asked.
        let found = unsafe {
            host.write_bytes(0, bytes);
            sys::cuMemHostGetDevicePointer_v2(&mut mapped, host.as_ptr().cast(), 0).result()
        };
        if let Err(error) = found {
            self.unpin(host);
            return Err(failed("mapping pinned memory")(error));
        }
        Ok((host, mapped))
    }

    fn unpin(&self, host: NonNull<u8>) {
        // SAFETY: allocated once, freed once, after everything that may write it has ended.
        unsafe {
            let _ = self.bind();
            let _ = result::stream::synchronize(self.stream);
            let _ = result::free_host(host.as_ptr().cast());
        }
    }

    fn load(&self, image: &[u8]) -> Result<Handle, Error> {
        // SAFETY: a whole cubin, as the trait asks.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        Ok(Handle(module.map_err(failed("loading kernels"))? as u64))
    }

    fn unload(&self, module: Handle) {
        // SAFETY: loaded once, unloaded once, its functions are owned beside it.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::module::unload(module.0 as sys::CUmodule);
        }
    }

    fn function(&self, module: Handle, name: &str) -> Result<Handle, Error> {
        let name = CString::new(name).expect("kernel names are literals");
        // SAFETY: a loaded module.
        let function = unsafe { result::module::get_function(module.0 as sys::CUmodule, name) };
        let function = function.map_err(failed("looking up a kernel"))?;
        // A processor splits its memory into cache and shared memory, and must run empty to change the split: with one split
        // for all, a kernel can start beside the one ahead of it (dependent launch). In percent of the most there is.
        let split = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: a function that was just found.
        unsafe { result::function::set_function_attribute(function, split, 100) }
            .map_err(failed("asking for shared memory"))?;
        Ok(Handle(function as u64))
    }

    fn launch(&self, function: Handle, shape: Shape, arguments: &Arguments) -> Result<(), Error> {
        let function = function.0 as sys::CUfunction;
        if shape.shared > FREE_SHARED {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a valid function; the driver checks the value, which is below 2^31 as shared memory is.
            unsafe { result::function::set_function_attribute(function, attribute, shape.shared as i32) }
                .map_err(failed("asking for shared memory"))?;
        }
        let mut params: Vec<*mut c_void> =
            arguments.addresses().0.into_iter().map(<*const _>::cast_mut).collect();
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
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(shape.dependent && self.overlaps),
        };
        // SAFETY: parameters match the kernel's signature (`Argument`, and the emulator, which compares their sizes) and
        // are only read, before the call returns; buffers live as long as the backend, which waits for the stream before
        // it drops them.
        unsafe {
            sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()).result()
        }
        .map_err(failed("launching a kernel"))
    }

    fn begin_capture(&self) -> Result<(), Error> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid and not being recorded: `Cuda` pairs this with `end_capture`.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("recording a graph"))
    }

    fn end_capture(&self) -> Result<Handle, Error> {
        // SAFETY: as in `begin_capture`.
        let graph =
            unsafe { result::stream::end_capture(self.stream) }.map_err(failed("recording a graph"))?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: a graph that was just recorded; both handles are destroyed once, here and in `discard`.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result();
            let _ = result::graph::destroy(graph);
            made
        };
        made.map_err(failed("instantiating a graph"))?;
        Ok(Handle(exec as u64))
    }

    fn replay(&self, graph: Handle) -> Result<(), Error> {
        // SAFETY: instantiated once, alive.
        unsafe { result::graph::launch(graph.0 as sys::CUgraphExec, self.stream) }
            .map_err(failed("replaying a graph"))
    }

    fn discard(&self, graph: Handle) {
        // SAFETY: destroyed once.
        unsafe {
            let _ = result::graph::exec_destroy(graph.0 as sys::CUgraphExec);
        }
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f32, Error> {
        let (start, end) = (Event::new()?, Event::new()?);
        start.record(self.stream)?;
        work()?;
        end.record(self.stream)?;
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

    fn record(&self, stream: sys::CUstream) -> Result<(), Error> {
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(self.0, stream) }.map_err(failed("timing kernels"))
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
