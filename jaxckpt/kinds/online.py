"""A loop of unknown length, reversed with few states: online checkpointing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxckpt.program.ir import is_differentiable


def checkpointed_while(params: dict[str, Any], max_steps: int, num_states: int) -> Callable[..., list[Any]]:
    """A while equation as a function of its operands that is differentiable in reverse."""
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    flat_cond, flat_body = (jex.jaxpr_as_fun(params[name]) for name in ("cond_jaxpr", "body_jaxpr"))

    def parts(operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        operands = list(operands)
        return operands[:num_cond], operands[num_cond : num_cond + num_body], operands[num_cond + num_body :]

    def goes_on(cond_consts: list[Any], i: Any, state: list[Any]) -> Any:
        (more,) = flat_cond(*cond_consts, *state)
        return more & (i < max_steps)

    @jax.custom_vjp
    def loop(*operands: Any) -> list[Any]:
        cond_consts, body_consts, init = parts(operands)
        return lax.while_loop(
            lambda c: goes_on(cond_consts, *c),
            lambda c: (c[0] + 1, list(flat_body(*body_consts, *c[1]))),
            (jnp.int32(0), init),
        )[1]

    def forward(*operands: Any) -> tuple[list[Any], Any]:
        cond_consts, body_consts, init = parts(operands)

        def step(carry: Any) -> Any:
            i, state, before, held = carry
            # One step late: the last state of all that a step starts from is at hand when the loop ends.
            held = held.with_newest(i - 1, before)
            return i + 1, list(flat_body(*body_consts, *state)), state, held

        first = (jnp.int32(0), init, init, _Held.start(init, num_states))
        num_steps, final, before, held = lax.while_loop(lambda c: goes_on(cond_consts, *c[:2]), step, first)
        return final, (operands, num_steps, before, held)

    def backward(residuals: Any, cotangents: list[Any]) -> tuple[Any, ...]:
        operands, num_steps, before, held = residuals
        cond_consts, body_consts, _ = parts(operands)
        gradients, ct_init = _reversed(flat_body, body_consts, num_steps, before, held, cotangents)
        return (*[None] * len(cond_consts), *gradients, *ct_init)

    loop.defvjp(forward, backward)
    return loop


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Held:
    """The held states: the first `count` of `steps`, ascending, say before which steps they stand.

    `slots` is a permutation: the state before `steps[j]` is stored in slot `slots[j]`; those from `count` on are free.
    """

    states: list[Any]  # [num_states, ...] each
    steps: jax.Array
    slots: jax.Array
    count: jax.Array
    repeats: jax.Array  # r: no step runs more often than this, so far
    room: jax.Array  # beta(c - i + 1, r - 1) for each place i, how long a stretch may be there

    @classmethod
    def start(cls, init: list[Any], num_states: int) -> "_Held":
        """Hold the initial state."""
        place = jnp.arange(num_states, dtype=jnp.int32)
        return cls(
            states=[jnp.broadcast_to(x, (num_states, *x.shape)) for x in init],
            steps=jnp.zeros_like(place),
            slots=place,
            count=jnp.int32(1),
            repeats=jnp.int32(1),
            room=jnp.ones(num_states, jnp.float32),
        )

    def with_newest(self, step: jax.Array, state: list[Any]) -> "_Held":
        """Hold the state before a step, the latest so far, if that is worth the place of another one."""
        num_states = self.steps.shape[0]
        if num_states == 1:
            return self
        end, place = num_states - 1, jnp.arange(num_states, dtype=jnp.int32)
        is_full = self.count == num_states
        # What a stretch would be long if the state at its end were dropped.
        merged = jnp.roll(self.steps, -1).at[end].set(step) - jnp.roll(self.steps, 1)
        spare = lambda room: jnp.where(place > 0, room - merged.astype(room.dtype), -1)  # noqa: E731
        # The loop runs to step + 2 at least; the last stretch is reversed with the one state it starts from.
        last_stretch = step + 2 - self.steps[end]

        def none_fits(carry: Any) -> Any:
            return is_full & (step > 0) & ~(spare(carry[1]) > -0.5).any() & (last_stretch > carry[0] + 1)

        def repeat_more(carry: Any) -> Any:
            repeats, room = carry
            more = (num_states - place + repeats + 1).astype(room.dtype) / repeats.astype(room.dtype)
            return repeats + 1, jnp.round(room * more)

        repeats, room = lax.while_loop(none_fits, repeat_more, (self.repeats, self.room))
        fits = spare(room) > -0.5
        exact = fits & (spare(room) < 0.5) & (repeats <= 2)
        latest_of = lambda flags: end - lax.argmax(flags[::-1], 0, jnp.int32)  # noqa: E731
        gone = jnp.where(is_full, jnp.where(exact.any(), latest_of(exact), latest_of(fits)), num_states)
        last = jnp.where(is_full, end, self.count)
        slot = self.slots[jnp.minimum(jnp.where(is_full, gone, self.count), end)]
        moved = jnp.minimum(place + _as_int(place >= gone), end)
        # The initial state is held from the start.
        wanted = (step > 0) & (fits.any() | ~is_full)
        put = lambda old, new: jnp.where(wanted, jnp.where(place == last, new, old[moved]), old)  # noqa: E731
        return _Held(
            states=_written_if(wanted, self.states, slot, state),
            steps=put(self.steps, step),
            slots=put(self.slots, slot),
            count=jnp.minimum(self.count + _as_int(wanted), num_states),
            repeats=repeats,
            room=room,
        )

    def latest(self) -> tuple[jax.Array, list[Any]]:
        """The latest held state and its step."""
        return self.steps[self.count - 1], _read(self.states, self.slots[self.count - 1])

    def pushed_if(self, wanted: jax.Array, step: jax.Array, state: list[Any]) -> "_Held":
        """Hold one more in the first free slot."""
        place = jnp.minimum(self.count, self.steps.shape[0] - 1)
        return replace(
            self,
            states=_written_if(wanted, self.states, self.slots[place], state),
            steps=self.steps.at[place].set(jnp.where(wanted, step, self.steps[place])),
            count=self.count + _as_int(wanted),
        )

    def popped_if(self, wanted: jax.Array) -> "_Held":
        """Hold one less."""
        return replace(self, count=self.count - _as_int(wanted))


def _as_int(flag: jax.Array) -> jax.Array:
    return flag.astype(jnp.int32)


def _read(states: list[Any], slot: jax.Array) -> list[Any]:
    return [lax.dynamic_index_in_dim(x, slot, keepdims=False) for x in states]


def _written_if(wanted: jax.Array, states: list[Any], slot: jax.Array, state: list[Any]) -> list[Any]:
    # The slot is written either way: a branch would copy the buffer.
    kept = [jnp.where(wanted, new, old) for new, old in zip(state, _read(states, slot), strict=True)]
    return [lax.dynamic_update_index_in_dim(x, new, slot, 0) for x, new in zip(states, kept, strict=True)]


def _reversed(
    flat_body: Callable,
    consts: list[Any],
    num_steps: jax.Array,
    before: list[Any],
    held: _Held,
    cotangents: list[Any],
) -> tuple[list[Any], list[Any]]:
    """Reverse the steps: gradients of the body's constants and of the initial state, None where not differentiable."""
    num_states = held.steps.shape[0]
    smooth_consts, smooth = ([i for i, x in enumerate(xs) if is_differentiable(x)] for xs in (consts, before))

    def turn(state: list[Any], gradients: list[Any], cts: list[Any]) -> tuple[list[Any], list[Any]]:
        def step(some_consts: list[Any], some: list[Any]) -> list[Any]:
            results = flat_body(*_merged(consts, smooth_consts, some_consts), *_merged(state, smooth, some))
            return [results[i] for i in smooth]

        _, pull = jax.vjp(step, [consts[i] for i in smooth_consts], [state[i] for i in smooth])
        more, cts = pull(cts)
        return [a + b for a, b in zip(gradients, more, strict=True)], cts

    def stretch(carry: Any) -> Any:
        """Restore the latest state, advance, and either hold another one there or reverse the step."""
        left, held, gradients, cts = carry
        start, state = held.latest()
        distance, free = left - start, num_states - held.count
        advance = jnp.where(free == 0, distance - 1, _split(distance, free + 1))
        state = lax.fori_loop(0, advance, lambda _, s: list(flat_body(*consts, *s)), state)
        turns = start + advance == left - 1
        gradients, cts = lax.cond(turns, turn, lambda _, *kept: kept, state, gradients, cts)
        held = held.pushed_if(~turns, start + advance, state).popped_if(turns & (advance == 0))
        return left - _as_int(turns), held, gradients, cts

    zeros = [jnp.zeros_like(consts[i]) for i in smooth_consts]
    cts = [cotangents[i] for i in smooth]
    # The last step starts from the state that is at hand.
    last = lax.cond(num_steps > 0, turn, lambda _, *kept: kept, before, zeros, cts)
    first = (num_steps - 1, held, *last)
    _, _, gradients, cts = lax.while_loop(lambda carry: carry[0] > 0, stretch, first)
    nothing = lambda xs: [None] * len(xs)  # noqa: E731
    return _merged(nothing(consts), smooth_consts, gradients), _merged(nothing(before), smooth, cts)


