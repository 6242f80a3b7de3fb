"""Everything of a release folder but the weights: configuration, code, tokenizers, templates, licences, model card.

The weights are written by whoever holds them, as safetensors whose tensors are called

    specialists.<name>.<the name in that specialist's own folder>     all rows, also those beyond the shared vocabulary
    gate.w1.<shared or name> (m, d_j)    gate.b1 (m,)    gate.w2 (m,)

Fused training unties a specialist's head from its embedding, so ``lm_head.weight`` is there for every specialist and
its ``tie_word_embeddings`` becomes false; nothing else in its configuration changes.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ultrafuser_mega.data import chat_format
from ultrafuser_mega.data.chat_format import Chat
from ultrafuser_mega.data.templates import PaperTemplate, ResponseFormat, Template, load_template, response_format
from ultrafuser_mega.data.tokenizer import TextEncoder, check_tokenizers
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import answer_ends, read_json_object
from ultrafuser_mega.release.card import CardFacts, SpecialistFacts, licence_files, write_card
from ultrafuser_mega.release.configuration_ultrafuser import UltraFuserConfig

#: Sub-folder of a model folder with chat templates beside the default (tool_use, rag), as transformers names it.
ADDITIONAL = "additional_chat_templates"
CODE = {
    **{
        file: Path(__file__).with_name(file)
        for file in (
            "configuration_ultrafuser.py",
            "modeling_ultrafuser.py",
            "chat_ultrafuser.py",
            "pipeline_ultrafuser.py",
        )
    },
    "chat_format_ultrafuser.py": Path(chat_format.__file__),
}
_QUESTIONS = ("What?", "3", "(a", "Is it so.\n\nIt is", "été")  # of no common beginning or end
_AUTO_MAP = {
    "AutoConfig": "configuration_ultrafuser.UltraFuserConfig",
    "AutoModelForCausalLM": "modeling_ultrafuser.UltraFuserForCausalLM",
}
_PIPELINES = {
    "text-generation": {
        "impl": "pipeline_ultrafuser.UltraFuserPipeline",
        "pt": ["AutoModelForCausalLM"],
        "type": "text",
    }
}


def assemble_release(
    out_dir: Path,
    specialists: Mapping[str, tuple[Path, str]],
    vocab_size: int,
    gate_units: int,
    gate_shared: bool,
    dtype: torch.dtype,
    card: CardFacts,
) -> UltraFuserConfig:
    """Write a release folder without its weights; files that are there already are written anew.

    Args:
        out_dir: the folder; made if missing.
        specialists: name -> its Hugging Face folder and the name of its template, in the order of the gate weights.
        vocab_size: entries of the shared vocabulary.
        gate_units: hidden units of the gate.
        gate_shared: whether all specialists share the gate's first layer.
        dtype: of the weights, which is what ``dtype="auto"`` loads.
        card: what the training run tells about the model.

    Returns:
        The configuration that was written.

    Raises:
        InputError: a specialist's folder, template or family cannot be released, or the specialists do not fit.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = _Parts.load(specialists, vocab_size)
    config = _make_config(parts, gate_units, gate_shared, dtype)
    config.to_json_file(out_dir / "config.json")
    for file, source in CODE.items():
        shutil.copyfile(source, out_dir / file)
    _write_tokenizers_and_templates(out_dir, parts)
    _write_generation_config(out_dir, parts, parts.first)
    _copy_licences(out_dir, parts.folders)
    facts = [
        SpecialistFacts.read(name, folder, template, config.specialist_config(name))
        for name, (folder, template) in specialists.items()
    ]
    write_card(out_dir / "README.md", card, facts, config)
    return config


