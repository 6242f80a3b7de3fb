"""The run in which a student learns from a fused model: a configuration made of that of the fused run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ultrafuser_mega.baselines.derived import DerivedRun, steps_of_both_stages, train_in_full
from ultrafuser_mega.baselines.folder import Account
from ultrafuser_mega.checkpoint.checkpoint import adapted_specialists
from ultrafuser_mega.checkpoint.locate import find_checkpoint
from ultrafuser_mega.checkpoint.sources import CONFIG
from ultrafuser_mega.config import DisjointLayout, FuserConfig, Layout, load_config
from ultrafuser_mega.config.load import parse_config
from ultrafuser_mega.data.tokenizer import check_tokenizers
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import read_architecture
from ultrafuser_mega.planning.preflight import shared_vocabulary

STUDENT = "student"


def distilled(
    run: Path, into: str, template: str | None = None, config: Path | None = None, overrides: Sequence[str] = ()
) -> DerivedRun:
    """The run that distils the fused model of ``run``.

    The student is one more specialist, on as many ranks as ``into`` has or, of a colocated layout, on all. It takes as
    many samples as both stages of the fused run, in stage 2's batches at stage 2's rates.

    Args:
        run: a run's folder, or a checkpoint of a fused model.
        into: what the student begins as: a specialist of the run, as it came, or a Hugging Face folder.
        template: of the student; None: the specialist's, or the folder's own.
        config: of the fused run; None: what its checkpoint keeps.
        overrides: of the configuration that comes of all this.

    Raises:
        InputError: there is no such checkpoint or student, or an override is wrong.
    """
    checkpoint = find_checkpoint(run).resolve()  # "best" and "the newest" may soon be others
    adapted = adapted_specialists(checkpoint)  # which sees whether it is a checkpoint at all
    kept = config or checkpoint / CONFIG
    if config is None and not kept.is_file():
        raise InputError(f"{run}: keeps no configuration; give the run's folder, or --config")
    fused = load_config(kept, [override for override in overrides if _of_the_fused(override)])
    if fused.distil is not None:
        raise InputError(f"{run}: is a distillation itself; give the run that it learned from")
    if adapted:
        raise InputError(
            f"{run}: {', '.join(adapted)} have adapters, and a teacher has none; merge them: ultrafuser export {run} "
            "RELEASE, ultrafuser import RELEASE START, ultrafuser distil START --config CONFIG"
        )
    if STUDENT in fused.specialists:
        raise InputError(f"specialists.{STUDENT}: the fused model has a specialist of this name; name it otherwise")
    known = fused.specialists.get(into)
    folder = fused.folders[into] if known is not None else Path(into)
    if known is None and not (folder / "config.json").is_file():
        raise InputError(f"--into {into}: expected one of {', '.join(fused.specialists)}, or a Hugging Face folder")
    tree = fused.model_dump(mode="json")
    begins_as = into if known is not None else folder.absolute().name
    word = "".join(character if character.isalnum() else "-" for character in begins_as)
    tree["name"] = f"{fused.name}-distilled-{word}"
    form = template if template is not None else known.template if known is not None else "hf"
    tree["specialists"][STUDENT] = {"path": str(folder.absolute()), "template": form}
    tree["layouts"] = [_with_student(layout, into) for layout in fused.layouts]
    tree["vocab_size"] = shared_vocabulary(fused)
    if (rows := read_architecture(folder).vocab_rows) < tree["vocab_size"]:
        raise InputError(f"--into {into}: its head has {rows} rows, fewer than the {tree['vocab_size']} that are fused")
    if known is None:
        _check_tokenizer(into, folder, fused, tree["vocab_size"])
    tree["data"]["store"] = None
    # What a checkpoint keeps counts the steps of its epochs already.
    counted = {key: getattr(fused, key).model_copy(update={"epochs": None}) for key in ("stage1", "stage2")}
    train_in_full(tree, steps_of_both_stages(fused if config else fused.model_copy(update=counted)))
    tree["stage2"]["gate_lr"] = None
    tree["stage2"]["train"] = {"gate": "frozen", "specialists": "frozen", STUDENT: {"mode": "full"}}
    tree["checkpoint"] |= {"start": None, "weights": "trained"}
    tree["loss"] |= {"label_smoothing": 0.0, "z_loss": 0.0, "backend": "auto"}
    tree["distil"] = {"student": STUDENT, "teacher": str(checkpoint)}
    made = parse_config(FuserConfig, f"the distillation of {run}", yaml.safe_dump(tree, sort_keys=False), overrides)
    assert made.distil is not None
    words = f"{begins_as}, which has learned from the fused model of {fused.name} ({', '.join(fused.specialists)}): "
    words += f"{made.stage2.steps} steps of distillation."
    account = Account(
        method="distil",
        words=words,
        config=made,
        like=STUDENT,
        settings={"into": into, "steps": made.stage2.steps, **made.distil.model_dump(mode="json")},
        made_of=made.folders,
    )
    return DerivedRun(made, f"specialist:{STUDENT}", account)


def _of_the_fused(override: str) -> bool:
    """Whether it says where the fused model's folders are, of which the student's may be one."""
    section, *below = override.partition("=")[0].split(".")
    return section == "models" or (section == "specialists" and below[:1] != [STUDENT])


def _check_tokenizer(into: str, folder: Path, fused: FuserConfig, vocab_size: int) -> None:
    """Refuse a student whose tokens are not those that the fused model's logits are of."""
    first = fused.fused[0]
    try:
        check_tokenizers({first: fused.folders[first], STUDENT: folder}, vocab_size)
    except InputError as error:
        raise InputError(f"--into {into}: {error}") from None


def _with_student(layout: Layout, into: str) -> dict[str, Any]:
    """The layout with a place for the student: ranks of its own where the others have theirs."""
    tree = layout.model_dump(mode="json")
    if isinstance(layout, DisjointLayout):
        like = layout.specialists.get(into) or next(iter(layout.specialists.values()))
        tree["specialists"][STUDENT] = {"tp": like.tp, "pp": like.pp}
    return tree
