"""What tools/gpu_check.sh needs and a bare machine may lack: say it, and install it from wheels that travelled along.

    python tools/benchmarks/needed.py                            versions of everything, and what is missing
    python tools/benchmarks/needed.py --missing yaml,rich        of these modules, those that cannot be imported
    python tools/benchmarks/needed.py --wheels FOLDER --target SITE    install those packages that are missing

Standard library alone, and torch where it is there.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MODULES = {  # package: what it is imported as
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "pybind11": "pybind11",
    "setuptools": "setuptools",
    "pytest": "pytest",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
    "megatron-core": "megatron.core",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "sentencepiece": "sentencepiece",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic_core",
    "annotated-types": "annotated_types",
    "typing-inspection": "typing_inspection",
    "typer": "typer",
    "annotated-doc": "annotated_doc",
    "rich": "rich",
    "filelock": "filelock",
    "pyyaml": "yaml",
    "psutil": "psutil",
    "einops": "einops",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
}
PEERS = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "apex": "apex.multi_tensor_apply"}
PROGRAMS = ("nvcc", "c++", "nvidia-smi")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", help="modules, separated by commas")
    parser.add_argument("--wheels", type=Path, help="folder of wheels")
    parser.add_argument("--target", type=Path, help="folder to install into")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.missing:
        print(", ".join(module for module in arguments.missing.split(",") if not is_there(module)))
    elif arguments.wheels:
        if arguments.target is None:
            parser.error("--wheels: needs --target, the folder to install into")
        install(arguments.wheels, arguments.target)
    else:
        found = report(arguments.device)
        print(json.dumps(found, indent=1))
        if arguments.out:
            arguments.out.write_text(json.dumps(found) + "\n")


def is_there(module: str) -> bool:
    """Whether it would be found; nothing is imported but its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def report(device: str) -> dict[str, object]:
    """Versions of packages and programs, the device, and the missing packages."""
    found: dict[str, object] = {"python": platform.python_version()}
    found["packages"] = {name: version_of(name) for name, module in (MODULES | PEERS).items() if is_there(module)}
    found["missing"] = [name for name, module in MODULES.items() if not is_there(module)]
    found["programs"] = {name: shutil.which(name) for name in PROGRAMS}
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "nccl": list(torch.cuda.nccl.version()),
        }
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        found["nvidia_smi"] = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return found


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def install(wheels: Path, target: Path) -> None:
    """Of the folder's wheels those whose package is missing here, into ``target``."""
    if not wheels.is_dir():
        sys.exit(f"needed.py: --wheels: {wheels} is not a folder; tools/gpu_wheels.sh makes one")
    chosen = [wheel for wheel in sorted(wheels.glob("*.whl")) if not is_installed(wheel)]
    print("missing here, installed from wheels:", ", ".join(wheel.name.split("-")[0] for wheel in chosen) or "nothing")
    if chosen:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command += ["--target", str(target), *map(str, chosen)]
        sys.exit(subprocess.run(command).returncode)


def is_installed(wheel: Path) -> bool:
    try:
        version(wheel.name.split("-")[0])
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
