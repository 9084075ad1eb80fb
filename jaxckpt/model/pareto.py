"""Pareto sets: items that no other one dominates."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

_T = TypeVar("_T")


def pareto(items: Iterable[_T], key: Callable[[_T], tuple[int, ...]]) -> list[_T]:
    """Items that no other one beats in everything, in the order of their keys."""
    pairs = sorted(((key(x), x) for x in items), key=lambda pair: pair[0])
    keys = np.array([k for k, _ in pairs], np.float64)
    best: list[int] = []
    for i in range(len(pairs)):
        if not (keys[best] <= keys[i]).all(axis=1).any():
            best.append(i)
    return [pairs[i][1] for i in best]
