"""Out of a checkpoint into Hugging Face folders: one specialist as it came, or the fused model as a release folder.

Written by one process without a model: tensors are read and written one at a time (``restore``, ``shards``).
Everything goes into a hidden folder beside the target, which gets its name when it is complete and, unless that is
switched off, when it was seen to compute what the checkpoint computes (``compare``).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS
from ultrafuser_mega.checkpoint.left_out import LEFT_OUT
from ultrafuser_mega.checkpoint.locate import find_checkpoint
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.sources import CARD, CONFIG, beside_weights
from ultrafuser_mega.checkpoint.unfinished import alone, finish, refuse_existing, unfinished_of
from ultrafuser_mega.config import load_config
from ultrafuser_mega.convert.adapters import check_adapters, write_adapters
from ultrafuser_mega.convert.compare import FUSED, ExportCheck
from ultrafuser_mega.convert.restore import RestoredSpecialist, TrainedModel
from ultrafuser_mega.convert.shards import LEDGER, SHARD_BYTES, Planned, begin_ledger, write_shards
from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.models.hf_folder import EMBEDDING, HEAD
from ultrafuser_mega.release import CardFacts, assemble_release

_SPECIALIST, _ADAPTER = "specialist:", "adapter:"


def export(
    checkpoint: Path,
    out: Path,
    what: str | None = None,
    *,
    resume: bool = False,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write the folder ``out``.

    Args:
        checkpoint: a folder that training or import wrote, from any layout; a run's folder stands for its newest.
        out: must not exist.
        what: "specialist:NAME", "adapter:NAME" (for PEFT, not compared) or "fused"; None: the specialist of a
            checkpoint of one, else "fused".
        resume: go on from an export of the same that was interrupted.
        verify: compare logits with the checkpoint's before the folder gets its name, which needs memory for the whole
            model in float32; without it one tensor is held at a time.
        shard_bytes: largest size of a safetensors file's tensors; one tensor is never cut.

    Returns:
        Notices for people: what was chosen, what of another export was thrown away, what had been rounded, what was
        untied, which damaged shards were written again, how the comparison ended.

    Raises:
        InputError: the checkpoint is damaged or lacks what was asked for, ``out`` exists, or an interrupted export is
            there and ``resume`` was not asked for, another process is exporting to ``out``, or the folder cannot be
            written.
        DifferentModel: the folder computes something else than the checkpoint; it keeps its hidden name.
    """
    folder = find_checkpoint(checkpoint)
    model = TrainedModel(folder)
    notices = [] if folder == checkpoint else [f"{checkpoint}: its newest checkpoint is {folder.name}"]
    if what is None:
        what, *said = _only_choice(model)
        notices += said
    with writing(out):
        _check_free(out, resume)
    unfinished, identity, part = unfinished_of(out), _identity(model, what), what.removeprefix(_SPECIALIST)
    write: Callable[[], list[str]]
    if what == FUSED and model.student is not None:
        raise InputError(
            f"--what fused: {folder} is a distillation; export its teacher's run, or specialist:{model.student}"
        )
    if what == FUSED:
        parts, card = {name: model.specialist(name) for name in model.sources}, _card(model, out.name)
        write = partial(_fused, model, parts, card, unfinished, identity, shard_bytes)
    elif part != what:
        write = partial(_specialist, model.specialist(part), unfinished, identity, shard_bytes)
    elif (adapted := what.removeprefix(_ADAPTER)) != what:
        specialist, verify = model.specialist(adapted), False
        check_adapters(specialist)  # before there is an unfinished folder, which would keep another export out
        write = partial(write_adapters, specialist, unfinished)
    else:
        raise InputError(
            f"--what {what}: expected fused, specialist:NAME or adapter:NAME with one of {', '.join(model.sources)}"
        )
    check = ExportCheck(folder, part) if verify else None
    with writing(unfinished):
        unfinished.mkdir(parents=True, exist_ok=True)
    with alone(unfinished):
        with writing(unfinished):
            _check_free(out, resume=True)  # another process may have been through in the meantime
            notices += _begin(unfinished, identity)
            notices += write()
            for path in unfinished.glob("*.partial"):
                path.unlink()
        if check is not None:
            notices.append(check.run(unfinished))
        with writing(out):
            finish(unfinished, out)
    return notices


def _only_choice(model: TrainedModel) -> list[str]:
    """What to export where nobody said it, and where that is not the fused model a notice."""
    if len(model.sources) > 1 and model.student is None:
        return [FUSED]
    name = model.student or next(iter(model.sources))
    holds = "is a distillation" if model.student else "holds one specialist"
    return [f"{_SPECIALIST}{name}", f"{model.folder}: {holds}; exported as with --what {_SPECIALIST}{name}"]


def _check_free(out: Path, resume: bool) -> None:
    refuse_existing(out)
    if not resume and (unfinished := unfinished_of(out)).exists():
        with alone(unfinished):
            raise InputError(f"{unfinished}: an interrupted export; go on with --resume, or remove it")


