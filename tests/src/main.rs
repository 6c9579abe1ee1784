//! The host's own `main`, built into this package so that end-to-end tests find a binary beside themselves
//! (`CARGO_BIN_EXE_pointsman-under-test`); cargo offers only a package's own binaries to its tests.

fn main() -> std::process::ExitCode {
    pointsman::main()
}
