#!/usr/bin/env bash
# Answer, on a bare machine with a GPU and without a network, in one call of under 9 minutes: are the kernels right,
# does the trainer train, how fast is it, and what would make it faster?
#
#     tools/gpu_check.sh [FOLDER FOR THE RESULTS, default $OUT or else docs/benchmarks]
#
# Needs python3 (or $PYTHON) with torch (CUDA), triton, numpy, pybind11 and pytest, and a C++ compiler. What else the
# steps need (megatron-core, transformers, ...) may travel as wheels: WHEELS=FOLDER names those that tools/gpu_wheels.sh
# made, of which the missing ones are installed for this call. pytest-xdist makes the tests faster; with nvcc the CUDA
# kernels of csrc/ are built, tested and measured, too; liger-kernel and cut-cross-entropy take part where installed.
#
# Triton's kernels compile in the background from the moment the package can be imported, which is when its C++ part is
# built. What matters most comes first, every step has a limit, one that fails does not stop the next, one whose packages
# are missing is reported as such, and what no longer fits into $GPU_CHECK_SECONDS (default 520) is left out. Leaves <GPU's name>.json, written anew
# after every step, the profiler's traces, and the same as tables beside the project's bars, <GPU's name>.md. Exits with
# 1 if anything failed, was missing or left out.
#
# DEVICE=cpu runs the same scripts on small sizes where there is no GPU, with limits ten times as long.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-${OUT:-docs/benchmarks}}")
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
scale=1 # of the steps' limits
[[ $device == cpu ]] && scale=10
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-520}))
parts=$(mktemp -d)
warming=""
finish() {
    [[ -z $warming ]] || kill -- "-$warming" 2>/dev/null || true
    rm -rf "$parts"
}
trap finish EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$parts/triton}"
failed=""

"$python" - "$device" <<'PY'
import sys
try:
    import torch
except ImportError:
    sys.exit(f"gpu_check: {sys.executable} has no torch; name one that has as PYTHON=...")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu_check: no CUDA device; run this on a machine with a GPU")
PY
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '_') if '$device' == 'cuda' else 'cpu_dry_run')")
mkdir -p "$out"

# everything that the steps have left so far, in one file
collect() {
    "$python" - "$parts" "$out/$gpu.json" <<'PY'
import json, sys
from pathlib import Path
parts, out = Path(sys.argv[1]), Path(sys.argv[2])
order = lambda path: path.stat().st_mtime_ns
report = {"steps": {step.stem: json.loads(step.read_text()) for step in sorted(parts.glob("*.step"), key=order)}}
for part in sorted(parts.glob("*.json"), key=order):
    try:
        report[part.stem] = json.loads(part.read_text())
    except json.JSONDecodeError:  # cut off while it was written
        report["steps"].setdefault(part.stem, {})["unreadable"] = True
out.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
out.with_suffix(".tmp").replace(out)
PY
}

# step NAME LIMIT MODULES COMMAND...: MODULES, separated by commas, are what the command cannot do without
step() {
    local name=$1 left=$((deadline - SECONDS)) limit=$(($2 * scale)) modules=$3 begun=$SECONDS code=0 missing=""
    shift 3
    if ((left < 10)); then
        echo "gpu_check: $name left out: no time"
        failed+=" $name"
        echo '{}' >"$parts/$name.step"
        collect
        return
    fi
    if [[ -n $modules ]]; then missing=$("$python" tools/benchmarks/needed.py --missing "$modules" || true); fi
    if [[ -n $missing ]]; then
        echo "gpu_check: $name left out: $missing is not installed"
        failed+=" $name"
        printf '{"missing": "%s"}\n' "$missing" >"$parts/$name.step"
        collect
        return
    fi
    echo "== $name"
    timeout -k 5 $((limit < left ? limit : left)) "$@" || code=$?
    echo "== $name: $((SECONDS - begun)) s, exit code $code, $((deadline - SECONDS)) s left"
    ((code == 0)) || failed+=" $name"
    printf '{"seconds": %d, "exit_code": %d}\n' $((SECONDS - begun)) "$code" >"$parts/$name.step"
    collect
}

benchmark() { # NAME LIMIT ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    if [[ $device == cpu ]]; then set -- --tokens 64 --vocab 512 --repeats 2 --skip torch.compile; fi
    step "$name" "$limit" "" "$python" tools/benchmarks/bench_mixture_ce.py --device "$device" --out "$parts/$name.json" \
        --task train --task gate_only --task forward "$@"
}

