"""What one call of the mixture cross-entropy is asked to do: its tensors, its settings, and their validation.

The backends receive a :class:`Problem` that has passed :func:`checked_problem` and check nothing again.

Letters in shape comments, here and in the other files of this folder:
    N rows (tokens)    n specialists    d_j hidden size of specialist j    C rows of one chunk
    V vocab_size (real rows of the whole vocabulary)    V_local head rows given to this rank
    R real rows among them: those below vocab_size; rows R.. are padding and are never touched
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ultrafuser_mega.errors import InputError

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Settings:
    """The numbers and the group of one call. ``group`` is None unless the vocabulary really is sharded."""

    group: dist.ProcessGroup | None
    vocab_start: int
    vocab_size: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: str

    @property
    def shards(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)


@dataclass(frozen=True)
class Problem:
    hidden: tuple[Tensor, ...]  # n x (N, d_j)
    heads: tuple[Tensor, ...]  # n x (V_local, d_j)
    gate_logits: Tensor  # (N, n)
    target: Tensor  # (N,) int64
    settings: Settings

    @property
    def rows(self) -> int:
        return self.target.shape[0]

    @property
    def real_rows(self) -> int:
        """R: how many of this rank's head rows belong to the vocabulary."""
        return max(0, min(self.heads[0].shape[0], self.settings.vocab_size - self.settings.vocab_start))

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return accumulate_dtype(self.hidden[0].dtype)

    def kept(self) -> Tensor:  # (N,) bool
        return self.target != self.settings.ignore_index

    def local_target(self) -> Tensor:  # (N,) int64
        """Column of the target among this rank's real rows; -1 where another rank holds it or the row is ignored."""
        column = self.target - self.settings.vocab_start
        here = self.kept() & (column >= 0) & (column < self.real_rows)
        return torch.where(here, column, -1)


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    gate: bool
    hidden: tuple[bool, ...]
    heads: tuple[bool, ...]

    @property
    def any(self) -> bool:
        return self.gate or any(self.hidden) or any(self.heads)

    @classmethod
    def of(cls, problem: Problem) -> Needs:
        """Those of what requires one, where gradients are on."""
        grad = torch.is_grad_enabled()
        hidden, heads = (tuple(grad and t.requires_grad for t in ts) for ts in (problem.hidden, problem.heads))
        return cls(grad and problem.gate_logits.requires_grad, hidden, heads)


