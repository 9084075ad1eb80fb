"""The same call means what it means to `jax.jit`, and what runs is always the function that was called."""

import collections
import dataclasses
import enum
import functools
import threading

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxckpt
from jaxckpt.program.same_call import ChangingError, Recent, key_of
from jaxckpt.program.trace import trace, traced_leaves

W = np.random.default_rng(0).normal(size=(8, 8)).astype("float32") / 3
remat = functools.partial(jaxckpt.auto_remat, budget="1GB", verify=False, cost="flops")


TRACES = []  # global, since a function may not change what it closes over


def counted(fun, **options):
    """A decorated function, and a list that grows with each trace of it."""
    number = len(TRACES)
    TRACES.append([])

    def inner(*args, **kwargs):
        TRACES[number].append(None)
        return fun(*args, **kwargs)

    return remat(inner, **options), TRACES[number]


# --- What is static ------------------------------------------------------------------------------------------------


class Module(eqx.Module):
    w: object
    heads: int = 2
    rate: float = 0.5
    is_on: bool = True
    options: dict = dataclasses.field(default_factory=lambda: {"times": 2})
    table: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(2, np.float32))


@flax.struct.dataclass
class State:
    w: object
    rate: float
    times: int = flax.struct.field(pytree_node=False, default=1)


def test_numbers_are_traced_but_in_equinox_modules():
    train = TrainState(step=0, apply_fn=None, params={"w": W}, tx=None, opt_state=(1, 2.0))
    for tree, wanted in [
        ((1, 1.0, 1j, True, "a", len, np.int32(1), np.bool_(True), W), "ttt---ttt"),
        ({"rate": 0.1, "is_on": False}, "-t"),
        (train, "tttt"),
        (State(W, 0.1), "tt"),
        (Module(W), "t----t"),
        ([3, Module(1.0), 4], "t-----tt"),
        ({"model": Module(jax.ShapeDtypeStruct((2,), "float32")), "step": 3}, "t----tt"),
    ]:
        assert "".join("t" if x else "-" for x in traced_leaves(tree)) == wanted


def test_ten_learning_rates_are_one_trace_and_one_plan():
    fun, traces = counted(lambda w, options: jnp.sum(jnp.tanh(w) * options["rate"]))
    for i in range(10):
        rate = 0.1 * i
        assert_close(jax.grad(fun)(W, {"rate": rate}), jax.grad(lambda w: jnp.sum(jnp.tanh(w) * rate))(W), 1e-6)  # noqa: B023
    assert len(traces) == 1


def test_true_and_false_are_traced_in_the_step_of_fit():
    loss = jaxckpt.auto_remat(lambda w, x: jnp.sum(jnp.tanh(x @ w)))

    def step(w, x, is_on):
        return jnp.where(is_on, w - jax.grad(loss)(w, x), w)

    fitted = jaxckpt.fit(step, W, W, True, budget="1GB")
    for is_on in (True, False):
        assert_close(fitted.step(W, W, is_on), step(W, W, is_on), 1e-6)


# --- Static values -------------------------------------------------------------------------------------------------


class Kind(enum.IntEnum):
    ONE = 1


@dataclasses.dataclass(frozen=True)
class Config:
    value: object


Pair = collections.namedtuple("Pair", "value")
# All of these that are equal to Python are different to a function that looks at them.
ATOMS = [0, 0.0, -0.0, False, 0j, 1, 1.0, True, 1 + 0j, Kind.ONE, np.int32(1), np.float32(1), np.True_, None, "1", b"1"]
ATOMS += [float("nan"), (), "", jnp.tanh, len, np.dtype("float32"), np.float32, ...]
VALUES = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner), st.tuples(inner, inner), inner.map(Config), inner.map(Pair), st.lists(inner, max_size=2)
    ),
    max_leaves=3,
)


def tag(value):
    """What a value is and what type it has."""
    return f"{type(value).__name__} {value!r}"


def looked_at(fun, *args, **kwargs):
    """What a function that returns `{tag(value): x}` saw, without a compile."""
    (seen,) = jax.eval_shape(functools.partial(fun, *args, **kwargs))
    return seen


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=5))
def test_static_values_are_told_apart_by_type_and_value(values):
    fun = remat(lambda x, value: {tag(value): x}, static_argnums=1)
    named = remat(lambda x, *, value: {tag(value): x}, static_argnames="value")
    held = remat(lambda x, state: {tag(state.times): x})
    for value in (*values, *values):
        assert looked_at(fun, 2.0, value) == looked_at(named, 2.0, value=value) == tag(value)
        assert looked_at(held, 2.0, State(W, 0.1, times=value)) == tag(value)


def test_the_same_static_value_is_one_trace():
    for value in (*ATOMS, Config((1, "a")), Pair(2), functools.partial(jnp.sum, axis=0), frozenset({1, 2})):
        fun, traces = counted(lambda x, value: {tag(value): x}, static_argnums=1)
        assert looked_at(fun, 2.0, value) == looked_at(fun, 2.0, value) and len(traces) == 1, value


def test_a_training_state_is_one_trace():
    nn, optax = pytest.importorskip("flax.linen"), pytest.importorskip("optax")
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), W)
    fun, traces = counted(lambda state, x: jnp.sum(jnp.tanh(state.apply_fn(state.params, x))))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    for step in range(3):
        jax.eval_shape(fun, state.replace(step=step), W)
        jax.grad(lambda params: fun(state.replace(params=params), W))(params)
    assert len(traces) == 1


