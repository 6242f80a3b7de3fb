#!/usr/bin/env bash
# Build, test, benchmark and tune the loss on a machine with a GPU, in under 9 minutes and without a network:
#
#     tools/gpu_check.sh [FOLDER FOR THE RESULTS, default $OUT or else docs/benchmarks]
#
# Needs python3 (or $PYTHON) with torch (CUDA), triton, numpy, pybind11 and pytest, and a C++ compiler; pytest-xdist makes
# the tests faster; with nvcc the CUDA kernels of csrc/ are built, tested and measured, too; megatron-core, liger-kernel
# and cut-cross-entropy take part in the benchmarks where they are installed. Leaves <GPU's name>.json, which is written
# anew after every step, and at the end the same as tables beside the project's bars, <GPU's name>.md. What matters most
# comes first, every step has a limit, and what no longer fits into $GPU_CHECK_SECONDS (default 520) is left out. Exits
# with 1 if anything failed or was left out.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-${OUT:-docs/benchmarks}}")
python=${PYTHON:-python3}
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-520}))
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=""

"$python" - <<'PY'
import sys
try:
    import torch
except ImportError:
    sys.exit(f"gpu_check: {sys.executable} has no torch; name one that has as PYTHON=...")
if not torch.cuda.is_available():
    sys.exit("gpu_check: no CUDA device; run this on a machine with a GPU")
import triton
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
PY
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '_'))")
mkdir -p "$out"

# everything that the steps have left so far, in one file
collect() {
    "$python" - "$parts" "$out/$gpu.json" <<'PY'
import json, sys
from pathlib import Path
parts, out = Path(sys.argv[1]), Path(sys.argv[2])
report = {"steps": {step.stem: json.loads(step.read_text()) for step in sorted(parts.glob("*.step"))}}
for part in sorted(parts.glob("*.json")):
    try:
        report[part.stem] = json.loads(part.read_text())
    except json.JSONDecodeError:  # cut off while it was written
        report["steps"][part.stem]["unreadable"] = True
out.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
out.with_suffix(".tmp").replace(out)
PY
}

# step NAME LIMIT COMMAND...: one of them failing does not keep the others from running
step() {
    local name=$1 left=$((deadline - SECONDS)) limit=$2 begun=$SECONDS code=0
    shift 2
    if ((left < 10)); then
        echo "gpu_check: $name left out: no time"
        failed+=" $name"
        echo '{}' >"$parts/$name.step"
        collect
        return
    fi
    echo "== $name"
    timeout -k 5 $((limit < left ? limit : left)) "$@" || code=$?
    echo "== $name: $((SECONDS - begun)) s, exit code $code"
    ((code == 0)) || failed+=" $name"
    printf '{"seconds": %d, "exit_code": %d}\n' $((SECONDS - begun)) "$code" >"$parts/$name.step"
    collect
}

benchmark() { # NAME LIMIT ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" tools/benchmarks/bench_mixture_ce.py --device cuda --out "$parts/$name.json" \
        --task train --task gate_only --task forward "$@"
}

workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 6); fi

step build 100 "$python" setup.py -q build_ext --inplace
benchmark llama2-13b 60 --preset llama2-13b --repeats 10 --skip torch.compile
benchmark llama3-8b 60 --preset llama3-8b --repeats 5 --skip torch.compile
step tests 150 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/gpu
benchmark llama2-13b_eighth 40 --preset llama2-13b --vocab 4000 --repeats 10 --skip torch.compile
benchmark llama3-8b_eighth 40 --preset llama3-8b --vocab 16032 --repeats 10 --skip torch.compile
step gate_kernels 30 "$python" tools/benchmarks/bench_gate_scale.py --out "$parts/gate_kernels.json"
step tiles 100 "$python" tools/benchmarks/tune_kernels.py --out "$parts/tiles.json"
benchmark llama2-13b_compiled 60 --preset llama2-13b --repeats 5 --skip megatron
benchmark llama2-7b 40 --preset llama2-7b --repeats 5 --skip torch.compile
benchmark qwen2.5-7b 60 --preset qwen2.5-7b --repeats 5 --skip torch.compile

echo "wrote $out/$gpu.json"
timeout 30 "$python" tools/benchmarks/gpu_report.py "$out/$gpu.json" || failed+=" report"
if [[ -n $failed ]]; then
    echo "gpu_check: FAILED or left out:$failed"
    exit 1
fi
