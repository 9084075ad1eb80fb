"""`while_loop`: the results of `lax.while_loop`, the gradients of the same loop unrolled."""

import functools

import jax
import jax.numpy as jnp
import pytest
from ckptsolvers.online import num_online_forwards
from ckptsolvers.revolve import num_forwards
from helpers import assert_close, jit, slow_but, x64
from jax import lax

import jaxckpt

COUNTS = (1, 2, 3, 5, 40)


def body(state, w):
    """A step of a pytree of states, an integer among them."""
    return {"x": jnp.sin(state["x"] @ w) + state["x"] * 0.5, "i": state["i"] + 1}


def unrolled(w, x, num_steps):
    state = {"x": x, "i": jnp.int32(0)}
    for _ in range(num_steps):
        state = body(state, w)
    return state


def looped(w, x, num_steps, **options):
    options = {"max_steps": 40, **options}
    first = {"x": x, "i": jnp.int32(0)}
    return jaxckpt.while_loop(lambda s: s["i"] < num_steps, lambda s: body(s, w), first, **options)


def args():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (3, 3)), jax.random.normal(keys[1], (2, 3))


def loss(loop):
    def fun(w, x, num_steps):
        state = loop(w, x, num_steps)
        return jnp.sum(state["x"] ** 2) * state["i"].astype(x.dtype)

    return fun


@pytest.mark.parametrize("num_checkpoints", COUNTS)
def test_gradients_are_those_of_the_unrolled_loop(num_checkpoints):
    with x64():
        w, x = args()
        # The number of steps is known when it runs, not when it is compiled.
        ours = jit(jax.value_and_grad(loss(functools.partial(looped, num_checkpoints=num_checkpoints)), argnums=(0, 1)))
        for num_steps in (0, 1, 2, 7, 23):
            wanted = jit(jax.value_and_grad(loss(unrolled), argnums=(0, 1)), static_argnums=2)(w, x, num_steps)
            assert_close(ours(w, x, num_steps), wanted, 1e-12)


def test_the_bound_ends_the_loop():
    with x64():
        w, x = args()
        cut = functools.partial(looped, max_steps=9, num_checkpoints=3)
        got = jit(jax.value_and_grad(loss(cut)))(w, x, 30)
        assert_close(got, jit(jax.value_and_grad(loss(unrolled)), static_argnums=2)(w, x, 9), 1e-12)
        assert cut(w, x, 30)["i"] == 9


@pytest.mark.slow
def test_forward_over_reverse_and_vmap():
    with x64():
        w, x = args()
        ours, wanted = loss(functools.partial(looped, num_checkpoints=3)), loss(unrolled)
        assert_close(jit(jax.hessian(ours))(w, x, 7), jit(jax.hessian(wanted), static_argnums=2)(w, x, 7), 1e-10)
        # Each example ends when it is done.
        xs, lengths = jnp.stack([x, 2 * x, -x]), jnp.array([7, 0, 12], jnp.int32)
        got = jit(lambda: jax.vmap(jax.grad(ours, argnums=1), (None, 0, 0))(w, xs, lengths))()
        each = jnp.stack([jax.grad(wanted, argnums=1)(w, x, n) for x, n in zip(xs, (7, 0, 12), strict=True)])
        assert_close(got, each, 1e-12)
        mean = lambda w: jax.vmap(ours, (None, 0, 0))(w, xs, lengths).mean()  # noqa: E731
        means = lambda w: sum(wanted(w, x, n) for x, n in zip(xs, (7, 0, 12), strict=True)) / 3  # noqa: E731
        assert_close(jit(jax.grad(mean))(w), jit(jax.grad(means))(w), 1e-12)


def test_what_the_condition_and_the_body_close_over():
    with x64():

        def root(a, scale):
            step = lambda x: scale * (x + a / x)  # noqa: E731
            return jaxckpt.while_loop(lambda x: jnp.abs(x * x - a) > 1e-10 * scale, step, a, max_steps=60)

        value, (slope, _) = jax.jit(jax.value_and_grad(root, argnums=(0, 1)))(2.0, 0.5)
        assert_close((value, slope), (jnp.sqrt(2.0), 0.5 / jnp.sqrt(2.0)), 1e-9)


