"""EXSPEC's turns: each step takes rows from a pool that end in one column, so that nothing has to be moved."""

from __future__ import annotations

import numpy as np


def next_group(columns: np.ndarray, lengths: np.ndarray, group_size: int) -> np.ndarray:
    """The rows of the pool that take part in the next step, [at most group_size] int64 indices.

    columns: [pool] int64, where each row ends in the cache, including its padding; rows without padding end together if
    they are equally long. lengths: [pool] int64.

    Takes the largest set of rows that end together (the shortest rows among equal sets) if it fills a group. Otherwise
    takes the shortest rows, whatever their columns: the cache realigns them, and they can form groups from then on.
    """
    size = min(group_size, len(columns))
    found, counts = np.unique(columns, return_counts=True)
    best = int(counts.argmax())  # the first of equals: the shortest
    if counts[best] >= size:
        return np.flatnonzero(columns == found[best])[:size]
    return np.sort(np.argsort(lengths, kind="stable")[:size])


def order_with_first(chosen: np.ndarray, num_rows: int) -> np.ndarray:
    """An order of all rows in which the chosen ones come first and as few as possible move.

    >>> order_with_first(np.array([1, 3]), 4).tolist()
    [3, 1, 2, 0]
    """
    order = np.arange(num_rows)
    leaving = np.setdiff1d(order[: len(chosen)], chosen)
    coming = chosen[chosen >= len(chosen)]
    order[leaving], order[coming] = coming, leaving
    return order