def assemble_single(
    out_dir: Path, specialists: Mapping[str, tuple[Path, str]], vocab_size: int, like: str, made_of: Mapping[str, Path]
) -> None:
    """Tokenizer, chat template, endings of answers and licences of ONE model that was made of several specialists.

    Args:
        out_dir: the folder; made if missing.
        specialists: name -> its Hugging Face folder and the name of its template, as they train together.
        vocab_size: rows of the model.
        like: the specialist whose tokenizer and template are the model's.
        made_of: name -> folder of whatever its weights come from, for the licences.

    Raises:
        InputError: a folder or a template cannot be read, or tokenizers disagree.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = _Parts.load(specialists, vocab_size)
    encoder = parts.encoders[like]
    _write_tokenizer(out_dir, encoder, _as_jinja(parts.templates[like], encoder, parts.responses), vocab_size)
    _copy_into(out_dir / ADDITIONAL, sorted((parts.folders[like] / ADDITIONAL).glob("*.jinja")))
    _write_generation_config(out_dir, parts, encoder)
    _copy_licences(out_dir, made_of)


@dataclass(frozen=True)
class _Parts:
    """What goes into a release beside weights: of every specialist, by name in the order of the gate weights."""

    folders: dict[str, Path]
    fields: dict[str, dict[str, Any]]  # of its config.json
    encoders: dict[str, TextEncoder]
    templates: dict[str, Template]
    responses: ResponseFormat
    vocab_size: int

    @classmethod
    def load(cls, specialists: Mapping[str, tuple[Path, str]], vocab_size: int) -> _Parts:
        """Raises InputError where a folder or a template is unusable, or the tokenizers disagree."""
        folders = {name: folder for name, (folder, _) in specialists.items()}
        fields = {name: read_json_object(folder / "config.json") for name, folder in folders.items()}
        encoders = check_tokenizers(folders, vocab_size)
        templates = {
            name: load_template(template, encoders[name].tokenizer, str(folders[name]))
            for name, (_, template) in specialists.items()
        }
        return cls(folders, fields, encoders, templates, response_format(encoders, templates, vocab_size), vocab_size)

    @property
    def first(self) -> TextEncoder:
        """The tokenizer of the release as a whole: the first specialist's."""
        return next(iter(self.encoders.values()))

    @cached_property  # a fingerprint is taken of the whole tokenizer
    def own_tokenizers(self) -> dict[str, str]:
        """Specialists with another tokenizer than the first -> its place in the release."""
        whole = self.first.fingerprint()
        return {name: f"tokenizers/{name}" for name, own in self.encoders.items() if own.fingerprint() != whole}

    def entries(self) -> list[dict[str, Any]]:
        """Of the field ``specialists`` in the release's config.json."""
        entries = []
        for name, fields in self.fields.items():
            untied = fields | {"tie_word_embeddings": False} if fields.get("tie_word_embeddings") else fields
            entry = {"name": name, "config": untied, "template": _template_fields(self.templates[name])}
            own = self.own_tokenizers.get(name)
            entries.append(entry if own is None else entry | {"tokenizer": own})
        return entries

    def chat_marks(self) -> dict[str, list[int]] | None:
        """See ``UltraFuserConfig``: what differing questions have in common in the first specialist's template."""
        first, *others = (_template_fields(template) for template in self.templates.values())
        if all(other == first for other in others):
            return None
        template, encoder = next(iter(self.templates.values())), self.first
        prompts = [template.prompt(encoder, Chat(None, [question], [], [])) for question in _QUESTIONS]
        bare = [[token for place, token in enumerate(ids) if place or token != encoder.bos_id] for ids in prompts]
        begins = _common(bare)
        return {"begins": begins, "ends": _common([ids[len(begins) :][::-1] for ids in bare])[::-1]}


def _common(sequences: Sequence[Sequence[int]]) -> list[int]:
    """What all begin with."""
    same = (len(set(column)) == 1 for column in zip(*sequences, strict=False))
    return list(sequences[0][: sum(itertools.takewhile(bool, same))])


def _make_config(parts: _Parts, gate_units: int, gate_shared: bool, dtype: torch.dtype) -> UltraFuserConfig:
    try:
        config = UltraFuserConfig(
            specialists=parts.entries(),
            vocab_size=parts.vocab_size,
            gate_units=gate_units,
            gate_shared=gate_shared,
            response_lead=parts.responses.lead,
            chat_marks=parts.chat_marks(),
            bos_token_id=parts.first.bos_id,
            eos_token_id=parts.responses.end_id,
            pad_token_id=_pad_id(parts.first, parts.vocab_size),
            dtype=dtype,
            architectures=["UltraFuserForCausalLM"],
        )
    except ValueError as error:
        raise InputError(f"release: {error}") from None
    widths = {name: config.specialist_config(name).hidden_size for name in config.names}
    if gate_shared and len(set(widths.values())) > 1:
        raise InputError(f"gate_shared: hidden sizes differ ({widths}); each specialist needs its own first layer")
    for name in config.names:
        if hasattr(torch.nn.ModuleDict(), name):
            raise InputError(f"specialists.{name}: PyTorch keeps this name for itself; call the specialist otherwise")
    config.auto_map = dict(_AUTO_MAP)
    config.custom_pipelines = copy.deepcopy(_PIPELINES)
    return config


