"""Builds the extensions; everything else about the package stands in pyproject.toml.

The C++ extensions are required: without them the package does not install. The CUDA extension is a faster form of
something that PyTorch computes, too; the environment variable UFM_BUILD_CUDA says what becomes of it:

    auto  (default) built where nvcc is found and succeeds; else one line says why not and the CPU's part is installed
    1     built, or the installation fails with one line
    0     left out

None includes a torch header (raw pointers and a stream cross the border) and the CUDA runtime is linked statically,
so a wheel built once serves every torch and imports on a machine without a GPU.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup

CUDA_ARCHITECTURES = (80, 90, 100)
NVCC_TIMEOUT_S = 180  # ten times what it takes: a toolkit that hangs must not hang the installation

# No -march: the code carries one clone per x86 level. GCC leaves a loop with a comparison of floats scalar on AVX2, an
# exponential for one, unless it may forget that some program might have its floating-point exceptions trap.
ON_CPU = {
    "extra_compile_args": ["-O3", "-fopenmp-simd", "-fno-trapping-math", "-pthread"],
    "extra_link_args": ["-pthread"],
}
cpu_epilogue = Pybind11Extension(
    "ultrafuser_mega.ops._cpu_epilogue",
    sources=[f"csrc/cpu_{part}.cpp" for part in ("epilogue", "mixture", "distillation", "epilogue_module")],
    depends=[f"csrc/{part}.hpp" for part in ("cpu_epilogue", "cpu_distillation", "cpu_loops", "over_rows")],
    cxx_std=17,
    **ON_CPU,
)
cpu_elementwise = Pybind11Extension(
    "ultrafuser_mega.models._cpu_elementwise",
    sources=["csrc/cpu_elementwise.cpp", "csrc/cpu_elementwise_module.cpp"],
    depends=["csrc/cpu_elementwise.hpp", "csrc/cpu_loops.hpp", "csrc/over_rows.hpp"],
    cxx_std=17,
    **ON_CPU,
)
cuda_gate = Extension(
    "ultrafuser_mega.ops._cuda_gate",
    sources=["csrc/gate_kernels.cu", "csrc/gate_kernels_module.cpp"],
    depends=["csrc/gate_kernels.hpp"],
)


class BuildExtensions(build_ext):
    """Builds the C++ extensions as ever, and cuda_gate by one call of nvcc as UFM_BUILD_CUDA says.

    Where cuda_gate is not built, one of an earlier build goes, too: it would be packed or imported in its place.
    """

    def run(self) -> None:
        super().run()
        if cuda_gate not in self.extensions:
            self._remove_cuda()  # the copy that an in-place build made beside the sources

    def build_extensions(self) -> None:
        wanted = os.environ.get("UFM_BUILD_CUDA", "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"UFM_BUILD_CUDA: {wanted!r} is none of 0, 1, auto")
        self.extensions.remove(cuda_gate)
        super().build_extensions()
        if wanted == "0":
            self._remove_cuda()
            return
        try:
            self._build_cuda()
        except NoCudaError as reason:
            self._remove_cuda()
            if wanted == "1":
                raise SystemExit(f"UFM_BUILD_CUDA=1: {reason}") from None
            print(f"ultrafuser_mega: built without CUDA kernels: {reason}", flush=True)
        else:
            self.extensions.append(cuda_gate)  # from here on it is installed like any other

    def _build_cuda(self) -> None:
        nvcc = _nvcc()
        target = Path(self.get_ext_fullpath(cuda_gate.name))
        sources = [*cuda_gate.sources, *cuda_gate.depends]
        if (
            not self.force
            and target.exists()
            and all(Path(s).stat().st_mtime < target.stat().st_mtime for s in sources)
        ):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        # nothing of the static CUDA runtime may be visible outside: PyTorch has brought one of its own into the process
        hide = ["-Xlinker=--exclude-libs=ALL", "-Xlinker=-Bsymbolic", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command = [nvcc, "-shared", "-O3", "-std=c++17", "-cudart=static", *hide, *_architectures(nvcc), *include]
        part = target.with_name(f"{target.name}.part")  # a failed nvcc may leave a file, too
        try:
            _run([*command, "-o", str(part), *cuda_gate.sources])
            part.replace(target)
        except OSError as error:
            raise NoCudaError(f"{nvcc} succeeded but left no library: {error}") from None
        finally:
            part.unlink(missing_ok=True)

    def _remove_cuda(self) -> None:
        Path(self.get_ext_fullpath(cuda_gate.name)).unlink(missing_ok=True)


class NoCudaError(Exception):
    """Why the CUDA extension cannot be built, in one line."""


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [Path(home, "bin", "nvcc")] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if place and Path(place).is_file():
            return str(place)
    raise NoCudaError(f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH or in /usr/local/cuda/bin")


def _architectures(nvcc: str) -> list[str]:
    """Machine code for those of CUDA_ARCHITECTURES that this nvcc knows, and the newest one's PTX for GPUs to come."""
    known = _run([nvcc, "--list-gpu-code"]).split()
    built = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in known]
    if not built:
        raise NoCudaError(f"{nvcc} knows none of sm_{', sm_'.join(map(str, CUDA_ARCHITECTURES))}")
    codes = {arch: f"sm_{arch}" for arch in built}
    codes[built[-1]] = f"[sm_{built[-1]},compute_{built[-1]}]"
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes.items()]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVCC_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCudaError(f"{command[0]}: {error}".splitlines()[0][:300]) from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        worst = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise NoCudaError(f"{command[0]} failed with code {done.returncode}: {worst[:300]}")
    return done.stdout


setup(ext_modules=[cpu_epilogue, cpu_elementwise, cuda_gate], cmdclass={"build_ext": BuildExtensions})
