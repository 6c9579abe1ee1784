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
# `pointsman gpu-check`, but for --budget, --json and --of. Each part is a process of its own, because a fault of a kernel takes the
# process's device with it, and is killed where it hangs. `host` serves the demo model ($DEVICE, or cuda:0) under load: with the native
# scheduler, with a guest, each for few clients and for more than may run at once, and while guests are swapped.
#
# $BUDGET (150) is the most seconds that a part has, or a load on the host, and half of it that the kernels and the comparisons of one
# type have. It is a cap: what is done earlier ends earlier, and comparisons that it leaves no time for have failed.
#
# Under a memory checker: WRAP="compute-sanitizer --target-processes all --error-exitcode 9" gpu-check kernels parity --small; with
# --tool racecheck it looks for races in shared memory instead. A part whose output has an ERROR SUMMARY or RACECHECK SUMMARY with
# errors has failed, whatever its status.
#
# Results are in $OUT or here: gpu-check.txt as they come, and gpu-check.tgz with all other files, where few can be taken along:
# gpu-check-PART.json, of kernels and parity for each type, and -without-THIS for what was run again; the host's log is
# gpu-check-host.log. The archive is made anew before each process and at the end, also at one by TERM; after a KILL the files of the
# last process lie beside it. Ends with 0 when all is well, 1 when a comparison failed or did not end or NVRTC was of no use, 2 after
# a wrong flag, 3 where there is no GPU to check.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="${OUT:-$PWD}"
mkdir -p "$out"
budget="${BUDGET:-150}"
parts=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do parts+=("$1"); shift; done
# What matters most first: the machine may be gone before the end.
[ ${#parts[@]} -gt 0 ] || parts=(kernels parity ladder memory host products)
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
child="" kept="$(mktemp -d)" || exit 1
mkdir "$kept/all" && touch "$kept/start" && mkfifo "$kept/pipe" || exit 1
trap 'pack; rm -rf "$kept"' EXIT
trap stopped TERM INT HUP
# An earlier run's stays.
[ ! -e "$out/gpu-check.tgz" ] || mv "$out/gpu-check.tgz" "$out/gpu-check-$(date -u -r "$out/gpu-check.tgz" +%Y%m%d-%H%M%S).tgz"
# Puts the files of this run into its archive, which is whole at every time.
pack() {
  local file files=()
  for file in "$out"/gpu-check-*.{json,part,log}; do
    [ "$file" -ot "$kept/start" ] || { cp -p "$file" "$kept/all" 2>/dev/null && files+=("$file"); }
  done
  [ ${#files[@]} -gt 0 ] || return
  tar -C "$kept/all" -czf "$out/gpu-check.tgz.part" . && mv "$out/gpu-check.tgz.part" "$out/gpu-check.tgz" && rm -f "${files[@]}"
}
# Whoever sends TERM may send KILL soon after: a process that does not end by it at once is not waited for.
stopped() {
  [ -z "$child" ] || kill "$child" 2>/dev/null
  for _ in $(seq 20); do [ -n "$child" ] && kill -0 "$child" 2>/dev/null && sleep 0.1 || break; done
  echo "== stopped" >>"$out/gpu-check.txt"
  exit 143
}
# Runs a command and says what it says. In the background, because a shell hears a signal only between commands, or while it waits.
said() {
  local status sayer
  pack
  say <"$kept/pipe" &
  sayer=$!
  "$@" >"$kept/pipe" 2>&1 &
  child=$!
  wait "$child"
  status=$?
  child=""
  wait "$sayer"
  return "$status"
}
{ echo "commit $(cat "$here/COMMIT")"; date -u; nvidia-smi 2>/dev/null; } | say
worst=0
# Beside its parts, for a run to start; most of it for kernels to be compiled, which the first run does for all where it can keep them.
starts=300
# NAME of its lines and its file, seconds that each of its parts has, how many there are, and flags.
run() {
  local name="$1" seconds="$2" n="$3" status lines errors
  shift 3
  rm -f "$out/gpu-check-$name.json"
  echo "== $name" | say
  lines="$(wc -l <"$out/gpu-check.txt")"
  said timeout -k 10 $((n * seconds + starts)) ${WRAP:-} "$here/pointsman" gpu-check --budget "$seconds" --json "$out/gpu-check-$name.json" "${flags[@]}" "$@"
  status=$?
  grep -q 'from the cache' "$out/gpu-check-$name.json" 2>/dev/null && starts=40
  [ "$status" = 0 ] || echo "== $name ends with status $status" | say
  # Killed, or not started.
  [ "$status" -lt 124 ] || status=1
  errors="$(tail -n +$((lines + 1)) "$out/gpu-check.txt" | grep -oE '(ERROR|RACECHECK) SUMMARY: [1-9].*')"
  [ -z "$errors" ] || { echo "== $name has failed: $errors" | say; status=1; }
  [ "$status" -le "$worst" ] || worst="$status"
}
# Kernels of one type. One that takes the device with it, or never ends, is passed over in a further run, for the sake of the others.
kernels_of() {
  local kind="$1" name="kernels-$1" passed="" lost json
  shift
  for _ in 1 2 3 4; do
    json="$out/gpu-check-$name.json"
    run "$name" $((budget / 2)) 1 --only kernels --of "$kind" ${passed:+--skip "$passed"} "$@"
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
# What the host's metrics say of its own part of steps: one line for each figure, its value first. `le=` are steps within that time.
steps() {
  exec 3<>"/dev/tcp/127.0.0.1/$port" || return
  printf 'GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
  awk '/^pointsman_step_host_seconds_/ && match($0, /_sum|_count|le="[^"]*"/) { of["host" substr($0, RSTART, RLENGTH)] += $NF }
    /^pointsman_step_seconds_sum/ && match($0, /phase="[a-z]*"/) { of[substr($0, RSTART, RLENGTH)] += $NF }
    /^pointsman_policy_call_seconds_count.*slot="scheduler"/ { of["asked"] += $NF }
    END { for (i in of) printf "%.9f %s\n", of[i], i }' <&3
  exec 3>&-
}
# What they were between two such times, of which the earlier one's values are negative: on average, within the bars, and the longest, as
# far as its bucket tells.
host_part() {
  awk '{ of[$2] += $1 }
    function us(what) { return of["phase=\"" what "\""] / steps * 1e6 }
    END { if (!(steps = of["host_count"])) exit
      printf "host per step          %.1f us on average (plan %.1f, launch %.1f, hand on %.1f), %.1f %% within 20 us, %.1f %% within 50 us\n",
        of["host_sum"] / steps * 1e6, us("schedule"), us("launch"), us("complete"),
        of["hostle=\"0.00002\""] / steps * 100, of["hostle=\"0.00005\""] / steps * 100
      for (i in of) if (i ~ /^hostle="[0-9]/ && of[i] == steps) { split(i, le, "\""); if (!most || le[2] + 0 < most) most = le[2] + 0 }
      printf "longest host part      %s; the device takes %.0f us for a step; %d steps, a guest was asked %d times\n",
        most ? "within " most * 1e6 " us" : "unknown", us("execute"), steps, of["asked"] }'
}
# Load by so many clients on the host, as they see it, and what the host took for a step meanwhile. Fails where a request was not answered.
load() {
  local before after result n
  # More for more clients: while the last of them run nobody waits any more.
  n=$((160 + 5 * $2))
  before="$(steps)"
  result="$(timeout "$budget" "$here/pointsman" bench --model demo-mini --concurrency "$2" --requests "$n" --warm-up 0 --shape 64:256)" || return 1
  after="$(steps)"
  echo "-- $1, $2 clients"
  grep -E '^(requests|output|failed|rejected|milliseconds|ttft|itl)' <<<"$result"
  { sed 's/^/-/' <<<"$before"; echo "$after"; } | host_part
  grep -q "^requests .* $n sent, $n answered" <<<"$result"
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
  if steps 2>/dev/null | grep -q .; then
    echo "port $port is in use"
    return 1
  fi
  folder="$(mktemp -d)"
  trap 'kill $swapper $pid 2>/dev/null; wait; rm -rf "$folder"' EXIT
  ln -s "$here/cubin" "$folder/cuda"
  export POINTSMAN_URL="http://127.0.0.1:$port" POINTSMAN_ADMIN_URL="http://127.0.0.1:$((port + 1))"
  timeout -k 10 $((6 * budget + starts)) "$here/pointsman" serve --device "${DEVICE:-cuda:0}" --data-dir "$folder" \
    --listen "127.0.0.1:$port" --admin "127.0.0.1:$((port + 1))" "${libraries[@]}" >"$out/gpu-check-host.log" 2>&1 &
  pid=$!
  for _ in $(seq "$starts"); do { kill -0 "$pid" && ! steps | grep -q .; } 2>/dev/null && sleep 1 || break; done
  if ! steps 2>/dev/null | grep -q .; then
    echo "it serves nothing:"
    tail -3 "$out/gpu-check-host.log"
    return 1
  fi
  scheduler native >/dev/null || status=1
  load warm-up 8 >/dev/null || status=1
  # A step that is planned ahead asks no guest, and one for which somebody waits is not: by 128 clients, of whom half run, it is asked.
  for clients in 8 128; do load "the native scheduler" "$clients" || status=1; done
  scheduler sched-fcfs >/dev/null || status=1
  for clients in 8 128; do load "a guest" "$clients" || status=1; done
  swaps &
  swapper=$!
  load "guests that are swapped" 8 || status=1
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
      said host
      status=$?
      [ "$status" = 0 ] || echo "== host ends with status $status" | say
      [ "$status" -le "$worst" ] || worst="$status" ;;
    kernels) for kind in none bf16 f16 f32; do kernels_of "$kind" "$@"; done ;;
    # Side by side in one table.
    ladder) again_without_overlap ladder "$budget" 2 "ladder${python:+,peers}" "$@" ;;
    # Of each type on its own, as kernels are.
    parity) for kind in bf16 f16 f32; do again_without_overlap "parity-$kind" $((budget / 2)) 1 parity --of "$kind" "$@"; done ;;
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
