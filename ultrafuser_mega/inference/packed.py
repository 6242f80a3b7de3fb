"""Linear layers of models on a CPU, their float32 weights as oneDNN lays them out.

A decoding step multiplies a few rows with every weight of a model. torch's own product looks at weights as they are
stored and rearranges them in every step; oneDNN's reads them as they were laid out once: half of the time for 4 rows of
SmolLM2-135M, 0.6 of it for 16. The numbers differ by the order of summation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 16  # that the layout is chosen for; others are not much slower


class PackedLinear(nn.Module):
    """A linear layer without gradients.

    Args:
        linear: the layer, float32 on the CPU.
        counts: whether its weight is a parameter of the model; False: it is that of another layer, too.
    """

    def __init__(self, linear: nn.Linear, counts: bool) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        if counts:
            self.weight = nn.Parameter(packed, requires_grad=False)
        else:
            self.register_buffer("weight", packed)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:  # (..., d) -> (..., e)
        """The layer's output."""
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Lay out the weights of a model that is to answer, in place: those of float32 linear layers on the CPU.

    A weight that an embedding shares is held twice. Nothing has gradients afterwards.
    """
    model.requires_grad_(False)
    if not torch.backends.mkldnn.is_available():
        return
    shared = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    # Names alone are listed: a layer's memory is free when the next one is laid out.
    for owner in [part for part in model.modules() if type(part) is not nn.Linear]:
        for name in [name for name, part in owner.named_children() if _is_packed(part)]:
            part = owner.get_submodule(name)
            assert isinstance(part, nn.Linear)
            setattr(owner, name, PackedLinear(part, counts=id(part.weight) not in shared))


def _is_packed(part: nn.Module) -> bool:
    return type(part) is nn.Linear and part.weight.dtype == torch.float32 and part.weight.device.type == "cpu"