def test_what_may_change_has_no_key():
    class Changing:
        __hash__ = lambda self: 0  # noqa: E731
        __eq__ = lambda self, other: True  # noqa: E731

    hidden = Config(1)
    object.__setattr__(hidden, "other", 2)
    for value in (Changing(), Config(Changing()), [], {}, set(), W, [].append, Changing().__eq__, (1, []), hidden):
        with pytest.raises(ChangingError):
            key_of(value)


# --- Objects with state, callbacks ---------------------------------------------------------------------------------


class Scaled:
    """Equal to all of its kind, whatever it holds."""

    def __init__(self, scale):
        self.scale = scale

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return True

    def __call__(self, x):
        return np.asarray(x) * np.float32(self.scale)

    @functools.partial(jaxckpt.auto_remat, budget="1GB", verify=False)
    def loss(self, x):
        return jnp.sum(jnp.tanh(x) * self.scale)


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=6))
def test_objects_are_what_they_hold_now(scales):
    one, argument = Scaled(0), remat(lambda x, scaled: jnp.sum(jnp.tanh(x)) * scaled.scale)
    static = remat(lambda x, scaled: jnp.sum(jnp.tanh(x)) * scaled.scale, static_argnums=1)
    bound = remat(one.loss)
    for scale in scales:
        one.scale = scale
        wanted = jax.grad(lambda x: jnp.sum(jnp.tanh(x) * scale))(W)  # noqa: B023
        for got in (one.loss, bound, lambda x: argument(x, one), lambda x: static(x, one)):
            assert_close(jax.grad(got)(W), wanted, 1e-5)


def calls_python(callback):
    def fun(x):
        spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
        made = jax.pure_callback(callback, spec, jax.lax.stop_gradient(x))
        return jnp.sum(jnp.tanh(x) * made)

    return fun


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=4), st.booleans())
def test_each_function_calls_its_own_callback(scales, are_objects):
    make = Scaled if are_objects else lambda scale: lambda v: np.asarray(v) * np.float32(scale)
    plain = [calls_python(make(scale)) for scale in scales]
    for scale, planned in zip(scales, map(remat, plain), strict=True):
        # Not against the undecorated functions: JAX itself takes callbacks that are equal for one where none is jitted.
        wanted = jnp.float32(np.sum(np.tanh(W) * W * scale))
        assert_close(planned(W), wanted, 1e-5)
        assert_close(jax.jit(planned)(W), wanted, 1e-5)
        assert_close(jax.grad(planned)(W), jnp.asarray((1 - np.tanh(W) ** 2) * W * scale), 1e-5)


def test_a_step_runs_the_callback_of_each_of_its_functions():
    def chain(scale):
        def loss(w, x):
            for _ in range(12):
                x = jnp.tanh(x @ w)
            total = jnp.mean(x**2)
            called = jax.pure_callback(lambda v: np.full_like(v, scale), total, jax.lax.stop_gradient(total))
            return total * called

        return loss

    x = np.ones((2048, 8), np.float32)
    make_step = lambda wrap: lambda w, x: [jax.grad(wrap(chain(scale)))(w, x) for scale in (1, 10)]  # noqa: E731
    with jax.numpy_rank_promotion("allow"):
        fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat), W, x, budget="80%")
        assert fitted.plans
        assert_close(fitted.step(W, x), make_step(lambda f: f)(W, x), 1e-4)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=5))
def test_each_debug_callback_is_its_own(tags):
    seen = []

    def logged(tag):
        def fun(x):
            jax.debug.callback(lambda v: seen.append(tag), jnp.sum(x))
            return jnp.sum(x)

        return fun

    for letter in tags:
        remat(logged(letter))(W)
        jax.effects_barrier()
    assert seen == tags


# --- The result's tree ---------------------------------------------------------------------------------------------


def by_rows(w, x):
    return {f"{i} of {len(x)}": jnp.sum(jnp.tanh(x[i] @ w)) for i in range(len(x))}


def test_two_hundred_shapes_have_their_own_trees_twice():
    fun = remat(lambda x: {f"{len(x)}": jnp.sum(x)})
    for size in [*range(1, 200), *range(1, 200)]:
        assert looked_at(fun, np.ones(size, np.float32)) == str(size)


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=8, max_size=24), st.integers(2, 8))
def test_threads_have_their_own_trees(sizes, num_threads):
    fun, wrong, barrier = remat(by_rows), [], threading.Barrier(num_threads)

    def work(number):
        barrier.wait()
        for size in sizes[number:] + sizes[:number]:
            try:
                got = jax.eval_shape(lambda: fun(W, W[:size]))  # noqa: B023
            except Exception as error:
                got = {repr(error): 0}
            if sorted(got) != sorted(f"{i} of {size}" for i in range(size)):
                wrong.append((size, list(got)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_table_forgets_and_makes_again():
    table, made = Recent(2), []
    for key in (1, 2, 1, 3, 1, 2):
        assert table.get(key, lambda key=key: made.append(key) or key) == key
    assert made == [1, 2, 3, 2]


def test_traces_of_the_same_call_are_one_object():
    memory = jaxckpt.program.trace.Memory()
    fun = lambda x: jnp.sin(x)  # noqa: E731
    first, again, other = (trace(fun, (x,), memory=memory) for x in (W, W + 1, W[:3]))
    assert first is again and first is not other
