"""Source files to a token store: what ``ultrafuser prepare`` does.

The files are read once to identify them and once to tokenise them (build.py). The store is written
beside its target and renamed when it is complete; nobody ever sees half of one. A finished store made
from the same inputs is used again, also by processes that began together: one makes it, the others wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ultrafuser_mega.data.align import Aligner
from ultrafuser_mega.data.build import Source, write_splits
from ultrafuser_mega.data.columns import check_columns
from ultrafuser_mega.data.files import expand_files, find_format
from ultrafuser_mega.data.folders import in_turn, move_into_place, work_folder
from ultrafuser_mega.data.report import PrepareReport
from ultrafuser_mega.data.store import FORMAT_VERSION, MANIFEST, TokenStore, digest, hash_file, read_manifest
from ultrafuser_mega.data.store_writer import token_dtype, write_manifest
from ultrafuser_mega.data.templates import load_template
from ultrafuser_mega.data.tokenizer import check_tokenizers
from ultrafuser_mega.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ANOTHER_PLACE = "give the run another name or data.store, or run prepare --overwrite"
_CALLED = {"responses": "the specialists' order or endings of answers"}


def prepare_store(
    out_dir: str | Path,
    sources: Mapping[str, Sequence[str | Path]],
    specialists: Mapping[str, tuple[str | Path, str]],
    *,
    vocab_size: int,
    max_length: int,
    holdout_rows: Mapping[str | Path, int] | None = None,
    holdout_files: Mapping[str, Sequence[str | Path]] | None = None,
    columns: Mapping[str | Path, Mapping[str, str]] | None = None,
    on_malformed: Literal["skip", "fail"] = "skip",
    overwrite: bool = False,
    compare_only: bool = False,
    progress: bool = False,
) -> PrepareReport:
    """Tokenise the files of every class for every specialist into the store ``out_dir``.

    sources        class name -> its files, folders of files or globs (files.py says what is read)
    specialists    name -> (folder of its tokenizer, template name: see templates.TEMPLATE_NAMES)
    vocab_size     rows of the shared vocabulary (tokenizer.shared_vocab_size gives the usual choice)
    max_length     tokens of the longest specialist's sequence
    holdout_rows   file (one of ``sources``) -> how many of its first rows are held out; rows are counted
                   as they stand in the file, those that are dropped included
    holdout_files  class name -> further files, folders or globs, held out as a whole
    columns        one of ``sources`` or ``holdout_files`` -> its names for a row's fields (columns.py)
    on_malformed   "skip" counts and names malformed rows, "fail" makes no store of them and names those of all files
    overwrite      rebuild where ``out_dir`` holds a store made from other inputs
    compare_only   make none: refuse the one that is there if other inputs made it, as far as sizes of files tell
    progress       show a bar on stderr

    Raises InputError for bad arguments and files, tokenizers that disagree, a class without a single
    training row (or held-out row, where some were asked for), and a target in the way.
    """
    out = Path(out_dir)
    if on_malformed not in ("skip", "fail"):
        raise InputError(f'on_malformed is "{on_malformed}"; expected "skip" or "fail"')
    planned = _plan(sources, holdout_rows or {}, holdout_files or {}, columns or {})
    _check_names("specialist", specialists)
    encoders = check_tokenizers({name: folder for name, (folder, _) in specialists.items()}, vocab_size)
    templates = {
        name: load_template(template, encoders[name].tokenizer, encoders[name].folder)
        for name, (_, template) in specialists.items()
    }
    aligner = Aligner(encoders, templates, vocab_size, max_length)
    inputs = _inputs(planned, aligner, on_malformed, hashed=not compare_only)
    if compare_only:
        manifest = read_manifest(out)
        _refuse_others(out, manifest["inputs"], inputs)
        return PrepareReport(out, manifest, reused=True)
    if _finished_before(out, inputs, overwrite):
        return PrepareReport(out, read_manifest(out), reused=True)

    out.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(out):
        if _finished_before(out, inputs, overwrite):  # meanwhile, by whoever had the turn before
            return PrepareReport(out, read_manifest(out), reused=True)
        with work_folder(out) as work:
            splits = write_splits(work, planned, aligner, on_malformed, progress)
            _refuse_empty(splits, planned)
            manifest = _manifest(inputs, aligner, splits)
            write_manifest(work, manifest)
            move_into_place(work, out)
    return PrepareReport(out, manifest, reused=False)


def _plan(
    sources: Mapping[str, Sequence[str | Path]],
    holdout_rows: Mapping[str | Path, int],
    holdout_files: Mapping[str, Sequence[str | Path]],
    columns: Mapping[str | Path, Mapping[str, str]],
) -> list[Source]:
    """The files in the order in which they are read; raises InputError for every way to get them wrong."""
    _check_names("class", sources)
    for name, files in sources.items():
        if not files:
            raise InputError(f'class "{name}" has no training files; expected at least one')
    held = {Path(file).resolve(): (file, count) for file, count in holdout_rows.items()}
    own_names = {Path(entry): names for entry, names in columns.items()}
    planned: list[Source] = []
    seen: set[Path] = set()
    for class_name, number, entry, is_heldout in (
        *((name, at, Path(file), False) for name, files in sources.items() for at, file in enumerate(files)),
        *((name, at, Path(file), True) for name, files in holdout_files.items() for at, file in enumerate(files)),
    ):
        if class_name not in sources:
            raise InputError(f'held-out class "{class_name}" has no training files; classes are {", ".join(sources)}')
        names = own_names.get(entry, {})
        try:
            check_columns(names)
            files_of_entry = expand_files(entry)
            for path in files_of_entry:
                find_format(path)
        except InputError as error:
            raise InputError(f'class "{class_name}": {error}') from None
        for path in files_of_entry:
            resolved = path.resolve()
            if resolved in seen:
                raise InputError(f'class "{class_name}": {path} is listed twice; a file may serve once, in one class')
            seen.add(resolved)
            _, count = held.pop(resolved, (None, 0)) if not is_heldout else (None, None)
            planned.append(Source(class_name, path, count, names, number))
    _check_holdout_rows(held.values(), holdout_rows)
    return planned


def _inputs(planned: Sequence[Source], aligner: Aligner, on_malformed: str, *, hashed: bool) -> dict[str, Any]:
    """All that decides what a store holds; another with the same is the same. Of files not ``hashed``: their sizes."""
    encoders = aligner.encoders
    return {
        "vocab_size": aligner.vocab_size,
        "max_length": aligner.max_length,
        "on_malformed": on_malformed,
        "classes": list(dict.fromkeys(source.class_name for source in planned)),
        "specialists": {
            name: {
                "template": template.name,
                "template_text": template.text,
                "template_hash": digest(template.text),
                "tokenizer": encoders[name].fingerprint(),
            }
            for name, template in aligner.templates.items()
        },
        "responses": {
            "of": next(iter(aligner.templates)),  # they have its tokenizer and ending: the first one's
            "lead": aligner.format.lead,
            "ends": {
                name: encoders[name].tokenizer.convert_ids_to_tokens(token)
                for name, token in aligner.format.ends.items()
            },
        },
        "sources": [
            {
                "class": source.class_name,
                "file": source.path.name,
                "holdout": source.holdout,
                "columns": dict(source.columns),
                "bytes": source.path.stat().st_size,
                **({"blake2b": hash_file(source.path)} if hashed else {}),
            }
            for source in planned
        ],
    }


def _manifest(inputs: dict[str, Any], aligner: Aligner, splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the store says of itself (store_writer.py), all but the checksum."""
    return {
        "format": FORMAT_VERSION,
        "fingerprint": _fingerprint(inputs),
        "inputs": inputs,
        "classes": inputs["classes"],
        "specialists": inputs["specialists"],
        "vocab_size": aligner.vocab_size,
        "max_length": aligner.max_length,
        "bos_id": next(iter(aligner.encoders.values())).bos_id,
        "eos_id": aligner.format.end_id,
        "token_dtype": token_dtype(aligner.vocab_size).str,
        "response_lead": aligner.format.lead,
        "splits": splits,
    }


