# The build vocabulary. Every recipe is a plain cargo command (or two), so nothing here needs `just`.

# Build and serve the embedded demo model on 127.0.0.1:8080.
run *ARGS:
    cargo run --release -- {{ARGS}}

# Every test of the workspace.
test *ARGS:
    cargo test --release --workspace {{ARGS}}

# Mixed traffic, swaps and clients that leave, for this long; figures at the end.
soak SECONDS="3600":
    SOAK_SECONDS={{SECONDS}} cargo test --release --workspace --test soak -- --nocapture

# Format, lints, documentation.
lint:
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps

# Rebuild the guests from source and check them against the committed ones.
guests:
    plugins/build.sh --check

# Rebuild the committed guests.
guests-update:
    plugins/build.sh

# One benchmark, or all of them: call, swap, sched_step, kv_pool, decode, serve.
bench NAME="":
    cargo bench --profile release -p pointsman-benches {{ if NAME == "" { "" } else { "--bench " + NAME } }}

# Remake the kernels' PTX from their sources, for machines without NVRTC; FOLDERS are looked through for libnvrtc first.
kernels-ptx *FOLDERS:
    cargo run --release -p pointsman-engine --example kernels_ptx -- {{FOLDERS}}

# One folder for a bare machine with a GPU and a driver: the binary and a script that checks and measures it.
gpu-bundle:
    benches/gpu-bundle.sh

# Check and measure the GPU of this machine.
gpu-check *ARGS:
    cargo run --release -- gpu-check {{ARGS}}

# What continuous integration runs.
ci:
    .ci/run
