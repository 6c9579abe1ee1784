//! What a model that has gone held, back to the system: the allocator keeps freed memory for the next that asks.
//!
//! Large blocks are mapped one by one and returned as they are freed, but GNU's allocator raises the size from which it maps
//! with each such block it frees, up to 32 MiB: from the second model on, matrices lie in its heaps, between others. Fixing that
//! size would map and unmap for every large buffer of a request; asking once after an unload costs nothing else.

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
