"""The framework examples train along the same curve with a plan, and the plan recomputes."""

import importlib
import warnings
from functools import partial

import jax
import pytest
from helpers import assert_close, count, jit, slow_but
from zoo.models import chain_args, chain_loss

from jaxckpt import JaxckptWarning, auto_remat
from jaxckpt.api import auto_remat as decorator

EXAMPLES = {"flax_linen": "flax", "flax_nnx": "flax", "equinox_vmap": "equinox", "haiku_pure": "haiku"}


@pytest.fixture
def plans(monkeypatch):
    """Every plan that is found from here on."""
    seen, find = [], decorator._find_plan
    monkeypatch.setattr(decorator, "_find_plan", lambda *args: seen.append(find(*args)) or seen[-1])
    return seen


@pytest.fixture
def quick_compiles():
    """The examples compile whole steps, and nobody asks how fast those run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", slow_but(EXAMPLES, "flax_linen", "flax_nnx"))
def test_training_follows_the_same_curve(name, plans):
    pytest.importorskip("sklearn")
    pytest.importorskip(EXAMPLES[name])
    train = importlib.import_module(f"examples.{name}").train
    # The frameworks promote types and ranks as they please.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore", JaxckptWarning)
        plain = train(lambda fun: fun, 3)
        planned = train(lambda fun: auto_remat(fun, budget="75%", verify=False), 3)
    assert plain[0] != plain[-1]
    assert max(abs(a - b) / abs(a) for a, b in zip(plain, planned, strict=True)) < 1e-4
    (plan,) = {id(plan): plan for plan in plans}.values()
    assert plan.schedule is not None and plan.recompute_flops > 0
    assert plan.peak_bytes <= plan.budget_bytes


def test_a_decorated_method_sees_what_its_object_holds_now():
    class Model:
        def __init__(self):
            self.scale = 1.0

        @partial(auto_remat, budget="80%", verify=False)
        def loss(self, weights, x):
            return chain_loss(weights, x) * self.scale

    model, args = Model(), chain_args(layers=6, rows=128, width=16)
    gradient = lambda: jit(lambda *args: jax.grad(model.loss)(*args))(*args)  # noqa: E731
    once = gradient()
    model.scale = 3.0
    assert_close(gradient(), jax.tree.map(lambda g: 3 * g, once), 1e-5)
    assert count(jax.grad(model.loss), *args)["checkpoint"]
