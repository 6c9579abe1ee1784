//! How a load gives way to those that serve: a thread of the lowest priority that works in small pieces.
//!
//! The priority alone is not enough. Threads that compute a step yield the processor while they wait for one another, and one that
//! yields is put behind whoever else is ready there, of whatever priority, until that one's slice or the tick is over: up to 4 ms
//! of a step of one. So the work is cut into pieces, and after each the thread yields in turn; where nobody else is ready that
//! costs a third of a microsecond. And it asks for the shortest slices, because one that yields gives up what its slice has left,
//! which at the lowest priority is a hundred milliseconds of the others' time otherwise.

use std::io;

/// Values that are looked at, packed or quantised between two yields: some ten microseconds of work. What a thread of a step that
/// looks for work and finds none lends out, it has back after one piece.
pub(crate) const PIECE: usize = 4 << 10;

/// Work in pieces.
#[derive(Debug, Default)]
pub(crate) struct Breath {
    /// Values since the last yield.
    n_values: usize,
}

impl Breath {
    /// So many values more are done.
    pub(crate) fn done(&mut self, n_values: usize) {
        self.n_values += n_values;
        if self.n_values >= PIECE {
            self.n_values = 0;
            std::thread::yield_now();
        }
    }
}

/// Gives this thread the lowest priority, and slices of 100 us where the kernel knows such (Linux 6.12).
///
/// # Errors
/// The system refuses, or is none that can be asked.
#[cfg_attr(
    all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")),
    expect(unsafe_code, reason = "the C library has no word for it")
)]
pub fn lowest_priority() -> io::Result<()> {
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        use std::ffi::{c_int, c_long, c_uint};

        /// `struct sched_attr` of sched_setattr(2), of its first version.
        #[repr(C)]
        struct Attributes {
            size: u32,
            policy: u32,
            flags: u64,
            nice: i32,
            priority: u32,
            runtime_ns: u64,
            deadline_ns: u64,
            period_ns: u64,
        }
        const CALL: c_long = if cfg!(target_arch = "x86_64") { 314 } else { 274 };
        /// One that never takes the processor from another when it wakes.
        const BATCH: u32 = 3;
        unsafe extern "C" {
            fn syscall(number: c_long, ...) -> c_long;
        }
        let attributes = Attributes {
            size: size_of::<Attributes>() as u32,
            policy: BATCH,
            flags: 0,
            nice: 19,
            priority: 0,
            runtime_ns: 100_000,
            deadline_ns: 0,
            period_ns: 0,
        };
        // SAFETY: the kernel reads as many bytes of the attributes as they say, and keeps none; thread 0 is this one.
        match unsafe { syscall(CALL, 0 as c_int, &raw const attributes, 0 as c_uint) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    Err(io::ErrorKind::Unsupported.into())
}
