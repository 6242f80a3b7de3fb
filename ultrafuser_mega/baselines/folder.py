"""The Hugging Face folder of a baseline: written under a hidden name, with what says how it was made.

Beside weights, config.json, tokenizer and licences: ``baseline.json`` (the method, its settings, versions),
``config.yaml`` (the configuration with its overrides), ``summary.json`` (held-out losses) and the card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from ultrafuser_mega.checkpoint.unfinished import alone, finish, refuse_existing, unfinished_of
from ultrafuser_mega.config import FuserConfig, dump_config
from ultrafuser_mega.errors import writing
from ultrafuser_mega.release.assemble import assemble_single
from ultrafuser_mega.release.card import SpecialistFacts
from ultrafuser_mega.reporting.markdown import markdown_table
from ultrafuser_mega.reporting.records import FUSED, EvalRecord, write_summary

BASELINE = "baseline.json"
_VERSIONS = ("ultrafuser_mega", "torch", "transformers")


@dataclass(frozen=True)
class Account:
    """What a baseline's folder says of itself.

    Attributes:
        method: as ``ultrafuser baseline`` calls it.
        words: what was done, in a sentence or two, for the card.
        config: whose specialists and data it is made of.
        like: the specialist whose structure, tokenizer and template it has.
        settings: of the method.
        made_of: name -> folder of every model that its weights come from.
        notices: for people.
    """

    method: str
    words: str
    config: FuserConfig
    like: str
    settings: Mapping[str, Any]
    made_of: Mapping[str, Path]
    notices: Sequence[str] = ()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes ``out`` when all went well; one that was left by an interruption is begun anew.

    Raises:
        InputError: there is something of this name, another process writes to it, or it cannot be written.
    """
    refuse_existing(out)
    unfinished = unfinished_of(out)
    with writing(unfinished):
        unfinished.mkdir(parents=True, exist_ok=True)
    with alone(unfinished):
        with writing(unfinished):
            for path in unfinished.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield unfinished
        with writing(out):
            finish(unfinished, out)


def write_beside_weights(
    folder: Path, account: Account, config_json: Mapping[str, Any], vocab_size: int, dtype: torch.dtype
) -> None:
    """Configuration, tokenizer, template, licences, and how the model was made; the card comes last.

    Args:
        folder: with the weights.
        account: of the baseline.
        config_json: what the model's config.json says, but for vocabulary and element type.
        vocab_size: rows of the model.
        dtype: of the weights.
    """
    write_conversation(folder, account, vocab_size)
    kept = {key: value for key, value in config_json.items() if key != "torch_dtype"}
    written = kept | {"vocab_size": vocab_size, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    write_record(folder, account)


def write_conversation(folder: Path, account: Account, vocab_size: int) -> None:
    """Tokenizer, chat template and licences."""
    config = account.config
    sources = {name: (config.folders[name], part.template) for name, part in config.specialists.items()}
    assemble_single(folder, sources, vocab_size, account.like, account.made_of)


def write_record(folder: Path, account: Account) -> None:
    """``baseline.json`` and ``config.yaml``: what was done, with what."""
    made = {
        "baseline": account.method,
        "settings": dict(account.settings),
        "like": account.like,
        "made_of": {name: str(path) for name, path in account.made_of.items()},
        "notices": list(account.notices),
        "versions": {package: version(package) for package in _VERSIONS},
    }
    (folder / BASELINE).write_text(json.dumps(made, indent=2) + "\n")
    (folder / "config.yaml").write_text(dump_config(account.config))


def write_losses(folder: Path, losses: Mapping[str, float], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``summary.json`` as a run has it: the model is called "fused" there, whatever made it."""
    record = EvalRecord(stage=2, step=0, loss={name: {FUSED: loss} for name, loss in losses.items()}, gate={})
    summary = {"eval": {**record.loss, "mean": record.mean}, **(more or {})}
    write_summary(folder, summary)
    return summary


def write_card(folder: Path, account: Account, title: str, losses: Mapping[str, float] | None) -> None:
    """README.md with the Hub's front matter; nothing is judged or guessed."""
    templates = {name: part.template for name, part in account.config.specialists.items()}
    facts = [
        SpecialistFacts.read(name, path, templates.get(name, "-"), AutoConfig.from_pretrained(path))
        for name, path in account.made_of.items()
    ]
    licences = {one.licence_id for one in facts}
    (only,) = licences if len(licences) == 1 else (None,)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "license": only or "other"}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n",
        f"{account.words}\n\nStructure, tokenizer and chat template are those of {account.like}.\n",
        markdown_table(
            ("made of", "folder", "architecture", "licence"),
            [(one.name, one.folder, one.architecture, one.licence) for one in facts],
        ),
        f"## Settings\n\n```yaml\n{yaml.safe_dump(dict(account.settings), sort_keys=False)}```\n",
    ]
    if account.notices:
        sections.append("\n".join(f"- {line}" for line in account.notices) + "\n")
    if losses is not None:
        rows = [(name, f"{loss:.4f}") for name, loss in losses.items()]
        sections.append(f"## Held-out loss, nats per response token\n\n{markdown_table(('class', 'loss'), rows)}")
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")
