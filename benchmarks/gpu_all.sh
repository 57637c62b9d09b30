#!/usr/bin/env bash
# Everything that only a GPU can say, in one call: unpack, check, measure. Results go to $OUT.
# Run from the repository root; offline is fine.
#   OUT=results bash benchmarks/gpu_all.sh [PART ...]
# PART      folders made by pack_vllm_cuda.sh, unpacked into $SITE with $UNPACK; none if the machine's
#           python imports a CUDA vLLM 0.32 already
# OUT       where results go (default build/gpu)
# SITE      where packages are unpacked (default /tmp/vllm-site)
# UNPACK    unpack_vllm_cuda.sh (default .gpu/unpack_vllm_cuda.sh)
# EXTRA     a folder for PYTHONPATH with what else is missing: rich and numba, for example
# STAGES    of "doctor check bench triton" (default all); each is limited by $LIMIT seconds
# CONTEXTS, KV_GIB, SIDES    as --contexts, --kv-cache-gib, --sides of vllm-spindle bench gpu
#           (four sides and three contexts take some half an hour on an H100, by arithmetic; where a
#           call may not last as long: STAGES=bench CONTEXTS=4096 SIDES=stock,evict, and so on)
# CHECKS    requests of the last check (default 10000)
# CHECK_FLAGS, BENCH_FLAGS   further flags, for example --eager and --tiny to try this on a CPU
set -uo pipefail

OUT=${OUT:-build/gpu}
SITE=${SITE:-/tmp/vllm-site}
UNPACK=${UNPACK:-.gpu/unpack_vllm_cuda.sh}
PYTHON=${PYTHON:-python3}
STAGES=${STAGES:-doctor check bench triton}
LIMIT=${LIMIT:-3000}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

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
export PYTHONPATH="$plugins:$PWD/tests:${PYTHONPATH:-}"
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1} VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}

"$PYTHON" -c 'import numba, rich, vllm, vllm_spindle, vllm_spindle_patches' || {
  echo "missing above: put it into a folder and pass EXTRA=FOLDER" >&2
  exit 1
}
(nvidia-smi 2>/dev/null || echo "no GPU") > "$OUT/machine.txt"
git rev-parse HEAD > "$OUT/commit.txt" 2>/dev/null || true

status=0
stage() {  # stage NAME COMMAND ...
  local name=$1 started=$SECONDS
  shift
  timeout "$LIMIT" "$@" > "$OUT/$name.log" 2>&1
  local code=$?
  echo "$name: exit code $code after $((SECONDS - started)) s" | tee -a "$OUT/summary.txt"
  grep -E "${SHOW:-^(ok  |FAIL) }" "$OUT/$name.log" || tail -n 30 "$OUT/$name.log"
  [ $code -eq 0 ] || status=1
}
bench=("$PYTHON" -c 'import sys; from vllm_spindle.cli import main; sys.exit(main(sys.argv[1:]))' bench gpu)
flags=(--contexts "${CONTEXTS:-4096,32768,131072}" --kv-cache-gib "${KV_GIB:-32}")
flags+=(--sides "${SIDES:-stock,off,evict,whole}")

: > "$OUT/summary.txt"
for each in $STAGES; do
  case $each in
    doctor) SHOW=checks stage doctor "$PYTHON" -c 'import sys; from vllm_spindle.cli import main; sys.exit(main(["doctor"]))' ;;
    # A step that waits for the device where vLLM does not allow it is an error here.
    # shellcheck disable=SC2086
    check) stage check env VLLM_GPU_SYNC_CHECK="${SYNC_CHECK:-error}" "$PYTHON" benchmarks/gpu_checks.py --num-requests "${CHECKS:-10000}" \
      --json "$OUT/checks.json" ${CHECK_FLAGS:-} ;;
    # shellcheck disable=SC2086
    bench) SHOW=. stage bench "${bench[@]}" "${flags[@]}" --json "$OUT/bench-gpu.json" ${BENCH_FLAGS:-} ;;
    # The same checks, short, with vLLM's other attention backend.
    # shellcheck disable=SC2086
    triton) stage triton "$PYTHON" benchmarks/gpu_checks.py --num-requests 500 --json "$OUT/checks-triton.json" \
      --attention-backend TRITON_ATTN ${CHECK_FLAGS:-} ;;
    *) echo "no stage is called $each" >&2; exit 2 ;;
  esac
done
cat "$OUT/summary.txt"
exit $status
