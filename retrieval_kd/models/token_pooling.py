"""Token pooling in numpy: fewer vectors a text, as sentence-transformers' ``HierarchicalTokenPooling`` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def pooled(tokens: np.ndarray, settings: Mapping[str, Any] | None) -> np.ndarray:
    """A text's vectors [m, d] for its [n, d]: after the protected ones, the means of Ward clusters by cosine distance.

    ``settings`` has pool_factor, num_protected_tokens and normalize_embeddings; None leaves the vectors as they are.
    """
    if settings is None:
        return tokens
    first = settings["num_protected_tokens"] if settings["pool_factor"] > 1 else len(tokens)
    protected, rest = tokens[:first], tokens[first:]
    clusters = max(int(len(rest) // settings["pool_factor"]), 1)
    if clusters < len(rest):
        tokens = np.concatenate([protected, _cluster_means(rest, clusters)])
    if not settings["normalize_embeddings"]:
        return tokens
    return np.asarray(tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12))


def _cluster_means(vectors: np.ndarray, clusters: int) -> np.ndarray:
    """The mean of each cluster, in the order of the clusters' numbers."""
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    distances = np.clip(1 - vectors @ vectors.T, 0, 2)
    tree = hierarchy.linkage(squareform(distances, checks=False), method="ward")
    _, members = np.unique(hierarchy.fcluster(tree, t=clusters, criterion="maxclust"), return_inverse=True)
    sums = np.zeros((members.max() + 1, vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, members, vectors)
    return np.asarray(sums / np.bincount(members)[:, None].astype(np.float32))
