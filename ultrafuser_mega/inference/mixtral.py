"""Tensors of a Mixtral's folder as transformers' class holds them: the experts' matrices in one.

In the folder every expert has its own, as Mistral published them; the trainer computes no Mixtral, only answers come
from one (``ultrafuser baseline btx``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrafuser_mega.models.hf_folder import TensorFolder

MODEL_TYPE = "mixtral"


def mixtral_tensor(tensors: TensorFolder, name: str, experts: int) -> Tensor:
    """A parameter of ``MixtralForCausalLM`` by its name.

    Args:
        tensors: of the folder.
        name: as the class calls it.
        experts: how many there are to a layer.
    """
    layer, inner, matrix = name.partition(".mlp.")
    if not inner:
        return tensors.read(name)
    block = f"{layer}.block_sparse_moe"
    if matrix == "gate.weight":
        return tensors.read(f"{block}.gate.weight")
    parts = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}[matrix]
    return torch.stack(
        [
            torch.cat([tensors.read(f"{block}.experts.{number}.{part}.weight") for part in parts])
            for number in range(experts)
        ]
    )
