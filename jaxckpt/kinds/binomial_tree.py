"""A scan by binomial checkpointing, as a tree of nested checkpoints."""

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ckptsolvers.revolve import num_repeats, split_length
from jax import lax

from jaxckpt.errors import OptionError

# JAX traces nested checkpoints by recursion: as deep as this goes with Python's own limit, and no schedule that runs a
# step more often than the second number is worth having.
_SAFE_DEPTH = 20
_MAX_REPEATS = 200
_FRAMES_PER_LEVEL = 60


def binomial_scan(
    body: Callable, init: Any, xs: Any, length: int, num_states: int, *, reverse: bool = False
) -> tuple[Any, Any]:
    """Run a scan under the binomial schedule, as nested `jax.checkpoint`.

    Args:
        body: as in `lax.scan`.
        init: the first carry.
        xs: as in `lax.scan`.
        length: the number of steps, at least 1.
        num_states: states held at once, the initial one included.
        reverse: from the last x to the first.

    Returns:
        The last carry and the stacked ys.

    Raises:
        OptionError: so few states that a step would run more than 200 times.

    Source: Griewank and Walther 2000, section 2.
    """
    c = min(num_states, length)
    repeats = num_repeats(length, c)
    if repeats > _MAX_REPEATS:
        enough = next(c for c in itertools.count(num_states) if num_repeats(length, c) <= _MAX_REPEATS)
        raise OptionError(
            f"num_checkpoints={num_states} for {length:,} steps would run a step {repeats:,} times; give at least "
            f"num_checkpoints={enough}"
        )
    if repeats > _SAFE_DEPTH:
        # Whoever differentiates the result meets JAX's recursion, so there is no scope to raise the limit for.
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + _FRAMES_PER_LEVEL * repeats))
    pieces = _split(xs, _runs(length, c, repeats), reverse)
    carry, ys = _Binomial(body, reverse).part(length, c, repeats)(init, pieces)
    return carry, _joined(ys, reverse)


class _Binomial:
    """The tree of one loop: a part reverses `length` steps with c states when no step may run more than r times more.

    A part takes the carry and the pieces of xs of its own runs, and gives back the carry and a list of stacked ys.
    Equal parts are one function, so that JAX traces them once.
    """

    def __init__(self, body: Callable, reverse: bool):
        self.body, self.reverse = body, reverse
        self._parts: dict[tuple[int, int, int], Callable] = {}

    def part(self, length: int, c: int, r: int) -> Callable:
        key = (length, c, r)
        if key not in self._parts:
            self._parts[key] = functools.partial(self._run, key)
        return self._parts[key]

    def _run(self, key: tuple[int, int, int], carry: Any, pieces: list[Any]) -> tuple[Any, list[Any]]:
        length, c, r = key
        rest, ys = list(pieces), []
        if r <= 1 and length > 1:
            # A state for every step: each is recomputed on its own. Few steps are not worth a loop.
            carry, y = _scan_of_checkpoints(self.body, carry, rest.pop(0), length - 1, self.reverse)
            ys, length = [y], 1
        while length > 1:
            m = split_length(length, c, r)
            taken = len(_runs(m, c, r - 1))
            carry, inner = jax.checkpoint(self.part(m, c, r - 1))(carry, rest[:taken])
            ys, rest = [*ys, *inner], rest[taken:]
            length, c = length - m, c - 1
        carry, y = self.body(carry, jax.tree.map(lambda x: x[0], rest[0]))
        return carry, [*ys, jax.tree.map(lambda y: jnp.asarray(y)[None], y)]


def _scan_of_checkpoints(body: Callable, carry: Any, xs: Any, length: int, reverse: bool) -> tuple[Any, Any]:
    if length > 1:
        return lax.scan(jax.checkpoint(body, prevent_cse=False), carry, xs, length, reverse=reverse)
    carry, y = jax.checkpoint(body)(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: jnp.asarray(y)[None], y)


@functools.lru_cache(maxsize=4096)
def _runs(length: int, c: int, r: int) -> tuple[int, ...]:
    """Lengths of the runs of steps that a part consists of, in order."""
    if r <= 1:
        return (length - 1, 1) if length > 1 else (1,)
    runs: list[int] = []
    while length > 1:
        m = split_length(length, c, r)
        runs += _runs(m, c, r - 1)
        length, c = length - m, c - 1
    return (*runs, 1)


def _split(xs: Any, lengths: Sequence[int], reverse: bool) -> list[Any]:
    """Cut stacked arrays into runs, in the order they are scanned."""
    if len(lengths) == 1:
        return [xs]
    sizes = tuple(reversed(lengths)) if reverse else tuple(lengths)
    leaves, tree = jax.tree.flatten(xs)
    # One operation for all pieces: its transpose puts their cotangents together in one go.
    cut = [lax.split(leaf, sizes) for leaf in leaves]
    pieces = [jax.tree.unflatten(tree, [leaf[i] for leaf in cut]) for i in range(len(sizes))]
    return pieces[::-1] if reverse else pieces


def _joined(pieces: list[Any], reverse: bool) -> Any:
    """Put stacked ys together again."""
    ordered = pieces[::-1] if reverse else pieces
    return jax.tree.map(lambda *ys: lax.concatenate(ys, 0), *ordered)
