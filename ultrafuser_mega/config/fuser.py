"""A whole run: the sections together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from ultrafuser_mega.config.checkpoint import Checkpoint
from ultrafuser_mega.config.data import Data
from ultrafuser_mega.config.distillation import Distil
from ultrafuser_mega.config.evaluation import Evaluation
from ultrafuser_mega.config.faults import Faults
from ultrafuser_mega.config.gate import GateOptions
from ultrafuser_mega.config.layouts import ColocatedLayout, DisjointLayout, Layout, Parallel
from ultrafuser_mega.config.lora import Lora
from ultrafuser_mega.config.loss import Loss
from ultrafuser_mega.config.parts import GATE, TrainedPart, stage_parts
from ultrafuser_mega.config.reporting import Profile, Report
from ultrafuser_mega.config.section import Section
from ultrafuser_mega.config.specialists import Specialist
from ultrafuser_mega.config.stages import Optimizer, Stage, Stage2
from ultrafuser_mega.config.toy import Toy


class FuserConfig(Section):
    """A whole run."""

    name: str = Field("demo", pattern=r"^\w[\w.-]*$", max_length=100)
    runs: Path = Field(Path("runs"), description="runs/<name> receives everything the run writes")
    seed: int = Field(1234, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    toy: Toy | None = Field(None, description="make the toy specialists and their data here when they are missing")
    models: Path = Field(Path(), description="relative specialist paths are taken from here")
    specialists: dict[str, Specialist] = Field(min_length=1)
    layouts: list[Layout] = Field(
        [ColocatedLayout(kind="colocated")],
        min_length=1,
        description="the first that uses exactly the launched ranks is taken; default: all specialists on one rank",
    )
    parallel: Parallel = Parallel()
    vocab_size: PositiveInt | None = Field(None, description="shared vocabulary; default: the specialists' smallest")
    gate: GateOptions = GateOptions()
    loss: Loss = Loss()
    data: Data
    microbatch_tokens: PositiveInt = Field(
        4096,
        description="most tokens of a microbatch, into which whole samples are packed; a step takes as many as needed",
    )
    stage1: Stage
    stage2: Stage2
    lora: Lora | None = Field(None, description="of the adapters that a stage trains; default: rank 16 everywhere")
    distil: Distil | None = Field(None, description="train one specialist to be like the others fused")
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    report: Report = Report()
    profile: Profile = Profile()
    faults: Faults = Faults()

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return self.runs / self.name

    @property
    def store_dir(self) -> Path:
        """Where its token store is."""
        return self.data.store or self.run_dir / "store"

    @property
    def stages(self) -> dict[int, Stage]:
        """Number -> stage, of those that have steps; one that has none is left out of the run and of its reports."""
        return {number: stage for number, stage in ((1, self.stage1), (2, self.stage2)) if stage.steps}

    def parts(self, number: int) -> dict[str, TrainedPart]:
        """Name -> part, of all that stage 1 or 2 trains and does not."""
        stage = self.stage1 if number == 1 else self.stage2
        return stage_parts(stage, number, self.optimizer, list(self.specialists))

    @property
    def adapters(self) -> dict[str, Lora]:
        """Specialist -> its adapters', of those that have some: one of the stages trains them."""
        trained = {name for number in self.stages for name, part in self.parts(number).items() if part.mode == "lora"}
        return {name: self.lora or Lora() for name in self.specialists if name in trained}

    @property
    def student(self) -> str | None:
        """The specialist that learns from the others, in distillation."""
        return None if self.distil is None else self.distil.student

    @property
    def fused(self) -> list[str]:
        """The specialists that the gate mixes, in its order: all but a student."""
        return [name for name in self.specialists if name != self.student]

    @property
    def folders(self) -> dict[str, Path]:
        """Specialist name -> Hugging Face folder."""
        return {name: self.models / specialist.path for name, specialist in self.specialists.items()}

    @field_validator("toy", mode="before")
    @classmethod
    def _folder_alone(cls, value: Any) -> Any:
        return {"folder": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _consistent(self) -> FuserConfig:
        for name in [*self.specialists, *self.data.classes]:
            # Names serve as file names and as names of attributes.
            plain = name.isidentifier() and name.isascii() and not name.startswith("_")
            if not plain or name in ("fused", "mean", "shared"):
                raise ValueError(
                    f"{name!r} cannot name a specialist or class; use a plain word (letters from a to z, digits, _) "
                    "other than fused, mean, shared"
                )
        for index, layout in enumerate(self.layouts):
            if isinstance(layout, DisjointLayout) and set(layout.specialists) != set(self.specialists):
                raise ValueError(
                    f"layouts.{index}.specialists places {', '.join(layout.specialists)}; "
                    f"it must place exactly {', '.join(self.specialists)}"
                )
        if self.distil is not None:
            self._check_distil(self.distil)
        return self

    def _check_distil(self, distil: Distil) -> None:
        if distil.student not in self.specialists or len(self.specialists) < 2:
            raise ValueError(f"distil.student: {distil.student} must be one of two or more specialists")
        if self.stage1.steps:
            raise ValueError("stage1.steps: the teacher's gate is trained already; set stage1.steps to 0")
        parts = self.parts(2)
        for name in (GATE, *self.fused):
            if parts[name].trains:
                raise ValueError(f"stage2.train.{name}: is the teacher's; set stage2.train.{name}=frozen")
        if self.stage2.epochs is None and 0 < self.stage2.steps <= distil.on_policy_after:
            raise ValueError(
                f"distil.on_policy_after: {distil.on_policy_after} leaves no on-policy step of stage2.steps="
                f"{self.stage2.steps}; give less, or more steps"
            )
        if self.checkpoint.start is not None:
            raise ValueError("checkpoint.start: distil.teacher has the teacher's weights; leave it out")
        if self.loss.label_smoothing or self.loss.z_loss:
            raise ValueError("loss: label_smoothing and z_loss have no meaning in distillation; set them to 0")
