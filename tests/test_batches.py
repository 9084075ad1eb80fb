"""The largest batch: measured to fit, and the next one measured not to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt

WIDTH = 32
WS = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * 12


@jaxckpt.auto_remat
def loss(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def step(ws, momentum, x):
    grads = jax.grad(loss)(ws, x)
    momentum = [0.9 * m + g for m, g in zip(momentum, grads, strict=True)]
    return [w - 0.1 * m for w, m in zip(ws, momentum, strict=True)], momentum


def make_args(batch):
    return WS, WS, jax.ShapeDtypeStruct((16 * batch, WIDTH), jnp.float32)


@pytest.fixture(scope="module")
def found():
    return jaxckpt.largest_batch(step, make_args, budget="500KB", donate_argnums=(0, 1))


def test_it_fits_and_the_next_one_does_not(found):
    assert found.batch > 1 and found.measurement.device_bytes <= 500_000
    with pytest.raises(jaxckpt.InfeasibleBudgetError):
        jaxckpt.fit(step, *make_args(found.batch + 1), budget="500KB", donate_argnums=(0, 1))


def test_it_is_larger_than_what_fits_without_plans(found):
    def fits(batch):
        plain = jaxckpt.fit(step, *make_args(batch), budget="100%", donate_argnums=(0, 1))
        return plain.measurement.device_bytes <= 500_000

    assert fits(1) and not fits(found.batch // 2)


def test_it_takes_few_compiles(found):
    assert found.num_compiles <= 9


def test_the_step_that_is_returned_runs_at_that_batch(found):
    args = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), make_args(found.batch))
    ws, momentum = jax.jit(step)(*args)
    got = found.step(*args)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves((ws, momentum)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_budget_below_a_batch_of_one_is_refused():
    with pytest.raises(jaxckpt.InfeasibleBudgetError, match="a batch of 1") as caught:
        jaxckpt.largest_batch(step, make_args, budget="100KB")
    assert caught.value.least_peak_bytes > 100_000


def test_a_share_is_refused():
    with pytest.raises(jaxckpt.BudgetError, match="give bytes"):
        jaxckpt.largest_batch(step, make_args, budget="50%")


def test_arguments_that_do_not_grow_are_refused():
    with pytest.raises(jaxckpt.OptionError, match="make_args"):
        jaxckpt.largest_batch(step, lambda batch: make_args(4), budget="500KB")


def test_a_step_that_differentiates_nothing_is_refused():
    with pytest.raises(jaxckpt.OptionError, match="differentiates nothing"):
        jaxckpt.largest_batch(
            lambda ws, x: x * 2, lambda b: (WS, jax.ShapeDtypeStruct((b, 1), "float32")), budget="1MB"
        )
