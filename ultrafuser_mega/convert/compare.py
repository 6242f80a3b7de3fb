"""Do two models compute the same? Full-sequence float32 logits of any two of: Hugging Face folder, checkpoint, release.

A checkpoint is run by Megatron-core, the folders by transformers, so that agreement speaks for the conversion and for
both implementations. Needs memory for one model at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS, load_checkpoint, load_specialists
from ultrafuser_mega.checkpoint.locate import find_checkpoint
from ultrafuser_mega.convert import SAMPLE_TEXT
from ultrafuser_mega.convert.agreement import (
    Agreement,
    Comparison,
    check_memory,
    comparison_batches,
    float32_bytes,
    limits,
    rounding_cost,
)
from ultrafuser_mega.convert.restore import RestoredSpecialist, TrainedModel
from ultrafuser_mega.convert.shards import check_hashes
from ultrafuser_mega.convert.verify import Sequences, load_folder
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.fused import build_fused_stage
from ultrafuser_mega.models.fusion_head import LossOptions
from ultrafuser_mega.models.hf_folder import (
    Architecture,
    HFWeights,
    parse_architecture,
    read_architecture,
)
from ultrafuser_mega.release.check import check_release, is_release, loading
from ultrafuser_mega.release.configuration_ultrafuser import UltraFuserConfig
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.layout import plan_colocated
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.spawn import RankFailure, run_ranks
from ultrafuser_mega.training.engine import Engine

FUSED = "fused"
_BESIDE_WEIGHTS = 3 << 29  # bytes: a second process with Megatron, activations, one tensor on its way


class DifferentModel(RuntimeError):  # noqa: N818 (what was found, not an error in finding it)
    """An exported folder does not compute what its checkpoint computes; described in one line."""


@dataclass(frozen=True)
class ModelAddress:
    """One model to compare.

    Attributes:
        path: its folder.
        kind: what the folder is.
        part: a specialist's name, or "fused"; None for a Hugging Face folder, which is one model.
    """

    path: Path
    kind: Literal["folder", "checkpoint", "release"]
    part: str | None

    @classmethod
    def parse(cls, text: str) -> ModelAddress:
        """From ``PATH``, ``PATH@fused`` or ``PATH@specialist:NAME``; a checkpoint or release alone means fused.

        A run's folder stands for its newest checkpoint, a checkpoint of one specialist alone for that specialist.

        Raises:
            InputError: there is no such model.
        """
        path, part = Path(text), ""
        if not path.exists() and "@" in text:
            before, _, part = text.rpartition("@")
            path = Path(before)
        if not path.is_dir():
            raise InputError(
                f"{path}: no such folder; expected a Hugging Face folder, a checkpoint or a release folder"
            )
        path = find_checkpoint(path)
        kind: Literal["folder", "checkpoint", "release"] = "folder"
        if (path / PROGRESS).is_file():
            kind, names = "checkpoint", list(TrainedModel(path).sources)
        elif is_release(path):
            kind, names = "release", check_release(path).names
        if kind == "folder":
            if part:
                raise InputError(f"{text}: {path} is a Hugging Face folder, which is a single model; leave out @{part}")
            return cls(path, kind, None)
        chosen = part.removeprefix("specialist:") or FUSED
        if part not in ("", FUSED) and (not part.startswith("specialist:") or chosen not in names):
            raise InputError(f"{text}: expected @fused or @specialist:NAME with one of {', '.join(names)}")
        alone = names[0] if kind == "checkpoint" and len(names) == 1 else FUSED
        return cls(path, kind, chosen if part else alone)


@dataclass(frozen=True)
class Computed:
    """What a model computes.

    Attributes:
        logits: float32 (b, s, V) of every batch.
        rounding: how far another computation of the same may be off (``rounding_cost``); None where it was not asked.
    """

    logits: list[Tensor]
    rounding: float | None


def compare(a: str, b: str, text: str, tolerance: float | None = None) -> Comparison:
    """Compare two models on random tokens and on ``text``.

    Args:
        a: see :meth:`ModelAddress.parse`.
        b: likewise.
        text: tokenised by a's tokenizer.
        tolerance: largest accepted difference of a float32 logit, in parts of b's largest; None for what rounding
            explains (``rounding_cost``) in b, or in a where b alone is a checkpoint, whose adapters a may have merged.

    Raises:
        InputError: a model is missing, damaged, of another vocabulary or too large for this machine.
    """
    first, second = ModelAddress.parse(a), ModelAddress.parse(b)
    archs = [_description(address)[1] for address in (first, second)]
    for name, of_one in zip((a, b), archs, strict=True):
        check_memory(name, of_one)
    batches = comparison_batches(_text_ids(first, text), *limits(list(chain(*archs))))
    tokens = list(batches.values())
    in_first = second.kind == "checkpoint" != first.kind
    ours = _compute(first, tokens, rounding=tolerance is None and in_first, merged=_merged(second))
    theirs = _compute(second, tokens, rounding=tolerance is None and not in_first, merged=_merged(first))
    agreements = []
    for what, mine, other in zip(batches, ours.logits, theirs.logits, strict=True):
        if mine.shape != other.shape:
            raise InputError(
                f"{a} has {mine.shape[-1]} logits per token, {b} has {other.shape[-1]}; compare like with like"
            )
        agreements.append(Agreement.of(what, mine, other))
    if tolerance is None:
        tolerance = ours.rounding if in_first else theirs.rounding
    assert tolerance is not None
    return Comparison.of(a, b, tolerance, agreements)


class ExportCheck:
    """The comparison that an export ends with: one short text through the checkpoint and through the new folder.

    Made before anything is written, so that what makes a comparison impossible shows at once.

    Args:
        checkpoint: what is exported.
        part: "fused", or a specialist's name.

    Raises:
        InputError: the checkpoint is damaged or keeps no usable tokenizer, or the machine has too little memory.
    """

    def __init__(self, checkpoint: Path, part: str) -> None:
        self._checkpoint = ModelAddress(checkpoint, "checkpoint", part)
        _parts(self._checkpoint)
        archs = _description(self._checkpoint)[1]
        needed, free = float32_bytes(archs) + _BESIDE_WEIGHTS, psutil.virtual_memory().available
        if needed > free:
            raise InputError(
                f"{checkpoint}: comparing the export with it needs {needed / 1e9:.1f} GB of memory, "
                f"{free / 1e9:.1f} are free; export with --no-verify, and run ultrafuser verify on a larger machine"
            )
        try:
            ids = _text_ids(self._checkpoint, SAMPLE_TEXT)
            self._tokens = comparison_batches(ids, *limits(archs))["real"]
        except InputError as error:
            raise InputError(f"{error}; --no-verify exports without the comparison that needs one") from None

    def run(self, folder: Path) -> str:
        """The result in one line.

        Raises:
            DifferentModel: ``folder`` computes something else.
            InputError: ``folder`` cannot be read.
        """
        fused = self._checkpoint.part == FUSED
        written = ModelAddress(folder, *(("release", FUSED) if fused else ("folder", None)))
        ours = _compute(self._checkpoint, [self._tokens])
        theirs = _compute(written, [self._tokens], rounding=True, merged=_merged(self._checkpoint))
        found = Agreement.of("real", ours.logits[0], theirs.logits[0])
        assert theirs.rounding is not None
        comparison = Comparison.of(str(self._checkpoint.path), str(folder), theirs.rounding, [found])
        result = f"largest difference of a float32 logit {found.max_abs:.2g}, {found.relative:.2g} of the largest logit"
        if not comparison.equal:
            raise DifferentModel(
                f"{folder}: computes something else than {self._checkpoint.path} on a text of {found.shape[1]} tokens: "
                f"{result} (rounding explains {theirs.rounding:.2g}); it stays unfinished under this name"
            )
        return f"verified on a text of {found.shape[1]} tokens: {result}"


def _text_ids(address: ModelAddress, text: str) -> list[int]:
    """``text`` in the model's own tokens."""
    folder, _ = _description(address)
    # AutoTokenizer would ask to run a release's code; its tokenizer files speak for themselves.
    tokenizer = FastTokenizer.from_pretrained(folder) if address.kind == "release" else TextEncoder(folder).tokenizer
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _description(address: ModelAddress) -> tuple[Path, list[Architecture]]:
    """A folder with the tokenizer, and the architectures that take part."""
    if address.kind == "folder":
        return address.path, [read_architecture(address.path)]
    if address.kind == "release":
        config = UltraFuserConfig.from_pretrained(address.path)
        entries = [entry for entry in config.specialists or [] if address.part in (FUSED, entry["name"])]
        return address.path, [parse_architecture(address.path / "config.json", entry["config"]) for entry in entries]
    sources = TrainedModel(address.path).sources
    folders = [source.folder for name, source in sources.items() if address.part in (FUSED, name)]
    return folders[0], [read_architecture(folder) for folder in folders]


