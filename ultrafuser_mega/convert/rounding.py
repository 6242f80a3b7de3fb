"""The values that a checkpoint's weights have once they are exported: rounded to the types their specialists came with.

An export of fp32 weights to a bf16 folder changes every weight by up to 2^-9 of itself. A comparison that is to find
wrong tensors, not this, applies the rounding to the checkpoint too: element by element, where the weights lie in
Megatron's layout, so that it shares nothing with the code that puts exported tensors together.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ultrafuser_mega.convert.restore import RestoredSpecialist, TrainedModel
from ultrafuser_mega.models.families import FAMILIES
from ultrafuser_mega.models.families.rules import Rule
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.models.hf_folder import EMBEDDING, FINAL_NORM, HEAD


@torch.no_grad()
def round_as_exported(model: FusedStage, trained: TrainedModel, *, with_gate: bool) -> None:
    """Round every weight of an unsharded model, in place and in its own element type.

    Args:
        model: holds the weights of ``trained``.
        trained: the checkpoint, which knows the types.
        with_gate: whether the model's gate is the checkpoint's.
    """
    fusion = model.fusion
    assert fusion is not None
    for name, stage in model.stages.items():
        source = trained.specialist(name)
        _round(stage.embedding.word_embeddings.weight, source.dtype(EMBEDDING))
        _round(stage.decoder.final_layernorm.weight, source.dtype(FINAL_NORM))
        _round(fusion.heads[name], source.dtype(HEAD))
        if name in fusion.tails:
            _round(fusion.tails[name], source.dtype(HEAD))
        for layer in stage.decoder.layers:
            parameters = dict(layer.named_parameters())
            for rule in FAMILIES[source.arch.family].rules:
                _round_layer(parameters[rule.parameter], rule, source, layer.layer_number - 1)
    if with_gate:
        for parameter in fusion.gate.parameters():
            _round(parameter, trained.gate_dtype())


def _round_layer(weight: Tensor, rule: Rule, source: RestoredSpecialist, layer: int) -> None:
    shapes = rule.shapes(source.arch)
    dtypes = {part: source.dtype(f"model.layers.{layer}.{part}") for part in shapes}
    for dtype in set(dtypes.values()):  # parts that are fused into one weight may differ
        chosen = rule.shard(source.arch, partial(_marks, shapes, dtypes, dtype), 0, 1)
        _round(weight, dtype, chosen)


def _marks(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype,
    part: str,
    **whole: slice,
) -> Tensor:
    """Stands for a Hugging Face tensor when a weight is put together: whether it is of ``dtype``."""
    return torch.full(shapes[part], dtypes[part] == dtype)


def _round(weight: Tensor, dtype: torch.dtype, chosen: Tensor | bool = True) -> None:
    weight.copy_(torch.where(torch.as_tensor(chosen), weight.to(dtype).to(weight.dtype), weight))
