"""Sharded checkpoints: what a folder holds, where it stands in a run, and reading one into any number of ranks.

A checkpoint is a folder ``stage<k>-step<s>`` holding one file of tensors per rank and PyTorch's index of them
(``chunks``, ``writer``); ``progress.json``: where the run stood, a description of the model that another model's
checkpoint cannot match, and size and checksum of every other file; and what the specialists came with beside their
weights (``sources``). It is written under a temporary name (``saver``).

Nothing rank-specific is stored (no parameter groups, no flat buffers), so a plain and a distributed optimizer
read each other's checkpoints too. ``format`` in progress.json: 2; those without were written by Megatron, in the same
form but for two files that nothing here reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ultrafuser_mega.checkpoint.chunks import Chunk, parameter_parts, states_to_read, weights_to_read
from ultrafuser_mega.checkpoint.integrity import (
    FileRecords,
    HaveRead,
    damage_of,
    damage_of_here,
    record_files,
)
from ultrafuser_mega.checkpoint.left_out import weights_beside
from ultrafuser_mega.checkpoint.optimizer_state import create_moments
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.sources import SourceFiles, stored_type
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.checkpoint.writer import write_chunks
from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.models.fused import FusedStage, load_hf_weights
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.trainable import Trainable

_NAME = re.compile(r"stage(\d)-step(\d{7})$")
PROGRESS = "progress.json"
FORMAT = 2
_OTHER_ADAPTERS = (
    "; give lora and train as that run had them, or export it, which merges adapters, and begin with the import"
)


class DamagedCheckpointError(InputError):
    """A checkpoint is not as it was written, and what to do about it.

    Args:
        problem: which file, and how.
        path: the checkpoint.
    """

    def __init__(self, problem: str, path: Path) -> None:
        super().__init__(f"{problem}; {_advice(path)}")
        self.problem, self.path = problem, path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problem, self.path)


def list_checkpoints(folder: Path) -> list[tuple[Progress, Path]]:
    """Complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if (match := _NAME.match(path.name)) and (path / PROGRESS).is_file():
            found.append((Progress(int(match[1]), int(match[2])), path))
    return sorted(found)


def read_progress(path: Path, identity: Mapping[str, Any], *, adapters_begin: bool = False) -> Progress:
    """Where the checkpoint at ``path`` stands.

    Args:
        path: a checkpoint folder.
        identity: description of the model that is to be loaded, as given to :func:`write_checkpoint`.
        adapters_begin: the model's adapters may be new beside a checkpoint that has none.

    Raises:
        InputError: not a complete checkpoint, one of another model (names the first difference), or renamed.
    """
    record = _read_record(path)
    saved, wanted = flat(record["identity"]), flat(json.loads(json.dumps(identity)))
    if adapters_begin and "adapters" not in record["identity"]:
        wanted = {key: value for key, value in wanted.items() if not key.startswith("adapters.")}
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise InputError(
                f"{path}: checkpoint of another model: {key} is {saved.get(key)!r} there and {wanted.get(key)!r} here"
                f"{_OTHER_ADAPTERS if key.startswith('adapters.') else ''}"
            )
    progress = Progress(**record["progress"])
    if _NAME.match(path.name) and path.name != progress.folder:
        raise InputError(f"{path}: renamed: its {PROGRESS} is that of {progress.folder}; give it this name back")
    return progress


def adapted_specialists(path: Path) -> list[str]:
    """Those with adapters in the checkpoint at ``path``; raises InputError where it is none."""
    return list(_read_record(path)["identity"].get("adapters", ()))


def verify_checkpoint(path: Path) -> None:
    """Compare every file with its size and checksum as written; collective over the job, which shares the reading.

    One that notes none, as the first versions wrote them, passes.

    Raises:
        DamagedCheckpointError: a file is missing or damaged; the same message on every rank.
    """
    if problem := damage_of(path, _read_record(path).get("files", {})):
        raise DamagedCheckpointError(problem, path)


def verify_checkpoint_here(path: Path, have_read: HaveRead) -> None:
    """The same as :func:`verify_checkpoint` by one process, without a job; reads all of it.

    Raises:
        InputError: as there.
    """
    if problem := damage_of_here(path, _read_record(path).get("files", {}), have_read):
        raise DamagedCheckpointError(problem, path)


def noted_bytes(path: Path) -> int:
    """Of all files that are compared; 0 for a checkpoint that notes none."""
    return sum(noted["bytes"] for noted in _read_record(path).get("files", {}).values())


