"""Clusters of beam shifts: which movies were taken from the same place of the beam-shift pattern (spec/processing 1.9)."""
from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

MOST = 100  # clusters tried
CLEAR = 0.5  # silhouette from which there are clusters at all
SAMPLED = 2000  # points that the number of clusters is found from


def cluster_shifts(shifts: np.ndarray, count: int = 0) -> np.ndarray:
    """(n,) int64 cluster, from 0 in the order of first appearance, of shifts (n, 2); `count` 0: as many as the silhouette says, perhaps
    one.

    Hierarchical (Ward); the number is that of the highest mean silhouette, 1 where none exceeds CLEAR. Of more than SAMPLED points the
    number
    and the centres come from an even sample, and the rest joins the nearest centre.
    """
    n = len(shifts)
    if n < 3 or np.ptp(shifts, axis=0).max() == 0 or count == 1:
        return np.zeros(n, np.int64)
    sample = shifts[np.linspace(0, n - 1, min(n, SAMPLED)).astype(int)]
    tree = linkage(sample, "ward")
    if count:
        labels = fcluster(tree, count, "maxclust")
    else:
        distance = np.linalg.norm(sample[:, None] - sample, axis=-1)
        tried = {k: fcluster(tree, k, "maxclust") for k in range(2, min(MOST, len(sample) - 1) + 1)}
        scores = {k: silhouette(distance, label) for k, label in tried.items()}
        best = max(scores, key=lambda k: scores[k])
        if scores[best] < CLEAR:
            return np.zeros(n, np.int64)
        labels = tried[best]
    centres = np.stack([sample[labels == k].mean(0) for k in np.unique(labels)])
    nearest = np.argmin(((shifts[:, None] - centres) ** 2).sum(-1), 1)
    _, first, place = np.unique(nearest, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[place].astype(np.int64)


def silhouette(distance: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette: (b − a)/max(a, b) with a the mean distance to one's own cluster, b that to the nearest other; 0 for clusters of
    one.
    """
    kinds, place = np.unique(labels, return_inverse=True)
    member = (place[:, None] == np.arange(len(kinds))).astype(float)
    size = member.sum(0)
    total = distance @ member
    own = total[np.arange(len(labels)), place] / np.maximum(size[place] - 1, 1)
    other = np.where(member > 0, np.inf, total / size).min(1)
    value = (other - own) / np.maximum(np.maximum(own, other), 1e-30)
    return float(np.where(size[place] > 1, value, 0.0).mean())
