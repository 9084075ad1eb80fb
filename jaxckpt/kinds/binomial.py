"""A loop reversed with few states: binomial checkpointing as two loops whose program does not grow with the length.

The forward loop holds the state in front of some iterations, as many as it is given slots. The backward loop takes the
iterations from the last to the first: it starts at the nearest state held before one, runs forward to it, holding
states in slots that have become free on the way, and differentiates it. Which state goes where is a table, made here.
Stacked inputs are read, and their cotangents written, in place: unlike in nested scans no chunk of them is copied.

The backward's inner loop runs as often as the table says, and of such a loop there is no reverse derivative. Where the
gradient is differentiated again, both loops are therefore replaced by checkpointed scans of checkpointed scans.

Source: Griewank and Walther, "Algorithm 799: revolve", 2000.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ckptsolvers.revolve import num_forwards, revolve_actions
from jax import lax

from jaxckpt.program.ir import has_placed_type, is_differentiable

# One iteration: constants, carry and slices to carry and slices, flat lists all.
Step = Callable[[list[Any], list[Any], list[Any]], tuple[list[Any], list[Any]]]


@dataclass(frozen=True, slots=True)
class _Table:
    """Where states go, in the order in which iterations run; slot `num_states` holds whatever came last.

    Attributes:
        first: `[n]`, the slot of the state in front of each iteration in the forward loop.
        restored: `[n]`, the slot from which an iteration's backward starts.
        start: `[n]`, the iteration that the state in that slot stands in front of.
        offset: `[n]`, how many iterations backward loops have run again before.
        again: `[num_again]`, the slot of the state in front of each iteration that is run again.
    """

    first: np.ndarray
    restored: np.ndarray
    start: np.ndarray
    offset: np.ndarray
    again: np.ndarray

    @property
    def num_slots(self) -> int:
        """How many states there is room for, the one that came last among them."""
        return 1 + max(int(t.max()) for t in (self.first, self.again))


@functools.lru_cache(maxsize=64)
def _table(length: int, num_states: int) -> _Table:
    last, free, slots = num_states, list(range(num_states)), {}
    first = np.zeros(length, np.int32)
    restored, start, offset = (np.zeros(length, np.int32) for _ in range(3))
    again: list[int] = []
    leg: list[int] = []  # slots of the states in front of the iterations run since the last restore
    begin: tuple[int, int] | None = None  # where that was, and its slot; None in the forward loop
    for action in revolve_actions(length, num_states):
        if action.kind == "store":
            slots[action.step] = free.pop()
        elif action.kind == "drop":
            free.append(slots.pop(action.step))
        elif action.kind == "restore":
            begin, leg = (action.step, slots[action.step]), []
        elif action.kind == "advance":
            leg += [slots.get(i, last) for i in range(action.step, action.stop)]
        elif begin is None:
            # The forward loop runs the last iteration too, and its state is there still: nothing was written since.
            first[:] = [*leg, slots.get(action.step, last)]
            start[action.step], restored[action.step] = action.step, first[action.step]
        else:
            start[action.step], restored[action.step] = begin
            offset[action.step] = len(again)
            again += leg
    return _Table(first, restored, start, offset, np.asarray(again or [last], np.int32))


def num_again(length: int, num_states: int) -> int:
    """How many iterations the backward loop runs again to reach the states it has not held."""
    return num_forwards(length, num_states) - (length - 1)


def binomial_loop(
    step: Step,
    differentiable_step: Step,
    consts: Sequence[Any],
    carry: Sequence[Any],
    slices: Sequence[Any],
    *,
    length: int,
    num_states: int,
    reverse: bool = False,
) -> tuple[list[Any], list[Any]]:
    """Run a loop whose backward holds no more than a number of states, and one more that is being worked on.

    Args:
        step: one iteration, run forward only.
        differentiable_step: the same for the iteration that is being differentiated.
        consts: what every iteration reads.
        carry: what the first iteration starts from.
        slices: `[length, ...]` each, of which every iteration reads one slice.
        length: number of iterations.
        num_states: carries held at once.
        reverse: run from the last slice to the first.

    Returns:
        The last carry, and the stacked results. It can be differentiated in reverse, and the gradient in every way; its
        program has the same size whatever the length.
    """
    table = _table(length, min(num_states, length))
    # Loops below go over slices in the order in which they are stacked.
    stacked = (lambda per_step: per_step[::-1]) if reverse else (lambda per_step: per_step)

    @jax.custom_vjp
    def run(consts: list[Any], carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        return lax.scan(lambda c, x: step(consts, c, x), carry, slices, length=length, reverse=reverse)

    plain = functools.partial(_in_chunks, differentiable_step, length=length, reverse=reverse)

    @jax.custom_jvp
    def hold(consts: list[Any], carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        def held(state: tuple[list[Any], list[Any]], xs: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
            (carry, slots), (slot, x) = state, xs
            slots = _put(slots, carry, slot)
            carry, y = step(consts, carry, x)
            return (carry, slots), y

        empty = [_empty(table.num_slots, x) for x in carry]
        xs = (stacked(table.first), slices)
        (carry, slots), ys = lax.scan(held, (carry, empty), xs, length=length, reverse=reverse)
        return carry, ys, slots

    @hold.defjvp
    def hold_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
        # Under vmap a rule's results must lie as the function's own do, so that they are the function's own.
        carry, ys, slots = hold(*primals)
        _, (carry_tangents, result_tangents) = jax.jvp(plain, primals, tangents)
        # Of the states that are held, the gradient is a function of the first alone.
        starts = zip(slots, tangents[1], strict=True)
        slot_tangents = [_put_tangent(s, t, int(table.first[0])) for s, t in starts]
        return (carry, ys, slots), (carry_tangents, result_tangents, slot_tangents)

    def forward(consts: list[Any], carry: list[Any], slices: list[Any]) -> tuple[Any, Any]:
        carry, ys, slots = hold(consts, carry, slices)
        return (carry, ys), (consts, slots, slices)

    @jax.custom_jvp
    def turned(consts: Any, slots: Any, slices: Any, carry_cotangents: Any, result_cotangents: Any) -> Any:
        again = jnp.asarray(table.again)

        def reach(j: Any, state: Any, start: Any, offset: Any) -> Any:
            carry, slots = state
            slots = _put(slots, carry, again[offset + j])
            at = length - 1 - (start + j) if reverse else start + j
            return step(consts, carry, [lax.dynamic_index_in_dim(x, at, keepdims=False) for x in slices])[0], slots

        def turn(state: Any, xs: Any) -> Any:
            slots, cts, const_cts = state
            (restored, start, offset, at), x, y_cts = xs
            carry = [lax.dynamic_index_in_dim(s, restored, keepdims=False) for s in slots]
            advance = functools.partial(reach, start=start, offset=offset)
            carry, slots = lax.fori_loop(0, at - start, lambda j, s: advance(j, s), (carry, slots))
            grads = _pull(differentiable_step, consts, carry, x, cts, y_cts)
            const_cts = [a + g for a, g in zip(const_cts, grads[0], strict=True)]
            return (slots, grads[1], const_cts), grads[2]

        order = [stacked(t) for t in (table.restored, table.start, table.offset, np.arange(length, dtype=np.int32))]
        zeros = [jnp.zeros_like(x) for x in _active(consts)]
        init, xs = (slots, carry_cotangents, zeros), (order, slices, result_cotangents)
        (_, cts, const_cts), slice_cts = lax.scan(turn, init, xs, length=length, reverse=not reverse)
        return const_cts, cts, slice_cts

    @turned.defjvp
    def turned_jvp(primals: Any, tangents: Any) -> Any:
        def gradient(consts: Any, slots: Any, slices: Any, *cotangents: Any) -> Any:
            return tuple(_pull(plain, consts, [s[int(table.first[0])] for s in slots], slices, *cotangents))

        return turned(*primals), jax.jvp(gradient, primals, tangents)[1]

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, Any, Any]:
        consts, slots, slices = residuals
        const_cts, cts, slice_cts = turned(consts, slots, slices, *map(_wanted, cotangents))
        given = (consts, [s[0] for s in slots], slices)
        return tuple(_spread(x, ct) for x, ct in zip(given, (const_cts, cts, slice_cts), strict=True))  # type: ignore[return-value]

    run.defvjp(forward, backward)
    return run(list(consts), list(carry), list(slices))


def _in_chunks(
    step: Step, consts: list[Any], carry: list[Any], slices: list[Any], *, length: int, reverse: bool
) -> tuple[list[Any], list[Any]]:
    """The same loop as a scan of checkpointed scans, and one of what is left over."""
    size = max(1, math.isqrt(length))
    whole = length - length % size

    def scanned(carry: list[Any], slices: list[Any], num: int = size) -> tuple[list[Any], list[Any]]:
        return lax.scan(lambda c, x: step(consts, c, x), carry, slices, length=num, reverse=reverse)

    def chunked(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        chunks = [x.reshape(whole // size, size, *x.shape[1:]) for x in slices]
        inner = jax.checkpoint(scanned, prevent_cse=False)
        carry, ys = lax.scan(inner, carry, chunks, length=whole // size, reverse=reverse)
        return carry, [y.reshape(whole, *y.shape[2:]) for y in ys]

    if whole == length:
        return chunked(carry, slices)
    first, last = (
        (slice(length - whole, None), slice(length - whole)) if reverse else (slice(whole), slice(whole, None))
    )
    carry, ys = chunked(carry, [x[first] for x in slices])
    carry, rest = scanned(carry, [x[last] for x in slices], length - whole)
    return carry, [jnp.concatenate([b, a] if reverse else [a, b]) for a, b in zip(ys, rest, strict=True)]


def _put_tangent(slots: Any, tangent: Any, slot: int) -> Any:
    """The tangent of slots of which only one moves."""
    if not is_differentiable(jax.typeof(slots)):
        return np.zeros(slots.shape, jax.dtypes.float0)
    return jnp.zeros_like(slots).at[slot].set(tangent)


def _empty(num_slots: int, x: Any) -> Any:
    """Slots for values like this one, which lie where it does."""
    if has_placed_type(jax.typeof(x)):
        return jnp.stack([jnp.zeros_like(x)] * num_slots)
    return jnp.zeros((num_slots, *x.shape), x.dtype)


def _put(slots: list[Any], carry: list[Any], slot: Any) -> list[Any]:
    return [lax.dynamic_update_index_in_dim(s, x, slot, 0) for s, x in zip(slots, carry, strict=True)]


def _active(values: Sequence[Any]) -> list[Any]:
    return [x for x in values if is_differentiable(jax.typeof(x))]


def _wanted(cotangents: Sequence[Any]) -> list[Any]:
    """Those of values that have one."""
    return [ct for ct in cotangents if jax.typeof(ct).dtype != jax.dtypes.float0]


def _spread(values: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """Cotangents in the places of the values that have one, None elsewhere."""
    rest = iter(cotangents)
    return [next(rest) if is_differentiable(jax.typeof(x)) else None for x in values]


def _pull(step: Step, consts: Any, carry: Any, x: Any, carry_cts: Any, result_cts: Any) -> Any:
    """Cotangents of one iteration's constants, carry and slices, those that have one."""
    groups = [list(consts), list(carry), list(x)]

    def active(*moved: list[Any]) -> tuple[list[Any], list[Any]]:
        full = []
        for values, new in zip(groups, moved, strict=True):
            rest = iter(new)
            full.append([next(rest) if is_differentiable(jax.typeof(v)) else v for v in values])
        outs, results = step(*full)
        return _active(outs), _active(results)

    _, pull = jax.vjp(active, *map(_active, groups))
    return pull((carry_cts, result_cts))
