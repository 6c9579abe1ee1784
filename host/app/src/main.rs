//! The binary `pointsman`.

fn main() -> std::process::ExitCode {
    pointsman::main()
}
