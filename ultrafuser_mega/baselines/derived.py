"""Baselines that are runs of the trainer: a configuration made of another, trained, exported.

further-tuned    one specialist, on the same data with the same sampler, for as many samples as the fused model sees
llamafuser       the fused structure over copies of a model that was never specialised
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ultrafuser_mega.baselines.folder import (
    Account,
    new_folder,
    write_card,
    write_conversation,
    write_record,
)
from ultrafuser_mega.config import DisjointLayout, FuserConfig, Layout, dump_config
from ultrafuser_mega.config.parts import GATE, HEADS, SPECIALISTS
from ultrafuser_mega.config.problems import first_problem
from ultrafuser_mega.config.stages import Part, Stage2
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.data.store import MANIFEST, TokenStore
from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.models.hf_folder import read_json_object
from ultrafuser_mega.planning.preflight import shared_vocabulary
from ultrafuser_mega.reporting.records import FUSED, MEAN, SUMMARY_FILE, read_metrics, write_summary
from ultrafuser_mega.training.prepare import in_steps, make_missing_toy


@dataclass(frozen=True)
class DerivedRun:
    """A run to train, and what becomes of it.

    Attributes:
        config: of the run.
        what: is exported of it: "fused" or "specialist:NAME".
        account: of the exported folder.
    """

    config: FuserConfig
    what: str
    account: Account

    @property
    def config_path(self) -> Path:
        """Where the run's configuration is kept, for its ranks and for whoever trains it on a cluster."""
        return self.config.runs / f"{self.config.name}.yaml"

    def write_config(self) -> None:
        """Keep it there; raises InputError where that cannot be."""
        with writing(self.config_path):
            self.config_path.parent.mkdir(parents=True, exist_ok=True)
            self.config_path.write_text(dump_config(self.config))

    @property
    def is_over(self) -> bool:
        """Whether it was trained to its end: what it keeps as its result is of all its steps."""
        path = self.config.run_dir / SUMMARY_FILE
        return path.is_file() and read_json_object(path).get("steps") == len(read_metrics(path.parent)[0])

    def export(self, out: Path) -> list[str]:
        """Write the trained run's model as ``out``; returns notices for people.

        Raises:
            InputError: as :func:`ultrafuser_mega.convert.export.export`.
        """
        with new_folder(out) as folder:
            notices = export(self.config.run_dir, folder / "model", self.what)
            for path in (folder / "model").iterdir():
                path.rename(folder / path.name)
            (folder / "model").rmdir()
            summary = read_json_object(self.config.run_dir / SUMMARY_FILE)
            account = replace(self.account, notices=notices)
            if self.what == FUSED:
                card = folder / "README.md"
                card.write_text(card.read_text() + f"\n## What it is for\n\n{account.words}\n")
            else:
                losses = {name: models[FUSED] for name, models in summary["eval"].items() if name != MEAN}
                write_conversation(folder, account, shared_vocabulary(self.config))
                write_card(folder, account, out.name, losses)
            write_record(folder, account)
            write_summary(folder, summary)
        return notices


