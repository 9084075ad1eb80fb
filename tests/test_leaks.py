"""Planning again and again takes no more memory: functions and plans of the past are forgotten."""

import os
import subprocess
import sys

import pytest

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