def steps_run(num_steps, num_checkpoints):
    """How often the body really runs in a gradient, counted as it does."""
    seen = []

    def counted(s):
        # A custom rule keeps the count out of the turns' own forward.
        jax.debug.callback(lambda: seen.append(1))
        return jnp.sin(s)

    @jax.custom_vjp
    def step(s):
        return counted(s)

    step.defvjp(lambda s: (jnp.sin(s), s), lambda s, ct: (jnp.cos(s) * ct,))
    state = lambda x: (x, 0)  # noqa: E731
    fun = lambda x: jaxckpt.while_loop(  # noqa: E731
        lambda s: s[1] < num_steps,
        lambda s: (step(s[0]), s[1] + 1),
        state(x),
        max_steps=300,
        num_checkpoints=num_checkpoints,
    )[0]
    jax.block_until_ready(jax.jit(jax.grad(fun))(0.3))
    jax.effects_barrier()
    return len(seen)


@pytest.mark.parametrize("num_checkpoints", slow_but([1, 3, 10], 1, 3))
def test_steps_run_as_often_as_the_solver_says(num_checkpoints):
    for num_steps in (1, 5, 12, 60):
        # One more: the loop learns late which step is the last, and has run it.
        assert steps_run(num_steps, num_checkpoints) == num_online_forwards(num_steps, num_checkpoints) + 1
    assert steps_run(60, 10) == num_forwards(60, 10) + 1  # the least there is


def test_memory_does_not_depend_on_the_bound():
    def temporaries(max_steps, num_checkpoints):
        fun = lambda x: jaxckpt.while_loop(  # noqa: E731
            lambda x: jnp.sum(x) < 1e9,
            lambda x: jnp.sin(x) * 2,
            x,
            max_steps=max_steps,
            num_checkpoints=num_checkpoints,
        ).sum()
        compiled = jax.jit(jax.grad(fun)).lower(jax.ShapeDtypeStruct((1 << 16,), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = 4 << 16
    few, many = temporaries(1_000_000, 4), temporaries(100, 16)
    assert few <= 12 * state
    assert 10 * state <= many - few <= 14 * state


def test_a_budget_holds_as_many_states_as_fit():
    x = jnp.ones(1 << 14)

    def loop(x, **options):
        step = lambda s: (jnp.sin(s[0]) * 2, s[1] + 1)  # noqa: E731
        return jaxckpt.while_loop(lambda s: s[1] < 50, step, (x, 0), max_steps=64, **options)[0]

    budget = 2_000_000
    bytes_of = lambda **options: jaxckpt.measure(lambda x: loop(x, **options), x).device_bytes  # noqa: E731
    assert 0.5 * budget < bytes_of(budget=budget) <= budget < bytes_of(num_checkpoints=64)
    assert_close(jax.grad(lambda x: loop(x, budget=budget).sum())(x), jax.grad(lambda x: loop(x).sum())(x), 1e-6)
    with pytest.raises(jaxckpt.InfeasibleBudgetError, match="no number of held states of the while loop fits"):
        loop(x, budget=1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, r"max_steps=0 .* at least 1"),
        ({"max_steps": 2.0}, "max_steps=2.0"),
        ({"max_steps": 4, "num_checkpoints": 0}, "num_checkpoints=0 must be at least 1"),
        ({"max_steps": 4, "num_checkpoints": 1, "budget": "1MB"}, "not both"),
        ({"max_steps": 4, "budget": "lots"}, "budget"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises((jaxckpt.OptionError, jaxckpt.BudgetError), match=message):
        jaxckpt.while_loop(lambda x: x < 3, lambda x: x + 1, 0.0, **options)


def test_what_lax_while_loop_refuses_is_refused_in_its_words():
    for loop in (lax.while_loop, functools.partial(jaxckpt.while_loop, max_steps=3)):
        with pytest.raises(TypeError, match=r"body_fun|body function"):
            loop(lambda x: x[0] < 3, lambda x: jnp.concatenate([x, x]), jnp.zeros(2))
        with pytest.raises(TypeError, match="bool"):
            loop(lambda x: x, lambda x: x, jnp.zeros(2))
