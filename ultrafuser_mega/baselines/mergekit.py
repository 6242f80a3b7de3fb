"""Merges that mergekit computes, by its command line: it needs an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ultrafuser_mega.baselines.ingredients import Ingredients
from ultrafuser_mega.baselines.merging import BASE, write_combination
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import EMBEDDING, TensorFolder, read_json_object

#: What ``ultrafuser baseline`` calls a method -> what mergekit does.
METHODS = {"average": "linear", "task-arithmetic": "task_arithmetic", "ties": "ties", "dare": "dare_linear"}
_LONGEST_REASON = 300


def check_mergekit(python: Path | None) -> Path:
    """The interpreter that has mergekit: ``python``, or this one.

    Raises:
        InputError: it has not.
    """
    interpreter = python or Path(sys.executable)
    try:
        found = subprocess.run([interpreter, "-c", "import mergekit"], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise InputError(f"--mergekit {interpreter}: cannot be run ({error.strerror})") from None
    if not found:
        raise InputError(
            f"--mergekit {interpreter}: has no mergekit, which needs an environment of its own: "
            "python -m venv mk && mk/bin/pip install mergekit==0.1.5, then --mergekit mk/bin/python"
        )
    return interpreter


def write_merge(
    folder: Path,
    ingredients: Ingredients,
    method: str,
    weights: Mapping[str, float],
    parameters: Mapping[str, Mapping[str, float]],
    scale: float,
    seed: int,
    python: Path,
) -> None:
    """Have mergekit write the merge's safetensors into ``folder``, which exists and holds none.

    Args:
        folder: also holds what mergekit reads and writes meanwhile.
        ingredients: the specialists and, unless the method is an average, "base".
        method: one of METHODS.
        weights: of each specialist.
        parameters: more of them, mergekit's name -> specialist -> number.
        scale: of what is added to the base (mergekit's lambda).
        seed: of what is drawn.
        python: that has mergekit.

    Raises:
        InputError: mergekit fails; its last line.
    """
    places = {name: _cropped(folder / "cropped" / name, ingredients, name) for name in ingredients.folders}
    first = next(iter(weights))
    dtype = str(ingredients.dtype(EMBEDDING)).removeprefix("torch.")
    merge: dict[str, Any] = {
        "merge_method": METHODS[method],
        "base_model": str(places.get(BASE, places[first])),
        "models": [
            {
                "model": str(places[name]),
                "parameters": {"weight": weight, **{key: values[name] for key, values in parameters.items()}},
            }
            for name, weight in weights.items()
        ],
        "parameters": {"normalize": method in ("average", "ties")},
        "dtype": "float32",
        "out_dtype": dtype,
    }
    if method != "average":
        merge["parameters"]["lambda"] = scale
    recipe, merged = folder / "mergekit.yaml", folder / "merged"
    recipe.write_text(yaml.safe_dump(merge, sort_keys=False))
    command = [python, "-m", "mergekit.scripts.run_yaml", recipe, merged, "--no-copy-tokenizer", "--random-seed", seed]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise InputError(f"mergekit: exit code {done.returncode}: {last.strip()[:_LONGEST_REASON]}")
    TensorFolder(merged).check(ingredients.shapes)
    for path in merged.glob("model*.safetensors*"):
        path.rename(folder / path.name)
    for path in sorted([*merged.rglob("*"), *(folder / "cropped").rglob("*")], reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for left in (merged, folder / "cropped"):
        if left.is_dir():
            left.rmdir()


def _cropped(place: Path, ingredients: Ingredients, name: str) -> Path:
    """The model with the shared vocabulary's rows: its own folder where it has no others."""
    source = ingredients.folders[name]
    fields = read_json_object(source / "config.json")
    wanted = {"vocab_size": ingredients.architecture.vocab_rows, "tie_word_embeddings": ingredients.tied}
    if all(fields.get(key, False) == value for key, value in wanted.items()):
        return source.absolute()
    place.mkdir(parents=True)
    write_combination(place, ingredients, lambda tensor: {name: 1.0})
    (place / "config.json").write_text(json.dumps(fields | wanted))
    return place.absolute()
