"""State on the host beside an optimizer that keeps its own on the device, of parameters that blocks cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ultrafuser_mega.runtime.host_states import HostStates, Updated

SHAPES = [(37, 41), (1,), (300,), (13, 64)]
STEPS = 5
_GROUPS: list[dict[str, Any]] = [
    {"betas": (0.9, 0.95), "eps": 1e-8, "lr": 1e-2, "weight_decay": 0.1},
    {"betas": (0.9, 0.95), "eps": 1e-8, "lr": 3e-2, "weight_decay": 0.0},
]


def assert_updated_as_on_the_device(device: torch.device, dtype: torch.dtype, scale: int = 1, **options: Any) -> None:
    """Several updates of either, of two parameter groups, nobody waiting between them; then all is the same.

    Args:
        device: the parameters'.
        dtype: theirs.
        scale: how many times as many rows they have.
        options: of :class:`HostStates`.
    """
    generator = torch.Generator().manual_seed(3)
    shapes = [(scale * rows, *rest) for rows, *rest in SHAPES]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    parameters = [nn.Parameter(one.clone()) for one in drawn]
    whole = [nn.Parameter(one.float()) for one in drawn]
    mains = [p if dtype == torch.float32 else p.detach().float() for p in parameters]
    updated = [Updated(p, slice(None), mains[at], _GROUPS[at % 2]) for at, p in enumerate(parameters)]
    host = HostStates(updated, device, **options)
    assert len(host.runs(parameters[0])["exp_avg"]) > 2
    usual = torch.optim.AdamW([group | {"params": whole[at::2]} for at, group in enumerate(_GROUPS)], fused=True)
    gradients = [[torch.randn(shape, generator=generator).to(device) for shape in shapes] for _ in range(STEPS)]
    for of_step in gradients:
        for main, one, gradient in zip(mains, whole, of_step, strict=True):
            main.grad, one.grad = gradient, gradient.clone()
        host.update()
        usual.step()
    host.settle()
    for parameter, one in zip(parameters, whole, strict=True):
        assert torch.equal(parameter, one.to(dtype))
        for kind, runs in host.runs(parameter).items():
            expected = one.detach() if kind == "param" else usual.state[one][kind]
            assert torch.equal(torch.cat([run for run, _ in runs]), expected.cpu().view(-1)), kind
            assert [first for _, first in runs] == sorted(first for _, first in runs)
    assert host.nbytes >= sum(p.numel() for p in parameters) * (8 if dtype == torch.float32 else 12)
