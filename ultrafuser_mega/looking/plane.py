"""Vectors on a plane, those near each other that are near each other: t-SNE (van der Maaten and Hinton 2008)."""

from __future__ import annotations

import numpy as np

from ultrafuser_mega.errors import InputError

NEIGHBOURS = 10
_COMPONENTS = 50
_PERPLEXITY = 30.0


def usable(vectors: np.ndarray) -> np.ndarray:  # (n, d) -> (n,) bool
    """Which vectors are finite and not all zero."""
    return np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1)


def on_plane(vectors: np.ndarray, seed: int = 0) -> np.ndarray:  # (n, d) -> (n, 2)
    """Where t-SNE places vectors; the same for one seed on one machine.

    Of the 50 principal components, by openTSNE, with a perplexity of 30 or what few vectors allow.

    Raises:
        InputError: fewer than five vectors, one that is not usable, or openTSNE is not installed.
    """
    if len(vectors) < 5 or not usable(vectors).all():
        raise InputError(
            f"t-SNE: {int(usable(vectors).sum())} of {len(vectors)} vectors are usable; it takes 5 that are"
        )
    try:
        from openTSNE import TSNE
        from sklearn.decomposition import PCA
    except ImportError:
        raise InputError(
            "t-SNE is computed by openTSNE, which is not installed; pip install 'ultrafuser_mega[synthesis]'"
        ) from None
    centred = (vectors - vectors.mean(axis=0)).astype(np.float64)
    components = min(_COMPONENTS, *centred.shape)
    reduced = PCA(components, random_state=seed).fit_transform(centred)
    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    # One thread: several sum in any order, and wait for each other by spinning where cores are busy.
    tsne = TSNE(perplexity=perplexity, n_jobs=1, random_state=seed)
    return np.asarray(tsne.fit(reduced))


def purity(points: np.ndarray, classes: np.ndarray) -> float:  # (n, 2), (n,)
    """Of the ten nearest of every point, or of all others, the share that are of its class."""
    from sklearn.neighbors import NearestNeighbors

    count = min(NEIGHBOURS, len(points) - 1)
    near = NearestNeighbors(n_neighbors=count).fit(points).kneighbors(return_distance=False)
    return float((classes[near] == classes[:, None]).mean())