def _check_holdout_rows(unknown: Iterable[tuple[str | Path, int]], holdout_rows: Mapping[str | Path, int]) -> None:
    for file, count in unknown:
        raise InputError(f"holdout_rows: {file} (first {count} rows) is not one of the training files")
    for file, count in holdout_rows.items():
        if not isinstance(count, int) or count < 0:
            raise InputError(f"holdout_rows: {file}: {count!r}; expected how many of its first rows to hold out")


def _check_names(kind: str, names: Iterable[str]) -> None:
    names = list(names)
    if not names:
        raise InputError(f"no {kind} was given; expected at least one")
    for name in names:
        if not _NAME.fullmatch(name):
            raise InputError(f'{kind} "{name}": names serve as file names; use letters, digits, "-" and "_"')


def _fingerprint(inputs: dict[str, Any]) -> str:
    """Of contents, not of file names: moving or renaming the sources changes nothing."""
    return digest({**inputs, "format": FORMAT_VERSION, "sources": list(map(_contents, inputs["sources"]))})


def _finished_before(out: Path, inputs: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``out`` holds a whole store of the same inputs; raises InputError if it is in the way."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out}: exists and is no token store; it is left alone, choose another folder")
    try:
        store = TokenStore.open(out, verify=False)
    except InputError as error:
        if overwrite:
            return False
        raise InputError(f"{error}; use another folder, or prepare it again with --overwrite") from None
    if store.manifest["fingerprint"] == _fingerprint(inputs):
        return True
    if overwrite:
        return False
    _refuse_others(out, store.manifest["inputs"], inputs)
    raise InputError(f"{out}: holds a store of another version; {_ANOTHER_PLACE}")


