"""Effects inside a planned function: they happen once, in order, and the plan goes around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ckptsolvers.schedule import Recompute
from helpers import assert_close, count, jit
from jax.experimental import io_callback

import jaxckpt

LAYERS, ROWS, WIDTH = 6, 2048, 32
BUDGET = "80%"


def args():
    random = np.random.default_rng(0)
    return (random.normal(size=(LAYERS, WIDTH, WIDTH)) / 5).astype("float32"), np.ones((ROWS, WIDTH), "float32")


def make_loss(seen, kind):
    """`tanh` layers, two of which say what they made."""

    def say(i, x):
        if kind == "io_callback":
            io_callback(lambda v: seen.append((i, float(v))), None, jax.lax.stop_gradient(x), ordered=True)
        else:
            jax.debug.callback(lambda v: seen.append((i, float(v))), x, ordered=kind == "ordered")

    def loss(weights, x):
        for i, w in enumerate(weights):
            x = jnp.tanh(x @ w)
            if i in (2, 4):
                say(i, jnp.mean(x))
        return jnp.sum(x**2)

    return loss


@pytest.mark.parametrize("is_jitted", [False, True])
@pytest.mark.parametrize("kind", ["debug", "ordered", "io_callback"])
def test_effects_happen_once_and_gradients_are_the_same(kind, is_jitted):
    seen: list[tuple[int, float]] = []
    loss = make_loss(seen, kind)
    planned = jaxckpt.auto_remat(loss, budget=BUDGET, cost="flops")
    found = []
    for fun in (loss, planned):
        gradient = jax.value_and_grad(fun)
        result = (jit(gradient) if is_jitted else gradient)(*args())
        jax.effects_barrier()
        found.append((result, sorted(seen) if kind == "debug" else list(seen)))
        seen.clear()
    (wanted, said), (got, said_again) = found
    assert [i for i, _ in said] == [i for i, _ in said_again] == [2, 4]
    assert [v for _, v in said] == pytest.approx([v for _, v in said_again])
    assert_close(got, wanted, 1e-5)


def test_no_region_holds_an_effect_and_there_are_regions():
    loss = make_loss([], "debug")
    plan = jaxckpt.plan(loss, *args(), budget=BUDGET, cost="flops")
    regions = [node for node, _ in plan.schedule.walk() if isinstance(node, Recompute)]
    assert regions
    effects = [k for k, label in enumerate(plan.block_labels) if "callback" in label]
    assert len(effects) == 2
    assert not any(node.start <= k < node.stop for node in regions for k in effects)
    gradient = jax.grad(plan.apply(loss))
    assert count(gradient, *args())["tanh"] > LAYERS


def test_without_a_derivative_effects_happen_once():
    seen: list[tuple[int, float]] = []
    planned = jaxckpt.auto_remat(make_loss(seen, "ordered"), budget=BUDGET)
    planned(*args())
    jax.effects_barrier()
    assert [i for i, _ in seen] == [2, 4]


def in_a_scan(say, x, w):
    def step(c, _):
        c = jnp.tanh(c @ w)
        say(c)
        return c, None

    return jax.lax.scan(step, x, length=5)[0]


def in_a_branch(say, x, w):
    return jax.lax.cond(jnp.sum(x) > -1e9, lambda x: in_a_scan(say, x, w), lambda x: x, x)


@pytest.mark.parametrize("kind", ["debug", "ordered"])
@pytest.mark.parametrize("where", [in_a_scan, in_a_branch])
def test_effects_in_differentiated_loops_and_branches_happen_once(where, kind):
    seen: list[float] = []

    def say(x):
        jax.debug.callback(lambda v: seen.append(float(v)), jnp.sum(x), ordered=kind == "ordered")

    def loss(weights, x):
        for i, w in enumerate(weights):
            x = jnp.tanh(x @ w)
            if i == 2:
                x = where(say, x, w)
        return jnp.sum(x**2)

    planned = jaxckpt.auto_remat(loss, budget="92%", cost="flops")
    wanted = jit(jax.value_and_grad(loss))(*args())
    jax.effects_barrier()
    said = sorted(seen)
    seen.clear()
    got = jit(jax.value_and_grad(planned))(*args())
    jax.effects_barrier()
    assert len(said) == 5 and sorted(seen) == pytest.approx(said)
    assert_close(got, wanted, 1e-5)
    assert count(jax.grad(planned), *args())["checkpoint"] > 1
