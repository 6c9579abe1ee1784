//! The CUDA kernels without a GPU: run on the CPU against references in `f64`, and compiled for three generations of devices.
//!
//! The same `.cu` text is compiled as C++ with a shim (`shim/`): a fiber per CUDA thread, in shuffled order, under
//! AddressSanitizer, so that a wrong index, a missing barrier and a row that is written past the last one all show. What it cannot
//! show is speed, and what the hardware does beyond its description. Skipped, with a line, where there is no C++ compiler
//! (`c++`) or no NVRTC (`nvrtc`); `POINTSMAN_REQUIRE` makes either a failure.
#![expect(clippy::expect_used, reason = "a broken test should stop where it is")]

mod barriers;
mod case;
mod kernels;
mod nvrtc;
mod shim;
