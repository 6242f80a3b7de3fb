"""A specialist's adapters as a folder that PEFT loads: ``adapter_config.json`` and ``adapter_model.safetensors``.

The head comes along whole where it was trained, as a module that PEFT saves beside adapters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ultrafuser_mega.convert.restore import RestoredSpecialist
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import HEAD

_MODEL = "base_model.model."


def check_adapters(specialist: RestoredSpecialist) -> None:
    """Raise InputError where the specialist has no adapters, or PEFT would not make the trained model of them."""
    if specialist.lora is None:
        raise InputError(
            f"--what adapter:{specialist.name}: it has no adapters; "
            f"use specialist:{specialist.name} for all its weights"
        )
    if specialist.head_trained and specialist.arch.tied:
        raise InputError(
            f"--what adapter:{specialist.name}: its head was trained apart from the embedding that its folder "
            f"ties it to, which PEFT does not hold; use specialist:{specialist.name}"
        )
    if not specialist.stands_on_its_folder():
        raise InputError(
            f"--what adapter:{specialist.name}: its adapters were trained beside other weights than those in "
            f"{specialist.source.origin} (checkpoint.start), to which PEFT would add them; use "
            f"specialist:{specialist.name}, which has them merged"
        )


def write_adapters(specialist: RestoredSpecialist, folder: Path) -> list[str]:
    """Write both files into ``folder``, which exists, of a specialist that :func:`check_adapters` takes.

    Returns:
        Notices for people: what model they belong to.
    """
    lora = specialist.lora
    assert lora is not None
    tensors: dict[str, Tensor] = {}
    modules = [hf.removesuffix(".weight") for hf in specialist.layer_weights if hf.split(".")[-2] in lora.targets]
    for layer in range(specialist.arch.layers):
        for module in modules:
            found = specialist.adapter(layer, module.rpartition(".")[2])
            assert found is not None
            for letter, matrix in zip("AB", found, strict=True):
                tensors[f"{_MODEL}model.layers.{layer}.{module}.lora_{letter}.weight"] = matrix.contiguous()
    if specialist.head_trained:
        tensors[f"{_MODEL}{HEAD}"] = specialist.read(HEAD)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": specialist.source.origin,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "modules_to_save": [HEAD.removesuffix(".weight")] if specialist.head_trained else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod((folder / "adapter_config.json").stat().st_mode)  # safetensors writes them for their owner alone
    return [f"{specialist.name}: adapters of the model in {specialist.source.origin}; PEFT loads them beside it"]
