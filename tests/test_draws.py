"""On CPU random numbers wait for what is computed before them; they are the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close as assert_near
from zoo import models

import jaxckpt
from jaxckpt import _compat
from jaxckpt.program.draws import read_by_draws, waiting_keys
from jaxckpt.program.trace import trace

assert_close = functools.partial(assert_near, tolerance=1e-5)
LAYERS, ROWS = 6, 512
OPTIONS = jaxckpt.compiler_options() or None


def dropped(params, x, key, *, draw=None):
    draw = draw or (lambda key, i, shape: jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, shape))
    for i, w in enumerate(params):
        x = jnp.where(draw(key, i, x.shape), jnp.tanh(x @ w), 0) / 0.8
    return jnp.sum(x**2)


def arguments(key=None):
    params, batch, _ = models.dropout_args(layers=LAYERS, rows=ROWS, width=32)
    return params, batch["x"], jax.random.key(3) if key is None else key


def least_plan(fun, *args):
    return jaxckpt.plan(fun, *args, budget="30%", verify=False, calibration=None, on_infeasible="least")


def device_bytes(fun, *args):
    stats = jax.jit(jax.value_and_grad(fun), compiler_options=OPTIONS).lower(*args).compile().memory_analysis()
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


def test_a_plan_does_not_hold_the_random_numbers_of_all_layers():
    args = arguments()
    plan = least_plan(dropped, *args)
    assert plan.draws_wait
    words = LAYERS * 2 * 4 * args[1].size
    assert device_bytes(plan.apply(dropped), *args) < words < device_bytes(dropped, *args)


# Whatever recomputes the first block draws its numbers anew, and these depend on arguments alone: XLA for CPU makes
# those of all five regions before anything else.
NESTED = pytest.mark.xfail(strict=True, reason="the model does not count the numbers that nested regions draw early")


@pytest.mark.parametrize("budget", [pytest.param("40%", marks=NESTED), "60%", "80%"])
def test_what_is_held_of_random_numbers_is_predicted(budget):
    args = arguments()
    plan = jaxckpt.plan(dropped, *args, budget=budget, verify=False, calibration=None)
    # jaxlib before 0.12 holds one array of words more.
    near = 0.12 if _compat.CPU_UNDOES_REMAT else 0.1
    assert plan.unplanned_peak_bytes == pytest.approx(device_bytes(dropped, *args), rel=near)
    assert plan.predicted_peak_bytes == pytest.approx(device_bytes(plan.apply(dropped), *args), rel=near)


def own_masks(key, i, shape):
    return jax.random.uniform(jax.random.split(key, LAYERS)[i], shape) < 0.8


def gamma(key, i, shape):
    return jax.random.gamma(jax.random.fold_in(key, i), 2.0, shape) < 3.0


KEYS = {
    "typed": lambda: jax.random.key(3),
    "raw": lambda: jax.random.PRNGKey(3),
    "rbg": lambda: jax.random.key(3, impl="rbg"),
}


@pytest.mark.parametrize(
    ("key", "draw"),
    [("typed", None), ("raw", own_masks), ("rbg", None), pytest.param("typed", gamma, marks=pytest.mark.slow)],
    ids=["typed", "raw", "rbg", "gamma"],
)
def test_the_numbers_are_the_same(key, draw):
    params, x, key = arguments(KEYS[key]())
    params, x = params[:2], x[:8]
    fun = functools.partial(dropped, draw=draw)
    plan = least_plan(fun, params, x, key)
    planned = jax.jit(jax.value_and_grad(plan.apply(fun)))(params, x, key)
    assert_close(planned, jax.jit(jax.value_and_grad(fun))(params, x, key))
    tangents = [
        jax.jit(lambda x, f=f: jax.jvp(lambda x: f(params, x, key), (x,), (x,)))(x) for f in (plan.apply(fun), fun)
    ]
    assert_close(*tangents)


def test_without_jit_the_numbers_are_the_same():
    params, x, key = arguments()
    params, x = params[:2], x[:8]
    plan = least_plan(dropped, params, x, key)
    assert_close(jax.grad(plan.apply(dropped))(params, x, key), jax.grad(dropped)(params, x, key))


@pytest.mark.parametrize("key", ["typed", "rbg"])
def test_examples_of_one_key_draw_the_same_numbers(key):
    params, x, key = arguments(KEYS[key]())
    params, x = params[:3], x[:32]
    plan = least_plan(dropped, params, x, key)
    examples = jnp.stack([x, 2 * x, -x])
    batched = jax.jit(jax.vmap(jax.value_and_grad(plan.apply(dropped)), (None, 0, None)))
    assert_close(
        batched(params, examples, key),
        jax.jit(jax.vmap(jax.value_and_grad(dropped), (None, 0, None)))(params, examples, key),
    )
    # One key draws once, however many examples there are.
    drawn = {eqn.outvars[0].aval.shape for eqn in draws(jax.make_jaxpr(batched)(params, examples, key).jaxpr)}
    assert drawn == {x.shape}


def test_each_example_may_have_a_key_of_its_own():
    params, x, key = arguments()
    params, x = params[:3], x[:32]
    plan = least_plan(dropped, params, x, key)
    keys, examples = jax.random.split(key, 3), jnp.stack([x, 2 * x, -x])
    for axes, given in ((0, examples), (None, x)):
        found = jax.jit(jax.vmap(plan.apply(dropped), (None, axes, 0)))(params, given, keys)
        assert_close(found, jax.jit(jax.vmap(dropped, (None, axes, 0)))(params, given, keys))


def draws(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("random_bits", "rng_bit_generator"):
            yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from draws(inner)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 0.0, 3e38])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_key_that_waits_is_the_same_key(value, dtype):
    key, before = jax.random.key(5), jnp.full((2, 3), value, dtype)
    env = {0: key, 1: before}
    (waiting,) = jax.jit(lambda env: waiting_keys(env, {0}, [0, 1], [1]))(env).values()
    assert jax.random.key_data(waiting).tolist() == jax.random.key_data(key).tolist()
    assert not waiting_keys({0: key, 1: jnp.ones(3, jnp.int32)}, {0}, [0, 1], [1])
    assert not waiting_keys(env, {0}, [0, 1], [])


def test_what_draws_depend_on_is_found():
    spec = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    fun = lambda x, key: x @ x + jax.random.normal(jax.random.fold_in(key, 1), x.shape)  # noqa: E731
    program = trace(fun, (spec, jax.eval_shape(jax.random.key, 0))).program
    x, key = program.inputs
    assert key in read_by_draws(program.equations) and x not in read_by_draws(program.equations)


def test_other_compilers_need_no_waiting():
    plan = jaxckpt.plan(
        dropped, *arguments(), budget="30%", target="h100", verify=False, calibration=None, on_infeasible="least"
    )
    assert not plan.draws_wait
