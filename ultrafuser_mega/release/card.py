"""The model card of a release folder, written from the training run and from what the specialists' folders say.

Nothing here is judged or guessed: a licence that a folder does not state is "not stated", a run without a summary has
no tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml
from transformers import PreTrainedConfig

from ultrafuser_mega.config import FuserConfig, TrainedPart, in_words, load_config
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.markdown import markdown_table
from ultrafuser_mega.reporting.records import MEAN, PER_TOKEN, SUMMARY_FILE, EvalRecord
from ultrafuser_mega.reporting.tables import gate_table, loss_table, to_markdown

NOT_STATED = "not stated"
_STAGES = ("stage", "steps", "samples", "learning rate", "schedule", "warm-up steps", "weight decay")
_LICENCE_FILE = re.compile(r"licen[cs]e|^(copying|notice|use_policy|terms)", re.IGNORECASE)


@dataclass(frozen=True)
class CardFacts:
    """What the training run tells.

    Attributes:
        name: of the released model.
        config: of the run that trained it; None where ``earlier`` tells.
        summary: the run's summary.json, or None where the weights are not those it speaks of.
        origins: specialist -> where it was read from, where that is another folder than the one at hand.
        rounded: specialist -> what was rounded before it was fused, in words; those of which nothing was are not there.
        earlier: the card of the release that these weights were imported from, and not trained since.
    """

    name: str
    config: FuserConfig | None
    summary: Mapping[str, Any] | None
    origins: Mapping[str, str] = field(default_factory=dict)
    rounded: Mapping[str, str] = field(default_factory=dict)
    earlier: str = ""

    @classmethod
    def from_run(cls, run_dir: Path, name: str) -> CardFacts:
        """Read ``config.yaml`` and, where the run has finished, ``summary.json``; raises InputError."""
        path = run_dir / SUMMARY_FILE
        try:
            summary = json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error})") from None
        return cls(name=name, config=load_config(run_dir / "config.yaml"), summary=summary)


@dataclass(frozen=True)
class SpecialistFacts:
    """One specialist as its folder describes it; ``licence`` is the folder's own words."""

    name: str
    folder: str
    template: str
    architecture: str
    licence: str
    licence_id: str | None

    @classmethod
    def read(cls, name: str, folder: Path, template: str, config: PreTrainedConfig) -> SpecialistFacts:
        """From the specialist's folder and configuration."""
        size = f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.vocab_size} rows"
        front = _front_matter(folder / "README.md")
        licence_id, name_of_other = front.get("license"), front.get("license_name")
        ids = licence_id if isinstance(licence_id, list) else [licence_id]
        words = [str(name_of_other) if one == "other" and name_of_other else str(one) for one in ids if one]
        stated = [f"{', '.join(words)} (README.md)"] if words else []
        stated += [f"{_first_line(path)} ({path.name})" for path in licence_files(folder)]
        return cls(
            name=name,
            folder=folder.resolve().name,
            template=template,
            architecture=f"{config.model_type}, {size}",
            licence="; ".join(stated) or NOT_STATED,
            licence_id=licence_id if isinstance(licence_id, str) else None,
        )


def licence_files(folder: Path) -> list[Path]:
    """Licences, notices and use policies in a model folder, in alphabetical order."""
    return [path for path in sorted(folder.iterdir()) if _LICENCE_FILE.search(path.name) and path.is_file()]


def write_card(path: Path, card: CardFacts, specialists: Sequence[SpecialistFacts], model: Any) -> None:
    """Write the card as Markdown with the Hub's front matter. ``model`` is the release's configuration."""
    if card.config is None:
        parts = [card.earlier.rstrip("\n") + "\n", *_rounded(card.rounded)] if card.rounded else [card.earlier]
        path.write_text("\n".join(parts), encoding="utf-8")
        return
    licences = {facts.licence_id for facts in specialists}
    (only,) = licences if len(licences) == 1 else (None,)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ultrafuser", "custom_code"],
        "license": only or "other",
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {card.name}\n",
        _introduction(specialists, card.origins, model),
        _use(specialists),
        _licences(specialists),
        _training(card.config),
        *_rounded(card.rounded),
        _results(card.summary),
    ]
    path.write_text("\n".join(sections), encoding="utf-8")


