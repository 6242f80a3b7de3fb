"""Routing by clusters of prompts: k-means on the unit sphere, and who is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import decode, engine_of
from support.release_prompts import of_row, random_ids

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.clusters import Clusters, fit_clusters, k_means
from ultrafuser_mega.inference.model import opened_model

STEPS = 6


def test_k_means_finds_directions_and_leaves_no_cluster_empty() -> None:
    random = np.random.default_rng(0)
    means = np.eye(5)[:3]
    points = np.concatenate([mean + 0.05 * random.standard_normal((20, 5)) for mean in means])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    centres, members = k_means(points, 3, seed=1)
    assert [len(set(members[20 * group : 20 * group + 20])) for group in range(3)] == [1, 1, 1]
    assert len(set(members)) == 3 and np.allclose(np.linalg.norm(centres, axis=1), 1)
    _, of_equal_points = k_means(np.ones((4, 1)), 3, seed=0)
    assert set(of_equal_points) == {0, 1, 2}


@pytest.mark.parametrize("trio", ["llamas"], indirect=True)
def test_each_cluster_goes_to_the_specialist_that_knows_its_responses(
    model: Any, release: Path, tmp_path: Path
) -> None:
    prompts = [of_row(row) for row in range(3)]
    # The response to row i is what specialist i would say.
    responses = []
    for row, name in enumerate(model.names):
        with opened_model(f"{release}@{name}", "cpu", None) as alone:
            responses.append(decode(engine_of(alone.model), [{name: prompts[row][name]}], STEPS)[0])
    clusters = fit_clusters(model, prompts, responses, k=3, seed=0)
    assert sorted(clusters.chosen.tolist()) == [0, 1, 2]
    clusters.save(tmp_path / "by.routing")
    with opened_model(f"{release}+{tmp_path / 'by.routing'}", "cpu", None) as routed:
        found = decode(engine_of(routed.model, routed.rule, draft=2), prompts, STEPS)
        assert list(found.values()) == responses


def test_a_file_of_other_specialists_or_of_nothing_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "by.routing"
    Clusters(["a", "b"], torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)).save(path)
    with pytest.raises(InputError, match="was made of a, b, the model has a, c"):
        Clusters.load(path, ["a", "c"])
    path.write_text("no tensors")
    with pytest.raises(InputError, match="not what ultrafuser baseline clusters writes"):
        Clusters.load(path, ["a", "b"])
    with pytest.raises(InputError, match="--clusters 9: there are only 1 prompts"):
        fit_clusters(None, [{"a": random_ids(3, 0)}], [[1]], k=9, seed=0)  # type: ignore[arg-type]