def further_tuned(config: FuserConfig, specialist: str, classes: Sequence[str] = ()) -> DerivedRun:
    """One specialist trained alone, with stage 2's rates, for as many samples as both stages of ``config`` take.

    In full, or by adapters where stage 2 trains it by them; its head then as stage 2 trains heads.

    Args:
        config: of the fused model's run.
        specialist: which one.
        classes: of the data to train and evaluate on; none: all. Fewer classes have more samples each in a batch, so
            that a batch holds as many.

    Raises:
        InputError: there is no such specialist or class, or the run cannot begin with its folder.
    """
    _among("--specialist", specialist, config.specialists)
    for name in classes:
        _among("--classes", name, config.data.classes)
    tree = begin_derived(config)
    chosen = [name for name in config.data.classes if name in classes] or list(config.data.classes)
    per_class = -(-config.stage2.samples_per_class * len(config.data.classes) // len(chosen))
    steps = steps_of_both_stages(config)
    on = "" if len(chosen) == len(config.data.classes) else f"-on-{'-'.join(chosen)}"
    tree["name"] = f"{config.name}-further-tuned-{specialist}{on}"
    tree["specialists"] = {specialist: tree["specialists"][specialist]}
    tree["layouts"] = [_alone(layout, specialist) for layout in config.layouts]
    tree["data"]["classes"] = {name: tree["data"]["classes"][name] for name in chosen}
    if isinstance(config.data.sampling, dict):
        tree["data"]["sampling"] = {name: config.data.sampling[name] for name in chosen}
    train_in_full(tree, steps)
    if adapted := config.parts(2)[specialist].mode == "lora":
        tree["stage2"]["train"] = _adapters_alone(config.stage2, specialist)
        tree["stage2"]["gate_lr"] = None
    tree["stage2"]["samples_per_class"] = per_class
    derived = derived_config(tree)
    how = " by adapters" if adapted else ""
    words = f"The specialist {specialist} alone, trained further{how} on {', '.join(chosen)} data: {steps} steps of "
    words += f"{per_class} samples of each class, as many as the fused model is trained on."
    account = Account(
        method="further-tuned",
        words=words,
        config=derived,
        like=specialist,
        settings={"specialist": specialist, "classes": chosen, "steps": steps, "samples_per_class": per_class},
        made_of=derived.folders,
    )
    return DerivedRun(derived, f"specialist:{specialist}", account)


def llamafuser(config: FuserConfig, base: Path) -> DerivedRun:
    """The run of ``config`` with the model in ``base`` in the place of every specialist, under its name and template.

    Raises:
        InputError: the run cannot begin with the folder.
    """
    tree = begin_derived(config)
    tree["name"] = f"{config.name}-llamafuser"
    for specialist in tree["specialists"].values():
        specialist["path"] = str(base.absolute())
    derived = derived_config(tree)
    copies = len(config.specialists)
    words = f"The fused structure over {copies} copies of {base.absolute().name}, which was not specialised: what the "
    words += "structure and its training bring without specialists."
    account = Account(
        method="llamafuser",
        words=words,
        config=derived,
        like=next(iter(config.specialists)),
        settings={"base": str(base), "copies": copies},
        made_of={"base": base},
    )
    return DerivedRun(derived, FUSED, account)


def train_in_full(tree: dict[str, Any], steps: int) -> None:
    """Make a run of ``tree`` that trains everything for so many steps at stage 2's rates, and nothing before."""
    tree["stage1"] |= {"steps": 0, "train": {}, "epochs": None}
    tree["stage2"] |= {"steps": steps, "train": {}, "epochs": None}
    tree["checkpoint"]["weights"] = "all"


def steps_of_both_stages(config: FuserConfig) -> int:
    """Steps with stage 2's batches in which as many samples are taken as in both stages.

    Raises:
        InputError: stages end by epochs, and the run's data are not prepared.
    """
    if by := [f"stage{number}.epochs" for number, stage in config.stages.items() if stage.epochs is not None]:
        if not (config.store_dir / MANIFEST).is_file():
            raise InputError(
                f"{by[0]}: how many steps they are, prepared data say, and {config.store_dir} holds none; "
                "run ultrafuser prepare with this configuration first"
            )
        config = in_steps(config, TokenStore.open(config.store_dir, verify=False))
    taken = sum(stage.steps * stage.samples_per_class for stage in config.stages.values())
    return -(-taken // config.stage2.samples_per_class)


def derived_config(tree: dict[str, Any]) -> FuserConfig:
    """The configuration in ``tree``; raises InputError where what was derived cannot be one: a name too long, say."""
    try:
        return FuserConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"the baseline's configuration: {first_problem(error)}") from None


def begin_derived(config: FuserConfig) -> dict[str, Any]:
    """The tree of a configuration whose run has a token store of its own and begins with folders."""
    if config.checkpoint.start is not None:
        raise InputError(
            f"checkpoint.start: {config.checkpoint.start}: a baseline begins with the folders that the fused model "
            "began with; set checkpoint.start=null"
        )
    make_missing_toy(config)
    tree = config.model_dump(mode="json")
    tree["vocab_size"] = shared_vocabulary(config)
    tree["data"]["store"] = None
    return tree


def _alone(layout: Layout, specialist: str) -> dict[str, Any]:
    """The ranks of one specialist in ``layout``, without the others."""
    part = layout.specialists[specialist] if isinstance(layout, DisjointLayout) else layout
    return {"kind": "colocated", "tp": part.tp, "pp": part.pp, "dp": layout.dp}


def _adapters_alone(stage: Stage2, specialist: str) -> dict[str, Any]:
    """``stage2.train`` of a specialist alone whose adapters ``stage`` trains; a gate over one has nothing to learn."""
    own = stage.train.get(specialist) or stage.train[SPECIALISTS]
    parts = {GATE: Part(mode="frozen"), HEADS: stage.train.get(HEADS, Part()), specialist: own}
    return {name: part.model_dump(mode="json") for name, part in parts.items()}


def _among(option: str, name: str, known: Any) -> None:
    if name not in known:
        raise InputError(f"{option} {name}: the configuration has {', '.join(known)}")
