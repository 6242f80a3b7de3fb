#!/usr/bin/env bash
# Put into FOLDER, as wheels for x86-64 Linux, what tools/gpu_check.sh needs beside torch, triton and numpy, to be
# carried to a machine without a network:
#
#     tools/gpu_wheels.sh FOLDER [PYTHON'S VERSION THERE, default 3.12] [PACKAGE...]
#     WHEELS=FOLDER tools/gpu_check.sh          there
#
# Without PACKAGEs everything, 60 MiB. `tools/gpu_check.sh` names those that its machine lacks; often that is
# megatron-core, pydantic and what this needs, 5 MiB. gpu_check.sh installs of FOLDER only what is missing there.
set -euo pipefail
folder=${1:?gpu_wheels: name the folder for the wheels}
version=${2:-3.12}
packages=("${@:3}")
python=${PYTHON:-python3}
if ((${#packages[@]} == 0)); then
    packages=(
        "megatron-core>=0.16.1,<0.17" "transformers>=5.0,<5.24" "tokenizers>=0.22,<0.24" "huggingface-hub<3"
        "httpx2" "httpcore2" "anyio" "idna" "h11" "truststore" "fsspec"
        "safetensors>=0.6,<0.9" "sentencepiece>=0.2,<0.3" "regex" "tqdm" "packaging" "pyyaml>=6,<7" "jinja2" "markupsafe"
        "pydantic>=2.10,<3" "pydantic-core" "annotated-types" "typing-inspection" "typing-extensions"
        "typer>=0.20,<0.30" "annotated-doc" "click" "shellingham" "rich>=14,<16" "markdown-it-py" "mdurl" "pygments"
        "filelock>=3.16,<5" "psutil>=6,<8" "einops>=0.8,<0.9"
        "tensorboard>=2.18,<3" "protobuf" "absl-py" "markdown" "werkzeug"
        "matplotlib>=3.9,<4" "contourpy" "cycler" "fonttools" "kiwisolver" "pillow" "pyparsing" "python-dateutil" "six"
        "pytest>=8,<10" "iniconfig" "pluggy" "pytest-timeout>=2.3,<3" "pytest-xdist" "execnet" "pybind11>=3.0,<3.2"
        "setuptools>=77,<85"
    )
fi
platforms=()
for name in manylinux2014 manylinux1 manylinux2010 manylinux_2_12 manylinux_2_17 manylinux_2_24 manylinux_2_27 manylinux_2_28; do
    platforms+=(--platform "${name}_x86_64")
done
mkdir -p "$folder"
# pydantic and pydantic-core of one release belong together, and only pip's own resolution knows which do
pinned=()
for package in "${packages[@]}"; do
    [[ $package == pydantic-core* ]] || pinned+=("$package")
done
"$python" -m pip download -q --dest "$folder" --only-binary=:all: --no-deps \
    --python-version "$version" --implementation cp "${platforms[@]}" "${pinned[@]}"
if ((${#pinned[@]} < ${#packages[@]})); then
    core=$(unzip -p "$folder"/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
    "$python" -m pip download -q --dest "$folder" --only-binary=:all: --no-deps \
        --python-version "$version" --implementation cp "${platforms[@]}" "pydantic-core==$core"
fi
bytes=$(du -cb "$folder"/*.whl | tail -1 | cut -f1)
echo "$(ls "$folder"/*.whl | wc -l) wheels for Python $version in $folder: $((bytes / 1048576)) MiB"
if ((bytes > 62 << 20)); then
    echo "gpu_wheels: more than 62 MiB, which with the checkout is more than 64; name the packages that are missing there" >&2
    exit 1
fi
