#!/usr/bin/env bash
# Makes gpu-bundle.tgz in cargo's target folder: all that a bare machine with a GPU and a driver needs to check it. No network, no
# Rust, no compiler there. On that machine: tar xzf gpu-bundle.tgz && gpu-bundle/gpu-check
set -euo pipefail
cd "$(dirname "$0")/.."
most_mib=40
target="${CARGO_TARGET_DIR:-target}"
bundle="$target/gpu-bundle"
for tool in strip objdump; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: install binutils" >&2; exit 1; }
done
"${CARGO:-cargo}" build --release -p pointsman
rm -rf "$bundle" "$bundle.tgz" && mkdir -p "$bundle"
strip -o "$bundle/pointsman" "$target/release/pointsman"
git rev-parse HEAD >"$bundle/COMMIT"
[ -z "$(git status --porcelain)" ] || echo "with changes that are not committed" >>"$bundle/COMMIT"
cat >"$bundle/gpu-check" <<'EOF_SCRIPT'
#!/usr/bin/env bash
# Compares the GPU with the CPU and measures it: `gpu-check`, or `gpu-check kernels ladder` for some parts, and then further flags of
# `pointsman gpu-check`, but for --budget, which is $BUDGET, --json and --of. Each part is a process of its own, because a fault of a
# kernel takes the process's device with it, and is killed where it hangs. `host` serves the demo model ($DEVICE, or cuda:0) under load:
# with the native scheduler, with a guest, and while guests are swapped; its log is gpu-check-host.log. Results as they come, in $OUT
# or here: gpu-check.txt, and gpu-check-PART.json for each other part, of kernels and parity for each type, and -without-THIS for what
# was run again. Ends with 0 when all is well, 1 when a comparison failed or did not end or NVRTC was of no use, 2 after a wrong flag, 3 where there is no GPU to check.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="${OUT:-$PWD}"
mkdir -p "$out"
budget="${BUDGET:-150}"
parts=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do parts+=("$1"); shift; done
[ ${#parts[@]} -gt 0 ] || parts=(kernels parity products memory ladder host)
# Where drivers are mounted into containers, and the libraries that came with a Python.
for folder in /usr/local/nvidia/lib64 /usr/local/nvidia/lib /usr/lib/wsl/lib; do
  [ -d "$folder" ] && export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
done
# Where a driver keeps what it compiles from PTX: a home may not be there.
export CUDA_CACHE_PATH="${CUDA_CACHE_PATH:-$here/jit}"
python="$(command -v "${PYTHON:-python3}" || true)"
flags=(--cache "$here/cubin")
libraries=()
if [ -n "$python" ]; then
  flags+=(--peers "$python")
  while IFS= read -r folder; do libraries+=(--cuda-lib-dir "$folder"); done < <(
    "$python" -c 'import glob, sys; [print(found) for path in sys.path for found in glob.glob(path + "/nvidia/*/lib")]' 2>/dev/null
  )
  flags+=("${libraries[@]}")
fi
say() { tee -a "$out/gpu-check.txt"; }
{ echo "commit $(cat "$here/COMMIT")"; date -u; nvidia-smi 2>/dev/null; } | say
worst=0
# Beside its parts, for a run to start; most of it for kernels to be compiled, which the first run does for all where it can keep them.
starts=120
# NAME of its lines and its file, seconds that each of its parts has, how many there are, and flags.
run() {
  local name="$1" seconds="$2" n="$3" status
  shift 3
  rm -f "$out/gpu-check-$name.json"
  echo "== $name" | say
  timeout -k 10 $((n * seconds + starts)) ${WRAP:-} "$here/pointsman" gpu-check --budget "$seconds" --json "$out/gpu-check-$name.json" "${flags[@]}" "$@" 2>&1 | say
  status="${PIPESTATUS[0]}"
  grep -q 'from the cache' "$out/gpu-check-$name.json" 2>/dev/null && starts=40
  [ "$status" = 0 ] || echo "== $name ends with status $status" | say
  # Killed, or not started.
  [ "$status" -lt 124 ] || status=1
  [ "$status" -le "$worst" ] || worst="$status"
}
# Kernels of one type. One that takes the device with it, or never ends, is passed over in a further run, for the sake of the others.
kernels_of() {
  local kind="$1" name="kernels-$1" passed="" lost json
  shift
  rm -f "$out/gpu-check-$name"-without-*.json
  for _ in 1 2 3 4; do
    json="$out/gpu-check-$name.json"
    run "$name" $((budget / 4)) 1 --only kernels --of "$kind" ${passed:+--skip "$passed"} "$@"
    lost="$(named lost_at "$json")"
    [ -n "$lost" ] || has_ended "$json" || lost="$(named tried "$json")"
    [ -n "$lost" ] || return
    passed="${passed:+$passed,}$lost"
    name="kernels-$kind-without-${passed//,/-}"
  done
}
# Parts, as `--only` has them, whose launches that overlap come last or after the first figures: without those once more, where the
# device was lost or the run never ended.
again_without_overlap() {
  local name="$1" seconds="$2" n="$3" parts="$4" json="$out/gpu-check-$1.json"
  shift 4
  rm -f "$out/gpu-check-$name-without-overlap.json"
  run "$name" "$seconds" "$n" --only "$parts" "$@"
  case " $* " in *" --no-overlap "*) return ;; esac
  if grep -q 'device is lost' "$json" 2>/dev/null || { [ -f "$json" ] && ! has_ended "$json"; }; then
    run "$name-without-overlap" "$seconds" 1 --only "${parts%,peers}" "$@" --no-overlap
  fi
}
# Whether the run of a file came to its verdict, and was not killed before.
has_ended() { grep -q '"verdict"' "$1" 2>/dev/null; }
# The last member of that NAME in a file.
named() { sed -n "s/.*\"$1\": \"\(.*\)\".*/\1/p" "$2" 2>/dev/null | tail -1; }
# Sum and count of what the host says of its steps: the part of PHASE.
steps() {
  exec 3<>"/dev/tcp/127.0.0.1/$port" || return
  printf 'GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
  grep -a "^pointsman_step_seconds_[sc].*phase=\"$1\"" <&3 | sort -r | sed 's/.* //' | tr '\n' ' '
  exec 3>&-
}
# Load on the host, as its clients see it, and what planning a step took meanwhile. Fails where a request was not answered.
load() {
  local before after result
  before="$(steps schedule)"
  result="$(timeout "$budget" "$here/pointsman" bench --model demo-mini --concurrency 8 --requests 200 --shape 64:256)" || return 1
  after="$(steps schedule)"
  echo "-- $1"
  grep -E '^(requests|output|failed|rejected|milliseconds|ttft|itl)' <<<"$result"
  awk -v before="$before" -v after="$after" 'BEGIN { split(before, b); split(after, a); n = a[2] - b[2]
    printf "planning a step        %.1f us on average, %d steps\n", n ? (a[1] - b[1]) / n * 1e6 : 0, n }'
  grep -q '^requests .* 200 sent, 200 answered' <<<"$result"
}
scheduler() { timeout 30 "$here/pointsman" policy activate scheduler "$1"; }
swaps() {
  while sleep 0.1; do
    for guest in sched-shortest-first sched-fcfs; do scheduler "$guest" >>"$folder/swaps" || return; done
  done
}
# In a shell of its own, which leaves nothing behind.
host() {
  folder="" pid="" swapper="" status=0 port=18080
  if steps schedule 2>/dev/null | grep -q .; then
    echo "port $port is in use"
    return 1
  fi
  folder="$(mktemp -d)"
  trap 'kill $swapper $pid 2>/dev/null; wait; rm -rf "$folder"' EXIT
  ln -s "$here/cubin" "$folder/cuda"
  export POINTSMAN_URL="http://127.0.0.1:$port" POINTSMAN_ADMIN_URL="http://127.0.0.1:$((port + 1))"
  timeout -k 10 $((4 * budget + starts)) "$here/pointsman" serve --device "${DEVICE:-cuda:0}" --data-dir "$folder" \
    --listen "127.0.0.1:$port" --admin "127.0.0.1:$((port + 1))" "${libraries[@]}" >"$out/gpu-check-host.log" 2>&1 &
  pid=$!
  for _ in $(seq 120); do { kill -0 "$pid" && ! steps schedule | grep -q .; } 2>/dev/null && sleep 1 || break; done
  if ! steps schedule 2>/dev/null | grep -q .; then
    echo "it serves nothing:"
    tail -3 "$out/gpu-check-host.log"
    return 1
  fi
  scheduler native >/dev/null || status=1
  load warm-up >/dev/null || status=1
  load "the native scheduler" || status=1
  scheduler sched-fcfs >/dev/null || status=1
  load "a guest" || status=1
  swaps &
  swapper=$!
  load "guests that are swapped" || status=1
  kill "$swapper" 2>/dev/null || { echo "a swap failed"; status=1; }
  swapper=""
  echo "swaps                  $(grep -c ';g=' "$folder/swaps")"
  kill -0 "$pid" || status=1
  return "$status"
}
for part in "${parts[@]}"; do
  case "$part" in
    host)
      echo "== host" | say
      (host) 2>&1 | say
      status="${PIPESTATUS[0]}"
      [ "$status" = 0 ] || echo "== host ends with status $status" | say
      [ "$status" -le "$worst" ] || worst="$status" ;;
    kernels)
      case " $* " in
        *" --small "*) run kernels "$budget" 1 --only kernels "$@" ;;
        *) for kind in none bf16 f16 f32; do kernels_of "$kind" "$@"; done ;;
      esac ;;
    # Side by side in one table.
    ladder) again_without_overlap ladder "$budget" 2 "ladder${python:+,peers}" "$@" ;;
    # Of each type on its own, as kernels are.
    parity) for kind in bf16 f16 f32; do again_without_overlap "parity-$kind" $((budget / 3)) 1 parity --of "$kind" "$@"; done ;;
    products) again_without_overlap products "$budget" 1 products "$@" ;;
    *) run "$part" "$budget" 1 --only "$part" "$@" ;;
  esac
done
exit "$worst"
EOF_SCRIPT
chmod +x "$bundle/gpu-check"
tar -C "$target" -czf "$bundle.tgz" gpu-bundle
newest="$(objdump -T "$bundle/pointsman" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1)"
kib=$(($(stat -c %s "$bundle.tgz") >> 10))
echo "$bundle.tgz: $((kib >> 10)).$(((kib & 1023) * 10 >> 10)) MiB; needs ${newest/_/ } or newer"
[ "$kib" -lt $((most_mib << 10)) ] || { echo "larger than $most_mib MiB" >&2; exit 1; }
