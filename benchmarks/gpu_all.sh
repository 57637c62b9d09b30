#!/usr/bin/env bash
# Everything that only a GPU can say, in one call: unpack, check, measure. Results go to $OUT.
# Run from the repository root; offline is fine. Where a call may last ten minutes, and a GPU is there
# for fifteen, this one says the most, the most important first:
#   QUICK=1 OUT=results bash benchmarks/gpu_all.sh PART ...
# and in what is left of the fifteen, on the same machine (what is unpacked there stays):
#   QUICK=1 STAGES="more triton" TOTAL=180 OUT=results bash benchmarks/gpu_all.sh PART ...
# Of the repository models/ is not needed there (34 of 37 MiB), should what travels be limited.
# And this one says all of it, which takes about an hour on an H100, by arithmetic:
#   OUT=results bash benchmarks/gpu_all.sh [PART ...]
# PART      folders made by pack_vllm_cuda.sh, unpacked into $SITE with $UNPACK; none if the machine's
#           python imports a CUDA vLLM 0.32 already
# OUT       where results go (default build/gpu): eight files at most, each complete as far as it got
# SITE      where packages are unpacked (default /tmp/vllm-site)
# UNPACK    unpack_vllm_cuda.sh (default .gpu/unpack_vllm_cuda.sh)
# EXTRA     a folder for PYTHONPATH with what else is missing: rich and numba, for example
# QUICK     1 for the short run: our kernels beside torch, then the plan with FlashAttention and graphs,
#           evicting and by kv head; stock and evict at 32k, with the decode kernels; then the other
#           checks, as far as time goes. By arithmetic: 40 s to unpack and import, 130, 300 and 90
# STAGES    of "doctor first bench check more triton" (default "doctor check bench triton"; QUICK: "first
#           bench more triton")
# LIMIT     seconds of a stage (default 3000); TOTAL of all of them, unpacking too (QUICK: 570)
# CONTEXTS, KV_GIB, SIDES    as --contexts, --kv-cache-gib, --sides of vllm-spindle bench gpu
# CHECKS    requests of the last check (default 10000; QUICK: 1000)
# CHECK_FLAGS, BENCH_FLAGS   further flags, for example --eager and --tiny to try this on a CPU
set -uo pipefail

started=$SECONDS
OUT=${OUT:-build/gpu}
SITE=${SITE:-/tmp/vllm-site}
UNPACK=${UNPACK:-.gpu/unpack_vllm_cuda.sh}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-3000}
if [ "${QUICK:-0}" = 1 ]; then
  STAGES=${STAGES:-first bench more triton} TOTAL=${TOTAL:-570} CHECKS=${CHECKS:-1000}
  CONTEXTS=${CONTEXTS:-32768} KV_GIB=${KV_GIB:-20} SIDES=${SIDES:-stock,evict}
  BENCH_FLAGS="--repeats 1 --output-len 48 --bound-output-len 128 --bound-factor 4 ${BENCH_FLAGS:-}"
fi
STAGES=${STAGES:-doctor check bench triton}
TOTAL=${TOTAL:-1000000}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

{
  nvidia-smi 2>/dev/null || echo "no GPU"
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
} > "$OUT/summary.txt"
: > "$OUT/log.txt"

if [ $# -gt 0 ]; then
  PYTHON=$PYTHON bash "$UNPACK" "$SITE" "$@" || exit 1
  export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
[ -z "${EXTRA:-}" ] || export PYTHONPATH="$EXTRA:${PYTHONPATH:-}"

# The plugins as if installed: packages by their names, and metadata with their entry points.
plugins=$(mktemp -d)
trap 'rm -rf "$plugins"' EXIT
ln -s "$PWD/vllm_spindle" "$PWD/vllm_covipal" "$plugins/"
ln -s "$PWD/patches" "$plugins/vllm_spindle_patches"
"$PYTHON" - "$plugins" <<'P' || exit 1
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
version = project.get("version", "0")
info = pathlib.Path(sys.argv[1]) / f"vllm_spindle-{version}.dist-info"
info.mkdir()
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-spindle\nVersion: {version}\n")
groups = project["entry-points"]
lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
(info / "entry_points.txt").write_text("\n".join(lines))
P
export PYTHONPATH="$plugins:$PWD/tests:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1} VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}

"$PYTHON" -c 'import rich, vllm, vllm_spindle, vllm_spindle_patches' || {
  echo "missing above: put it into a folder and pass EXTRA=FOLDER" >&2
  exit 1
}
"$PYTHON" -c 'import numba' || echo "no numba: codebooks will not be built" | tee -a "$OUT/summary.txt"
echo "unpacked and imported after $((SECONDS - started)) s" | tee -a "$OUT/summary.txt"

status=0
stage() {  # stage NAME COMMAND ...
  local name=$1 began=$SECONDS left=$((TOTAL - SECONDS + started))
  shift
  if [ $left -lt 20 ]; then
    echo "$name: no time left" | tee -a "$OUT/summary.txt"
    status=1
    return
  fi
  local limit=$((left < LIMIT ? left : LIMIT)) log="$plugins/$name.log"
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$log" >> "$OUT/log.txt"
  local code=${PIPESTATUS[0]}
  echo "$name: exit code $code after $((SECONDS - began)) s" | tee -a "$OUT/summary.txt"
  grep -E "${SHOW:-^(ok  |FAIL) }" "$log" | tee -a "$OUT/summary.txt" || tail -n 30 "$log"
  [ "$code" -eq 0 ] || status=1
}
bench=("$PYTHON" -c 'import sys; from vllm_spindle.cli import main; sys.exit(main(sys.argv[1:]))' bench gpu)
flags=(--contexts "${CONTEXTS:-4096,32768,131072}" --kv-cache-gib "${KV_GIB:-32}")
flags+=(--sides "${SIDES:-stock,off,evict,whole}")
# A step that waits for the device where vLLM does not allow it is an error here.
checks=(env "VLLM_GPU_SYNC_CHECK=${SYNC_CHECK:-error}" "$PYTHON" benchmarks/gpu_checks.py)
checks+=(--num-requests "${CHECKS:-10000}")

for each in $STAGES; do
  # shellcheck disable=SC2086
  case $each in
    doctor) SHOW=checks stage doctor "$PYTHON" -c 'import sys; from vllm_spindle.cli import main; sys.exit(main(["doctor"]))' ;;
    check) stage check "${checks[@]}" --json "$OUT/checks.json" ${CHECK_FLAGS:-} ;;
    # The same in two parts, around the measurements.
    first) stage first "${checks[@]}" --only reduction-kernels,plan-evict,plan-heads --json "$OUT/checks.json" ${CHECK_FLAGS:-} ;;
    more) stage more "${checks[@]}" --only plan-codebooks,aborts,off-is-stock \
      --json "$OUT/checks-more.json" ${CHECK_FLAGS:-} ;;
    bench) SHOW=. stage bench "${bench[@]}" "${flags[@]}" --json "$OUT/bench-gpu.json" ${BENCH_FLAGS:-} ;;
    # The plans once more, with vLLM's other attention backend.
    triton) stage triton "${checks[@]}" --only plan-evict,plan-heads,plan-codebooks \
      --json "$OUT/checks-triton.json" --attention-backend TRITON_ATTN ${CHECK_FLAGS:-} ;;
    *) echo "no stage is called $each" >&2; exit 2 ;;
  esac
done
cat "$OUT/summary.txt"
exit $status
