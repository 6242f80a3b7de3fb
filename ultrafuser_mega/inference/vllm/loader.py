"""The weights of one engine's model, read one tensor at a time from wherever the fused model lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ultrafuser_mega.inference.stored import StoredModel, stored_release
from ultrafuser_mega.inference.vllm.part import Part
from ultrafuser_mega.models.dtypes import narrowed
from ultrafuser_mega.models.hf_folder import HEAD, hf_shapes, parse_architecture
from ultrafuser_mega.release.check import is_release


class FusedLoader(BaseModelLoader):
    """vLLM's loader of the format "ultrafuser"."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing is downloaded."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill ``model``; raises InputError where the folder is damaged or a value is beyond the element type."""
        part = Part.of(model_config.hf_config)
        with ExitStack() as stack:
            stored = _stored(part.model, stack)
            model.load_weights(_tensors(stored, part, model_config.dtype))  # type: ignore[operator]


def _stored(model: str, stack: ExitStack) -> StoredModel:
    if Path(model).is_dir() and is_release(Path(model)):
        return stored_release(Path(model), None)
    from ultrafuser_mega.inference.address import Address  # brings Megatron: seconds

    return Address.parse(model).stored(stack)


def _tensors(stored: StoredModel, part: Part, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The specialist's tensors but for its head; the gate and every specialist's head where tokens are chosen."""
    own = parse_architecture(Path(f"{stored.origin}: {part.name}"), stored.config.entry(part.name)["config"])
    sources = {tensor: f"specialists.{part.name}.{tensor}" for tensor in hf_shapes(own) if tensor != HEAD}
    if part.leads:
        sources |= {f"heads.{name}.weight": f"specialists.{name}.{HEAD}" for name in part.widths}
        firsts = ["shared"] if part.gate_shared else list(part.widths)
        gate = ["gate.b1", "gate.w2", *(f"gate.w1.{name}" for name in firsts)]
        sources |= dict(zip(gate, gate, strict=True))
    for name, source in sources.items():
        value = narrowed(stored.read(source), dtype, f"{stored.origin}: tensor {source}")
        yield name, value[: part.vocab_size] if name.startswith("heads.") else value
