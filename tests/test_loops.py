"""`scan`: the same results as `lax.scan`, with the counts and bytes that were asked for."""

import random

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest
from ckptsolvers.revolve import num_forwards
from helpers import assert_close, jit, slow_but, x64
from jax import lax
from jax.extend.core import primitives as prims

import jaxckpt
from jaxckpt import _compat


def matmuls(jaxpr, trips=1):
    """Matmuls that run, loops times their trips."""
    found = 0
    for eqn in jaxpr.eqns:
        found += trips * (eqn.primitive is prims.dot_general_p)
        inner = trips * (eqn.params["length"] if eqn.primitive is prims.scan_p else 1)
        found += sum(matmuls(getattr(j, "jaxpr", j), inner) for j in jex.jaxprs_in_params(eqn.params))
    return found


def forwards(scan, length):
    """Steps that run forward in the value and gradient of a loop: its matmuls, less two per step that go backward."""

    def loss(state, weights):
        # The step's own backward reads the sine of the state, never the matmul's result, which is the next state.
        return jnp.sum(scan(lambda s, w: (jnp.sin(s) @ w, None), state, weights)[0])

    closed = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.ones((2, 2)), jnp.ones((length, 2, 2)))
    return matmuls(_compat.dce(closed)) - 2 * length


def binomial(num_checkpoints):
    return lambda body, init, xs: jaxckpt.scan(body, init, xs, num_checkpoints=num_checkpoints)


def steps_run(scan, length):
    """Steps that run forward in the value and gradient of a loop, counted as they run: how often is in a table."""
    seen = []

    @jax.custom_vjp
    def counted(s):
        # A custom rule keeps the count out of the turns' own forward, which the optimum does not count either.
        return jax.pure_callback(lambda s: seen.append(1) or s, jax.ShapeDtypeStruct((), s.dtype), s)

    counted.defvjp(lambda s: (s, None), lambda _, ct: (ct,))
    fun = lambda s, x: scan(lambda s, x: (counted(jnp.sin(s) + x), None), s, x)[0]  # noqa: E731
    jax.block_until_ready(jax.jit(jax.value_and_grad(fun))(jnp.float32(1), jnp.ones(length)))
    return len(seen)


def check_optimal(length, num_checkpoints):
    # One more than the optimum: the last step's result, which the loss reads.
    assert steps_run(binomial(num_checkpoints), length) == num_forwards(length, num_checkpoints) + 1


@pytest.mark.parametrize("num_checkpoints", [1, 2, 5])
def test_the_binomial_schedule_runs_the_fewest_steps(num_checkpoints):
    for length in (2, 11, 60):
        check_optimal(length, num_checkpoints)


@pytest.mark.slow
def test_the_binomial_schedule_runs_the_fewest_steps_everywhere():
    pairs = [(length, c) for length in range(2, 31) for c in range(1, 7)]
    rng = random.Random(0)
    pairs += [(rng.randint(31, 200), rng.randint(1, 20)) for _ in range(20)]
    for length, c in [*pairs, (200, 20)]:
        check_optimal(length, c)


def test_long_loops_hold_the_states_that_were_asked_for_and_compile_as_fast_as_short_ones():
    state = 4 * 64 * 256

    def compiled(length, num_checkpoints):
        body = lambda x, b: (jnp.tanh(x + b), None)  # noqa: E731
        loss = lambda x, b: jnp.sum(jaxckpt.scan(body, x, b, num_checkpoints=num_checkpoints)[0])  # noqa: E731
        specs = jax.ShapeDtypeStruct((64, 256), "float32"), jax.ShapeDtypeStruct((length,), "float32")
        lowered = jax.jit(jax.grad(loss), compiler_options=jaxckpt.compiler_options() or None).lower(*specs)
        text = lowered.as_text()
        return lowered.compile().memory_analysis().temp_size_in_bytes, text.count("\n")

    _, lines = compiled(100, 20)
    for length, c in ((100, 5), (1_000, 10), (10_000, 20), (100_000, 100)):
        temporaries, num_lines = compiled(length, c)
        assert temporaries <= (c + 12) * state + 16 * length
        assert num_lines == lines


def step(carry, x):
    """A pytree of carries, an integer among them, and ys of two shapes."""
    s, k = carry
    return (jnp.sin(s) @ x["w"] + x["b"][None], k + 1), {"norm": jnp.sum(s**2) * k, "state": s}


def loop_args(length):
    keys = jax.random.split(jax.random.key(length), 3)
    xs = {"w": jax.random.normal(keys[0], (length, 3, 3)), "b": jax.random.normal(keys[1], (length, 3))}
    return jax.random.normal(keys[2], (2, 3)), xs


def loss(scan, shift=0.5):
    def fun(state, xs):
        body = lambda carry, x: step((carry[0] * shift, carry[1]), x)  # noqa: E731
        (s, k), ys = scan(body, (state, jnp.float64(0)), xs)
        weights = jnp.arange(1.0, ys["norm"].shape[0] + 1)
        return jnp.sum(s) * k + jnp.sum(ys["norm"] * weights) + jnp.sum(jnp.cos(ys["state"]))

    return fun


