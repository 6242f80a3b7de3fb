"""What this machine has: versions, device, backend, optional accelerators, and what is missing for what."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

REQUIRED = ("torch", "megatron-core", "transformers", "sentencepiece", "safetensors", "numpy", "pydantic")


@dataclass(frozen=True)
class Accelerator:
    """An optional package: what it is imported as, what it brings, and a module only the real one has."""

    name: str
    module: str
    purpose: str


OPTIONAL = (
    Accelerator("triton", "triton", "the loss kernels on GPUs"),
    # The package called apex on PyPI is another project; NVIDIA's has this module.
    Accelerator("apex", "apex.multi_tensor_apply", "Megatron's fused AdamW and gradient norm on GPUs"),
    Accelerator("transformer-engine", "transformer_engine", "the same, preferred to apex where both are there"),
    Accelerator("flash-attn", "flash_attn", "nothing yet: attention runs in torch's SDPA, which has flash kernels"),
)


def report(console: Console) -> bool:
    """Print what was found; False when something required is missing."""
    table = Table("what", "found", "for", title="ultrafuser doctor", title_justify="left")
    table.add_row("python", platform.python_version(), "")
    healthy = True
    for name in REQUIRED:
        found = _version(name)
        healthy &= found is not None
        table.add_row(name, found or "[red]missing: pip install -e .[/]", "required")
    modules = ("ultrafuser_mega.ops._cpu_epilogue", "ultrafuser_mega.models._cpu_elementwise")
    built = all(importlib.util.find_spec(module) is not None for module in modules)
    healthy &= built
    state = "built" if built else "[red]not built: pip install -e .[/]"
    table.add_row("C++ extensions", state, "the loss and layers on CPUs")
    for name, found, purpose in _devices():
        table.add_row(name, found, purpose)
    for accelerator in OPTIONAL:
        table.add_row(accelerator.name, _optional(accelerator), accelerator.purpose)
    console.print(table)
    return healthy


def _devices() -> list[tuple[str, str, str]]:
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        return [("device", f"cpu ({cpu})", "every rank"), ("backend", "gloo", "all collectives")]
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return [
        ("device", f"cuda: {names}", "one GPU per rank"),
        ("backend", f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))} and gloo", "CUDA and CPU tensors"),
    ]


def _optional(accelerator: Accelerator) -> str:
    try:
        present = importlib.util.find_spec(accelerator.module) is not None
    except ModuleNotFoundError:
        present = False
    if not present:
        return "not found"
    note = "" if torch.cuda.is_available() else " (no GPU here: not used)"
    return f"{_version(accelerator.name) or 'found'}{note}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
