"""Clusters of a run's training prompts, and which of its specialists answers best in each."""

from __future__ import annotations

from pathlib import Path

from ultrafuser_mega.checkpoint.unfinished import refuse_existing
from ultrafuser_mega.config import load_config
from ultrafuser_mega.data.sampler import shuffled
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.clusters import SUFFIX, fit_clusters
from ultrafuser_mega.inference.model import opened_model
from ultrafuser_mega.inference.requests import Prompt


def write_routing(run: Path, out: Path, clusters: int, samples: int, seed: int, device: str) -> None:
    """Write what ``RUN+OUT`` is routed by.

    Args:
        run: the folder of a run.
        out: the file, called ``*.routing``.
        clusters: how many.
        samples: training samples of each class that are looked at: their first turns.
        seed: of the choice of samples and of k-means.
        device: see :func:`ultrafuser_mega.inference.model.opened_model`.

    Raises:
        InputError: no such run, its token store is gone, or ``out`` exists or is called otherwise.
    """
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out}: must end in {SUFFIX}")
    refuse_existing(out)
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: has no config.yaml; expected the folder of a run, as in runs/demo")
    store = TokenStore.open(load_config(run / "config.yaml").store_dir, verify=False)
    prompts: list[Prompt] = []
    responses: list[list[int]] = []
    for name in store.class_names:
        split = store.split(name, "train")
        for index in shuffled(len(split), seed, name, 0)[:samples]:
            sample = split[int(index)]
            prompts.append({own: parts[0].tolist() for own, parts in sample.prompts.items()})
            responses.append(sample.responses[0].tolist())
    with opened_model(str(run), device, None) as opened:
        fit_clusters(opened.model, prompts, responses, clusters, seed).save(out)
