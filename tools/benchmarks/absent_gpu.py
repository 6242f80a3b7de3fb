"""A GPU that is not there, as Triton's own launch path sees it: kernels are specialised and compiled as for the real
one, stored in Triton's cache on disk under the same keys, and stopped where the driver would be called.

Tensors may lie in the CPU's memory; nothing reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ultrafuser_mega.ops import streaming_tiles

SHARED_BYTES = 227 << 10  # that one program may have on 9.0


@dataclass(frozen=True)
class Launch:
    kernel: str
    programs: int
    shared_bytes: int
    descriptor_bytes: int


class AbsentGpu:
    """What Triton asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.target, self.utils = GPUTarget("cuda", capability, 32), self
        self.launches: list[Launch] = []
        self.launcher_cls = lambda source, metadata: self._launcher(metadata)

    def stand_in(self) -> None:
        """From here on the kernels of this process are this GPU's."""
        driver.set_active(self)

        def capability(tensor: Tensor) -> int:
            return self.capability

        streaming_tiles.capability = capability

    def _launcher(self, metadata: Any) -> Callable[..., None]:
        def launch(programs: int, _y: int, _z: int, *_rest: object) -> None:
            found = Launch(metadata.name, programs, metadata.shared, metadata.global_scratch_size)
            self.launches.append(found)

        return launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, *_arguments: object) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, _module: int) -> None:
        pass