SCHEDULES = {
    "default": {},
    "one state": {"num_checkpoints": 1},
    "three states": {"num_checkpoints": 3},
    "a state for every step": {"num_checkpoints": 50},
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", slow_but(SCHEDULES, "default", "one state"))
def test_a_scan_has_the_same_results_and_gradients(name, reverse):
    with x64():
        for length in (1, 2, 9):
            args = loop_args(length)
            wanted, got = (
                jit(jax.value_and_grad(loss(scan), argnums=(0, 1)))(*args)
                for scan in (
                    lambda *a: lax.scan(*a, reverse=reverse),
                    lambda *a: jaxckpt.scan(*a, reverse=reverse, **SCHEDULES[name]),
                )
            )
            assert_close(got, wanted, 1e-12)


def test_a_scan_of_nothing_and_a_scan_without_xs():
    for kwargs in SCHEDULES.values():
        carry, ys = jaxckpt.scan(lambda c, x: (c + x, c), 2.0, jnp.zeros(0), **kwargs)
        assert carry == 2.0 and ys.shape == (0,)
        carry, ys = jaxckpt.scan(lambda c, _: (2 * c, c), 1.0, length=6, **kwargs)
        assert carry == 64 and ys.tolist() == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("kwargs", slow_but([{"num_checkpoints": 3}, {}]))
def test_a_scan_under_other_transformations(kwargs):
    with x64():
        state, xs = loop_args(7)
        plain, ours = loss(lax.scan), loss(lambda *a: jaxckpt.scan(*a, **kwargs))

        def results(f):
            shifted = lambda t: loss(lax.scan if f is plain else lambda *a: jaxckpt.scan(*a, **kwargs), t)(state, xs)  # noqa: E731
            return (
                jax.jvp(f, (state, xs), (state, xs)),
                jax.hessian(f)(state, xs),
                jax.vmap(jax.grad(f), (0, None))(jnp.stack([state, 2 * state]), xs),
                jax.grad(lambda s: jax.vmap(f, (0, None))(jnp.stack([s, 2 * s]), xs).mean())(state),
                jax.grad(lambda s: jnp.sum(jax.grad(f)(s, xs) ** 2))(state),
                jax.grad(shifted)(0.3),  # closed over, a tracer
            )

        assert_close(jit(lambda: results(ours))(), jit(lambda: results(plain))(), 1e-10)


def test_keys_and_integers_pass_through_a_scan():
    def noisy(x, key):
        return x + jax.random.normal(key, x.shape) * jnp.sin(x), jax.random.bits(key)

    keys = jax.random.split(jax.random.key(0), 11)
    loss = lambda scan: lambda x: scan(noisy, x, keys)[0].sum()  # noqa: E731
    wanted, *got = (jit(jax.value_and_grad(loss(scan)))(jnp.ones(3)) for scan in (lax.scan, binomial(3), jaxckpt.scan))
    for each in got:
        assert_close(each, wanted, 1e-6)


def test_the_jaxpr_of_uniform_nesting_does_not_grow_with_the_length():
    def lines(length):
        fun = jax.value_and_grad(lambda s, w: jaxckpt.scan(lambda s, w: (jnp.sin(s) @ w, None), s, w)[0].sum())
        return len(str(jax.make_jaxpr(fun)(jnp.ones((2, 2)), jnp.ones((length, 2, 2)))).splitlines())

    assert lines(90_000) == lines(100)


def test_the_default_runs_most_steps_twice():
    assert forwards(lax.scan, 12) == 12
    # Chunks of three; what is left over runs last and is not made again.
    assert forwards(jaxckpt.scan, 12) == 12 + 12
    assert forwards(jaxckpt.scan, 14) == 14 + 12


def test_a_budget_is_kept_by_the_compiled_loop():
    weights, x = jnp.ones((48, 8, 8)) / 8, jnp.ones((2048, 8))
    body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    loop = lambda scan: lambda weights, x: scan(body, x, weights)[0]  # noqa: E731
    planned = loop(lambda *a: jaxckpt.scan(*a, budget="30%"))

    def device_bytes(fun):
        value_and_gradients = lambda weights, x: (fun(weights, x), jax.vjp(fun, weights, x)[1](x))  # noqa: E731
        stats = jit(value_and_gradients).lower(weights, x).compile().memory_analysis()
        return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes

    assert device_bytes(planned) <= 0.32 * device_bytes(loop(lax.scan))
    gradient = lambda f: jit(jax.grad(lambda w: f(w, x).sum()))(weights)  # noqa: E731
    assert_close(gradient(planned), gradient(loop(lax.scan)), 1e-4)
    # A budget that everything fits into changes nothing.
    free = loop(lambda *a: jaxckpt.scan(*a, budget="100%"))
    assert "checkpoint" not in str(jax.make_jaxpr(free)(weights, x))


def test_an_impossible_budget_says_what_is_possible():
    body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    loss = lambda x: jaxckpt.scan(body, x, jnp.ones((12, 8, 8)), budget="1KB")[0].sum()  # noqa: E731
    with pytest.raises(jaxckpt.InfeasibleBudgetError, match="no plan fits") as caught:
        jax.grad(loss)(jnp.ones((256, 8)))
    error = caught.value
    assert 1000 < error.expected_least_bytes < error.unplanned_peak_bytes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"budget": "1MB", "num_checkpoints": 2}, "not both"),
        ({"num_checkpoints": 0}, "at least 1"),
        ({"num_checkpoints": 2.5}, "write an int"),
        ({"num_checkpoints": True}, "write an int"),
        ({"num_checkpoints": 1, "length": 300}, r"run a step 299 times; give at least num_checkpoints=2"),
    ],
)
def test_options_of_a_scan_that_make_no_sense(kwargs, message):
    with pytest.raises(jaxckpt.OptionError, match=message):
        jaxckpt.scan(lambda c, _: (jnp.sin(c), None), 1.0, **{"length": 4, **kwargs})


def test_what_lax_scan_refuses_is_refused_in_its_words():
    for f in (lax.scan, jaxckpt.scan):
        with pytest.raises(TypeError, match="carry"):
            f(lambda c, _: (jnp.zeros(3), None), jnp.zeros(2), length=4)
