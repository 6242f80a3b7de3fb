"""GPUs that a run can be planned for, and what is assumed of how well the program uses one.

Figures are per GPU, for the SXM boards with eight GPUs on NVSwitch: dense bf16 without sparsity, links per direction.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser_mega.errors import InputError

GIB = 2**30
GPUS_PER_NODE = 8  # of the nodes that people rent


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links.

    Attributes:
        flops: bf16 matrix products per second, dense.
        memory: bytes that CUDA reports.
        bandwidth: of the memory, bytes/s.
        node_bandwidth: to the other GPUs of its node, bytes/s and direction.
        network_bandwidth: to other nodes, bytes/s and direction.
        host_bandwidth: to the host's memory, bytes/s and direction.
    """

    flops: float
    memory: float
    bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float


#: What ``--gpu`` names.
GPUS: dict[str, Gpu] = {
    # NVIDIA A100 datasheet (2021): 312 TFLOPS bf16, 1,555 GB/s, NVLink 600 GB/s both ways; DGX A100: one 200 Gb/s
    # HDR port a GPU. 40 GB read as 40,960 MiB, of which CUDA reports 39.4 GiB. PCIe 4.0 x16 to the host.
    "a100-40g": Gpu(
        flops=312e12,
        memory=39.4 * GIB,
        bandwidth=1.555e12,
        node_bandwidth=300e9,
        network_bandwidth=25e9,
        host_bandwidth=32e9,
    ),
    # The same sheet: 2,039 GB/s; 81,920 MiB, of which CUDA reports 79.2 GiB.
    "a100-80g": Gpu(
        flops=312e12,
        memory=79.2 * GIB,
        bandwidth=2.039e12,
        node_bandwidth=300e9,
        network_bandwidth=25e9,
        host_bandwidth=32e9,
    ),
    # NVIDIA H100 datasheet (2023): 1,979 TFLOPS bf16 with sparsity, half of it dense (989.4), 3.35 TB/s, NVLink
    # 900 GB/s both ways; DGX H100: one 400 Gb/s NDR port a GPU. 81,559 MiB, of which CUDA reports 79.1 GiB.
    # PCIe 5.0 x16 to the host.
    "h100-80g": Gpu(
        flops=989.4e12,
        memory=79.1 * GIB,
        bandwidth=3.35e12,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
    ),
    # NVIDIA H200 datasheet (2024): the H100's products and links, 4.8 TB/s; 143,771 MiB, of which CUDA reports
    # 139.8 GiB.
    "h200-141g": Gpu(
        flops=989.4e12,
        memory=139.8 * GIB,
        bandwidth=4.8e12,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
    ),
    # NVIDIA DGX B200 datasheet (2024), an eighth of it: 72 PFLOPS FP8 with sparsity, a quarter of it bf16 and dense,
    # 64 TB/s, 1,440 GB, NVLink 14.4 TB/s both ways; one 400 Gb/s port a GPU. About 178 GiB are CUDA's.
    "b200-180g": Gpu(
        flops=2.25e15,
        memory=178 * GIB,
        bandwidth=8e12,
        node_bandwidth=900e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
    ),
}


#: What CUDA calls GPUs of these products; boards with fewer (H100 PCIe, H200 NVL, MIG slices) are not among them.
_NAMES = {
    "A100-SXM4-40GB": "a100-40g",
    "A100-PCIE-40GB": "a100-40g",
    "A100-SXM4-80GB": "a100-80g",
    "A100 80GB PCIe": "a100-80g",
    "H100 80GB HBM3": "h100-80g",
    "GH200 480GB": "h100-80g",
    "H200": "h200-141g",
    "B200": "b200-180g",
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """bf16 matrix products per second of a GPU, by the name that CUDA gives it; None where they are not known.

    Args:
        device_name: as in "NVIDIA H100 80GB HBM3".
        dtype: of the run; only "bf16" is compared with them.
    """
    found = _NAMES.get(device_name.removeprefix("NVIDIA "))
    return GPUS[found].flops if found is not None and dtype == "bf16" else None


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """How much of a GPU the program gets. BELIEVE RATIOS, NOT DIGITS: no step has been timed on a GPU yet.

    Two layouts compare well, since what is wrong here is wrong in both; a predicted second may be 30 % off.

    Attributes:
        gemm: share of ``Gpu.flops`` that matrix products reach, attention's among them.
        hbm: share of ``Gpu.bandwidth`` that everything else reaches.
        links: share of ``node_bandwidth`` that a collective's bytes reach; 340 of 450 GB/s on H100.
        network: the same of ``network_bandwidth``; 42 of 50 GB/s.
        pcie: share of ``host_bandwidth`` that copies of pinned memory reach.
        host_memory: bytes/s that a node's memory gives all its GPUs' copies together, both directions: two thirds of
            two sockets' eight channels of DDR5-4800.
        hidden: share of a collective that a product beside it hides at the most: both want multiprocessors and memory.
        parts: time of two products of half the rows in parts of the whole's: more of a last wave of tiles idles.
        latency: seconds that a collective takes before its first byte.
        kernel: seconds that the shortest kernel takes.
        operation: seconds of host thread per dispatched operation; 5.4 us were measured over a training step.
        collective: seconds of host thread per collective.
        step: seconds of host thread per step for data, logging and the one wait for the device.
        reserved: bytes that are not the program's: CUDA's context, NCCL's buffers, fragmentation.
    """

    gemm: float = 0.70
    hbm: float = 0.80
    links: float = 0.75
    network: float = 0.84
    pcie: float = 0.8
    host_memory: float = 400e9
    hidden: float = 0.8
    parts: float = 1.15
    latency: float = 15e-6
    kernel: float = 2.5e-6
    operation: float = 5.4e-6
    collective: float = 25e-6
    step: float = 20e-3
    reserved: float = 5 * GIB


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs; ranks fill one node after the other."""

    gpu: Gpu
    gpus_per_node: int = GPUS_PER_NODE
    assumed: Assumptions = Assumptions()

    @property
    def room(self) -> float:
        """Bytes of a GPU that a rank may use."""
        return self.gpu.memory - self.assumed.reserved

    def bus(self, ranks: int, nodes: int) -> float:
        """Bytes/s at which a ring of ``ranks`` over ``nodes`` passes bytes on.

        Between nodes a collective's rings leave by the network ports of all its ranks in a node, so those add up.
        """
        inside = self.gpu.node_bandwidth * self.assumed.links
        if nodes == 1:
            return inside
        return min(inside, self.gpu.network_bandwidth * self.assumed.network * max(1, ranks // nodes))


def named_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        InputError: there is none; lists those there are.
    """
    if name not in GPUS:
        raise InputError(f"--gpu {name}: not known; one of {', '.join(GPUS)}")
    return GPUS[name]