def _begin(folder: Path, identity: str) -> list[str]:
    """Make ``folder`` one of this export alone: files of another would stay among its own."""
    if begin_ledger(folder, identity):
        return []
    for path in sorted(folder.iterdir(), key=lambda path: path.name == LEDGER):  # it says whose this is
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    begin_ledger(folder, identity)
    return [f"{folder}: was left by the export of something else; thrown away and begun anew"]


def _specialist(specialist: RestoredSpecialist, folder: Path, identity: str, shard_bytes: int) -> list[str]:
    tied = specialist.tied()
    notices = [*_rounded_notice(specialist), *_untied_notice(specialist, tied)]
    notices += write_shards(folder, _plan(specialist, tied), specialist.read, identity, shard_bytes)
    for place, content in beside_weights(specialist.source.folder).items():
        if place == LEDGER:  # of the export that the specialist came from
            continue
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    changes: dict[str, Any] = {"tie_word_embeddings": False} if specialist.arch.tied and not tied else {}
    if specialist.trained or specialist.rounded():
        dtype = str(specialist.dtype(EMBEDDING)).removeprefix("torch.")
        changes |= {field: dtype for field in ("dtype", "torch_dtype") if config.get(field, dtype) != dtype}
    if changes:
        (folder / "config.json").write_text(json.dumps(config | changes, indent=2) + "\n")
    return notices


def _fused(
    model: TrainedModel,
    parts: Mapping[str, RestoredSpecialist],
    card: CardFacts,
    folder: Path,
    identity: str,
    shard_bytes: int,
) -> list[str]:
    tensors: dict[str, Planned] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    notices: list[str] = []
    for name, specialist in parts.items():
        notices += [*_rounded_notice(specialist), *_untied_notice(specialist, tied=False)]
        for tensor, planned in _plan(specialist, tied=False).items():
            key = f"specialists.{name}.{tensor}"
            tensors[key] = planned
            readers[key] = partial(specialist.read, tensor)
    for key in model.gate_keys():
        tensors[key] = Planned((model.gate_units, *model.tensors.shape(key)[1:]), model.tensors.dtype(key))
        readers[key] = partial(model.gate, key)
    dtype = reduce(torch.promote_types, {planned.dtype for planned in tensors.values()})
    notices += write_shards(folder, tensors, lambda key: readers[key](), identity, shard_bytes)
    specialists = {name: (part.source.folder, part.source.template) for name, part in parts.items()}
    shared = "gate.w1.shared" in tensors
    assemble_release(folder, specialists, model.vocab_size, model.gate_units, shared, dtype, card)
    return notices


def _plan(specialist: RestoredSpecialist, tied: bool) -> Mapping[str, Planned]:
    """Tensors in the order of the model; a head that is still the embedding only where the folder held one too."""
    return {
        name: Planned(shape, specialist.dtype(name))
        for name, shape in specialist.shapes.items()
        if not (tied and name == HEAD and HEAD not in specialist.source.dtypes)
    }


def _rounded_notice(specialist: RestoredSpecialist) -> list[str]:
    lost = specialist.rounded()
    return [f"{specialist.name}: {lost} on the way into the checkpoint, and written so"] if lost else []


def _untied_notice(specialist: RestoredSpecialist, tied: bool) -> list[str]:
    if not specialist.arch.tied or tied:
        return []
    return [f"{specialist.name}: its folder tied the output head to the embedding; written as two tensors"]


def _card(model: TrainedModel, name: str) -> CardFacts:
    """What is known of these weights: from the run that trained them, whose summary speaks of its last checkpoint only.

    Of an imported release, which was not trained since, its own card.
    """
    if not model.fused:
        raise InputError(
            f"--what fused: {model.folder} was imported from single folders, not from a configuration of a run; "
            "export its specialists, or import the configuration"
        )
    rounded = {part: text for part in model.sources if (text := model.specialist(part).rounded())}
    if not (model.folder / CONFIG).is_file():
        earlier = (model.folder / CARD).read_text(encoding="utf-8")
        return CardFacts(name=name, config=None, summary=None, rounded=rounded, earlier=earlier)
    config = load_config(model.folder / CONFIG)
    run_dir = model.folder.resolve().parent.parent
    summary = None
    ends = [Progress(number, stage.steps) for number, stage in config.stages.items()]
    if ends[-1:] == [model.progress] and (run_dir / "config.yaml").is_file():
        summary = CardFacts.from_run(run_dir, name).summary
        if summary and summary["steps"] != config.stage1.steps + config.stage2.steps:
            summary = None  # of a run that went on from here
    origins = {specialist: source.origin for specialist, source in model.sources.items()}
    return CardFacts(name=name, config=config, summary=summary, origins=origins, rounded=rounded)


def _identity(model: TrainedModel, what: str) -> str:
    """Of the weights that are exported: an export goes on only from the same checkpoint."""
    digest = hashlib.sha256(what.encode())
    for file in (".metadata", PROGRESS, "sources.json", LEFT_OUT):
        if file != LEFT_OUT or (model.folder / file).is_file():
            digest.update((model.folder / file).read_bytes())
    sizes = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model.folder.glob("*.distcp"))
    digest.update(json.dumps(sizes).encode())
    return digest.hexdigest()
