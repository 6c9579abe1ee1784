//! What a model that has gone held, back to the system: the allocator keeps freed memory for the next that asks.
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
