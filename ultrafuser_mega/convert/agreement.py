"""When do two models compute the same? When their float32 logits differ by no more than float32 itself costs.

What it costs is a property of the model: rounding is small beside the numbers that it rounds, but what a deep model
makes of it depends on its weights. So it is measured, in parts of the largest logit, on the same tokens
(``rounding_cost``), in the memory that the model has anyway; a run in float64 would take twice that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import psutil
import torch
from torch import Tensor, nn

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import Architecture, hf_shapes

_UNIT = 2.0**-24  # of float32: largest relative error of one rounding


@dataclass(frozen=True)
class Agreement:
    """How far apart two models' logits are on one batch of sequences; NaN is apart from everything, itself included.

    Attributes:
        what: the batch.
        shape: of the logits (b, s, V).
        max_abs: largest absolute difference.
        relative: that, over the largest absolute logit.
        top1: share of positions with the same most likely token.
    """

    what: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    top1: float

    @classmethod
    def of(cls, what: str, ours: Tensor, theirs: Tensor) -> Agreement:
        """Of two models' logits (b, s, V)."""
        known = ~(ours.amax(-1) - theirs.amax(-1)).isnan()  # a maximum over NaN is NaN
        same = known & (ours.argmax(-1) == theirs.argmax(-1))
        return cls(
            what,
            tuple(ours.shape),
            (ours - theirs).abs().max().item(),
            _relative(ours, theirs).item(),
            same.float().mean().item(),
        )


@dataclass(frozen=True)
class Comparison:
    """All of a comparison of the models ``a`` and ``b``.

    Attributes:
        tolerance: largest accepted difference of a float32 logit, in parts of the largest logit of b.
        equal: whether no batch exceeds it.
        batches: what was found on each.
    """

    a: str
    b: str
    tolerance: float
    equal: bool
    batches: list[Agreement]

    @classmethod
    def of(cls, a: str, b: str, tolerance: float, batches: list[Agreement]) -> Comparison:
        """With the verdict; a comparison with NaN is false, so NaN never counts as equal."""
        return cls(a, b, tolerance, all(agreement.relative <= tolerance for agreement in batches), batches)

    def to_json(self) -> str:
        """For other programs."""
        return json.dumps(asdict(self), indent=1)


@torch.no_grad()
def rounding_cost(
    model: nn.Module,
    logits: Sequence[Tensor],
    run: Callable[[], Sequence[Tensor]],
    merged: Callable[[str], float] | None = None,
) -> float:
    """How far apart float32's rounding can put two computations of a model, in parts of the largest logit.

    A sum of n products comes out of float32 as an exact sum would whose factors are each off by up to sqrt(n) 2^-24,
    in whatever order it is summed (with high probability: Higham and Mary, SIAM J. Sci. Comput. 41, 2019). So the model
    runs once more with every weight off by that much, up or down by chance, n being the longest row of a weight. Each
    of two computations may be off by what the logits then move, in opposite directions. On trained models of up to 30
    layers this is 7 to 15 times the error of transformers' float32 against its float64; rounding weights to bf16 moves
    the logits more than five times as far.

    Args:
        model: float32; its weights are changed for good.
        logits: what ``run`` gave before.
        run: computes the model's logits, a tensor for each batch.
        merged: parameter -> largest relative error of a number of it that one computation has rounded and the other
            has not, as merging adapters into narrow weights does; None: there are none.

    Returns:
        The tolerance of a comparison; NaN where a logit is.
    """
    generator = torch.Generator().manual_seed(0)

    def signs(size: int) -> Tensor:
        return torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).float()

    longest = max(weight.shape[-1] for weight in model.parameters() if weight.dim() > 1)
    for name, weight in model.named_parameters():
        # A sign for each row times one for each column: as good as one for each element, without drawing billions.
        pattern = signs(weight.shape[0])
        if weight.dim() > 1:
            pattern = torch.outer(pattern, signs(weight.shape[1]))
        unit = merged(name) / 2 if merged is not None else 0.0  # of one computation alone, and both are counted below
        weight.addcmul_(weight, pattern, value=math.sqrt(longest) * _UNIT + unit)
    moved = torch.stack([_relative(after, before) for after, before in zip(run(), logits, strict=True)])
    return 2 * moved.max().item()


def comparison_batches(ids: Sequence[int], rows: int, positions: int, multiple: int = 1) -> dict[str, Tensor]:
    """Token ids (b, s) to compare on: random ones, and a real text's.

    Args:
        ids: the text's tokens; those beyond ``rows`` are left out.
        rows: of the vocabulary.
        positions: that a sequence may have.
        multiple: s is a multiple of it; the text's last token is repeated for that.

    Raises:
        InputError: none of the text's tokens is in the vocabulary.
    """
    positions = positions // multiple * multiple
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, rows, (4, min(96, positions)), generator=generator)
    real = [token for token in ids if token < rows][:positions]
    if not real:
        raise InputError("--text: none of its tokens is in the vocabulary; give a longer text")
    real += real[-1:] * (-len(real) % multiple)
    return {"random": random, "real": torch.tensor([real])}


def limits(archs: Sequence[Architecture]) -> tuple[int, int]:
    """Vocabulary rows, and positions of a sequence, that all of them have."""
    windows = [arch.sliding_window for arch in archs if arch.sliding_window is not None]
    return min(arch.vocab_rows for arch in archs), min(chain((arch.max_positions for arch in archs), windows))


def float32_bytes(archs: Sequence[Architecture]) -> int:
    """Of all their weights."""
    return 4 * sum(math.prod(shape) for arch in archs for shape in hf_shapes(arch).values())


def check_memory(what: str, archs: Sequence[Architecture]) -> None:
    """Refuse a comparison whose weights alone are more than what is free.

    Raises:
        InputError: says how much it takes.
    """
    needed, free = float32_bytes(archs), psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"{what}: comparing it takes {needed / 1e9:.1f} GB of memory for its weights in float32, "
            f"{free / 1e9:.1f} are free; use a machine with more"
        )


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """Largest difference, in parts of the largest of ``theirs``."""
    largest = (ours - theirs).abs().max()
    return largest if largest == 0 else largest / theirs.abs().max()
