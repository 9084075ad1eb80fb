"""Chips that are not here: names, missing compilers, and, where they are installed, their word."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import compilers, targets

X = jax.ShapeDtypeStruct((8192, 1024), jnp.float32)
WS = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 12
INSTALLED = {
    "v5e": importlib.util.find_spec("libtpu"),
    "h100": importlib.util.find_spec("jax_plugins.xla_cuda12") or importlib.util.find_spec("jax_plugins.xla_cuda13")
    if importlib.util.find_spec("jax_plugins")
    else None,
}


def chain(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def test_an_unknown_chip_offers_the_nearest_names():
    with pytest.raises(jaxckpt.TargetError, match="'h100'"):
        targets.find("h10")


@pytest.mark.parametrize("chip", sorted(INSTALLED))
def test_a_missing_compiler_names_what_installs_it(chip):
    if INSTALLED[chip]:
        pytest.skip("its compiler is installed")
    with pytest.raises(jaxckpt.TargetError, match="pip install"):
        jaxckpt.measure(chain, WS, X, target=chip)


def test_a_refusal_says_how_much_was_needed():
    text = "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (26.06G) exceeds available HBM (15.75G)"
    assert compilers.refused_bytes(RuntimeError(text)) == int(26.06 * 2**30)
    assert compilers.refused_bytes(RuntimeError("INTERNAL: something else (26.06G)")) is None


@pytest.mark.targets
@pytest.mark.parametrize("chip", sorted(INSTALLED))
def test_a_plan_for_a_chip_that_is_not_here_fits_by_its_own_compiler(chip):
    if not INSTALLED[chip]:
        pytest.skip("its compiler is not installed")
    plan = jaxckpt.plan(chain, WS, X, budget="60%", target=chip)
    assert plan.target == chip
    assert plan.measured_peak_bytes is not None
    assert plan.measured_peak_bytes <= 0.6 * plan.unplanned_peak_bytes
    assert plan.recompute_flops > 0
