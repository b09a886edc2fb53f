//! Host memory that the GPU writes while the host looks on: how results come back without a copy or a wait. Knows
//! nothing of what is written.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;
use crate::driver::{Device, Plain, Ptr};

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
        let (host, mapped) = device.pin(len * size_of::<T>())?;
        Ok(Pinned { device: device.clone(), host: host.cast(), mapped, len, _values: PhantomData })
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
        self.device.unpin(self.host.cast());
    }
}
