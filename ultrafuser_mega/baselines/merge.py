"""A configuration's specialists merged into a folder, by ``ultrafuser baseline average`` and its neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultrafuser_mega.baselines.folder import Account, new_folder, write_beside_weights, write_card, write_losses
from ultrafuser_mega.baselines.heldout import heldout_losses, load_model
from ultrafuser_mega.baselines.ingredients import Ingredients
from ultrafuser_mega.baselines.mergekit import check_mergekit, write_merge
from ultrafuser_mega.baselines.merging import BASE, average_coefficients, task_coefficients, write_combination
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import EMBEDDING, read_json_object
from ultrafuser_mega.planning.preflight import RunPlan, first_layouts_ranks, preflight
from ultrafuser_mega.runtime.device import choose_device
from ultrafuser_mega.training.prepare import make_missing_toy, prepare

_WORDS = {
    "average": "The weights of {names} averaged, tensor by tensor (Wortsman et al. 2022). Nothing was trained.",
    "task-arithmetic": "What {names} learned beyond their base model, added up and to it (Ilharco et al. 2023). "
    "Nothing was trained.",
    "ties": "What {names} learned beyond their base model, trimmed to its largest part, its signs agreed upon, and "
    "added to it (TIES, Yadav et al. 2023; computed by mergekit). Nothing was trained.",
    "dare": "What {names} learned beyond their base model, a random part of it dropped and the rest scaled up, added "
    "to it (DARE, Yu et al. 2024; computed by mergekit). Nothing was trained.",
}
#: Share of a task vector that is kept, as published: TIES' top 20 %, DARE's drop rate of 0.9.
DENSITY = {"ties": 0.2, "dare": 0.1}


@dataclass(frozen=True)
class Merge:
    """What to merge, and how.

    Attributes:
        method: average, task-arithmetic, ties or dare.
        weights: specialist -> its weight; the first gives structure, tokenizer and template.
        base: the folder that the specialists were trained from; None for an average.
        scale: of what is added to the base.
        density: share of it that ties and dare keep; None: as published.
        mergekit: an interpreter that has mergekit; None: this one. Used by ties and dare.
    """

    method: str
    weights: Mapping[str, float]
    base: Path | None = None
    scale: float = 1.0
    density: float | None = None
    mergekit: Path | None = None

    @property
    def by_mergekit(self) -> bool:
        """Whether mergekit computes it."""
        return self.method in DENSITY


def parse_parts(config: FuserConfig, text: str | None) -> dict[str, float]:
    """``text,math`` or ``text=2,math=1`` -> name -> weight; None: every specialist, 1 each.

    Raises:
        InputError: one is not a specialist of the configuration, stands twice, or its weight is no number.
    """
    if text is None:
        return dict.fromkeys(config.specialists, 1.0)
    parts: dict[str, float] = {}
    for entry in text.split(","):
        name, _, weight = entry.strip().partition("=")
        if name not in config.specialists or name in parts:
            what = "stands twice" if name in parts else "is no specialist of the configuration"
            raise InputError(f"--of {text}: {name!r} {what}; choose among {', '.join(config.specialists)}")
        try:
            parts[name] = float(weight) if weight else 1.0
        except ValueError:
            parts[name] = math.nan
        if not math.isfinite(parts[name]):
            raise InputError(f"--of {text}: {weight!r} is no number; expected as in {name}=0.5")
    return parts


def merge(config: FuserConfig, out: Path, how: Merge, *, losses: bool = True) -> list[str]:
    """Write the folder ``out``; returns notices for people.

    Args:
        config: with the specialists and, for the losses, their data.
        out: must not exist.
        how: to merge.
        losses: evaluate the result on the held-out data, which needs memory for the whole model in float32.

    Raises:
        InputError: the specialists cannot be merged, mergekit is missing or fails, ``out`` cannot be written.
    """
    python = check_mergekit(how.mergekit) if how.by_mergekit else None
    if how.base is None and how.method != "average":
        raise InputError(f"--base: {how.method} needs the folder of the model that the specialists were trained from")
    plan = checked(config)
    folders = {name: config.folders[name] for name in how.weights}
    ingredients = _ingredients({**folders, BASE: how.base} if how.base else folders, plan.vocab_size)
    settings, coefficients = _settings(how), _coefficients(how)
    names = " and ".join([", ".join([*how.weights][:-1]), [*how.weights][-1]]) if len(how.weights) > 1 else "one model"
    account = Account(
        method=how.method,
        words=_WORDS[how.method].format(names=names),
        config=config,
        like=next(iter(how.weights)),
        settings=settings,
        made_of=ingredients.folders,
        notices=ingredients.notices,
    )
    with new_folder(out) as folder:
        if python is not None:
            density = {"density": dict.fromkeys(how.weights, settings["density"])}
            write_merge(folder, ingredients, how.method, how.weights, density, how.scale, config.seed, python)
        else:
            write_combination(folder, ingredients, lambda tensor: coefficients)
        fields = read_json_object(config.folders[account.like] / "config.json")
        fields["tie_word_embeddings"] = ingredients.tied
        write_beside_weights(folder, account, fields, plan.vocab_size, ingredients.dtype(EMBEDDING))
        measured = evaluated(folder, config, plan, account.like) if losses else None
        if measured is not None:
            write_losses(folder, measured)
        write_card(folder, account, out.name, measured)
    return list(ingredients.notices)


def checked(config: FuserConfig) -> RunPlan:
    """The plan of the configuration's run, whose specialists and data are there; its toy trio is made where missing."""
    make_missing_toy(config)
    return preflight(config, first_layouts_ranks(config), resume=False)


def evaluated(folder: Path, config: FuserConfig, plan: RunPlan, like: str) -> dict[str, float]:
    """Class -> held-out loss of the model in ``folder``, asked as ``like`` is; on the run's store, made if missing."""
    prepare(config, plan.vocab_size)
    store = TokenStore.open(config.store_dir, verify=False)
    model = load_model(folder, choose_device(config.device))
    with torch.inference_mode():
        return heldout_losses(model, store, config, like)


def _ingredients(folders: Mapping[str, Path], vocab_size: int) -> Ingredients:
    ingredients = Ingredients.of(folders, vocab_size)
    rows = ingredients.architecture.vocab_rows
    if rows < vocab_size:
        raise InputError(
            f"--base {folders[BASE]}: has {rows} vocabulary rows, the specialists share {vocab_size}; "
            f"set vocab_size={rows}"
        )
    return ingredients


def _coefficients(how: Merge) -> dict[str, float]:
    return average_coefficients(how.weights) if how.method == "average" else task_coefficients(how.weights, how.scale)


def _settings(how: Merge) -> dict[str, Any]:
    settings: dict[str, Any] = {"weights": dict(how.weights)}
    if how.base is not None:
        if not math.isfinite(how.scale):
            raise InputError(f"--scale {how.scale:g}: expected a number, as 0.4")
        settings |= {"base": str(how.base), "scale": how.scale}
    if how.by_mergekit:
        density = DENSITY[how.method] if how.density is None else how.density
        if not 0 < density <= 1:
            raise InputError(f"--density {density:g}: expected a share above 0, at most 1")
        settings["density"] = density
    return settings
