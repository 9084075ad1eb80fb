"""What is measured is what runs: the user's own compile of the planned function takes the bytes that the plan says."""

import jax
import jax.numpy as jnp
import pytest
from helpers import slow_but
from zoo.catalogue import CATALOGUE, DEEP
from zoo.models import MODELS

import jaxckpt

ALL = CATALOGUE | DEEP
TINY = [name for name in ALL if ALL[name].size == "base" and name != "llama-scan"]


def own_bytes(fun, args, argnums=0, has_aux=False):
    """Device bytes of value and gradient, as a user compiles them."""
    step = jax.jit(jax.value_and_grad(fun, argnums, has_aux), compiler_options=jaxckpt.compiler_options())
    stats = step.lower(*args).compile().memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + results + stats.temp_size_in_bytes


def check(fun, args, argnums=0, has_aux=False, budgets=("100%", "70%"), **options):
    for budget in budgets:
        try:
            plan = jaxckpt.plan(fun, *args, budget=budget, argnums=argnums, has_aux=has_aux, cost="flops", **options)
        except jaxckpt.InfeasibleBudgetError as error:
            plan = jaxckpt.plan(
                fun, *args, budget=error.expected_least_bytes, argnums=argnums, has_aux=has_aux, cost="flops", **options
            )
        assert plan.measured_peak_bytes == own_bytes(plan.apply(fun), args, argnums, has_aux)


@pytest.mark.parametrize("name", slow_but(MODELS, "chain", "conv", "residual"))
def test_of_small_models(name):
    model = MODELS[name]
    check(model.fun, model.specs(), has_aux=model.has_aux)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_of_the_zoo(name):
    pytest.importorskip("equinox" if name == "ode" else "flax")
    case = ALL[name].case("tiny")
    with jax.numpy_rank_promotion("allow"):
        check(case.fun, case.specs)


def layers(w, b, x):
    for i in range(6):
        x = jnp.tanh(x @ w[i] + b[None, i])
    return jnp.mean(x**2)


SPECS = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((6, 64, 64), (6, 64), (512, 64))]


@pytest.mark.parametrize("argnums", slow_but([(1, 0), (2, 0), (0, 1, 2), 2, -1], (2, 0), -1))
def test_under_any_order_of_the_gradients(argnums):
    check(layers, SPECS, argnums=argnums)


def test_with_an_auxiliary_result():
    check(lambda w, b, x: (layers(w, b, x), {"x": x * 2, "n": jnp.sum(w)}), SPECS, has_aux=True)


def test_of_the_users_own_checkpoints():
    def loss(w, b, x):
        for i in range(6):
            x = jax.checkpoint(lambda w, b, x: jnp.tanh(x @ w + b[None]))(w[i], b[i], x)
        return jnp.mean(x**2)

    for keep in (True, False):
        plan = jaxckpt.plan(loss, *SPECS, budget="100%", keep_checkpoints=keep)
        assert plan.measured_peak_bytes == own_bytes(plan.apply(loss), SPECS), keep


def test_with_arguments_that_nothing_reads():
    check(lambda w, b, x: layers(w, jnp.zeros((6, 64)), x), SPECS)


def test_of_inner_jits():
    layer = jax.jit(lambda w, b, x: jnp.tanh(x @ w + b[None]))

    def loss(w, b, x):
        for i in range(6):
            x = layer(w[i], b[i], x)
        return jnp.mean(x**2)

    check(loss, SPECS)


def test_of_arrays_that_are_closed_over(monkeypatch):
    data = jnp.sin(jnp.arange(512 * 64.0)).reshape(512, 64)
    check(lambda w, b: layers(w, b, data), SPECS[:2])
    own = own_bytes(lambda w, b: layers(w, b, data), SPECS[:2])
    assert jaxckpt.measure(lambda w, b: layers(w, b, data), *SPECS[:2]).device_bytes == own
    # Too large to be compiled into the program each time, it is an argument and taken off.
    monkeypatch.setattr("jaxckpt.compilation.measure._MOST_CONSTANT_BYTES", 0)
    assert jaxckpt.measure(lambda w, b: layers(w, b, data), *SPECS[:2]).device_bytes == own
