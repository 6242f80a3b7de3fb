"""Make the three toy specialists and their data: the input of the embedded default, with nothing to download.

:func:`make_toy` is safe to call from anywhere, any number of times: a finished folder is reused, two
processes do not build at once, and a build that was cut short leaves no folder with a final name.

    OUT/{text,code,math}/                    Hugging Face folders (Llama, fp32)
    OUT/base/                                of a branched trio: what the three were trained on from
    OUT/data/{class}.{train,heldout}.jsonl   {"instruction": ..., "output": ...} per line
    OUT/data/{class}.tasks.jsonl             held-out instructions with what makes a reply right (checkable.py)
    OUT/recipe.json                          what they were made from, and how well they do; written last
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy.checkable import make_tasks, write_tasks
from ultrafuser_mega.toy.corpus import BASE, CLASSES, generate, write_jsonl
from ultrafuser_mega.toy.jobs import Job, run_jobs
from ultrafuser_mega.toy.llama import llama_config
from ultrafuser_mega.toy.templates import CHAT_TEMPLATES, template_of
from ultrafuser_mega.toy.tokenizer import train_sentencepiece, training_documents, write_tokenizer

RECIPE_FILE = "recipe.json"
_PARTIAL, _LOCK = ".partial", ".lock"
_DECIDES_NOTHING = {"__init__.py", "jobs.py"}


@dataclass(frozen=True)
class ToyRecipe:
    """Sizes and training of the toy trio. The defaults are the embedded default's: about a minute on two cores.

    ``pieces`` is V, the shared vocabulary. The three differ as the paper's trio does in vocabulary rows
    and rope theta, and also in key/value heads, eps and positions, so that nothing works by luck.

    A ``branched`` trio is of one shape and has a common origin, so that its weights can be averaged: a base model is
    trained ``steps`` at ``lr`` on the rows of all classes as plain text, without templates, and each specialist
    ``branch_steps`` at ``branch_lr`` from there on its own class.
    """

    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    pieces: int = 1536
    train_rows: int = 4000
    heldout_rows: int = 200
    task_rows: int = 100
    steps: int = 500
    batch_size: int = 16
    lr: float = 5e-3
    branched: bool = False
    branch_steps: int = 250
    branch_lr: float = 2e-3

    @property
    def models(self) -> tuple[str, ...]:
        """The folders that are made, beside that of the data."""
        return (*CLASSES, BASE) if self.branched else CLASSES

    def shape(self, name: str) -> dict[str, Any]:
        """Arguments of :func:`llama_config` for one of the models."""
        sizes = {"hidden_size": self.hidden_size, "layers": self.layers, "heads": self.heads}
        plain = {"vocab_rows": self.pieces, "kv_heads": self.heads, "rope_theta": 1e4}
        if self.branched:
            return sizes | plain
        own = {
            "text": plain,
            "code": {
                "vocab_rows": self.pieces + 16,
                "kv_heads": max(1, self.heads // 2),
                "rope_theta": 1e6,
                "max_positions": 4096,
            },
            "math": {
                "vocab_rows": self.pieces + 1,
                "kv_heads": self.heads,
                "rope_theta": 1e4,
                "rms_norm_eps": 1e-6,
            },
        }[name]
        return sizes | own


@dataclass(frozen=True)
class ToyFolders:
    """Where the finished trio lies. Dictionaries go by class name: "text", "code", "math".

    ``heldout_loss[model][class]`` is in nats per response token, each specialist under its own template. A branched
    trio has a ``base``, which was taught no template and is asked in that of "text"; others have None.
    """

    root: Path
    specialists: dict[str, Path]
    train: dict[str, Path]
    heldout: dict[str, Path]
    tasks: dict[str, Path]
    base: Path | None
    heldout_loss: dict[str, dict[str, float]]


def make_toy(
    out_dir: Path | str,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    recipe: ToyRecipe | None = None,
) -> ToyFolders:
    """Build the trio in ``out_dir``, or return it at once when it is there already, made by the same recipe and seed.

    A trio of another recipe or seed in ``out_dir`` is replaced. ``device`` is where the three train
    (side by side, one process each); it is not part of what identifies a trio. Progress goes to stderr.

    Raises:
        InputError: ``device`` is not there, a size in ``recipe`` does not work, or ``out_dir`` holds
            files under the trio's names that this function did not make.
        RuntimeError: a training process failed; carries the end of its output.
    """
    recipe = recipe or ToyRecipe()
    root = Path(out_dir)
    identity = {"seed": seed, **asdict(recipe), "sources": _sources_digest()}
    if _is_finished(root, identity):
        return _folders(root)
    _check(recipe, device)
    root.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=not progress)
    lock = FileLock(root / _LOCK)
    with lock.acquire(poll_interval=0.2):
        if (root / _PARTIAL / RECIPE_FILE).exists():  # complete, but its maker was ended while publishing
            _publish(root)
        if not _is_finished(root, identity):
            _refuse_foreign(root)
            _build(root / _PARTIAL, recipe, seed, device, identity, console)
            _publish(root)
    return _folders(root)


def _build(
    partial: Path, recipe: ToyRecipe, seed: int, device: str, identity: dict[str, Any], console: Console
) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    data = partial / "data"
    data.mkdir(parents=True)
    splits = {
        name: generate(name, seed=seed, train_rows=recipe.train_rows, heldout_rows=recipe.heldout_rows)
        for name in CLASSES
    }
    for name, split in splits.items():
        write_jsonl(data / f"{name}.train.jsonl", split.train)
        write_jsonl(data / f"{name}.heldout.jsonl", split.heldout)
        taken = {row.instruction for row in split.train + split.heldout}
        write_tasks(data / f"{name}.tasks.jsonl", make_tasks(name, seed=seed, rows=recipe.task_rows, taken=taken))
    model = train_sentencepiece(
        training_documents({name: split.train for name, split in splits.items()}), pieces=recipe.pieces
    )
    jobs = {}
    for number, name in enumerate(recipe.models):
        shape, branches = recipe.shape(name), recipe.branched and name != BASE
        max_length = llama_config(**shape).max_position_embeddings
        write_tokenizer(partial / name, model, chat_template=CHAT_TEMPLATES[template_of(name)], max_length=max_length)
        jobs[name] = Job(
            name=name,
            folder=str(partial / name),
            data=str(data),
            shape=shape,
            steps=recipe.branch_steps if branches else recipe.steps,
            batch_size=recipe.batch_size,
            lr=recipe.branch_lr if branches else recipe.lr,
            seed=3 * seed + number,
            device=device,
            start=str(partial / BASE) if branches else None,
        )
    losses_of_base = run_jobs([jobs.pop(BASE)], console) if recipe.branched else {}
    losses = run_jobs(list(jobs.values()), console) | losses_of_base
    files = {
        str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
    }
    finished = {"identity": identity, "heldout_loss": losses, "files": files, "torch": torch.__version__}
    unfinished_name = partial / f"{RECIPE_FILE}.new"
    unfinished_name.write_text(json.dumps(finished, indent=2) + "\n")
    unfinished_name.rename(partial / RECIPE_FILE)


def _publish(root: Path) -> None:
    """Move a complete build to its final names; can be repeated after an interruption. The recipe goes last."""
    partial = root / _PARTIAL
    (root / RECIPE_FILE).unlink(missing_ok=True)
    if not json.loads((partial / RECIPE_FILE).read_text())["identity"]["branched"]:
        shutil.rmtree(root / BASE, ignore_errors=True)  # of another trio that was here
    for name in (*CLASSES, BASE, "data"):
        if (partial / name).exists():
            shutil.rmtree(root / name, ignore_errors=True)
            (partial / name).rename(root / name)
    (partial / RECIPE_FILE).rename(root / RECIPE_FILE)
    partial.rmdir()


def _is_finished(root: Path, identity: dict[str, Any]) -> bool:
    try:
        finished = json.loads((root / RECIPE_FILE).read_text())
        sizes = {name: (root / name).stat().st_size for name in finished["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return finished.get("identity") == identity and sizes == finished["files"]


def _folders(root: Path) -> ToyFolders:
    return ToyFolders(
        root=root,
        specialists={name: root / name for name in CLASSES},
        train={name: root / "data" / f"{name}.train.jsonl" for name in CLASSES},
        heldout={name: root / "data" / f"{name}.heldout.jsonl" for name in CLASSES},
        tasks={name: root / "data" / f"{name}.tasks.jsonl" for name in CLASSES},
        base=root / BASE if (root / BASE).is_dir() else None,
        heldout_loss=json.loads((root / RECIPE_FILE).read_text())["heldout_loss"],
    )


def _refuse_foreign(root: Path) -> None:
    if (root / RECIPE_FILE).exists():
        return
    for name in (*CLASSES, BASE, "data"):
        if (root / name).exists():
            raise InputError(
                f"out_dir {root}: holds '{name}' but no {RECIPE_FILE}, so it was not made here; choose another"
            )


def _check(recipe: ToyRecipe, device: str) -> None:
    for field in ("layers", "steps", "branch_steps", "batch_size", "train_rows", "heldout_rows", "task_rows"):
        if getattr(recipe, field) < 1:
            raise InputError(f"{field} = {getattr(recipe, field)}: must be at least 1")
    for name in recipe.models:
        llama_config(**recipe.shape(name))
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"device = {device!r}: torch cannot use it on this machine; 'cpu' works everywhere") from None


def _sources_digest() -> str:
    """Changes with the code that decides the data, the tokenizer or the weights: an old trio is then made anew."""
    sources = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name not in _DECIDES_NOTHING)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
