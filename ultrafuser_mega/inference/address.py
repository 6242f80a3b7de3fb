"""Which model is meant: ``PATH[@PART][+RULE]``, as generate, chat and evaluate take it.

runs/demo              the run's newest checkpoint, fused; of a distillation the student
my_release             what ultrafuser export wrote
runs/demo@math         one specialist, as it is there
/models/Qwen2.5-3B     a Hugging Face folder, prompts in its own chat template
/models/Llama@ultralm  the same in another template: ultralm, codellama, wizardmath
runs/demo+uniform      the same specialists, mixed by another rule
runs/demo+by.routing   routed by what `ultrafuser baseline clusters` wrote
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS
from ultrafuser_mega.checkpoint.locate import find_checkpoint
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.clusters import SUFFIX, Clusters
from ultrafuser_mega.inference.mixing import GATE, RULES, Rule
from ultrafuser_mega.inference.stored import StoredModel, stored_checkpoint, stored_folder, stored_release
from ultrafuser_mega.release.check import check_release, is_release

FUSED, TEMPLATE = "fused", "hf"


@dataclass(frozen=True)
class Address:
    """One model.

    Attributes:
        path: its folder; of a run, the newest checkpoint's.
        kind: what the folder is.
        part: a specialist's name, None for the fused model; of a folder, the name of the template.
        rule: how specialists are mixed.
    """

    path: Path
    kind: Literal["folder", "checkpoint", "release"]
    part: str | None
    rule: str = GATE

    @classmethod
    def parse(cls, text: str) -> Address:
        """From what a user wrote.

        Raises:
            InputError: there is no such model, part or rule.
        """
        where, part, rule = _split(text)
        if not where.is_dir():
            raise InputError(f"{where}: no such folder; expected a release, a checkpoint, a run or a model's folder")
        path = find_checkpoint(where)
        if (path / PROGRESS).is_file():
            from ultrafuser_mega.convert.restore import TrainedModel  # brings Megatron: seconds

            trained = TrainedModel(path)
            names, kind = list(trained.sources), "checkpoint"
            if not part and trained.student is not None:
                part = trained.student  # what a distillation is about
            elif not part and not trained.fused and len(names) == 1:
                part = names[0]
        elif is_release(path):
            names, kind = check_release(path).names, "release"
        else:
            if not (path / "config.json").is_file():
                raise InputError(
                    f"{path}: no config.json; expected what ultrafuser export wrote, a checkpoint, the folder of a run "
                    "(runs/<name>) or of a Hugging Face model"
                )
            if rule != GATE:
                raise InputError(f"{text}: {path} is a single model, there is nothing to mix; leave out +{rule}")
            return cls(path, "folder", part or TEMPLATE)
        name = part.removeprefix("specialist:")
        if part in ("", FUSED):
            return cls(path, kind, None, rule)  # type: ignore[arg-type]
        if name not in names:
            raise InputError(f"{text}: expected @{FUSED} or @ with one of {', '.join(names)}")
        if rule != GATE:
            raise InputError(f"{text}: one specialist, there is nothing to mix; leave out +{rule}")
        return cls(path, kind, name)  # type: ignore[arg-type]

    def mixing(self, names: Sequence[str]) -> Rule:
        """Its rule, for specialists called ``names``; raises InputError where a file that it names is none."""
        if self.rule.endswith(SUFFIX):
            return Clusters.load(Path(self.rule), names).rule()
        return RULES[self.rule]

    def stored(self, stack: ExitStack) -> StoredModel:
        """Its description, kept until ``stack`` closes; raises InputError where it is damaged."""
        if self.kind == "release":
            return stored_release(self.path, self.part)
        described = Path(stack.enter_context(TemporaryDirectory(prefix="ultrafuser-")))
        if self.kind == "checkpoint":
            return stored_checkpoint(self.path, self.part, described)
        assert self.part is not None
        return stored_folder(self.path, self.part, described)


def _split(text: str) -> tuple[Path, str, str]:
    """Path, part and rule; a path that exists is one whatever it holds."""
    if Path(text).exists():
        return Path(text), "", GATE
    before, plus, rule = text.rpartition("+")
    if not plus:
        before, rule = text, GATE
    elif rule not in RULES and not rule.endswith(SUFFIX):
        if Path(before.rpartition("@")[0] or before).exists() or Path(before).exists():
            raise InputError(f"{text}: no rule +{rule}; expected one of {', '.join(RULES)}")
        before, rule = text, GATE
    if Path(before).exists():
        return Path(before), "", rule
    path, at, part = before.rpartition("@")
    return (Path(path), part, rule) if at else (Path(before), "", rule)
