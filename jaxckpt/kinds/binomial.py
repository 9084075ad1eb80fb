"""A loop reversed with few states: binomial checkpointing as two loops whose program does not grow with the length.

The forward loop holds the state in front of some iterations, as many as it is given slots. The backward loop takes the
iterations from the last to the first: it starts at the nearest state held before one, runs forward to it, holding
states in slots that have become free on the way, and differentiates it. Which state goes where is a table, made by
`binomial_table`. Stacked inputs are read, and their cotangents written, in place: unlike in nested scans no chunk of
them is copied.

To JAX the loop is a `custom_jvp`, whose tangents one linear primitive makes. Evaluated, that is the plain loop's
derivative in forward mode; transposed, it is the backward loop. So the loop has every derivative, wherever it stands.

The backward's inner loop runs as often as the table says, and of such a loop there is no reverse derivative. Where the
gradient is differentiated again, it is therefore the gradient of checkpointed scans of checkpointed scans.

Source: Griewank and Walther, "Algorithm 799: revolve", 2000.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from jaxckpt import _compat
from jaxckpt.kinds.binomial_table import binomial_table
from jaxckpt.program.ir import has_placed_type, is_differentiable, spec_of

# One iteration: constants, carry and slices to carry and slices, flat lists all.
Step = Callable[[list[Any], list[Any], list[Any]], tuple[list[Any], list[Any]]]


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
        The last carry, and the stacked results. It can be differentiated and mapped in every way; in forward mode each
        iteration runs once more. Its program has the same size whatever the length.
    """
    loop = _Loop(step, differentiable_step, length, min(num_states, length), reverse)

    @jax.custom_jvp
    def run(consts: list[Any], carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        return loop.scan(lambda c, x: step(consts, c, x), carry, slices)

    def run_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
        carry, ys, slots = loop.hold(*primals)
        return (carry, ys), _tangents(loop, primals, tangents, carry, ys, slots)

    run.defjvp(run_jvp, symbolic_zeros=True)
    return run(list(consts), list(carry), list(slices))


@dataclass(frozen=True, slots=True, eq=False)
class _Loop:
    """A loop that is reversed by a table."""

    step: Step
    differentiable_step: Step
    length: int
    num_states: int
    reverse: bool

    def scan(self, body: Callable, carry: Any, xs: Any, *, backward: bool = False) -> tuple[Any, Any]:
        return lax.scan(body, carry, xs, length=self.length, reverse=self.reverse != backward)

    def stacked(self, per_step: np.ndarray) -> np.ndarray:
        """What is listed in the order in which iterations run, in the order in which slices are stacked."""
        return per_step[::-1] if self.reverse else per_step

    def start(self, slots: list[Any]) -> list[Any]:
        """The state in front of the first iteration, which is held throughout."""
        return [s[self.num_states - 1] for s in slots]

    def hold(self, consts: list[Any], carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Run the loop and hold states; the last slot has whatever came last."""
        table = binomial_table(self.length, self.num_states)

        @jax.custom_jvp
        def hold(consts: list[Any], carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
            def held(state: tuple[list[Any], list[Any]], xs: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
                (carry, slots), (slot, x) = state, xs
                slots = _put(slots, carry, slot)
                carry, y = self.step(consts, carry, x)
                return (carry, slots), y

            empty = [_empty(self.num_states + 1, x) for x in carry]
            (carry, slots), ys = self.scan(held, (carry, empty), (self.stacked(table.first), slices))
            return carry, ys, slots

        def hold_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
            # Under vmap a rule's results must lie as the function's own do, so that they are the function's own.
            carry, ys, slots = hold(*primals)
            # Of the states that are held, the gradient is a function of the first alone.
            starts = zip(slots, tangents[1], strict=True)
            slot_tangents = [_put_tangent(s, t, self.num_states - 1) for s, t in starts]
            return (carry, ys, slots), (*_tangents(self, primals, tangents, carry, ys, slots), slot_tangents)

        hold.defjvp(hold_jvp, symbolic_zeros=True)
        return hold(consts, carry, slices)

    def turn(self, places: "_Places", consts: Any, slots: Any, slices: Any, carry_cts: Any, result_cts: Any) -> Any:
        """Cotangents of the constants, carry and slices that move, from those of the carry and the results."""
        table, last = binomial_table(self.length, self.num_states), self.num_states

        @jax.custom_jvp
        def turned(consts: Any, slots: Any, slices: Any, carry_cotangents: Any, result_cotangents: Any) -> Any:
            stops = jnp.asarray(table.stops)

            def reach(j: Any, state: Any, start: Any, slot: Any) -> Any:
                carry, slots, stop = state
                is_due = stops[stop] == j
                slots = _put(slots, carry, jnp.where(is_due, slot - stop, last))
                at = self.length - 1 - (start + j) if self.reverse else start + j
                xs = [lax.dynamic_index_in_dim(x, at, keepdims=False) for x in slices]
                return self.step(consts, carry, xs)[0], slots, stop + is_due.astype(stop.dtype)

            def turn(state: Any, xs: Any) -> Any:
                slots, cts, const_cts = state
                (restored, start, stop, at), x, y_cts = xs
                carry = [lax.dynamic_index_in_dim(s, restored, keepdims=False) for s in slots]
                # The state at a part's first stop goes into the slot below that of its start, and so on.
                advance = functools.partial(reach, start=start, slot=restored - 1 + stop)
                carry, slots, _ = lax.fori_loop(0, at - start, lambda j, s: advance(j, s), (carry, slots, stop))
                grads = _pull(self.differentiable_step, places, consts, carry, x, cts, y_cts)
                const_cts = [a + g for a, g in zip(const_cts, grads[0], strict=True)]
                return (slots, grads[1], const_cts), grads[2]

            positions = np.arange(self.length, dtype=np.int32)
            order = [self.stacked(t) for t in (table.restored, table.start, table.stop, positions)]
            init = (slots, carry_cotangents, [jnp.zeros_like(consts[i]) for i in places.consts])
            (_, cts, const_cts), slice_cts = self.scan(turn, init, (order, slices, result_cotangents), backward=True)
            return const_cts, cts, slice_cts

        @turned.defjvp
        def turned_jvp(primals: Any, tangents: Any) -> Any:
            def gradient(consts: Any, slots: Any, slices: Any, *cotangents: Any) -> Any:
                return tuple(_pull(self.in_chunks, places, consts, self.start(slots), slices, *cotangents))

            return turned(*primals), jax.jvp(gradient, primals, tangents)[1]

        return turned(consts, slots, slices, carry_cts, result_cts)

    def in_chunks(self, consts: list[Any], carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        """The same loop as a scan of checkpointed scans, and one of what is left over."""
        size, length, reverse = max(1, math.isqrt(self.length)), self.length, self.reverse
        whole = length - length % size

        def scanned(carry: list[Any], slices: list[Any], num: int = size) -> tuple[list[Any], list[Any]]:
            body = lambda c, x: self.differentiable_step(consts, c, x)  # noqa: E731
            return lax.scan(body, carry, slices, length=num, reverse=reverse)

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

    def batched(self, axis: Any, mapped: Sequence[Sequence[bool]], specs: Any) -> tuple["_Loop", list[int | None]]:
        """The loop of all examples of a mapped axis, and along which axis one iteration's results are mapped.

        Args:
            axis: the mapped axis, as JAX hands it to a rule.
            mapped: which constants, carries and slices differ between examples.
            specs: of one iteration's constants, carry and slices, those of all examples together.
        """
        in_axes = tuple([0 if is_mapped else None for is_mapped in group] for group in mapped)
        found: list[int | None] = []

        def probe(*groups: list[Any]) -> Any:
            carry, results = self.step(*groups)
            found[:] = [0 if _compat.is_mapped(x) else None for x in results]
            return carry, results

        jax.eval_shape(_mapped(probe, axis, in_axes), *specs)
        whole = lambda step: _mapped(step, axis, in_axes, (in_axes[1], list(found)))  # noqa: E731
        return replace(self, step=whole(self.step), differentiable_step=whole(self.differentiable_step)), found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Which values of an iteration have tangents: constants and slices that move, carries and results that can."""

    consts: tuple[int, ...]
    carry: tuple[int, ...]
    slices: tuple[int, ...]
    results: tuple[int, ...]

    def of(self, *groups: Sequence[Any]) -> tuple[list[Any], ...]:
        """Those of the constants, the carry and the slices that have one."""
        places = self.consts, self.carry, self.slices
        return tuple([xs[i] for i in at] for xs, at in zip(groups, places, strict=True))

    def put(self, groups: Sequence[Sequence[Any]], moved: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Constants, carry and slices, with others in the places of those that have one."""
        places = self.consts, self.carry, self.slices
        return [_replaced(*each) for each in zip(groups, places, moved, strict=True)]

    def out(self, carry: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """Those of the last carry and of the results that have one."""
        return [carry[i] for i in self.carry] + [results[i] for i in self.results]


# The tangents of the last carry and the results, from constants, slots and slices, and tangents that it is linear in.
linear_p = jex.Primitive("binomial_tangents")
linear_p.multiple_results = True


def _tangents(
    loop: _Loop, primals: Any, tangents: Any, carry: list[Any], ys: list[Any], slots: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Tangents of the last carry and the stacked results, in the loop's `custom_jvp`."""
    consts, _, slices = primals
    moves = lambda i, x, ts: is_differentiable(jax.typeof(x)) and not isinstance(ts[i], SymbolicZero)  # noqa: E731
    places = _Places(
        consts=tuple(i for i, x in enumerate(consts) if moves(i, x, tangents[0])),
        carry=_differentiable(carry),
        slices=tuple(i for i, x in enumerate(slices) if moves(i, x, tangents[2])),
        results=_differentiable(ys),
    )
    starts = [jnp.zeros_like(x) if isinstance(t, SymbolicZero) else t for x, t in zip(carry, tangents[1], strict=True)]
    moved = [t for group in places.of(tangents[0], starts, tangents[2]) for t in group]
    avals = tuple(jax.typeof(x).to_tangent_aval() for x in places.out(carry, ys))
    counts = (len(consts), len(slots), len(slices))
    found = linear_p.bind(*consts, *slots, *slices, *moved, loop=loop, places=places, counts=counts, avals=avals)
    still = [np.zeros(x.shape, jax.dtypes.float0) for x in (*carry, *ys)]
    whole = _replaced(still, _differentiable([*carry, *ys]), found)
    return whole[: len(carry)], whole[len(carry) :]


def _along(*operands: Any, loop: _Loop, places: _Places, counts: tuple[int, ...], avals: Any) -> list[Any]:
    """The derivative in forward mode: that of the plain loop."""
    del avals
    consts, slots, slices, moved = _groups(operands, counts)
    given = consts, loop.start(slots), slices
    starts = places.of(*given)

    def fun(*moving: list[Any]) -> list[Any]:
        return places.out(*loop.in_chunks(*places.put(given, moving)))

    return jax.jvp(fun, starts, tuple(_groups(moved, map(len, starts))[:3]))[1]


linear_p.def_impl(_along)
linear_p.def_abstract_eval(lambda *_, avals, **__: list(avals))
mlir.register_lowering(linear_p, mlir.lower_fun(_along, multiple_results=True))


def _transpose(
    cotangents: Any, *operands: Any, loop: _Loop, places: _Places, counts: tuple[int, ...], avals: Any
) -> list[Any]:
    """The derivative in reverse: the backward loop."""
    del avals
    consts, slots, slices, moved = _groups(operands, counts)
    cotangents = list(map(ad.instantiate_zeros, cotangents))
    carry_cts, result_cts = _groups(cotangents, [len(places.carry)])
    found = loop.turn(places, consts, slots, slices, carry_cts, result_cts)
    cts = [ct for group in found for ct in group]
    wanted = [ct if ad.is_undefined_primal(t) else None for ct, t in zip(cts, moved, strict=True)]
    return [None] * sum(counts) + wanted


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[list[Any], list[Any]]:
    """The derivative's derivative: that of the plain loop's."""
    active = [i for i, t in enumerate(tangents) if not _compat.is_zero(t)]
    along = lambda *values: _along(*_replaced(primals, active, values), **params)  # noqa: E731
    _, moved = jax.jvp(along, [primals[i] for i in active], [tangents[i] for i in active])
    return linear_p.bind(*primals, **params), moved


def _batch(axis: Any, args: Any, dims: Any, **params: Any) -> tuple[list[Any], list[int | None]]:
    """The loop of all examples: what differs between them is known from the states that are held."""
    loop, places, counts = params["loop"], params["places"], params["counts"]
    consts, slots, slices, moved = _groups(list(zip(args, dims, strict=True)), counts)
    mapped = [[dim is not None for _, dim in group] for group in (consts, slots, slices)]
    wanted = places.of(*mapped)
    if any(dim is not None and not w for (_, dim), w in zip(moved, [w for g in wanted for w in g], strict=True)):
        # Many directions in one place, as `jax.jacfwd` has them: nothing of that is transposed.
        return _mapped(functools.partial(_along, **params), axis, tuple(dims))(*args), [0] * len(params["avals"])
    residuals = [[_at(x, dim, i) for x, dim in xs] for i, xs in zip((0, 1, 1), (consts, slots, slices), strict=True)]
    linear = [
        [_at(x, dim, i, axis.size if w else None) for (x, dim), w in zip(xs, ws, strict=True)]
        for i, xs, ws in zip((0, 0, 1), _groups(moved, map(len, wanted)), wanted, strict=False)
    ]
    specs = jax.eval_shape(lambda c, s, x: (c, loop.start(s), [y[0] for y in x]), *residuals)
    whole, result_axes = loop.batched(axis, mapped, specs)
    operands = [x for group in (*residuals, *linear) for x in group]
    closed = jax.make_jaxpr(functools.partial(_along, **{**params, "loop": whole}))(
        *(spec_of(jax.typeof(x)) for x in operands)
    )
    found = linear_p.bind(*operands, **{**params, "loop": whole, "avals": tuple(closed.out_avals)})
    carry_axes = [0 if is_mapped else None for is_mapped in mapped[1]]
    return found, places.out(carry_axes, [None if axis is None else 1 for axis in result_axes])


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.fancy_primitive_batchers[linear_p] = _batch


def _mapped(fun: Callable, axis: Any, in_axes: Any, out_axes: Any = 0) -> Callable:
    """The function under `vmap` over an axis that JAX handed to a rule."""
    names = {"axis_name": axis.name, "axis_size": axis.size, "spmd_axis_name": axis.spmd_name or None}
    return jax.vmap(fun, in_axes=in_axes, out_axes=out_axes, **names)


def _at(x: Any, dim: int | None, place: int, size: int | None = None) -> Any:
    """A value with its mapped axis in a place; with a size, one that is not mapped is repeated."""
    if dim is not None:
        return jnp.moveaxis(x, dim, place)
    return x if size is None else jnp.repeat(jnp.expand_dims(x, place), size, place)


def _groups(values: Sequence[Any], counts: Iterable[int]) -> list[list[Any]]:
    """Values in groups of so many, and those that are left."""
    rest = iter(values)
    return [*(list(itertools.islice(rest, n)) for n in counts), list(rest)]


def _replaced(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    new = list(values)
    for i, x in zip(places, others, strict=True):
        new[i] = x
    return new


def _differentiable(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(values) if is_differentiable(jax.typeof(x)))


def _put_tangent(slots: Any, tangent: Any, slot: int) -> Any:
    """The tangent of slots of which only one moves."""
    if not is_differentiable(jax.typeof(slots)):
        return np.zeros(slots.shape, jax.dtypes.float0)
    still = jnp.zeros_like(slots)
    return still if isinstance(tangent, SymbolicZero) else still.at[slot].set(tangent)


def _empty(num_slots: int, x: Any) -> Any:
    """Slots for values like this one, which lie where it does."""
    if has_placed_type(jax.typeof(x)):
        return jnp.stack([jnp.zeros_like(x)] * num_slots)
    return jnp.zeros((num_slots, *x.shape), x.dtype)


def _put(slots: list[Any], carry: list[Any], slot: Any) -> list[Any]:
    return [lax.dynamic_update_index_in_dim(s, x, slot, 0) for s, x in zip(slots, carry, strict=True)]


def _pull(step: Step, places: _Places, consts: Any, carry: Any, x: Any, carry_cts: Any, result_cts: Any) -> Any:
    """Cotangents of one iteration's constants, carry and slices, those that have one."""
    groups = consts, carry, x

    def active(*moving: list[Any]) -> list[Any]:
        return places.out(*step(*places.put(groups, moving)))

    _, pull = jax.vjp(active, *places.of(*groups))
    return pull([*carry_cts, *result_cts])