trainer=megatron.core,transformers,pydantic,typer,rich,safetensors,tokenizers,sentencepiece,filelock,yaml,psutil,einops
trainer+=,matplotlib,tensorboard
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 6); fi

if [[ -n ${WHEELS:-} ]]; then
    step wheels 60 "" "$python" tools/benchmarks/needed.py --wheels "$WHEELS" --target "$parts/site"
    export PYTHONPATH="$PYTHONPATH:$parts/site"
fi
step versions 30 "" "$python" tools/benchmarks/needed.py --device "$device" --out "$parts/versions.json"
if [[ $device == cuda ]]; then
    step build 90 "" env UFM_BUILD_CUDA=0 "$python" setup.py -q build_ext --inplace
fi
capability=90 # on a CPU the goal's
if [[ $device == cuda ]]; then
    capability=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
    if ((deadline - SECONDS >= 10)); then
        setsid "$python" tools/benchmarks/warm_kernels.py --capability "$capability" --out "$parts/warm.json" \
            >"$parts/warm.log" 2>&1 &
        warming=$!
    fi
    step build_cuda 90 "" "$python" setup.py -q build_ext --inplace
else
    step warm 120 triton "$python" tools/benchmarks/warm_kernels.py --capability "$capability" --processes 1 --part goal \
        --kernel "chunked: dlogits" --out "$parts/warm.json"
fi
step values 80 "" "$python" tools/benchmarks/check_values.py --device "$device" --out "$parts/values.json"
step toy 90 "$trainer" "$python" tools/benchmarks/train_toy_on.py --device "$device" --limit $((75 * scale)) \
    --out "$parts/toy.json"
benchmark llama2-13b 50 --preset llama2-13b --repeats 8 --skip torch.compile
benchmark llama3-8b 50 --preset llama3-8b --repeats 5 --skip torch.compile
benchmark llama2-13b_eighth 25 --preset llama2-13b --vocab 4000 --repeats 10 --skip torch.compile
benchmark llama3-8b_eighth 25 --preset llama3-8b --vocab 16032 --repeats 10 --skip torch.compile
if [[ $device == cuda ]]; then
    step tests 120 pytest "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/gpu
fi
step questions 40 triton "$python" tools/benchmarks/kernel_questions.py --device "$device" --out "$parts/questions.json"
step beside_plain 150 "$trainer" env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "$python" \
    tools/benchmarks/train_beside_plain.py --device "$device" --limit $((60 * scale)) --traces "$out" --out "$parts/beside_plain.json"
step loss_profile 40 "" "$python" tools/benchmarks/profile_loss.py --device "$device" --trace "$out/trace_loss.json.gz" \
    --out "$parts/loss_profile.json"
if [[ $device == cuda ]]; then
    step gate_kernels 30 "" "$python" tools/benchmarks/bench_gate_scale.py --out "$parts/gate_kernels.json"
    step layer_kernels 40 "" "$python" tools/benchmarks/bench_elementwise.py --out "$parts/layer_kernels.json"
    step tiles 90 "" "$python" tools/benchmarks/tune_kernels.py --out "$parts/tiles.json"
    benchmark llama2-13b_compiled 60 --preset llama2-13b --repeats 5 --skip megatron
    benchmark llama2-7b 40 --preset llama2-7b --repeats 5 --skip torch.compile
    benchmark qwen2.5-7b 60 --preset qwen2.5-7b --repeats 5 --skip torch.compile
    step checkpoint 60 "$trainer" "$python" tools/benchmarks/bench_checkpoint.py --device cuda --hidden 1024 --tokens 1024 \
        --rounds 3 --folder "$parts" --out "$parts/checkpoint.json"
    step host_states 30 "" "$python" tools/benchmarks/bench_host_states.py --out "$parts/host_states.json"
    cat "$parts/warm.log" 2>/dev/null || true
fi
collect

echo "wrote $out/$gpu.json"
timeout 30 "$python" tools/benchmarks/gpu_report.py "$out/$gpu.json" || failed+=" report"
if [[ -n $failed ]]; then
    echo "gpu_check: FAILED or left out:$failed"
    exit 1
fi
