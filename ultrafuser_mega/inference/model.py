"""A fused model in memory, from a release folder or straight from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.dtypes import parse_dtype
from ultrafuser_mega.models.hf_folder import TensorFolder
from ultrafuser_mega.release.check import check_release, is_release, loading
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to answer.

    Attributes:
        model: its specialists are on their devices; the gate is where the first one is.
        tokenizer: of the answers.
        eos: tokens that end an answer.
    """

    model: UltraFuserForCausalLM
    tokenizer: Any
    eos: frozenset[int]


@contextmanager
def opened_model(folder: Path, devices: str, dtype: str | None) -> Iterator[OpenedModel]:
    """Load ``folder`` for as long as the context lasts.

    Args:
        folder: what ``ultrafuser export`` wrote, or a checkpoint of ``ultrafuser train`` (or of ``import`` of a
            configuration or a release); a run's folder stands for its newest checkpoint.
        devices: "auto" (a GPU for each specialist where there are enough, else one for all, else the CPU), or one
            device for all, or one for each, as in "cuda:0,cuda:1,cuda:1".
        dtype: fp32, bf16 or fp16; None: the element type of the stored weights.

    Raises:
        InputError: the folder is neither, or is damaged; a device or dtype is not there; a value is beyond the dtype.
    """
    wanted = parse_dtype(dtype)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a release folder or a checkpoint")
    with ExitStack() as stack:
        if is_release(folder):
            described = folder
            places = choose_devices(devices, check_release(folder).names)
            with loading(folder):
                model = UltraFuserForCausalLM.from_pretrained(
                    folder, dtype=wanted or "auto", local_files_only=True, use_safetensors=True
                )
            if wanted is not None:
                _refuse_overflow(model, folder, wanted)
        else:
            from ultrafuser_mega.inference.restored import RestoredModel  # brings Megatron: seconds

            described = Path(stack.enter_context(TemporaryDirectory(prefix="ultrafuser-")))
            restored = RestoredModel(folder, described)
            places = choose_devices(devices, restored.config.names)
            model = restored.load(wanted)
        for name, device in places.items():
            model.specialists[name].to(device)
        model.gate.to(places[model.names[0]])
        ends = GenerationConfig.from_pretrained(described).eos_token_id
        eos = frozenset(ends if isinstance(ends, list) else [ends])
        yield OpenedModel(model, FastTokenizer.from_pretrained(described), eos)


def _refuse_overflow(model: UltraFuserForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """Refuse what transformers made infinite on loading ``folder`` in ``dtype``; what is so by itself is left alone."""
    tensors = TensorFolder(folder)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            tensors.read(name, dtype=dtype)


def choose_devices(devices: str, names: list[str]) -> dict[str, torch.device]:
    """Specialist -> device; see :func:`opened_model`."""
    gpus = torch.cuda.device_count()
    if devices == "auto":
        if gpus == 0:
            return dict.fromkeys(names, torch.device("cpu"))
        return {name: torch.device("cuda", i if gpus >= len(names) else 0) for i, name in enumerate(names)}
    given = devices.split(",")
    if len(given) not in (1, len(names)):
        raise InputError(f"--device {devices}: names {len(given)} devices; give one, or one for each of {names}")
    chosen = []
    for text in given:
        try:
            device = torch.device(text)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
            raise InputError(f"--device {text}: expected auto, cpu or cuda:N; this machine has {gpus} GPUs")
        chosen.append(device)
    return dict(zip(names, chosen * (len(names) if len(chosen) == 1 else 1), strict=True))
