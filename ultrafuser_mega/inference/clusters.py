"""Routing by clusters of prompts (Avengers, Zhang et al. 2025): no training, a table of who answers best where.

A prompt is the first specialist's last hidden state where the prompt ends, at length 1. k-means over prompts whose
responses are known; in every cluster the specialist with the highest mean log-likelihood of a response's token answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.inference.lanes import Lanes
from ultrafuser_mega.inference.mixing import Evidence, Rule
from ultrafuser_mega.inference.requests import Prompt
from ultrafuser_mega.inference.scoring import Continued, Scorer
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

SUFFIX = ".routing"
_ROUNDS = 100
_PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Clusters:
    """Who answers which prompts.

    Attributes:
        names: the specialists.
        centres: (k, d) float32, of length 1.
        chosen: (k,) the specialist's place in ``names``.
    """

    names: list[str]
    centres: Tensor
    chosen: Tensor

    def rule(self) -> Rule:
        """The mixture that gives all weight to the chosen specialist, for the whole answer."""
        n = len(self.names)

        def weights(evidence: Evidence) -> Tensor:
            near = _unit(evidence.state.float().cpu()) @ self.centres.T
            return torch.nn.functional.one_hot(self.chosen[near.argmax(1)], n).to(evidence.gate)

        return Rule(weights)

    def save(self, path: Path) -> None:
        """Write it to ``path``."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"centres": self.centres, "chosen": self.chosen}
            save_file(tensors, path, {"names": json.dumps(self.names)})

    @classmethod
    def load(cls, path: Path, names: Sequence[str]) -> Clusters:
        """Read what ``save`` wrote, for a model of the specialists ``names``.

        Raises:
            InputError: the file is no such thing, or was made of other specialists.
        """
        try:
            with safe_open(path, "pt") as file:
                held = json.loads((file.metadata() or {})["names"])
                found = cls(held, file.get_tensor("centres"), file.get_tensor("chosen"))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not what ultrafuser baseline clusters writes ({error})") from None
        if found.names != list(names):
            raise InputError(f"{path}: was made of {', '.join(found.names)}, the model has {', '.join(names)}")
        return found


def fit_clusters(
    model: UltraFuserForCausalLM, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], k: int, seed: int
) -> Clusters:
    """Find clusters of ``prompts`` and who answers best in each.

    Args:
        model: its specialists are on their devices.
        prompts: of S samples.
        responses: the ids of each one's response.
        k: clusters, at most S.
        seed: of k-means.

    Raises:
        InputError: fewer samples than clusters.
    """
    if len(prompts) < k:
        raise InputError(f"--clusters {k}: there are only {len(prompts)} prompts")
    states = _unit(torch.cat(list(_states(model, prompts)))).numpy()
    centres, members = k_means(states, k, seed)
    likelihoods = np.stack([_likelihoods(model, prompts, responses, place) for place in range(len(model.names))], 1)
    means = np.stack([likelihoods[members == cluster].mean(0) for cluster in range(k)])
    return Clusters(list(model.names), torch.from_numpy(centres), torch.from_numpy(means.argmax(1)))


def k_means(points: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (k, d) of length 1 and each point's cluster (S,), by cosine; no cluster is empty.

    Args:
        points: (S, d) of length 1.
        k: at most S.
        seed: of the first centres (k-means++, Arthur & Vassilvitskii 2007).
    """
    random = np.random.default_rng(seed)
    centres = points[[random.integers(len(points))]]
    while len(centres) < k:
        away = np.maximum(1 - (points @ centres.T).max(1), 0)
        weights = away / away.sum() if away.sum() > 0 else None
        centres = np.concatenate([centres, points[[random.choice(len(points), p=weights)]]])
    members = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        near = points @ centres.T
        now = near.argmax(1)
        for cluster in np.setdiff1d(np.arange(k), now):  # takes the point that its own centre fits worst
            crowded = np.bincount(now, minlength=k)[now] > 1
            now[np.where(crowded, near.max(1), np.inf).argmin()] = cluster
        if (now == members).all():
            break
        members = now
        centres = np.stack([points[members == cluster].mean(0) for cluster in range(k)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return centres.astype(np.float32), members


def _states(model: UltraFuserForCausalLM, prompts: Sequence[Prompt]) -> list[Tensor]:
    first = model.names[0]
    longest = max(len(ids) for prompt in prompts for ids in prompt.values())
    lanes, found = Lanes(model, _PROMPTS_AT_ONCE * longest), []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        opened = [lanes.open(prompt, 0) for prompt in prompts[start : start + _PROMPTS_AT_ONCE]]
        rows = [sequences for sequences in opened if sequences is not None]  # all: there is room
        hidden = lanes.read({first: [(sequences[first], sequences[first].left) for sequences in rows]})
        found.append(hidden[first][:, -1].float().cpu())
        for sequences in rows:
            lanes.close(sequences)
    return found


def _likelihoods(
    model: UltraFuserForCausalLM, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], place: int
) -> np.ndarray:
    """(S,) mean log-likelihood of a response's token under one specialist."""
    n = len(model.names)
    alone = Rule(lambda evidence: torch.eye(n)[place].to(evidence.gate).expand_as(evidence.gate))
    requests = [Continued(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    found = np.zeros(len(requests))
    for number, likelihood in Scorer(model, alone).score(requests):
        found[number] = likelihood.total / len(responses[number])
    return found


def _unit(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states, dim=1)
