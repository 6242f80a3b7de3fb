"""Builds the C++ extension and names the package; pyproject.toml holds the tools' configuration.

The extension is required: without it the package does not install. It includes no torch header (raw pointers cross
its border), so a wheel built once serves every torch version.
"""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_namespace_packages, setup

cpu_epilogue = Pybind11Extension(
    "ultrafuser_mega.ops._cpu_epilogue",
    sources=["csrc/cpu_epilogue.cpp", "csrc/cpu_epilogue_module.cpp"],
    depends=["csrc/cpu_epilogue.hpp"],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp-simd", "-pthread"],  # no -march: the code carries one clone per x86 level
    extra_link_args=["-pthread"],
)

setup(
    name="ultrafuser_mega",
    version="0.1.0",
    description="A distributed trainer that fuses specialised language models through a token-level gate",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["ultrafuser_mega", "ultrafuser_mega.*"]),
    package_data={"ultrafuser_mega": ["default.yaml"], "ultrafuser_mega.ops": ["*.pyi"]},
    ext_modules=[cpu_epilogue],
    cmdclass={"build_ext": build_ext},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.16.1,<0.17",
        "transformers>=5.0,<5.24",
        "sentencepiece>=0.2,<0.3",
        "tokenizers>=0.22,<0.24",
        "safetensors>=0.6,<0.9",
        "numpy>=2.0,<2.4",
        # Megatron-core uses these without asking for them; without psutil its checkpoint save hangs.
        "psutil>=6,<8",
        "einops>=0.8,<0.9",
        # CUDA builds of torch bring the Triton they were built with; elsewhere this one runs the kernels' tests.
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "pydantic>=2.10,<3",
        "pyyaml>=6,<7",
        "typer>=0.20,<0.30",
        "rich>=14,<16",
        "filelock>=3.16,<5",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "dev": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "hypothesis>=6.100,<7",
            "ruff>=0.14,<0.18",
            "mypy>=1.18,<3",
            "import-linter>=2.5,<3",
            "types-PyYAML>=6,<7",
        ],
    },
    entry_points={"console_scripts": ["ultrafuser=ultrafuser_mega.cli:main"]},
)