def _merged(values: Sequence[Any], places: Sequence[int], some: Sequence[Any]) -> list[Any]:
    merged = list(values)
    for i, value in zip(places, some, strict=True):
        merged[i] = value
    return merged


def _split(distance: jax.Array, num_states: jax.Array) -> jax.Array:
    """Where revolve puts the next state: steps to advance from the restored one, which counts among the states.

    With c states and r the least with beta(c, r) >= distance: min(beta(c, r - 1), distance - beta(c - 1, r - 1)).
    In floating point, since the products are large; a wrong last digit moves the state by a step and nothing else.
    """
    c, n = num_states.astype(jnp.float32), distance.astype(jnp.float32)

    def more(carry: Any) -> Any:
        r, _, beta = carry
        return r + 1, beta, beta * (c + r + 1) / (r + 1)

    # With one state all but the last step are advanced, and beta would grow by one at a time.
    limit = jnp.where(num_states == 1, 0, n)
    r, before, _ = lax.while_loop(
        lambda carry: carry[2] < limit, more, (jnp.float32(0), jnp.float32(1), jnp.float32(1))
    )
    m = jnp.minimum(before, n - jnp.round(before * c / jnp.maximum(c + r - 1, 1)))
    m = jnp.where(num_states == 1, n - 1, jnp.maximum(jnp.round(m), 1))
    return jnp.minimum(m.astype(jnp.int32), distance - 1)
