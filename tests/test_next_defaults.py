"""JAX's next defaults, alone and together: the same plans, bytes and gradients, as far as JAX itself has them."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src import config

import jaxckpt
from jaxckpt import _compat

FLAGS = ("scan3", "remat3", "custom_vjp3", "custom_jvp3", "remat_barrier_no_cotangents")
ALONE = [(name,) for name in FLAGS]
TOGETHER = [tuple(name for name in FLAGS if name != "scan3"), FLAGS]


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_jvp
def _square(x):
    return x * x


_square.defjvp(lambda primals, tangents: (_square(*primals), 2 * primals[0] * tangents[0]))


def _chain(w, x):
    for a in w:
        x = jnp.tanh(x @ a)
    return jnp.sum(x**2)


def _scan(w, x):
    return jnp.sum(lax.scan(lambda x, a: (jnp.tanh(x @ a), None), x, w)[0] ** 2)


def _rules(w, x):
    for a in w:
        x = _sine(x @ a) + jax.nn.relu(x) + _square(x) * 0.1
    return jnp.sum(x**2)


def _branches(w, x):
    for a in w:
        x = lax.cond(x[0, 0] > 0, lambda x, a: jnp.tanh(x @ a), lambda x, a: jnp.sin(x @ a), x, a)
    return jnp.sum(x**2)


def _checkpoints(w, x):
    layer = jax.checkpoint(lambda x, a: jnp.tanh(jnp.tanh(x @ a) @ a))
    for a in w:
        x = layer(x, a)
    return jnp.sum(x**2)


PROGRAMS = {"chain": _chain, "scan": _scan, "rules": _rules, "branches": _branches, "checkpoints": _checkpoints}


def _flags(names):
    """All of these flags on; a test is skipped where this JAX lacks one."""
    if missing := [name for name in names if not hasattr(config, name)]:
        pytest.skip(f"jax {jax.__version__} has no {', '.join(missing)}")
    stack = contextlib.ExitStack()
    for name in names:
        stack.enter_context(getattr(config, name)(True))
    return stack


def _made(name):
    """A plan's schedule and bytes, and what the planned function gives."""

    def fun(w, x):  # no cache knows it
        return PROGRAMS[name](w, x)

    args = jnp.stack([jnp.eye(16) * 0.9 + 0.01 * i for i in range(6)]), jnp.full((2048, 16), 0.1)
    plan = jaxckpt.plan(fun, *args, budget="65%", calibration=None)
    step = jax.jit(jax.value_and_grad(plan.apply(fun)), compiler_options=jaxckpt.compiler_options() or None)
    return json.dumps(plan.to_json()["schedule"]), plan.measured_peak_bytes, step(*args)


def _differentiates(name):
    """Whether JAX itself has a gradient of a program under the flags that are set."""
    try:
        jax.eval_shape(jax.grad(lambda *args: PROGRAMS[name](*args)), jnp.ones((6, 16, 16)), jnp.ones((2, 16)))
    except NotImplementedError:
        return False
    return True


def _undoes_checkpoints(names):
    """Whether JAX's own checkpoints, which the function has, save nothing under these flags."""
    return "remat3" in names and (_compat.CPU_UNDOES_REMAT or "remat_barrier_no_cotangents" in names)


@pytest.mark.parametrize("names", ALONE + TOGETHER, ids="+".join)
@pytest.mark.parametrize(
    "program",
    [*("chain", "scan"), *(pytest.param(x, marks=pytest.mark.slow) for x in ("rules", "branches", "checkpoints"))],
)
def test_plans_bytes_and_gradients_are_the_same(names, program):
    with _flags(names):
        if not _differentiates(program):
            with pytest.raises(NotImplementedError, match="Scan3"):
                _made(program)
            return
        schedule, size, results = _made(program)
    wanted_schedule, wanted_size, wanted = _made(program)
    assert schedule == wanted_schedule
    if program != "checkpoints" or not _undoes_checkpoints(names):
        assert abs(size / wanted_size - 1) <= 0.01
    for one, other in zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