def _merged(address: ModelAddress) -> Callable[[str], float]:
    """Parameter of an export -> how far merging adapters into it may have rounded its numbers, relatively.

    A checkpoint computes with its adapters beside the weights, unrounded.
    """
    parts = {part.name: part for part in _parts(address)} if address.kind == "checkpoint" else {}

    def of(parameter: str) -> float:
        name, rest = parameter.removeprefix("specialists.").split(".", 1) if address.part == FUSED else ("", parameter)
        part = parts.get(name or str(address.part))
        if part is None or part.lora is None or rest.split(".")[-2] not in part.lora.targets:
            return 0.0
        return torch.finfo(part.dtype(rest)).eps / 2

    return of


def _compute(
    address: ModelAddress,
    batches: Sequence[Tensor],
    *,
    rounding: bool = False,
    merged: Callable[[str], float] | None = None,
) -> Computed:
    """float32 logits of every batch (b, s), and on demand what rounding makes of them."""
    if address.kind == "checkpoint":
        _parts(address)
        try:
            (result,) = run_ranks(_compute_checkpoint, 1, address, list(batches), rounding, timeout_s=3600.0)
        except RankFailure:
            _read_all(address)  # damaged chunks are named by whoever reads them one by one
            raise
        return Computed(*result)
    check_hashes(address.path)
    if address.kind == "folder":
        HFWeights(address.path, read_architecture(address.path))
        model = load_folder(address.path)
    else:
        model = _load_release(address)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [model(input_ids=ids, return_dict=True).logits for ids in batches]

    logits = run()
    return Computed(logits, rounding_cost(model, logits, run, merged) if rounding else None)


