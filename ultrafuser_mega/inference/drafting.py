"""Specialists that draft for each other, exactly: the same tokens as without, in fewer passes.

The specialist that leads an answer proposes its next tokens alone; the others read all of them in one pass each, and
the mixture says how far they are what it would have chosen. The leader's hidden states are used again, so k drafts cost
at most k + 1 passes of one specialist and one pass of each other, for up to k + 1 tokens; fewer where the leader reads
what followed the same tokens before (``guesses``) and then drafts just that. A specialist without others checks such
guesses alone: a pass for up to k + 1 tokens. Drafts and choices of a position are
drawn with the same noise (``noise``), so they agree as often as the distributions let them, and the answer is the one
without drafts, token for token, drawn or greedy; but for rounding, which passes of other shapes do otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ultrafuser_mega.inference.lanes import Lanes
from ultrafuser_mega.inference.sampling import choose
from ultrafuser_mega.inference.underway import Underway


@dataclass(frozen=True)
class Round:
    """What specialists say to the tokens that come next; R places, row by row: behind the answer and behind its drafts.

    Attributes:
        hidden: specialist -> (R, d_j).
        logits: specialist -> (R, V) float32, of it alone.
        counts: of each row's places.
        passes: specialist -> forward passes.
        read: tokens that all specialists together read.
    """

    hidden: dict[str, Tensor]
    logits: dict[str, Tensor]
    counts: list[int]
    passes: dict[str, int]
    read: int


@dataclass
class _Said:
    """By one specialist: parts, and the (row, place) of each of their rows in turn."""

    hidden: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    order: list[tuple[int, int]] = field(default_factory=list)

    def add(self, hidden: Tensor, logits: Tensor, order: Sequence[tuple[int, int]]) -> None:
        self.hidden.append(hidden)
        self.logits.append(logits)
        self.order += order

    def sorted(self) -> tuple[Tensor, Tensor]:
        """All, row by row."""
        hidden, logits = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (self.hidden, self.logits))
        order = sorted(range(len(self.order)), key=self.order.__getitem__)
        if order == list(range(len(order))):
            return hidden, logits
        return hidden[torch.tensor(order, device=hidden.device)], logits[torch.tensor(order, device=logits.device)]


def next_round(lanes: Lanes, rows: Sequence[Underway], length: int) -> Round:
    """One round of all ``rows``, with drafts of up to ``length`` tokens; 0: none."""
    names = list(lanes.positions)
    said = {name: _Said() for name in names}
    passes = dict.fromkeys(names, 0)
    limits = [0 if row.request.constraint is not None else min(length, row.left - 1) for row in rows]
    if len(names) > 1:
        _draft(lanes, rows, limits, said, passes)
    else:
        for row, limit in zip(rows, limits, strict=True):
            for token in row.guess(limit):
                row.draft(token)
    counts = [row.unsettled for row in rows]
    read = sum(len(part.order) for part in said.values())
    spans, order = {}, {}
    for name in names:
        checked = [(number, row.sequences[name]) for number, row in enumerate(rows) if row.sequences[name].left]
        if checked:
            spans[name] = [(held, held.left) for _, held in checked]
            order[name] = [(number, place) for number, held in checked for place in range(held.left)]
            passes[name] += 1
            read += len(order[name])
    hidden = {name: _meant(part, [count for _, count in spans[name]]) for name, part in lanes.read(spans).items()}
    for name, logits in lanes.own_logits(hidden).items():
        said[name].add(hidden[name], logits, order[name])
    whole = {name: part.sorted() for name, part in said.items()}
    return Round(
        {name: hidden for name, (hidden, _) in whole.items()},
        {name: logits for name, (_, logits) in whole.items()},
        counts,
        passes,
        read,
    )


def _draft(
    lanes: Lanes, rows: Sequence[Underway], limits: Sequence[int], said: dict[str, _Said], passes: dict[str, int]
) -> None:
    """Give rows up to so many drafts each by their leaders, which read them, guesses at what they will draft ahead."""
    names = list(lanes.positions)
    going = [number for number, limit in enumerate(limits) if limit > 0]
    while going:
        groups = {name: [i for i in going if names[rows[i].leader] == name] for name in names}
        groups = {name: members for name, members in groups.items() if members}
        guesses = {i: rows[i].guess(limits[i] - len(rows[i].drafts)) for i in going}
        spans = {name: [(rows[i].sequences[name], 1 + len(guesses[i])) for i in own] for name, own in groups.items()}
        for name, own in groups.items():
            for i in own:
                rows[i].sequences[name].ids += guesses[i]
        hidden = {name: _meant(part, [count for _, count in spans[name]]) for name, part in lanes.read(spans).items()}
        logits = lanes.own_logits(hidden)
        ahead = {name: [(i, g) for i in own for g in range(1 + len(guesses[i]))] for name, own in groups.items()}
        chosen = _chosen(rows, limits, guesses, [pair for own in ahead.values() for pair in own], logits)
        going = []
        for name, members in groups.items():
            passes[name] += 1
            meant: list[int] = []
            order: list[tuple[int, int]] = []
            first = 0
            for i in members:
                at = len(rows[i].drafts)
                places, goes_on = _take(rows[i], name, guesses[i], chosen[i])
                meant += range(first, first + places)
                order += [(i, at + place) for place in range(places)]
                first += 1 + len(guesses[i])
                if goes_on:
                    going.append(i)
            if len(meant) < first:
                hidden[name], logits[name] = (
                    part[torch.tensor(meant, device=part.device)] for part in (hidden[name], logits[name])
                )
            said[name].add(hidden[name], logits[name], order)
        going.sort()


def _chosen(
    rows: Sequence[Underway],
    limits: Sequence[int],
    guesses: Mapping[int, list[int]],
    ahead: Sequence[tuple[int, int]],
    logits: Mapping[str, Tensor],
) -> dict[int, list[int]]:
    """Row -> what its leader drafts behind each of the places that it read and may draft behind."""
    chosen: dict[int, list[int]] = {i: [] for i in guesses}
    wanted = [at for at, (i, g) in enumerate(ahead) if len(rows[i].drafts) + g < limits[i]]
    if not wanted:
        return chosen
    scores = torch.cat(list(logits.values()))
    if len(wanted) < len(ahead):
        scores = scores[torch.tensor(wanted, device=scores.device)]
    places = [rows[i].place(len(rows[i].drafts), guesses[i][:g]) for i, g in (ahead[at] for at in wanted)]
    for at, token in zip(wanted, choose(scores, places).tolist(), strict=True):
        chosen[ahead[at][0]].append(token)
    return chosen


def _take(row: Underway, leader: str, guessed: Sequence[int], chosen: Sequence[int]) -> tuple[int, bool]:
    """Make drafts of what the leader chose, as long as it had read just that.

    Returns:
        How many of the places that it read count, and whether it reads on.
    """
    held = row.sequences[leader]
    held.cut(len(held.ids) - len(guessed))
    read, right = len(held.ids), 0
    for place, token in enumerate(chosen):
        row.draft(token)
        if token in row.request.eos:
            goes_on = False
            break
        if guessed[place : place + 1] != [token]:
            goes_on = True
            break
        right += 1
    else:  # it has spoken behind the last draft, too
        goes_on = False
    if guessed:
        row.trusted = right
    held.read = read + right
    return right + 1, goes_on


def _meant(hidden: Tensor, counts: Sequence[int]) -> Tensor:  # (b, s, d) -> (R, d)
    """The last ``counts[row]`` of each row."""
    s = hidden.shape[1]
    if min(counts) == s:
        return hidden.flatten(0, 1)
    index = [row * s + at for row, count in enumerate(counts) for at in range(s - count, s)]
    return hidden.flatten(0, 1)[torch.tensor(index, device=hidden.device)]
