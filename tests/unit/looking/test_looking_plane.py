"""t-SNE keeps together what is together, and says which vectors it cannot take."""

from __future__ import annotations

import numpy as np
import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.looking.plane import on_plane, purity, usable


def test_vectors_that_are_not_finite_or_zero_are_named() -> None:
    vectors = np.ones((4, 3))
    vectors[1, 2], vectors[2, 0], vectors[3] = np.nan, np.inf, 0
    assert usable(vectors).tolist() == [True, False, False, False]
    with pytest.raises(InputError, match="1 of 4 vectors are usable"):
        on_plane(vectors)


@pytest.mark.timeout(120)
def test_classes_that_are_apart_stay_apart() -> None:
    pytest.importorskip("openTSNE")
    generator = np.random.default_rng(0)
    classes = np.repeat(["a", "b", "c"], 30)
    vectors = generator.normal(size=(90, 20)) + 12 * np.repeat(np.eye(3, 20), 30, axis=0)
    points = on_plane(vectors)
    assert points.shape == (90, 2) and np.isfinite(points).all()
    assert purity(points, classes) > 0.95
    assert purity(points, generator.permutation(classes)) < 0.6
