//! Standard output as commands write to it. A reader may stop reading, as `| head` does; that is no fault, and nothing is said of
//! it.
//!
//! A type of its own, because the error alone does not tell: a connection to a host that breaks is a broken pipe too, and a
//! fault.

use std::io::{ErrorKind, Result, Write, stdout};

/// Exit code of a program that nobody reads any more: what shells report of one that SIGPIPE has ended.
pub(crate) const CLOSED: u8 = 128 + 13;

/// Standard output.
#[derive(Debug, Default)]
pub(crate) struct Output {
    is_closed: bool,
}

// === impl Output ===

impl Output {
    /// Whether its reader has gone: nothing more can be printed.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed
    }

    fn watch<T>(&mut self, done: Result<T>) -> Result<T> {
        self.is_closed |= done.as_ref().is_err_and(|error| error.kind() == ErrorKind::BrokenPipe);
        done
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let written = stdout().write(bytes);
        self.watch(written)
    }

    fn flush(&mut self) -> Result<()> {
        let flushed = stdout().flush();
        self.watch(flushed)
    }
}
