"""The one configuration tree: YAML file -> ``key.sub=value`` overrides -> validated objects.

Every key a run understands is a field below, with its default and its meaning. Unknown keys, wrong types and
impossible values are refused in one line that names the key. What needs the outside world to be checked
(folders, tokenizers, rank counts) is checked by ``ultrafuser_mega.training.preflight``.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ultrafuser_mega.errors import InputError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Specialist(_Section):
    """One specialist: a Hugging Face folder and the conversation template it was trained with."""

    path: Path = Field(description="Hugging Face folder (config.json, safetensors, tokenizer)")
    template: str = Field("hf", description="ultralm, codellama, wizardmath (paper, table 9), or hf: the folder's own")


class Sizes(_Section):
    """A specialist's place in a disjoint layout."""

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    first_rank: NonNegativeInt | None = Field(None, description="inside a replica; default: after the one before")


class DisjointLayout(_Section):
    """Every specialist on its own ranks."""

    kind: Literal["disjoint"]
    specialists: dict[str, Sizes] = Field(description="specialist name -> tp, pp; every specialist must appear")
    dp: PositiveInt = Field(1, description="replicas of the whole fused model")


class ColocatedLayout(_Section):
    """All specialists on the same ranks, one after the other."""

    kind: Literal["colocated"]
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: PositiveInt = 1


Layout = Annotated[DisjointLayout | ColocatedLayout, Field(discriminator="kind")]


class Parallel(_Section):
    """What the layouts do not say."""

    sequence_parallel: bool = Field(False, description="shard activations between tensor-parallel regions by sequence")
    distributed_optimizer: bool = Field(False, description="shard stage 2's optimizer state over the dp replicas")


class GateOptions(_Section):
    """The gating MLP (paper, appendix C)."""

    hidden_size: PositiveInt | None = Field(
        None, description="hidden units; default: the largest specialist's hidden size"
    )


class Loss(_Section):
    """The training loss (paper, eq. 2)."""

    normalize: Literal["token", "sample"] = Field(
        "token", description="token: mean over the global batch's response tokens; sample: the paper's sum per sample"
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    z_loss: NonNegativeFloat = 0.0
    backend: Literal["auto", "reference", "chunked", "streaming", "gate_only"] = "auto"


class DataClass(_Section):
    """One class of instruction data. A held-out set comes from its own files or from the head of training files."""

    train: list[Path] = Field(min_length=1, description="JSON or JSONL files")
    heldout: list[Path] = Field(default_factory=list, description="files that are only evaluated on")
    heldout_first: dict[Path, PositiveInt] = Field(
        default_factory=dict, description="training file -> its first rows are held out instead of trained on"
    )


class Data(_Section):
    """Instruction data, tokenised once into a memory-mapped store."""

    root: Path = Field(Path(), description="relative files below are taken from here")
    classes: dict[str, DataClass] = Field(min_length=1)
    store: Path | None = Field(None, description="where the token store is; default: <run folder>/store")
    max_length: PositiveInt = Field(2048, description="tokens of the longest specialist's sequence")
    on_malformed: Literal["skip", "fail"] = "fail"


class Stage(_Section):
    """One of the two training stages (paper, algorithm 1)."""

    steps: NonNegativeInt
    samples_per_class: PositiveInt = Field(description="n: samples of each class in every global batch")
    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["cosine", "constant"] = "cosine"


class Optimizer(_Section):
    """AdamW."""

    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = Field(1.0, description="bound on the global gradient norm; 0: none")


class Evaluation(_Section):
    """Held-out evaluation, always at the end of each stage."""

    every: NonNegativeInt = Field(0, description="also every so many steps; 0: never")
    samples_per_class: PositiveInt = 100
    micro_batch_size: PositiveInt = 4
    token_views: NonNegativeInt = Field(2, description="samples per class in the token-coloured HTML")


class Checkpoint(_Section):
    """Sharded checkpoints, always at the end of each stage."""

    every: NonNegativeInt = Field(0, description="also every so many steps; 0: never")
    keep: PositiveInt = Field(2, description="newest checkpoints to keep")


class FuserConfig(_Section):
    """A whole run."""

    name: str = Field("demo", pattern=r"^[\w.-]+$")
    runs: Path = Field(Path("runs"), description="runs/<name> receives everything the run writes")
    seed: int = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    toy: Path | None = Field(None, description="make the toy specialists and their data here when they are missing")
    models: Path = Field(Path(), description="relative specialist paths are taken from here")
    specialists: dict[str, Specialist] = Field(min_length=1)
    layouts: list[Layout] = Field(min_length=1, description="the first that uses exactly the launched ranks is taken")
    parallel: Parallel = Parallel()
    vocab_size: PositiveInt | None = Field(None, description="shared vocabulary; default: the specialists' smallest")
    gate: GateOptions = GateOptions()
    loss: Loss = Loss()
    data: Data
    micro_batch_size: PositiveInt = Field(1, description="samples per microbatch and replica")
    stage1: Stage
    stage2: Stage
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return self.runs / self.name

    @property
    def store_dir(self) -> Path:
        """Where its token store is."""
        return self.data.store or self.run_dir / "store"

    @property
    def folders(self) -> dict[str, Path]:
        """Specialist name -> Hugging Face folder."""
        return {name: self.models / specialist.path for name, specialist in self.specialists.items()}

    @model_validator(mode="after")
    def _consistent(self) -> FuserConfig:
        for name in [*self.specialists, *self.data.classes]:
            if not name.isidentifier() or name in ("fused", "mean", "shared"):
                raise ValueError(
                    f"{name!r} cannot name a specialist or class; use a plain word other than fused, mean, shared"
                )
        for index, layout in enumerate(self.layouts):
            if isinstance(layout, DisjointLayout) and set(layout.specialists) != set(self.specialists):
                raise ValueError(
                    f"layouts.{index}.specialists places {', '.join(layout.specialists)}; "
                    f"it must place exactly {', '.join(self.specialists)}"
                )
        return self


def default_config_text() -> str:
    """The embedded default: toy specialists, a layout for 1, 2, 3, 4, 6 and 8 ranks."""
    return resources.files("ultrafuser_mega").joinpath("default.yaml").read_text()


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> FuserConfig:
    """Read a YAML file (None: the embedded default), apply ``key.sub=value`` overrides, validate.

    Raises:
        InputError: the file, an override or a value is wrong; one line that names the key.
    """
    if path is None:
        source, text = "the embedded default", default_config_text()
    elif path.is_file():
        source, text = str(path), path.read_text()
    else:
        raise InputError(f"--config {path}: no such file")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected keys and values at the top level")
    for override in overrides:
        _apply(tree, override)
    try:
        return FuserConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(error)}") from None


def dump_config(config: FuserConfig) -> str:
    """YAML that :func:`load_config` reads back to the same object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r}: expected key.sub=value, as in stage1.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 2e-3 as a word
            value = float(value)
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise InputError(f"override {override!r}: {part} is a value, not a section")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise InputError(f"override {override!r}: {part} is not an index below {len(node)}")
    return int(part)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"] if part not in ("disjoint", "colocated"))
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        known = {field for section in _Section.__subclasses__() for field in section.model_fields}
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=3)
        return f"unknown key {where}" + (f"; did you mean {' or '.join(close)}?" if close else "")
    if problem["type"] == "missing":
        return f"{where} is missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    shown = f" (found {value!r})" if where and not isinstance(value, dict | list) else ""
    return f"{where}: {message}{shown}" if where else message