def _introduction(specialists: Sequence[SpecialistFacts], origins: Mapping[str, str], model: Any) -> str:
    names = ", ".join(facts.name for facts in specialists)
    folders = {facts.name: PurePath(origins.get(facts.name, "")).name or facts.folder for facts in specialists}
    rows = [(facts.name, folders[facts.name], facts.architecture, facts.template) for facts in specialists]
    table = markdown_table(("specialist", "folder", "architecture", "template"), rows)
    gate = "one first layer for all" if model.gate_shared else "one first layer per specialist"
    return (
        f"{len(specialists)} specialised language models ({names}) fused token by token: every specialist reads the "
        "conversation through its own chat template, a gate turns their last hidden states into weights, and the "
        "next token comes from the weighted sum of their logits.\n\n"
        f"{table}\n"
        f"Gate: {model.gate_units} hidden units, {gate}. Shared vocabulary: {model.vocab_size}.\n"
    )


def _use(specialists: Sequence[SpecialistFacts]) -> str:
    return f"""## Use

Needs transformers 5 and torch, nothing else. `MODEL` is this folder.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True, dtype="auto")

messages = [{{"role": "user", "content": "Write a function that adds two numbers."}}]
print(model.chat(messages, tokenizer=tokenizer, max_new_tokens=128))

# The same in steps: each specialist's prompt, generation, and who had a say in every token.
inputs = model.chat_inputs([messages], tokenizer)
sequences = model.generate(**inputs, max_new_tokens=128)
response = sequences[:, inputs["specialist_input_ids"]["{specialists[0].name}"].shape[1]:]
whole = {{name: torch.cat([prompt, response], dim=1) for name, prompt in inputs["specialist_input_ids"].items()}}
output = model(specialist_input_ids=whole, logits_to_keep=response.shape[1] + 1, return_gate_weights=True)
for token, weights in zip(response[0].tolist(), output.gate_weights[0].tolist()):
    print(repr(tokenizer.decode([token])), dict(zip(model.names, weights)))
```

`pipeline("text-generation", MODEL, trust_remote_code=True)(messages)` gives every specialist its own prompt, too.
`model(input_ids)` and `model.generate(input_ids)` give all specialists the same text, which is what evaluation tools
do; `tokenizer.apply_chat_template` renders the template of {specialists[0].name}, and the model warns once where all of
them read that. The templates of all specialists are in `chat_templates/`.
"""


def _licences(specialists: Sequence[SpecialistFacts]) -> str:
    table = markdown_table(("specialist", "licence"), [(facts.name, facts.licence) for facts in specialists])
    return (
        "## Licences\n\nThis model is derived from all its specialists. What their folders state"
        f" (files copied to `licenses/`):\n\n{table}"
    )


def _rounded(rounded: Mapping[str, str]) -> list[str]:
    if not rounded:
        return []
    table = markdown_table(("specialist", "before fusing"), rounded.items())
    return [f"## Rounding\n\nThese specialists came in wider element types than were fused:\n\n{table}"]


