//! Host memory that the GPU writes while the host looks on: how results come back without a copy or a wait. With
//! `driver.rs` and `compile.rs` the only files that know cudarc; knows nothing of what is written.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::result;
use cudarc::driver::sys;

use crate::Error;
use crate::driver::{Device, Plain, Ptr, failed};

/// Page-locked host memory of `len` values, zero at first, which kernels reach at [`Pinned::ptr`].
pub(crate) struct Pinned<T> {
    device: Arc<Device>,
    host: NonNull<T>,
    mapped: Ptr,
    len: usize,
    _values: PhantomData<T>,
}

// SAFETY: the memory is owned, and read through volatile and atomic loads only.
unsafe impl<T> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    pub(crate) fn new(device: &Arc<Device>, len: usize) -> Result<Pinned<T>, Error> {
        device.bind()?;
        let bytes = (len * size_of::<T>()).max(16);
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the context is current; freed in `drop`.
        let host =
            unsafe { result::malloc_host(bytes, flags) }.map_err(failed("allocating pinned memory"))?;
        let host = NonNull::new(host).expect("the driver does not hand out null");
        let mut mapped = 0;
        // SAFETY: as many bytes as were allocated; the allocation is mapped, as the flags asked.
        let found = unsafe {
            host.cast::<u8>().write_bytes(0, bytes);
            sys::cuMemHostGetDevicePointer_v2(&mut mapped, host.as_ptr(), 0).result()
        };
        let pinned = Pinned {
            device: device.clone(),
            host: host.cast(),
            mapped: Ptr(mapped),
            len,
            _values: PhantomData,
        };
        found.map_err(failed("mapping pinned memory"))?;
        Ok(pinned)
    }

    /// Where kernels find the first value.
    pub(crate) fn ptr(&self) -> Ptr {
        self.mapped
    }

    /// Value `index` as it is now.
    pub(crate) fn read(&self, index: usize) -> T {
        assert!(index < self.len, "value {index} of {}", self.len);
        // SAFETY: inside the allocation; the GPU may be writing, hence volatile; any bits are a `T` (`Plain`).
        unsafe { self.host.add(index).read_volatile() }
    }

    /// The first eight bytes of value `index`; what the GPU wrote before a fence and these is seen after this.
    pub(crate) fn flag(&self, index: usize) -> u64 {
        assert!(
            index < self.len && size_of::<T>() >= 8 && align_of::<T>() >= 8,
            "value {index} of {}",
            self.len
        );
        // SAFETY: inside the allocation and aligned, by the assertion; only ever accessed by loads here.
        unsafe { AtomicU64::from_ptr(self.host.add(index).cast().as_ptr()) }.load(Ordering::Acquire)
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once, after everything that may write it has ended.
        unsafe {
            let _ = self.device.bind();
            let _ = result::stream::synchronize(self.device.stream());
            let _ = result::free_host(self.host.as_ptr().cast());
        }
    }
}

/// Whether everything on the stream has run; an error if the GPU failed at it.
pub(crate) fn is_idle(device: &Device) -> Result<bool, Error> {
    // SAFETY: the stream lives as long as the device.
    match unsafe { sys::cuStreamQuery(device.stream()) } {
        sys::cudaError_enum::CUDA_ERROR_NOT_READY => Ok(false),
        other => other.result().map(|()| true).map_err(failed("running kernels")),
    }
}
