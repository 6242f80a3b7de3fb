"""What a seed is a repetition of: its specialists, their data, and the configuration of all its runs.

Of the toy every seed makes its own: three specialists branched from one base model, rows to train on of which half have
been seen by no specialist (the same grammar, another seed), held-out rows and tasks whose replies can be checked. Of
somebody's own specialists (``--config``) a seed repeats training alone: its order of samples, its gate's beginning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrafuser_mega.config import FuserConfig, dump_config, load_config
from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.files import whole, write_atomically
from ultrafuser_mega.toy import ToyFolders, ToyRecipe, make_toy
from ultrafuser_mega.toy.corpus import CLASSES, generate, read_jsonl, write_jsonl

FUSED_RUN = "ultrafuser"
_FRESH_SEED = 10_000  # beyond the seed of the rows that specialists were trained on
#: Longer than the demo's toys: as briefly trained, none answers enough tasks for accuracies to tell models apart.
_RECIPE = ToyRecipe(branched=True, steps=1000, branch_steps=800)
#: Where a run is not one process, its experiments would wait for each other's ranks.
_ONE_PROCESS = "layouts=[{kind: colocated}]"
_EVALUATIONS, _QUICK_EVALUATIONS = 10, 5  # in stage 2, as densely in stage 1: for curves and table 4


@dataclass(frozen=True)
class Asked:
    """What the user asked for.

    Attributes:
        out: folder of everything.
        seeds: repetitions.
        quick: fewer steps, tasks and held-out samples.
        config: of somebody's own specialists; None: the toy's.
        overrides: of it.
        base: what those were trained from; None: nothing common.
        tasks: folder of their CLASS.tasks.jsonl; None: there are none.
        jobs: processes side by side.
        so_far: run nothing, the page is of what is there.
    """

    out: Path
    seeds: Sequence[int]
    quick: bool
    config: Path | None = None
    overrides: Sequence[str] = ()
    base: Path | None = None
    tasks: Path | None = None
    jobs: int = 2
    so_far: bool = False


@dataclass(frozen=True)
class Trio:
    """One seed's.

    Attributes:
        seed: which.
        root: folder of all of this seed.
        config: of its fused run.
        base: folder of the model that the specialists were trained from, if there is one.
        tasks: folder of tasks whose replies can be checked, if there are.
    """

    seed: int
    root: Path
    config: FuserConfig
    base: Path | None
    tasks: Path | None

    @property
    def config_path(self) -> Path:
        """Where its configuration is kept."""
        return self.root / "config.yaml"


def make_trio(asked: Asked, seed: int) -> Trio:
    """What this seed is about; made where it is missing.

    Raises:
        InputError: the configuration is wrong, or the folder holds what was made by another.
    """
    root = asked.out.absolute() / f"seed-{seed}"
    if asked.so_far and not root.is_dir():
        raise InputError(f"--so-far: {root}: no such folder; nothing was run for seed {seed}")
    base, tasks = asked.base, asked.tasks
    settings = [f"name={FUSED_RUN}", f"seed={seed}", f"runs={root / 'runs'}", f"data.store={root / 'store'}"]
    settings += [_ONE_PROCESS, "checkpoint.every=0", "checkpoint.start=null", "evaluation.token_views=2"]
    if asked.config is None:
        toy = make_toy(root / "toy", seed=seed, recipe=_RECIPE)
        base, tasks = toy.base, toy.root / "data"
        settings += ["toy=null", f"models={toy.root}", f"data.root={toy.root / 'data'}"]
        for name, path in write_fresh(toy, root / "fresh", seed, _RECIPE.train_rows).items():
            settings.append(f"data.classes.{name}.train=[{name}.train.jsonl, {path}]")
        if asked.quick:
            settings += ["stage1.steps=50", "stage2.steps=40", "evaluation.samples_per_class=40"]
    config = load_config(asked.config, [*settings, *asked.overrides])
    every = max(1, config.stage2.steps // (_QUICK_EVALUATIONS if asked.quick else _EVALUATIONS))
    config = load_config(asked.config, [*settings, *asked.overrides, f"evaluation.every={every}"])
    trio = Trio(seed, root, config, base, tasks)
    _keep(trio)
    return trio


def write_fresh(toy: ToyFolders, folder: Path, seed: int, rows: int) -> dict[str, Path]:
    """Class -> file of rows that no specialist was trained on and no evaluation asks for; made where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in CLASSES:
        found[name] = folder / f"{name}.fresh.jsonl"
        if found[name].exists():
            continue
        known = {row.instruction for path in (toy.train[name], toy.heldout[name]) for row in read_jsonl(path)}
        known |= {json.loads(line)["instruction"] for line in toy.tasks[name].open(encoding="utf-8")}
        other = generate(name, seed=seed + _FRESH_SEED, train_rows=rows, heldout_rows=1).train
        with whole(found[name]) as draft:
            write_jsonl(draft, tuple(row for row in other if row.instruction not in known))
    return found


def _keep(trio: Trio) -> None:
    text = dump_config(trio.config)
    if trio.config_path.exists() and trio.config_path.read_text() != text:
        raise InputError(
            f"{trio.config_path}: this folder holds results under other settings; give another --out, or the same "
            "options as before"
        )
    with writing(trio.config_path):
        trio.root.mkdir(parents=True, exist_ok=True)
        write_atomically(trio.config_path, text)
