"""A checkpoint as the released model class, its tensors read one at a time as an export reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS
from ultrafuser_mega.checkpoint.locate import find_checkpoint
from ultrafuser_mega.convert.restore import TrainedModel
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.dtypes import narrowed
from ultrafuser_mega.release import CardFacts, assemble_release
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM


class RestoredModel:
    """What a checkpoint would be as a release folder.

    Args:
        folder: the checkpoint; a run's folder stands for its newest.
        described: an empty folder, which gets everything of a release folder but the weights.

    Attributes:
        config: of the model.

    Raises:
        InputError: not a checkpoint, or one of single specialists.
    """

    def __init__(self, folder: Path, described: Path) -> None:
        folder = find_checkpoint(folder)
        if not (folder / PROGRESS).is_file():
            raise InputError(
                f"{folder}: expected what ultrafuser export wrote, a checkpoint, or the folder of a run (runs/<name>)"
            )
        self._trained = trained = TrainedModel(folder)
        if not trained.fused:
            raise InputError(f"{folder}: was imported from single folders; a fused model needs a configuration")
        self._dtype = trained.tensors.dtype("gate.b1")
        parts = {name: (source.folder, source.template) for name, source in trained.sources.items()}
        card = CardFacts(name=folder.name, config=None, summary=None)
        shared = "gate.w1.shared" in trained.tensors
        self.config = assemble_release(
            described, parts, trained.vocab_size, trained.gate_units, shared, self._dtype, card
        )
        self.config.name_or_path = str(described)  # where chat_ids looks for tokenizers of single specialists

    @torch.no_grad()
    def load(self, dtype: torch.dtype | None) -> UltraFuserForCausalLM:
        """The model on the CPU, in ``dtype`` or in that of the checkpoint.

        Raises:
            InputError: the checkpoint is damaged, or holds a value that is beyond ``dtype``.
        """
        dtype = dtype or self._dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with no_init_weights():
                model = UltraFuserForCausalLM(self.config)
        finally:
            torch.set_default_dtype(before)
        for name in self.config.names:
            part = self._trained.specialist(name)
            for tensor in part.shapes:
                key = f"specialists.{name}.{tensor}"
                model.get_parameter(key).copy_(self._narrowed(key, part.read(tensor), dtype))
        for key in self._trained.gate_keys():
            model.get_parameter(key).copy_(self._narrowed(key, self._trained.gate(key), dtype))
        return model

    def _narrowed(self, key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        return narrowed(value, dtype, f"{self._trained.folder}: tensor {key}")