def _load_release(address: ModelAddress) -> Any:
    check_release(address.path)
    with loading(address.path):
        model: Any = UltraFuserForCausalLM.from_pretrained(
            address.path, dtype=torch.float32, local_files_only=True, use_safetensors=True
        ).eval()
    return model if address.part == FUSED else model.specialists[address.part]


def _parts(address: ModelAddress) -> list[RestoredSpecialist]:
    """The specialists that take part; raises InputError where their tensors are not those of their config.json."""
    trained = TrainedModel(address.path)
    return [trained.specialist(name) for name in trained.sources if address.part in (FUSED, name)]


def _read_all(address: ModelAddress) -> None:
    """Read a checkpoint's tensors one by one; raises InputError where one cannot be read, and names its file."""
    for part in _parts(address):
        for tensor in part.shapes:
            part.read(tensor)
    trained = TrainedModel(address.path)
    for key in trained.gate_keys() if address.part == FUSED else ():
        trained.gate(key)


def _compute_checkpoint(
    rank: int, address: ModelAddress, batches: Sequence[Tensor], rounding: bool
) -> tuple[list[Tensor], float | None]:
    device = torch.device("cpu")
    trained = TrainedModel(address.path)
    names = [name for name in trained.sources if address.part in (FUSED, name)]
    groups = make_groups(plan_colocated(names, tp=1, pp=1, dp=1))
    with megatron_scope(device):
        model = build_fused_stage(
            groups,
            {name: read_architecture(trained.sources[name].folder) for name in names},
            vocab_size=trained.vocab_size,
            gate_units=trained.gate_units,
            dtype=torch.float32,
            device=device,
            sequence_parallel=False,
            loss=LossOptions(),
            seed=0,
            adapters=trained.adapters,
        ).eval()
    if address.part == FUSED:
        load_checkpoint(address.path, model, groups, None, 0)
    else:
        load_specialists(address.path, model, groups)
    fusion = model.fusion
    assert fusion is not None
    collected: list[Tensor] = []

    def keep_logits(hidden: dict[str, Tensor], batch: Sequences) -> Tensor:
        heads = {name: head[: trained.vocab_size] for name, head in fusion.heads.items()}
        if address.part == FUSED:  # equation 1 of the paper
            weights = fusion.gate(hidden).softmax(dim=1)
            parts = [weights[:, i : i + 1] * (hidden[name] @ heads[name].t()) for i, name in enumerate(names)]
            whole = torch.stack(parts).sum(dim=0)
        else:
            (name,) = names
            tail = [fusion.tails[name]] if name in fusion.tails else []
            whole = hidden[name] @ torch.cat([heads[name], *tail]).t()
        collected.append(whole.view(*batch.shape, -1))
        return torch.zeros(())

    def run() -> list[Tensor]:
        collected.clear()
        with torch.no_grad():
            Engine(model, groups, device).forward([Sequences(ids, names) for ids in batches], keep_logits)
        return list(collected)

    logits = run()
    return logits, rounding_cost(model, logits, run) if rounding else None