def _pad_id(encoder: TextEncoder, vocab_size: int) -> int:
    pad = encoder.tokenizer.pad_token_id
    return pad if pad is not None and pad < vocab_size else encoder.eos_id


def _template_fields(template: Template) -> dict[str, str]:
    if isinstance(template, PaperTemplate):
        return {"first": template.first, "later": template.later}
    return {"chat_template": template.text}


def _as_jinja(template: Template, encoder: TextEncoder, responses: ResponseFormat) -> str:
    """The template as tools other than ``chat`` read it, BOS, responses and their ending included."""
    if not isinstance(template, PaperTemplate):
        return template.text
    end = "eos_token"
    if responses.end_id != encoder.eos_id:
        end = json.dumps(encoder.tokenizer.convert_ids_to_tokens(responses.end_id))
    before, after = (json.dumps(part) for part in template.first.split("{instruction}"))
    later_before, later_after = (json.dumps(part) for part in template.later.split("{instruction}"))
    lead = json.dumps(template.response_lead)
    return (
        "{{ bos_token }}{% set state = namespace(system='', opened=false) %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set state.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' and state.opened %}"
        f"{{{{ {later_before} + message['content'] + {later_after} }}}}"
        "{% elif message['role'] == 'user' %}{% set state.opened = true %}"
        f"{{{{ {before} + state.system + message['content'] + {after} }}}}"
        f"{{% else %}}{{{{ {lead} + message['content'] + {end} }}}}{{% endif %}}{{% endfor %}}"
    )


def _write_tokenizers_and_templates(out_dir: Path, parts: _Parts) -> None:
    jinja = {
        name: _as_jinja(template, parts.encoders[name], parts.responses) for name, template in parts.templates.items()
    }
    _write_tokenizer(out_dir, parts.first, next(iter(jinja.values())), parts.vocab_size)
    (out_dir / "chat_templates").mkdir(exist_ok=True)
    for name, template in jinja.items():
        (out_dir / "chat_templates" / f"{name}.jinja").write_text(template, encoding="utf-8")
        _copy_into(out_dir / "chat_templates" / name, sorted((parts.folders[name] / ADDITIONAL).glob("*.jinja")))
    for name, place in parts.own_tokenizers.items():
        _write_tokenizer(out_dir / place, parts.encoders[name], jinja[name], parts.vocab_size)


def _write_tokenizer(folder: Path, encoder: TextEncoder, chat_template: str, vocab_size: int) -> None:
    """The tokenizer exactly as training loaded it, with a padding token that the model has a row for.

    What ``AutoTokenizer`` makes of a folder depends on the model type beside it and on class names in it, and a Llama
    tokenizer that changes its mind about spaces changes every prompt. So the loaded one is written down as it is,
    under the class that reads tokenizer.json and nothing else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    pad = encoder.tokenizer.convert_ids_to_tokens(_pad_id(encoder, vocab_size))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "pad_token": pad}
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)  # as transformers sorts it when it saves
    path.write_text(text + "\n", encoding="utf-8")
    model = Path(encoder.folder) / "tokenizer.model"
    if model.is_file():
        shutil.copyfile(model, folder / "tokenizer.model")
    written = FastTokenizer.from_pretrained(str(folder))
    if written.backend_tokenizer.to_str() != encoder.tokenizer.backend_tokenizer.to_str():
        raise InputError(f"{encoder.folder}: its tokenizer does not survive being saved; save it as tokenizer.json")


def _write_generation_config(out_dir: Path, parts: _Parts, encoder: TextEncoder) -> None:
    """The endings of training (that of the first template is the first), EOS, then whatever else ends a specialist's
    answers; nothing of their sampling settings."""
    stops = [*parts.responses.ends.values(), parts.first.eos_id]
    ends = list(dict.fromkeys(token for token in stops if token < parts.vocab_size))
    for folder in parts.folders.values():
        ends += [token for token in answer_ends(folder) if token < parts.vocab_size and token not in ends]
    generation = GenerationConfig(
        bos_token_id=encoder.bos_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=_pad_id(encoder, parts.vocab_size),
    )
    generation.save_pretrained(out_dir)


def _copy_licences(out_dir: Path, folders: Mapping[str, Path]) -> None:
    for name, folder in folders.items():
        card_of = [path] if (path := folder / "README.md").is_file() else []  # where most say what their licence is
        _copy_into(out_dir / "licenses" / name, [*licence_files(folder), *card_of])


def _copy_into(target: Path, paths: Sequence[Path]) -> None:
    for path in paths:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / path.name)
