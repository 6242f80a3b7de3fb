"""Weights that lie somewhere, as the released model class: a release, a checkpoint, a model's folder, or a part of one.

Whatever it is becomes a fused model of n specialists, n = 1 included: the gate's weight of a single one is 1. Tensors
are read one at a time, as an export reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from ultrafuser_mega.data.templates import TEMPLATE_NAMES
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.mixtral import MODEL_TYPE, mixtral_tensor
from ultrafuser_mega.models.dtypes import narrowed
from ultrafuser_mega.models.hf_folder import EMBEDDING, HEAD, TensorFolder, read_architecture, read_json_object
from ultrafuser_mega.release import CardFacts, assemble_release
from ultrafuser_mega.release.check import check_release
from ultrafuser_mega.release.configuration_ultrafuser import UltraFuserConfig
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

#: The name of a model that is no specialist of anything.
ALONE = "model"


@dataclass(frozen=True)
class StoredModel:
    """A model's description, and where its weights are read.

    Attributes:
        origin: what it was made of, for messages.
        described: a release folder but for the weights.
        config: of the model.
        dtype: element type of the stored weights.
        read: name of a parameter -> its value.
    """

    origin: Path
    described: Path
    config: UltraFuserConfig
    dtype: torch.dtype
    read: Callable[[str], Tensor]

    def without_weights(self, dtype: torch.dtype | None, device: str = "meta") -> UltraFuserForCausalLM:
        """The model, nothing in its parameters."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or self.dtype)
        try:
            with no_init_weights(), torch.device(device):
                return UltraFuserForCausalLM(self.config)
        finally:
            torch.set_default_dtype(before)

    @torch.no_grad()
    def load(self, dtype: torch.dtype | None) -> UltraFuserForCausalLM:
        """The model on the CPU, in ``dtype`` or in that of the weights.

        Raises:
            InputError: the weights are damaged, or hold a value that is beyond ``dtype``.
        """
        dtype = dtype or self.dtype
        model = self.without_weights(dtype, "cpu")
        for name, parameter in model.named_parameters():
            parameter.copy_(narrowed(self.read(name), dtype, f"{self.origin}: tensor {name}"))
        return model


def stored_release(folder: Path, part: str | None) -> StoredModel:
    """What ``ultrafuser export`` wrote, or one specialist of it.

    Raises:
        InputError: the folder is damaged.
    """
    config = check_release(folder)
    tensors = TensorFolder(folder)
    if part is not None:
        config = _alone(config, part, folder)
    first = f"specialists.{config.names[0]}.{EMBEDDING}"
    return StoredModel(folder, folder, config, getattr(config, "dtype", None) or tensors.dtype(first), tensors.read)


def stored_checkpoint(folder: Path, part: str | None, described: Path) -> StoredModel:
    """A checkpoint, or one specialist of it.

    Args:
        folder: the checkpoint.
        part: the specialist's name; None: the fused model.
        described: an empty folder, which gets everything of a release folder but the weights.

    Raises:
        InputError: it has no fused model.
    """
    from ultrafuser_mega.checkpoint.sources import stored_type
    from ultrafuser_mega.convert.restore import TrainedModel  # brings Megatron: seconds

    trained = TrainedModel(folder)
    if part is None and not trained.fused:
        raise InputError(f"{folder}: was imported from single folders; a fused model needs a configuration")
    names = list(trained.sources) if part is None else [part]
    specialists = {name: trained.specialist(name) for name in names}
    # Also of a specialist alone: its answers end as those of all were trained to.
    along = list(trained.sources) if trained.fused else names
    keys = trained.gate_keys() if trained.fused and part is None else []
    shared = part is None and (not keys or "gate.w1.shared" in keys)  # widths may differ
    dtype = stored_type(trained.tensors)
    config = _describe(
        described,
        {name: (trained.sources[name].folder, trained.sources[name].template) for name in along},
        trained.vocab_size,
        trained.gate_units if keys else 1,
        shared,
        dtype,
        folder.name,
    )
    if part is not None:
        config = _alone(config, part, described)

    def read(name: str) -> Tensor:
        if name.startswith("gate."):
            return trained.gate(name) if keys else torch.zeros(_gate_shape(config, name))
        _, specialist, tensor = name.split(".", 2)
        return specialists[specialist].read(tensor)

    return StoredModel(folder, described, config, dtype, read)


def stored_folder(folder: Path, template: str, described: Path) -> StoredModel:
    """A Hugging Face folder of one model.

    Args:
        folder: the model's.
        template: the name of the template that it reads prompts in.
        described: as for :func:`stored_checkpoint`.

    Raises:
        InputError: it is none that the trainer could fuse, or has no such template.
    """
    if template not in TEMPLATE_NAMES:
        raise InputError(f"{folder}@{template}: expected a template, one of {', '.join(TEMPLATE_NAMES)}")
    fields = read_json_object(folder / "config.json")
    mixture = fields.get("model_type") == MODEL_TYPE
    if mixture:
        rows, tied = int(fields["vocab_size"]), bool(fields.get("tie_word_embeddings"))
    else:
        architecture = read_architecture(folder)
        rows, tied = architecture.vocab_rows, architecture.tied
    tensors = TensorFolder(folder)
    dtype = tensors.dtype(EMBEDDING) if EMBEDDING in tensors else torch.float32
    config = _describe(described, {ALONE: (folder, template)}, rows, 1, True, dtype, folder.name)

    def read(name: str) -> Tensor:
        if name.startswith("gate."):
            return torch.zeros(_gate_shape(config, name))
        tensor = name.removeprefix(f"specialists.{ALONE}.")
        if tensor == HEAD and tied and HEAD not in tensors:
            return tensors.read(EMBEDDING)
        return mixtral_tensor(tensors, tensor, fields["num_local_experts"]) if mixture else tensors.read(tensor)

    return StoredModel(folder, described, config, dtype, read)


def _describe(
    described: Path,
    specialists: dict[str, tuple[Path, str]],
    vocab_size: int,
    gate_units: int,
    gate_shared: bool,
    dtype: torch.dtype,
    name: str,
) -> UltraFuserConfig:
    card = CardFacts(name=name, config=None, summary=None)
    config = assemble_release(described, specialists, vocab_size, gate_units, gate_shared, dtype, card)
    config.name_or_path = str(described)  # where chat_ids looks for tokenizers of single specialists
    return config


def _alone(config: UltraFuserConfig, part: str, described: Path) -> UltraFuserConfig:
    """Of one specialist of a fused model whose other files lie in ``described``."""
    config.specialists, shared = [config.entry(part)], config.gate_shared
    found = UltraFuserConfig.from_dict(config.to_dict())
    found.gate_shared, found.name_or_path = shared, str(described)
    return found


def _gate_shape(config: UltraFuserConfig, name: str) -> tuple[int, ...]:
    return (config.gate_units, config.hidden_size) if name.startswith("gate.w1") else (config.gate_units,)
