#!/usr/bin/env bash
# The check on a CUDA device: tests/cuda, then what a step costs, within eight minutes.
#
#   make gpu                          with everything already installed beside python3
#   WHEELS=folder make gpu            installs the wheels in that folder into a temporary one first
#   RESULTS=folder make gpu           where logs and results go; runs/gpu by default
#
# It uses python3 (or PYTHON) as it is: that must have torch with CUDA, numpy, jaxtyping, pytest and
# hypothesis, and beartype, which `make gpu-wheels` brings for a machine without a package index.
# TEST_SECONDS and BENCHMARK_SECONDS limit the two parts. The status is 1 if a test or a measurement
# failed. DEVICE=cpu tries the command where there is no such device: tests are skipped, and
# networks are tiny.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-runs/gpu}
DEVICE=${DEVICE:-cuda}
TEST_SECONDS=${TEST_SECONDS:-230}
BENCHMARK_SECONDS=${BENCHMARK_SECONDS:-215}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
SECONDS=0

say() { printf '\n== %s (%s s) ==\n' "$1" "$SECONDS"; }
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

if [ -n "${WHEELS:-}" ]; then
    say "wheels from $WHEELS"
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$scratch/site" "$WHEELS"/*.whl || status=1
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi

say "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader || true
timeout 60 "$PYTHON" - <<'PYTHON' || status=1
import sys
import torch

print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
for name in ("numpy", "jaxtyping", "beartype", "pytest", "hypothesis", "triton"):
    try:
        module = __import__(name)
        print(name, getattr(module, "__version__", "there"))
    except Exception as error:
        print(name, "MISSING:", error)
import gradkit

print("gradkit", gradkit.__version__, "from", gradkit.__file__)
PYTHON

say "tests"
options=(-q -rfEs --tb=short --show-capture=no -p no:cacheprovider -p no:benchmark -W default
    "--junitxml=$RESULTS/gpu-tests.xml" --durations=15)
# What speeds tests up, or ends one that hangs, where it is installed.
has xdist && options+=(--numprocesses "${WORKERS:-6}" --dist loadfile)
has pytest_timeout && options+=(--timeout 120)
# The run-time check of shapes needs beartype; without it the tests run all the same.
has beartype || options+=(-o "addopts=--strict-markers")
TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton" \
    timeout --kill-after=10 "$TEST_SECONDS" "$PYTHON" -m pytest tests/cuda "${options[@]}" \
    >"$RESULTS/gpu-tests.log" 2>&1
tests=$?
tail -c 6000 "$RESULTS/gpu-tests.log"
[ "$tests" -eq 0 ] || status=1

say "what a step costs"
measure=(--device "$DEVICE" --out "$RESULTS" --seconds "$((BENCHMARK_SECONDS - 25))")
[ "$DEVICE" = cpu ] && measure+=(--tiny)
timeout --kill-after=10 "$BENCHMARK_SECONDS" "$PYTHON" -m benchmarks.gpu "${measure[@]}" \
    >"$RESULTS/gpu-speed.log" 2>&1
benchmark=$?
if [ -s "$RESULTS/gpu-speed.md" ]; then
    head -c 5000 "$RESULTS/gpu-speed.md"
else
    tail -c 3000 "$RESULTS/gpu-speed.log"
fi
[ "$benchmark" -eq 0 ] || { status=1; grep -A 12 FAILED "$RESULTS/gpu-speed.log" | tail -c 2000; }

say "summary"
outcome() {
    case $1 in
        0) echo passed ;;
        124 | 137) echo "ran out of time" ;;
        *) echo "FAILED (status $1)" ;;
    esac
}
grep -E '^(FAILED|ERROR)|(passed|failed|skipped|error).* in [0-9]' "$RESULTS/gpu-tests.log" |
    cut -c1-200 | tail -n 25
echo "tests: $(outcome "$tests"); measurements: $(outcome "$benchmark"); $SECONDS s in all"
echo "files: $(cd "$RESULTS" && echo gpu-*) in $RESULTS"
exit "$status"
