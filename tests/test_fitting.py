"""Whole steps: what `fit` chooses is measured on the step, and the step computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count

import jaxckpt

X = jax.ShapeDtypeStruct((2048, 64), jnp.float32)
WS = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 12


def chain(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def make_step(*losses):
    """A momentum step over the sum of the losses."""

    def step(ws, momentum, x):
        def total(ws):
            return sum(loss(ws, x * (i + 1.0)) for i, loss in enumerate(losses))

        value, grads = jax.value_and_grad(total)(ws)
        momentum = [0.9 * m + g for m, g in zip(momentum, grads, strict=True)]
        return [w - 0.1 * m for w, m in zip(ws, momentum, strict=True)], momentum, value

    return step


def arrays():
    keys = jax.random.split(jax.random.key(0), 13)
    ws = [jax.random.normal(k, (64, 64)) / 8 for k in keys[:12]]
    return ws, [jnp.zeros_like(w) for w in ws], jax.random.normal(keys[12], (2048, 64))


@pytest.mark.parametrize("share", ["75%", "50%"])
def test_the_step_is_measured_within_its_budget(share):
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget=share)
    budget = int(share[:-1]) * fitted.unplanned.device_bytes // 100
    assert fitted.measurement.device_bytes <= budget
    assert fitted.plans[0].schedule is not None
    assert fitted.plans[0].recompute_flops > 0


def test_the_fitted_step_computes_what_the_step_does():
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget="60%")
    for ours, theirs in zip(
        jax.tree.leaves(fitted.step(*arrays())), jax.tree.leaves(jax.jit(make_step(chain))(*arrays())), strict=True
    ):
        # Float32 with sums of 2048 terms in another order.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    planned, plain = count(fitted.step.__wrapped__, WS, WS, X), count(make_step(chain), WS, WS, X)
    assert planned["tanh"] > plain["tanh"]


def test_donated_arguments_give_their_buffers_back():
    step = make_step(jaxckpt.auto_remat(chain))
    kept = jaxckpt.fit(step, WS, WS, X, budget="100%")
    donated = jaxckpt.fit(step, WS, WS, X, budget="100%", donate_argnums=(0, 1))
    assert donated.measurement.alias_bytes > kept.measurement.alias_bytes
    assert donated.measurement.device_bytes < kept.measurement.device_bytes


def test_a_step_that_fits_is_left_alone():
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget="100%")
    assert [plan.schedule for plan in fitted.plans] == [None]
    assert fitted.num_compiles == 1
    assert count(fitted.step.__wrapped__, WS, WS, X)["checkpoint"] == 0


def test_several_functions_and_an_inner_jit_are_planned_together():
    other = jax.jit(jaxckpt.auto_remat(lambda ws, x: chain(ws[:6], x)))
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain), other), WS, WS, X, budget="70%")
    assert len(fitted.plans) == 2
    assert fitted.measurement.device_bytes <= 0.7 * fitted.unplanned.device_bytes


def test_a_step_without_a_decorated_function_is_refused():
    with pytest.raises(jaxckpt.OptionError, match="decorate the loss"):
        jaxckpt.fit(make_step(chain), WS, WS, X, budget="60%")


def test_a_budget_below_the_state_says_what_no_plan_changes():
    with pytest.raises(jaxckpt.InfeasibleBudgetError, match="which no plan changes") as caught:
        jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget=1000)
    assert 1000 < caught.value.least_peak_bytes <= caught.value.unplanned_peak_bytes