def _refuse_others(out: Path, before: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """InputError where the two differ in what both have; names of files are no difference."""
    old, new = (list(map(_contents, one["sources"])) for one in (before, inputs))
    if not all("blake2b" in source for source in new):
        old = [{key: value for key, value in source.items() if key != "blake2b"} for source in old]
    changed = [_CALLED.get(key, key) for key in inputs if key != "sources" and before.get(key) != inputs[key]]
    if old != new:
        files = _changed_files(before["sources"], inputs["sources"])
        changed.append(f"sources{': ' if files else ''}{', '.join(files[:3])}{', ...' if len(files) > 3 else ''}")
    if changed:
        raise InputError(f"{out}: holds a store made from other inputs ({', '.join(changed)}); {_ANOTHER_PLACE}")


def _contents(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != "file"}


def _changed_files(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of source files with other contents, of new ones and of those that are no longer there."""
    told = "blake2b" if all("blake2b" in source for source in now) else "bytes"
    old, new = ({source["file"]: source[told] for source in sources} for sources in (before, now))
    words = {name: "is new" for name in new if name not in old}
    words |= {name: "is gone" for name in old if name not in new}
    words |= {name: "has changed" for name in new if name in old and new[name] != old[name]}
    return [f"{name} {what}" for name, what in words.items()]


def _refuse_empty(splits: dict[str, Any], planned: Sequence[Source]) -> None:
    for class_name, of_class in splits.items():
        asks_heldout = any(source.holdout != 0 for source in planned if source.class_name == class_name)
        for split in ("train", "heldout") if asks_heldout else ("train",):
            if of_class[split]["kept"] == 0:
                dropped = ", ".join(f"{count} {reason}" for reason, count in of_class[split]["dropped"].items())
                examples = [places[0] for places in of_class[split]["dropped_examples"].values()]
                raise InputError(
                    f'class "{class_name}" is left without {split} rows: {of_class[split]["rows"]} read, '
                    f"dropped: {dropped or 'none'}{f', as {examples[0]}' if examples else ''}"
                )
