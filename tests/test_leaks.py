"""Planning again and again takes no more memory: functions and plans of the past are forgotten."""

import gc
import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxckpt

CYCLES = """
import gc, os
import jax, jax.numpy as jnp, numpy as np
import jaxckpt

def cycle(i, verify):
    # A new function each time, and new shapes every second time.
    def loss(w, x):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)
    rows = 64 + 8 * (i // 2)
    # Of NumPy, and the gradient under jit: JAX keeps what it compiles of single operations for each new shape.
    w, x = np.eye(8, dtype=np.float32), np.ones((rows, 8), np.float32)
    plan = jaxckpt.plan(loss, w, x, budget="90%", verify=verify, calibration=None, on_infeasible="least")
    jax.jit(jax.grad(plan.apply(loss)))(w, x).block_until_ready()

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
"""
RUN = """
import warnings; warnings.simplefilter("ignore")
for i in range({warm}): cycle(i, {verify})
before = resident()
for i in range({warm}, {warm} + {num}): cycle(i, {verify})
print(before, resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("verify", [False, True])
def test_memory_stays_as_it_is(verify):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    code = CYCLES + RUN.format(warm=50, num=500, verify=verify)
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert after <= 1.05 * before, (before, after)


def chain(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def chain_step(params, x):
    return [w - 0.1 * g for w, g in zip(params, jax.grad(chain)(params, x), strict=True)]


def named(params, x):
    @jax.checkpoint
    def layer(x, w):
        return x + jnp.tanh(checkpoint_name(x @ w, "h")) @ w

    for w in params:
        x = layer(x, w)
    return jnp.sum(x**2)


def named_step(params, x):
    return jax.value_and_grad(named)(params, x)


def jitted(params, x):
    step = jaxckpt.jit(chain_step, budget="1GB")
    step(params, x)
    return step


VERBS = {
    "plan": lambda params, x: jaxckpt.plan(chain, params, x, budget="1GB"),
    "fit": lambda params, x: jaxckpt.fit(chain_step, params, x, budget="1GB"),
    "fit-static": lambda params, x: jaxckpt.fit(
        lambda params, x, n: chain_step(params, x), params, x, 3, budget="1GB", static_argnums=2
    ),
    "fit-key": lambda params, x: jaxckpt.fit(
        lambda params, x, key: chain_step(params, x + jax.random.normal(key, x.shape)),
        params,
        x,
        jax.random.key(0),
        budget="1GB",
    ),
    "fit-host": lambda params, x: jaxckpt.fit(chain_step, params, x, budget="1GB", host_budget="1MB"),
    "jit": jitted,
    "names": lambda params, x: jaxckpt.names(named, params, x, budget="1GB"),
    "names-step": lambda params, x: jaxckpt.names(named_step, params, x, budget="1GB"),
}


def released():
    """What nobody holds is gone: NumPy arrays that XLA read in place are let go when JAX is called the next time."""
    gc.collect()
    jax.block_until_ready(jnp.asarray(np.zeros(3)) + 1)
    gc.collect()


@pytest.mark.parametrize("make", [np.ones, jnp.ones])
@pytest.mark.parametrize("verb", VERBS)
def test_arrays_that_a_verb_is_given_die_with_their_owner(verb, make, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params, x = [make((8, 8), np.float32) for _ in range(3)], make((16, 8), np.float32)
    alive = [weakref.ref(leaf) for leaf in (*params, x)]
    found = VERBS[verb](params, x)
    del params, x
    released()
    assert found is not None and not [ref for ref in alive if ref() is not None]


def test_state_of_objects_that_a_step_is_fitted_with_dies_too():
    nnx = pytest.importorskip("flax.nnx")

    def step(model, x):
        grads = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads))

    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    first = weakref.ref(model.kernel[...])
    fitted = jaxckpt.fit(step, model, jnp.ones((4, 8)), budget="1GB")
    fitted.step(model, jnp.ones((4, 8)))
    released()
    assert first() is None