def no_checkpoint(path: Path) -> InputError:
    """What is wrong with a folder that holds no PROGRESS."""
    why = f"not a complete checkpoint (no {PROGRESS})" if path.is_dir() else "no such folder"
    return InputError(f"{path}: {why}")


def _read_record(path: Path) -> dict[str, Any]:
    """What progress.json says: "progress", "identity" and "files"."""
    file = path / PROGRESS
    try:
        record = json.loads(file.read_text())
        if not isinstance(record["identity"], dict) or not isinstance(record.get("files", {}), dict):
            raise TypeError("identity or files is no object")
        Progress(**record["progress"]).folder  # noqa: B018 (raises unless both are whole numbers)
        written = int(record.get("format", 1))
    except (FileNotFoundError, NotADirectoryError):
        raise no_checkpoint(path) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{file}: damaged ({error!r})", path) from None
    if written > FORMAT:
        raise InputError(f"{file}: format {written} of a later version; this one reads {FORMAT} and earlier ones")
    return record


def _advice(path: Path) -> str:
    """What to do about damage of the checkpoint at ``path``; ends a message."""
    older = [other.name for _, other in list_checkpoints(path.parent) if other.name < path.name]
    instead = f"for --resume to go on from {older[-1]}" if older else "and start afresh: there is no older one"
    return f"copy the checkpoint again, or remove {path.name} {instead}"


def remove_checkpoint(path: Path) -> None:
    """Remove the folder ``path`` if there is one; what is left of it when that is interrupted has no final name."""
    if path.exists():
        leaving = path.with_name(f".{path.name}.old.partial")  # which the next save clears away
        shutil.rmtree(leaving, ignore_errors=True)
        path.rename(leaving)
        shutil.rmtree(leaving)


def write_checkpoint(
    folder: Path,
    final: Path,
    progress: Progress,
    chunks: Sequence[Chunk],
    group: dist.ProcessGroup,
    identity: Mapping[str, Any],
    sources: SourceFiles | None,
) -> None:
    """Write a checkpoint into ``folder``, its progress.json last; collective over ``group``.

    Args:
        folder: empty.
        final: the name that the caller gives it when this is done; that of messages.
        progress: where the run stands.
        chunks: of :func:`ultrafuser_mega.checkpoint.chunks.chunks_to_write`.
        group: all ranks, for objects.
        identity: description of the model, checked on reading.
        sources: where its specialists came from, written into the folder; rank 0's, others need none.

    Raises:
        InputError: it cannot be written; the same on every rank.
    """
    is_first, files = dist.get_rank() == 0, FileRecords()
    with same_everywhere(final, group):
        if is_first:
            assert sources is not None
            sources.write(folder)
            files = record_files(folder)
    with same_everywhere(final, group):
        files |= write_chunks(folder, chunks, group)
    everyone: list[FileRecords] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, files, group=group)
    with same_everywhere(final, group):
        if is_first:
            files = {name: record for records in everyone for name, record in records.items()}
            record = {"format": FORMAT, "progress": asdict(progress), "identity": identity, "files": files}
            with (folder / PROGRESS).open("w") as file:
                file.write(json.dumps(record, indent=1))
                file.flush()
                os.fsync(file.fileno())  # older checkpoints are removed next


@contextmanager
def same_everywhere(final: Path, group: dist.ProcessGroup) -> Iterator[None]:
    """What the system has against writing ``final``, on whichever rank, as an InputError on every rank; collective."""
    problem = None
    try:
        with writing_checkpoint(final):
            yield
    except InputError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    for first in filter(None, problems):
        raise InputError(first)


@contextmanager
def writing_checkpoint(path: Path) -> Iterator[None]:
    """What the system has against it, which the library below may wrap, as an InputError.

    Args:
        path: the name that the checkpoint gets when it is complete.
    """
    with writing(path, as_whole=True):
        try:
            yield
        except CheckpointException as error:
            reason = str(error).strip().splitlines()[-1]
            if not error.failures:  # the library has printed it, rank by rank
                reason = "a rank could not write its part, as the lines above say"
            raise OSError(reason) from None


