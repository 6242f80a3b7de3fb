#!/usr/bin/env bash
# Build, test and benchmark the loss on a machine with a GPU, in under 9 minutes and without a network:
#
#     tools/gpu_check.sh [FOLDER FOR THE RESULTS, default docs/benchmarks]
#
# Needs Python with torch (CUDA), triton, pybind11 and pytest; with nvcc the CUDA kernels of csrc/ are built, tested and
# measured, too. Leaves JSON files named after the GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-docs/benchmarks}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python - <<'PY'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu_check: no CUDA device; run this on a machine with a GPU")
import triton
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
PY
gpu=$(python -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '_'))")

python setup.py -q build_ext --inplace
timeout 180 python -m pytest -q -p no:cacheprovider tests/gpu || echo "gpu_check: TESTS FAILED"
timeout 30 python tests/gpu/bench_gate_scale.py --out "$out/${gpu}_gate_kernels.json" ||
    echo "gpu_check: benchmark gate_kernels FAILED"
benchmark() { # NAME ARGUMENTS...: a failure of one does not keep the others from running
    local name=$1
    shift
    timeout 100 python tools/bench_mixture_ce.py --device cuda --out "$out/${gpu}_$name.json" "$@" ||
        echo "gpu_check: benchmark $name FAILED"
}
benchmark llama2-13b --preset llama2-13b
benchmark llama2-13b_eighth --preset llama2-13b --vocab 4000
benchmark llama3-8b --preset llama3-8b --repeats 10
benchmark llama3-8b_eighth --preset llama3-8b --vocab 16032
ls -l "$out"