def trainable(problem: Problem) -> str:
    """The first hidden state or head that needs a gradient; "" if all are frozen."""
    if not torch.is_grad_enabled():
        return ""
    for name, tensors in (("hidden", problem.hidden), ("head_weight", problem.heads)):
        for j, tensor in enumerate(tensors):
            if tensor.requires_grad:
                return f"{name}[{j}]"
    return ""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything but fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_problem(
    hidden: Sequence[Tensor],
    head_weight: Sequence[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Problem:
    """The validated problem, or an InputError of one line that names the argument, what it is and what it must be."""
    _check_tensors(hidden, head_weight, gate_logits, target)
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction: {reduction!r} is none of {', '.join(REDUCTIONS)}")
    _check_number("label_smoothing", label_smoothing, Real)
    _check_number("z_loss", z_loss, Real)
    _check_number("vocab_start", vocab_start, Integral)
    _check_number("ignore_index", ignore_index, Integral)
    if vocab_size is not None:
        _check_number("vocab_size", vocab_size, Integral)
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"label_smoothing: {label_smoothing} lies outside [0, 1]")
    if not 0.0 <= z_loss < float("inf"):
        raise InputError(f"z_loss: {z_loss} must be a finite number >= 0")
    held = head_weight[0].shape[0]
    shards = 1 if group is None else _members(group)
    if vocab_size is None:
        if shards > 1:
            raise InputError(
                f"vocab_size: needed when the heads are sharded over a group (this one has {shards} ranks)"
            )
        vocab_size = held
    if vocab_size < 1:
        raise InputError(f"vocab_size: {vocab_size} must be at least 1")
    if vocab_start < 0 or (shards == 1 and vocab_start != 0):
        raise InputError(f"vocab_start: {vocab_start} must be {'0 without a group' if shards == 1 else '>= 0'}")
    if shards == 1 and vocab_size > held:
        raise InputError(f"vocab_size: {vocab_size} exceeds the {held} head rows given, and there is no group")
    if readable(target):
        _check_target_range(target, vocab_size, ignore_index)
    settings = Settings(
        group=group if shards > 1 else None,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        reduction=reduction,
    )
    return Problem(tuple(hidden), tuple(head_weight), gate_logits, target, settings)


def _check_tensors(
    hidden: Sequence[Tensor], head_weight: Sequence[Tensor], gate_logits: Tensor, target: Tensor
) -> None:
    _check_list("hidden", hidden)
    _check_list("head_weight", head_weight)
    n = len(hidden)
    if n == 0 or len(head_weight) != n:
        raise InputError(f"hidden, head_weight: {n} and {len(head_weight)} tensors, needed one of each per specialist")
    for name, tensors in (("hidden", hidden), ("head_weight", head_weight)):
        for j in range(n):
            _check_tensor(f"{name}[{j}]", tensors[j])
    _check_tensor("gate_logits", gate_logits)
    _check_tensor("target", target)
    first = hidden[0]
    if first.dtype not in DTYPES:
        raise InputError(f"hidden[0]: dtype {first.dtype}, needed one of {', '.join(map(str, DTYPES))}")
    rows = first.shape[0] if first.dim() else 0
    held = head_weight[0].shape[0] if head_weight[0].dim() else 0
    for j, (states, weight) in enumerate(zip(hidden, head_weight, strict=True)):
        if states.dim() != 2 or states.shape[0] != rows:
            raise InputError(
                f"hidden[{j}]: shape {tuple(states.shape)}, needed (N, d_j) with N = {rows} as in hidden[0]"
            )
        if weight.dim() != 2 or weight.shape != (held, states.shape[1]):
            raise InputError(
                f"head_weight[{j}]: shape {tuple(weight.shape)}, needed ({held}, {states.shape[1]}):"
                " the rows of head_weight[0] by the width of its hidden"
            )
        _check_kind(f"hidden[{j}]", states, first.dtype, first.device)
        _check_kind(f"head_weight[{j}]", weight, first.dtype, first.device)
    if gate_logits.shape != (rows, n):
        raise InputError(f"gate_logits: shape {tuple(gate_logits.shape)}, needed ({rows}, {n}): rows by specialists")
    _check_kind("gate_logits", gate_logits, accumulate_dtype(first.dtype), first.device)
    if target.shape != (rows,):
        raise InputError(f"target: shape {tuple(target.shape)}, needed ({rows},): one vocabulary id per row")
    _check_kind("target", target, torch.int64, first.device)


def check_main_grad(head_main_grad: Sequence[Tensor | None], problem: Problem) -> None:
    """InputError unless there is one buffer, or None, per head that can receive its gradient in the wide type."""
    _check_list("head_main_grad", head_main_grad)
    if len(head_main_grad) != len(problem.heads):
        raise InputError(f"head_main_grad: {len(head_main_grad)} buffers, needed {len(problem.heads)}, one per head")
    for j, (buffer, head) in enumerate(zip(head_main_grad, problem.heads, strict=True)):
        if buffer is None:
            continue
        _check_tensor(f"head_main_grad[{j}]", buffer)
        if buffer.shape != head.shape:
            raise InputError(
                f"head_main_grad[{j}]: shape {tuple(buffer.shape)}, needed {tuple(head.shape)} as the head"
            )
        _check_kind(f"head_main_grad[{j}]", buffer, problem.accumulate_dtype, head.device)
        if buffer.requires_grad:
            raise InputError(f"head_main_grad[{j}]: requires a gradient, needed a plain buffer that is added to")


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at for nothing: not on a GPU, not in a graph that is compiled, not of a fake."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def check_shards(columns: int, vocab_size: int) -> None:
    """InputError unless the shards' real rows, ``columns`` in all, can be the vocabulary, each row of it once."""
    if columns != vocab_size:
        raise InputError(
            f"vocab_start, head_weight: the shards of the group hold {columns} rows of the vocabulary in all,"
            f" needed vocab_size = {vocab_size}, {'each row once' if columns > vocab_size else 'without gaps'}"
        )


def _members(group: dist.ProcessGroup) -> int:
    """How many ranks share the vocabulary; InputError where this rank is none of them."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]  # what new_group gives to the ranks it leaves out
        raise InputError("group: this rank is not a member of it; only its members call the loss")
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(f"group: {_kind(group)}, needed a process group or None")
    return dist.get_world_size(group)


def _check_list(name: str, values: object) -> None:
    if isinstance(values, str) or not isinstance(values, (Sequence, torch.nn.ParameterList)):
        raise InputError(f"{name}: {_kind(values)}, needed a list of tensors, one per specialist")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{name}: {_kind(value)}, needed a tensor")


def _check_number(name: str, value: object, kind: type) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InputError(f"{name}: {_kind(value)}, needed {'an integer' if kind is Integral else 'a number'}")


def _kind(value: object) -> str:
    """What a value of a wrong type is, in a few words: itself where it is short, else its type."""
    return repr(value) if value is None or isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _check_kind(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise InputError(f"{name}: dtype {tensor.dtype}, needed {dtype}")
    if tensor.device != device:
        raise InputError(f"{name}: on {tensor.device}, needed {device}, where hidden[0] is")


def _check_target_range(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Only where targets are readable; on a GPU such a row's loss is inf instead."""
    wrong = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InputError(f"target: row {row} is {int(target[row])}, outside [0, {vocab_size}) and not {ignore_index}")
