"""Along which values tangents flow: inside loops, conditionals and checkpoints too."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxckpt
from jaxckpt.program.dataflow import active_values
from jaxckpt.program.trace import trace

W, X = jnp.eye(4) * 0.5, jnp.ones((8, 4))


def stopped(x):
    return lax.stop_gradient(x)


def active_results(fun, *args):
    """For each result whether tangents of the first argument flow into it."""
    program = trace(fun, args).program
    found = []
    for x in program.outputs:
        active = active_values(program, {program.inputs[0]}, {x} if isinstance(x, int) else set())
        found.append(x in active)
    return found


def loop_with(wrap):
    def fun(w, x):
        def body(c, _):
            c = jnp.tanh(c @ w)
            return c, wrap(jnp.mean(c))

        return lax.scan(body, x, None, length=3)

    return fun


def test_a_stopped_result_of_a_loop_is_not_active():
    assert active_results(loop_with(lambda y: y), W, X) == [True, True]
    assert active_results(loop_with(stopped), W, X) == [True, False]


def test_a_carry_is_reached_through_another_one():
    def fun(w, x):
        # The first reaches the second, the second the third, each an iteration later.
        return lax.scan(lambda c, _: ((jnp.sum(w), c[0], c[1], c[3]), None), (0.0, 0.0, 0.0, 0.0), None, length=5)[0]

    assert active_results(fun, W, X) == [True, True, True, False]


def test_branches_and_checkpoints_are_looked_into():
    def branches(w, x):
        return lax.cond(x[0, 0] > 0, lambda: (jnp.sum(w), stopped(w)), lambda: (0.0, stopped(2 * w)))

    def remat(w, x):
        return jax.checkpoint(lambda w: (jnp.sum(w), stopped(w)))(w)

    assert active_results(branches, W, X) == active_results(remat, W, X) == [True, False]


def test_a_rule_of_its_own_may_send_tangents_anywhere():
    @jax.custom_jvp
    def straight_through(x):
        return stopped(jnp.round(x))

    straight_through.defjvp(lambda p, t: (straight_through(*p), t[0]))
    assert active_results(lambda w, x: lax.scan(lambda c, _: (straight_through(c), None), w, None, length=2)[0], W, X)


OPERATIONS = (jnp.sin, jnp.cumsum, stopped, lambda x: x * 2, lambda x: jnp.flip(x))


@settings(deadline=None, max_examples=20)
@given(
    picks=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=6),
    form=st.sampled_from(["scan", "cond", "remat"]),
)
def test_whatever_has_a_derivative_is_active(picks, form):
    def step(values):
        values = list(values)
        for source, place, op in picks:
            values[place] = 0.1 * values[place] + OPERATIONS[op](values[source])
        return tuple(values)

    def fun(x, y, z):
        if form == "scan":
            return lax.scan(lambda c, _: (step(c), None), (x, y, z), None, length=3)[0]
        if form == "cond":
            return lax.cond(jnp.sum(x) > -100, step, lambda values: values, (x, y, z))
        return jax.checkpoint(step)((x, y, z))

    args = tuple(jnp.linspace(0.1, 1, 3) + i for i in range(3))
    jacobians = jax.jacrev(fun)(*args)
    for result, has_path in zip(jacobians, active_results(fun, *args), strict=True):
        assert has_path or not jnp.any(result)


@pytest.mark.parametrize("length", [2, 32])
def test_what_only_an_auxiliary_result_needs_is_not_saved(length):
    def loss(w, x):
        def body(c, _):
            for _ in range(4):
                c = jnp.tanh(c @ w)
            return c, jnp.mean(stopped(c))

        last, means = lax.scan(body, x, None, length=length)
        return jnp.mean(means) + jnp.sum(w**2), last

    w, x = jnp.eye(64) * 0.5, jnp.ones((512, 64))
    plan = jaxckpt.plan(loss, w, x, budget="100%", has_aux=True, calibration=None)
    predicted = jaxckpt.plan(loss, w, x, budget="100%", has_aux=True, verify=False, calibration=None)
    assert plan.schedule is None and predicted.unplanned_peak_bytes <= plan.unplanned_peak_bytes
