"""Binomial loops: the same numbers with few states, as often as the formula says, in a program of one size."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ckptsolvers.revolve import num_forwards, num_repeats
from helpers import assert_close, count, jit, least_budget, x64
from jax import lax

import jaxckpt
from jaxckpt import compiler_options
from jaxckpt.kinds import binomial
from jaxckpt.kinds.binomial_table import binomial_table, num_again
from jaxckpt.kinds.scan_run import LoopPlan


def step(consts, carry, slices):
    """A recurrent cell with an integer state and an integer input, and two results."""
    (w,), (h, i), (u, b) = consts, carry, slices
    h = jnp.tanh(h @ w + u + i.astype(h.dtype) * 0.1 * b.astype(h.dtype))
    return [h, i + 1], [jnp.sum(h), i]


def loss(loop, w, h, u, b):
    (h, _), (sums, _) = loop([w], [h, jnp.int32(0)], [u, b])
    return jnp.sum(h**2) + jnp.sum(sums**2)


def plain(reverse):
    return lambda k, c, x: lax.scan(lambda c, x: step(k, c, x), c, x, reverse=reverse)


def with_states(length, num_states, reverse=False):
    return lambda k, c, x: binomial.binomial_loop(
        step, step, k, c, x, length=length, num_states=num_states, reverse=reverse
    )


def args(length):
    random = np.random.default_rng(length)
    w, h, u = (random.normal(size=s) for s in ((4, 4), (3, 4), (length, 3, 4)))
    return w, h, u, random.integers(0, 3, length).astype("int32")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "num_states"), [(1, 1), (2, 5), (7, 2), (13, 1), (13, 4)])
def test_gradients_are_those_of_the_plain_loop(length, num_states, reverse):
    with x64():
        w, h, u, b = args(length)
        grads = [
            jit(jax.value_and_grad(lambda *a, loop=loop: loss(loop, *a, b), (0, 1, 2)))(w, h, u)
            for loop in (with_states(length, num_states, reverse), plain(reverse))
        ]
        assert_close(*grads, 1e-12)


@pytest.mark.parametrize(
    ("length", "reverse"),
    [
        (1, False),
        pytest.param(9, True, marks=pytest.mark.slow),
        pytest.param(11, False, marks=pytest.mark.slow),
        (11, True),
    ],
)
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_are_those_of_the_plain_loop(outer, length, reverse):
    with x64():
        w, h, u, b = args(length)

        def gradient_of(loop):
            return jax.grad(lambda s: loss(loop, w * s[0], h * s[1], u * s[2], b))

        loops = with_states(length, 2, reverse), plain(reverse)
        assert_close(*(jit(outer(gradient_of(loop)))(jnp.ones(3)) for loop in loops), 1e-10)


def test_the_hessian_of_stacked_inputs_is_that_of_the_plain_loop():
    with x64():
        w, h, u, b = args(3)

        def hessian_of(loop):
            # The inputs are stacked inside, so that the transposed stack takes the cotangents apart along one axis.
            return jax.hessian(jax.jit(lambda s: loss(loop, w, h * s[0], jnp.stack([u[0], u[1] * s[1], u[2]]), b)))

        loops = with_states(3, 1), plain(False)
        assert_close(*(jit(hessian_of(loop))(jnp.ones(2)) for loop in loops), 1e-10)


def test_a_gradients_derivative_by_its_cotangents():
    with x64():
        w, h, u, b = args(9)

        def pulled(loop):
            _, pull = jax.vjp(lambda h: loop([w], [h, jnp.int32(0)], [u, b])[0][0], h)
            return jax.grad(lambda ct: jnp.sum(pull(ct)[0] ** 2))(jnp.ones_like(h))

        assert_close(pulled(with_states(9, 2)), pulled(plain(False)), 1e-10)


def test_the_second_derivative_holds_few_states():
    length, rows, width = 256, 256, 16

    def temp_bytes(loop):
        def fun(w, x):
            (x,), _ = loop([w], [x], [])
            return jnp.sum(x**2)

        second = jax.grad(lambda w, x: jnp.sum(jax.grad(fun)(w, x) ** 2))
        specs = [jax.ShapeDtypeStruct(s, "float32") for s in ((width, width), (rows, width))]
        compiled = jax.jit(second, compiler_options=compiler_options() or None).lower(*specs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer = lambda k, c, x: ([jnp.tanh(c[0] @ k[0])], [])  # noqa: E731
    few = temp_bytes(lambda *a: binomial.binomial_loop(layer, layer, *a, length=length, num_states=4))
    all_of_them = temp_bytes(lambda k, c, x: lax.scan(lambda c, x: layer(k, c, x), c, x, length=length))
    assert few < 0.4 * all_of_them


@pytest.mark.parametrize("num_states", [1, 2, 3, 6, 20])
@pytest.mark.parametrize("length", [1, 2, 5, 16, 30, 200])
def test_iterations_run_again_as_often_as_the_binomial_formula_says(length, num_states):
    num_states = min(num_states, length)
    table = binomial_table(length, num_states)
    # What the two loops do, played with positions for states.
    slots = {int(slot): position for position, slot in enumerate(table.first)}
    again = 0
    for position in reversed(range(length)):
        restored, start, stop = (int(x[position]) for x in (table.restored, table.start, table.stop))
        at = slots[restored]
        assert at == start
        while at < position:
            is_due = table.stops[stop] == at - start
            restored, stop = restored - is_due, stop + is_due
            slots[restored if is_due else num_states] = at
            at, again = at + 1, again + 1
    assert again == num_again(length, num_states)
    assert again + length - 1 == num_forwards(length, num_states)
    assert set(slots) <= set(range(num_states + 1))


def test_the_table_of_a_long_loop_is_small_however_often_iterations_run_again():
    started = time.process_time()
    for num_states, repeats in ((3, 180), (20, 8), (1000, 3), (10**6, 1)):
        table = binomial_table(10**6, num_states)
        assert num_repeats(10**6, num_states) == repeats
        assert len(table.stops) <= 10**6 and table.first.nbytes == 4 * 10**6
    assert time.process_time() - started < 8


def test_memory_is_the_states_and_no_more():
    length, rows, width = 32, 2048, 32
    state = rows * width * 4

    def temp_bytes(num_states):
        layer = lambda k, c, x: ([jnp.tanh(c[0] @ x[0])], [])  # noqa: E731

        def fun(ws, x):
            (x,), _ = binomial.binomial_loop(layer, layer, [], [x], [ws], length=length, num_states=num_states)
            return jnp.sum(x**2)

        specs = [jax.ShapeDtypeStruct(s, "float32") for s in ((length, width, width), (rows, width))]
        compiled = jax.jit(jax.grad(fun), compiler_options=compiler_options() or None).lower(*specs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = temp_bytes(1)
    for num_states in (2, 4, 8):
        assert temp_bytes(num_states) - one == pytest.approx((num_states - 1) * state, rel=0.1)


def test_the_program_does_not_grow_with_the_length():
    sizes = {n: count(jax.grad(lambda w, n=n: loss(with_states(n, 3), w, *args(n)[1:])), args(n)[0]) for n in (8, 80)}
    assert sizes[8] == sizes[80]


@pytest.mark.slow
def test_a_decorated_loop_with_few_states_keeps_its_transformations():
    def fun(w, xs):
        return jnp.sum(lax.scan(lambda h, x: (jnp.tanh(h @ w + x), None), xs[0] * 0, xs)[0] ** 2)

    with x64():
        random = np.random.default_rng(0)
        w, xs = random.normal(size=(8, 8)) / 4, random.normal(size=(40, 256, 8))
        budget = int(1.02 * least_budget(fun, w, xs, cost="flops"))
        plan = jaxckpt.plan(fun, w, xs, budget=budget, cost="flops").block_saves
        assert any(part.num_states for saved in plan if isinstance(saved, LoopPlan) for part in saved.parts)
        planned = jaxckpt.auto_remat(fun, budget=budget, cost="flops")
        ones = jnp.ones_like(w)
        for transformed in (
            lambda f: jit(jax.grad(f))(w, xs),
            lambda f: jax.grad(jax.checkpoint(f))(w, xs),
            lambda f: jax.jvp(lambda w: f(w, xs), (w,), (ones,)),
            lambda f: jax.jvp(lambda w: jax.grad(f)(w, xs), (w,), (ones,)),
            lambda f: jit(jax.grad(lambda w: jnp.sum(jax.grad(f)(w, xs) ** 2)))(w),
        ):
            assert_close(transformed(planned), transformed(fun), 1e-10)
