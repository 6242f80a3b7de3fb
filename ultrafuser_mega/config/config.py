"""The one configuration tree: YAML file -> ``key.sub=value`` overrides -> validated objects.

Every key a run understands is a field below, with its default and its meaning. Unknown keys, wrong types and
impossible values are refused in one line that names the key. What needs the outside world to be checked
(folders, tokenizers, rank counts) is checked by ``ultrafuser_mega.planning.preflight``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


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

    every: NonNegativeInt = Field(500, description="also every so many steps; 0: never")
    samples_per_class: PositiveInt = 100
    micro_batch_size: PositiveInt = 4
    token_views: NonNegativeInt = Field(2, description="samples per class in the token-coloured HTML")


class Checkpoint(_Section):
    """Sharded checkpoints, always at the end of each stage."""

    every: NonNegativeInt = Field(500, description="also every so many steps; 0: never")
    keep: PositiveInt = Field(2, description="newest checkpoints to keep")
    stop_after_minutes: NonNegativeFloat | None = Field(
        None,
        description="end with a checkpoint, for --resume; a scheduler's limit less an evaluation, a step and a save",
    )


class FuserConfig(_Section):
    """A whole run."""

    name: str = Field("demo", pattern=r"^\w[\w.-]*$", max_length=100, coerce_numbers_to_str=True)
    runs: Path = Field(Path("runs"), description="runs/<name> receives everything the run writes")
    seed: int = Field(1234, ge=0, lt=2**31)
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


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, where PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def default_config_text() -> str:
    """The embedded default: toy specialists, a layout for 1, 2, 3, 4, 6 and 8 ranks."""
    return resources.files("ultrafuser_mega.config").joinpath("default.yaml").read_text()


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> FuserConfig:
    """Read a YAML file (None: the embedded default), apply ``key.sub=value`` overrides, validate.

    Raises:
        InputError: the file, an override or a value is wrong; one line that names the key.
    """
    if path is None:
        source, text = "the embedded default", default_config_text()
    elif path.is_file():
        source, text = str(path), path.read_text(encoding="utf-8", errors="replace")
    else:
        raise InputError(f"--config {path}: {'a folder; give a YAML file' if path.is_dir() else 'no such file'}")
    try:
        tree = yaml.load(text, _UniqueKeys)
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
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        step = _step(node, parents[:depth], part, override)
        if isinstance(node, dict) and node.get(step) is None:
            node[step] = {}
        node = node[step]
    node[_step(node, parents, last, override)] = value


def _step(node: Any, parents: list[str], part: str, override: str) -> str | int:
    """The key of a section or the index of a list that ``part`` means in ``node``."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise InputError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")
    if not part.isdigit() or int(part) >= len(node):
        raise InputError(f"override {override!r}: {part} is not an index below {len(node)}")
    return int(part)


def _first_problem(error: ValidationError) -> str:
    # A misspelt key usually comes with "missing" for the right one; the spelling is what to mend.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    kind, value = problem["type"], problem.get("input")
    where = ".".join(str(part) for part in problem["loc"] if part not in ("disjoint", "colocated"))
    if kind == "extra_forbidden":
        return f"unknown key {where}{_suggestion(where)}"
    if kind == "missing":
        return f"{where} is missing; it has no default"
    if kind == "union_tag_not_found":
        return f"{where}.kind is missing; use disjoint or colocated"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: expected keys and values (found {value!r})"
    message = problem["msg"].removeprefix("Value error, ")
    shown = f" (found {value!r})" if where and not isinstance(value, dict | list) else ""
    return f"{where}: {message}{shown}" if where else message


def _suggestion(unknown: str) -> str:
    """The keys that were perhaps meant: of the nearest spelling, in the same section if it has one."""
    known = [(section.split("."), name) for section, _, name in (key.rpartition(".") for key in _keys(FuserConfig))]
    *section, last = unknown.split(".")
    close = difflib.get_close_matches(last, {name for _, name in known}, n=1)
    meant = [place for place, name in known if name in close]
    here = ".".join([*section, *close])
    if any(_is_section(place, section) for place in meant):
        return f"; did you mean {here}?"
    elsewhere = dict.fromkeys(".".join([*place, *close]).removeprefix(".") for place in meant)
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""


def _is_section(pattern: list[str], section: list[str]) -> bool:
    section = section or [""]
    return len(pattern) == len(section) and all(p in ("*", s) for p, s in zip(pattern, section, strict=True))


def _keys(section: type[_Section], prefix: str = "") -> Iterator[str]:
    """Every key there is, as in stage1.steps; "*" stands for a name or an index."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner, many in _sections_in(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.*." if many else f"{prefix}{name}.")


def _sections_in(annotation: Any, many: bool = False) -> Iterator[tuple[type[_Section], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, _Section):
        yield annotation, many
    for argument in get_args(annotation):
        yield from _sections_in(argument, many=True)