def _training(config: FuserConfig) -> str:
    start = config.checkpoint.start
    begun = f" They began with the weights of `{start.name}`." if start else ""
    classes = [
        (
            name,
            ", ".join(path.name + (f" (weight {data.weights[path]:g})" if data.weights else "") for path in data.train),
            ", ".join(_heldout(data.heldout, data.heldout_first)) or "-",
        )
        for name, data in config.data.classes.items()
    ]
    count = len(config.data.classes)
    stages = [
        (
            f"{number}: {in_words(config.parts(number))}",
            stage.steps,
            f"{stage.samples_per_class} x {count}",
            _with_own(f"{stage.lr:g}", {part.name: f"{part.rates.lr:g}" for part in _trained(config, number)}),
            _with_own(stage.schedule, {part.name: part.rates.schedule for part in _trained(config, number)}),
            _with_own(str(stage.warmup_steps), {p.name: str(p.rates.warmup_steps) for p in _trained(config, number)}),
            _with_own(
                f"{config.optimizer.weight_decay:g}",
                {part.name: f"{part.weight_decay:g}" for part in _trained(config, number)},
            ),
        )
        for number, stage in config.stages.items()
    ]
    adapted = "".join(
        f" Adapters of {name}: rank {lora.rank}, alpha {lora.alpha:g}, beside {', '.join(lora.targets)}; merged."
        for name, lora in config.adapters.items()
    )
    how_many = ("No stage", "One stage", "Two stages")[len(stages)]
    optimizer, loss = config.optimizer, config.loss
    return (
        "## Training\n\nData, one class per kind of instruction:\n\n"
        f"{markdown_table(('class', 'trained on', 'held out'), classes)}\n"
        f"{how_many}, every global batch {_sampling(config.data.sampling)}.{begun}\n\n"
        f"{markdown_table(_STAGES, stages)}\n"
        f"AdamW (betas {optimizer.beta1:g} and {optimizer.beta2:g}), gradient norm at most {optimizer.clip_grad:g}, "
        f"sequences of at most {config.data.max_length} tokens, loss per "
        f"{loss.normalize}, label smoothing {loss.label_smoothing:g}, z-loss {loss.z_loss:g}, {config.dtype}, "
        f"seed {config.seed}.{adapted}\n"
    )


def _trained(config: FuserConfig, number: int) -> list[TrainedPart]:
    return [part for part in config.parts(number).values() if part.trains]


def _with_own(usual: str, of_parts: Mapping[str, str]) -> str:
    """What a stage has, and what parts have otherwise: "2e-05, gate 0.001"."""
    return ", ".join([usual, *(f"{name} {own}" for name, own in of_parts.items() if own != usual)])


def _sampling(sampling: str | Mapping[str, float]) -> str:
    if isinstance(sampling, Mapping):
        return "by weights: " + ", ".join(f"{name} {weight:g}" for name, weight in sampling.items())
    return {
        "balanced": "with the same number of samples of each class",
        "tokens": "with as many response tokens of each class, on the average",
        "iid": "drawn from all rows alike",
    }[sampling]


def _heldout(files: Iterable[Path], heads: Mapping[Path, int]) -> list[str]:
    return [path.name for path in files] + [f"first {rows} of {path.name}" for path, rows in heads.items()]


def _results(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "## Results\n\nThese weights were not evaluated by the run that trained them.\n"
    final = _record(summary, summary["steps"])
    after = summary.get("after_stage1")
    losses = loss_table(final, after_stage1=None if after is None else _record(after, 0))
    gate = gate_table(final)
    return (
        "## Results\n\nThe specialists' rows, and those of mixing or choosing among them, are those before fusing.\n\n"
        f"{losses.title}:\n\n{to_markdown(losses)}\n{gate.title} over the response tokens of each class:\n\n"
        f"{to_markdown(gate)}"
    )


def _record(summary: Mapping[str, Any], step: int) -> EvalRecord:
    loss = {name: _numbers(values) for name, values in summary["eval"].items() if name != MEAN}
    weights = summary.get(PER_TOKEN) or summary["gate"]  # as version 0.1.0 called it
    gate = {name: _numbers(values) for name, values in weights.items()}
    yardsticks = {name: _numbers(values) for name, values in summary.get("yardsticks", {}).items() if name != MEAN}
    return EvalRecord(stage=2, step=step, loss=loss, gate=gate, yardsticks=yardsticks)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML block at the head of a model card; empty where there is none or it cannot be read."""
    if not path.is_file():
        return {}
    opening, _, rest = path.read_text(encoding="utf-8-sig", errors="replace").partition("\n")
    block, closed, _ = rest.partition("\n---")
    if opening.strip() != "---" or not closed:
        return {}
    try:
        fields = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _first_line(path: Path) -> str:
    if path.suffix.lower() not in ("", ".txt", ".md", ".rst"):
        return "see the file"
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines())
    return next((line for line in lines if line), "empty file")
