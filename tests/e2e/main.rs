//! End to end: a real process, real sockets, the embedded model, the committed guests. Few and telling; everything that can
//! be tested closer to the code is.
#![expect(clippy::expect_used, clippy::panic, reason = "a broken host should stop the test where it is")]

mod client;
mod explain;
mod restart;
mod swaps;

use pointsman_tests::Host;

/// A host on the built-in policies.
fn host(settings: &[(&str, &str)]) -> Host {
    Host::start(env!("CARGO_BIN_EXE_pointsman-under-test"), settings)
}
