#!/usr/bin/env bash
# Makes target/gpu-bundle: all that a bare machine with a GPU and a driver needs to check it. No network, no Rust there.
set -euo pipefail
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-target}"
cargo build --release -p pointsman
bundle="$target/gpu-bundle"
rm -rf "$bundle" && mkdir -p "$bundle"
cp "$target/release/pointsman" "$bundle/pointsman"
strip "$bundle/pointsman" 2>/dev/null || true
git rev-parse HEAD >"$bundle/COMMIT"
cat >"$bundle/gpu-check" <<'EOF'
#!/usr/bin/env bash
# Compares the GPU with the CPU and measures it; exit status 1 when a comparison fails. Results: ${OUT:-.}/gpu-check.json and .txt
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="${OUT:-$PWD}"
{ echo "commit $(cat "$here/COMMIT")"; nvidia-smi 2>/dev/null; "$here/pointsman" gpu-check --json "$out/gpu-check.json" "$@"; } 2>&1 | tee "$out/gpu-check.txt"
exit "${PIPESTATUS[0]}"
EOF
chmod +x "$bundle/gpu-check"
bytes=$(du -sb "$bundle" | cut -f1)
echo "$bundle: $((bytes >> 20)) MiB"
[ "$bytes" -lt $((60 << 20)) ] || { echo "larger than 60 MiB" >&2; exit 1; }
