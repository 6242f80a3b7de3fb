"""A model in memory, ready to answer: fused, one of its specialists, or any single one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.address import Address
from ultrafuser_mega.inference.devices import places_of
from ultrafuser_mega.inference.mixing import GATE, RULES, Rule
from ultrafuser_mega.inference.packed import pack
from ultrafuser_mega.inference.stored import StoredModel
from ultrafuser_mega.models.dtypes import parse_dtype
from ultrafuser_mega.release.check import loading
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to answer.

    Attributes:
        model: its specialists are on their devices; the gate is where the first one is.
        tokenizer: of the answers.
        eos: tokens that end an answer.
        rule: how the specialists are mixed.
    """

    model: UltraFuserForCausalLM
    tokenizer: Any
    eos: frozenset[int]
    rule: Rule = RULES[GATE]


@contextmanager
def opened_model(model: str, devices: str, dtype: str | None) -> Iterator[OpenedModel]:
    """Load a model for as long as the context lasts; its weights may be laid out for reading alone (see ``packed``).

    Args:
        model: see ``address``.
        devices: "auto" (a GPU for each specialist where there are enough, else one for all, else the CPU), or one
            device for all, or one for each, as in "cuda:0,cuda:1,cuda:1".
        dtype: fp32, bf16 or fp16; None: the element type of the stored weights.

    Raises:
        InputError: there is no such model, or it is damaged; a device or dtype is not there; a value is beyond the
            dtype.
    """
    wanted = parse_dtype(dtype)
    address = Address.parse(model)
    with ExitStack() as stack:
        stored = address.stored(stack)
        rule = address.mixing(stored.config.names)
        places = choose_devices(devices, stored.config.names)
        with loading(address.path):
            loaded = stored.load(wanted)
        for name, device in places.items():
            loaded.specialists[name].to(device)
        pack(loaded.specialists)
        loaded.gate.to(places[loaded.names[0]])
        yield _opened(stored, loaded, rule)


@contextmanager
def described_model(model: str, dtype: str | None) -> Iterator[OpenedModel]:
    """A model without its weights, on the meta device: for whoever asks an engine elsewhere; see ``opened_model``."""
    wanted = parse_dtype(dtype)
    address = Address.parse(model)
    with ExitStack() as stack:
        stored = address.stored(stack)
        with loading(address.path):
            empty = stored.without_weights(wanted)
        yield _opened(stored, empty, address.mixing(stored.config.names))


def _opened(stored: StoredModel, model: UltraFuserForCausalLM, rule: Rule) -> OpenedModel:
    ends = GenerationConfig.from_pretrained(stored.described).eos_token_id
    eos = frozenset(ends if isinstance(ends, list) else [ends])
    return OpenedModel(model, FastTokenizer.from_pretrained(stored.described), eos, rule)


def choose_devices(devices: str, names: list[str]) -> dict[str, torch.device]:
    """Specialist -> device; see :func:`opened_model`."""
    places = places_of(devices, names)
    if any(len(place) > 1 for place in places.values()):
        raise InputError(f"--device {devices}: only --engine vllm spreads one specialist over several devices")
    return {name: torch.device("cpu") if gpu is None else torch.device("cuda", gpu) for name, (gpu,) in places.items()}
