//! Memory of models, as the system gives and takes it: what one that has gone held goes back, which the allocator would keep for
//! the next that asks.
//!
//! Large blocks are mapped one by one and returned as they are freed, but GNU's allocator raises the size from which it maps
//! with each such block it frees, up to 32 MiB: from the second model on, matrices lie in its heaps, between others. And it gives
//! back the free end of a heap only beyond twice that size, for each of the heaps that its threads have, which no trim looks at:
//! models that come and go made a host grow by 3 MB each. So a program fixes both sizes at its start, above what a request needs,
//! and asks once after an unload.

/// Size from which a block is mapped alone, and beyond which the free end of a heap is given back.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: std::ffi::c_int = 1 << 20;

/// Fixes the sizes above for this process, where the allocator can be told. For the start of a program.
#[cfg_attr(
    all(target_os = "linux", target_env = "gnu"),
    expect(unsafe_code, reason = "the C library has the call, and Rust's has not")
)]
pub fn keep_little_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        // Of malloc.h.
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        for parameter in [M_TRIM_THRESHOLD, M_MMAP_THRESHOLD] {
            // SAFETY: it takes the allocator's own locks and sets one of its numbers.
            unsafe { mallopt(parameter, LARGE) };
        }
    }
}

/// Asks for memory in large pages, where the system has them, for a block that is about to be filled: a product reads all weights
/// once, and looks up an address for every page.
#[cfg_attr(target_os = "linux", expect(unsafe_code, reason = "the C library has the call, and Rust's has not"))]
pub(super) fn want_large_pages<T>(room: &[std::mem::MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    {
        use std::ffi::{c_int, c_void};
        /// Bytes of a large page.
        const PAGE: usize = 2 << 20;
        /// Of sys/mman.h.
        const MADV_HUGEPAGE: c_int = 14;
        unsafe extern "C" {
            fn madvise(begin: *mut c_void, len: usize, advice: c_int) -> c_int;
        }
        let begin = room.as_ptr().cast::<u8>();
        let skipped = begin.align_offset(PAGE);
        let len = size_of_val(room).saturating_sub(skipped) / PAGE * PAGE;
        if len > 0 {
            // SAFETY: whole pages within `room`, which stay what they are; a system that does not know the advice says so, and
            // nothing is lost.
            unsafe { madvise(begin.wrapping_add(skipped).cast_mut().cast(), len, MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = room;
}

/// Returns the pages of freed memory to the system, where the allocator can be asked to.
#[cfg_attr(
    all(target_os = "linux", target_env = "gnu"),
    expect(unsafe_code, reason = "the C library has the call, and Rust's has not")
)]
pub fn give_back_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(keep: usize) -> std::ffi::c_int;
        }
        // SAFETY: it takes the allocator's own locks and touches nothing but its free pages; any thread may call it.
        unsafe { malloc_trim(0) };
    }
}