def load_checkpoint(
    path: Path,
    model: FusedStage,
    groups: RankGroups,
    trainable: Trainable | None,
    steps: int,
    skipped: int = 0,
    *,
    verified: bool = False,
    folders: Mapping[str, Path] | None = None,
) -> None:
    """Read the model, and with ``trainable`` its optimizer too; collective over the job.

    The first replica reads the model, and the others receive it. What an optimizer holds, its own rank reads. What a
    small checkpoint leaves out comes from the specialists' folders; adapters that it does not have stay as they are.

    Args:
        path: a checkpoint folder.
        model: filled in place.
        groups: this rank's process groups; they may differ from those it was saved with.
        trainable: the stage's optimizer and schedule, advanced to ``steps``; None to read weights only.
        steps: steps that were done in the stage; a checkpoint of step 0 holds no optimizer state.
        skipped: of them, those that updated nothing.
        verified: :func:`verify_checkpoint` has found it whole; nothing but what is needed is read then.
        folders: of a run that goes on from it: where its specialists are now; None: where they were.

    Raises:
        InputError: a tensor is missing, damaged or of another shape, or what it leaves out is not where it was.
    """
    beside = _read_left_out(path, model, groups, names_of(model), folders)
    tensors = CheckpointTensors(path, verified=verified and noted_bytes(path) > 0)  # the first versions noted nothing
    with torch.no_grad():
        if groups.reads:
            _fill(weights_to_read(model, groups), tensors, beside=beside)
        groups.receive(tensor for tensor, _ in parameter_parts(model, groups))
        if trainable is None:
            return
        with megatron_scope(trainable.device):
            trainable.reload()  # where the checkpoint has no weights in float32
            if steps > 0:
                create_moments(trainable, steps - skipped)
                _fill(states_to_read(model, trainable, groups), tensors)
            trainable.schedule.step(steps)


def load_teacher(path: Path, model: FusedStage, groups: RankGroups, student: str) -> None:
    """Read all but the student's weights from the checkpoint of a fused model; collective over the job.

    What a small checkpoint leaves out comes from the specialists' folders.

    Raises:
        InputError: a tensor is missing, damaged or of another shape, or what it leaves out is not where it was.
    """
    beside = _read_left_out(path, model, groups, [name for name in names_of(model) if name != student])
    with torch.no_grad():
        if groups.reads:
            chunks = [chunk for chunk in weights_to_read(model, groups) if not is_part_of(chunk.key, student)]
            _fill(chunks, CheckpointTensors(path), beside=beside)
        found = parameter_parts(model, groups)
        groups.receive(weight for weight, parts in found if not is_part_of(parts[0].key, student))


def is_part_of(key: str, specialist: str) -> bool:
    """Whether a checkpoint's tensor is one of the specialist's, its head's among them."""
    return f"{key}.".startswith(tuple(f"{kind}.{specialist}." for kind in ("specialists", "heads", "tails")))


def load_specialists(path: Path, model: FusedStage, groups: RankGroups) -> None:
    """Read the weights but for the gate's into a model of some of the checkpoint's specialists."""
    beside = _read_left_out(path, model, groups, names_of(model))
    with torch.no_grad():
        chunks = [chunk for chunk in weights_to_read(model, groups) if not chunk.key.startswith("gate.")]
        _fill(chunks, CheckpointTensors(path), beside=beside)


def names_of(model: FusedStage) -> list[str]:
    """Specialists of which this rank holds anything."""
    return list(model.stages if model.fusion is None else model.fusion.architectures)


def _read_left_out(
    path: Path,
    model: FusedStage,
    groups: RankGroups,
    names: Iterable[str],
    folders: Mapping[str, Path] | None = None,
) -> bool:
    """Fill what a small checkpoint leaves out of ``names``; whether it is one, so that more may be missing in it."""
    beside = weights_beside(path, names, folders)
    if beside:
        load_hf_weights(model, beside, groups, stored_type(CheckpointTensors(path)))
    return bool(beside)


def _fill(chunks: Iterable[Chunk], tensors: CheckpointTensors, *, beside: bool = False) -> None:
    """Read ``chunks``; with ``beside`` those that the checkpoint has, and adapters always only where it has some."""
    for chunk in chunks:
        if chunk.key not in tensors and (beside or ".adapters." in chunk.key):
            continue
        saved = tensors.shape(chunk.key)
        if saved[1:] != chunk.shape[1:] or (saved != chunk.shape and not chunk.padded):
            raise InputError(
                f"{tensors.folder}: {chunk.key} has the shape {list(saved)} there, {list(chunk.shape)} is needed"
            )
        spans = [slice(at, at + size) for at, size in zip(chunk.offsets, chunk.data.shape, strict=True)]
        if saved != chunk.shape:  # rows beyond the vocabulary, more or fewer than here
            spans[0] = slice(spans[0].start, max(spans[0].start, min(spans[0].stop, saved[0])))
            chunk.data.zero_()
        found = spans[0].stop - spans[0].start
        if found:
            chunk.data[:found].copy_(tensors.read(chunk.key, *spans))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}
