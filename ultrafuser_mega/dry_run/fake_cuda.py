"""Builds and loads fake_cuda.cpp, with which a PyTorch without CUDA runs a backward over fake CUDA tensors.

It must be loaded before torch is imported, and stays for the life of the process. So this module imports torch nowhere,
and a process that loads it does nothing but dry runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ultrafuser_mega.errors import InputError

_SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def load_fake_cuda() -> None:
    """Have CUDA devices that compute nothing; takes seconds the first time, then the library is found in a cache.

    Raises:
        InputError: there is no compiler, it fails, or PyTorch was built for CUDA and needs the real thing.
    """
    if "torch" in sys.modules:
        raise RuntimeError("load_fake_cuda() comes before torch is imported")
    version = importlib.metadata.version("torch")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        raise InputError(f"device=cuda: torch {version} is built for CUDA, the dry run's GPU needs one that is not")
    key = hashlib.blake2b(_SOURCE.read_bytes() + f"{version} {torch_folder}".encode(), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ultrafuser_mega"
    library = cache / f"fake_cuda-{key}.so"
    if not library.exists():
        _build(library, torch_folder)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _build(library: Path, torch_folder: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise InputError("device=cuda: the dry run's GPU needs a C++ compiler; install g++, or set device=cpu")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part = Path(folder) / library.name
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(_SOURCE)]
        command += ["-o", str(part), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        command.append(f"-Wl,-rpath,{torch_folder / 'lib'}")
        built = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if built.returncode:
            lines = [line for line in built.stderr.splitlines() if "error" in line] or built.stderr.splitlines()
            why = f": {lines[0].strip()}" if lines else ""
            raise InputError(f"device=cuda: {compiler} cannot build the dry run's GPU{why}; set device=cpu")
        part.replace(library)  # others may be building the same
