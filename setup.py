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
    package_data={"ultrafuser_mega.ops": ["*.pyi"]},
    ext_modules=[cpu_epilogue],
    cmdclass={"build_ext": build_ext},
    install_requires=["torch>=2.11", "numpy"],
)
