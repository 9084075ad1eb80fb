"""`auto_remat` under every transformation: the same numbers, and recomputation really there."""

import json
import logging
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, count, jit, no_compiles, x64
from zoo.models import MODELS, chain_args, chain_loss

import jaxckpt
from jaxckpt import InfeasibleBudgetError, JaxckptWarning, _compat, auto_remat
from jaxckpt.api import auto_remat as decorator
from jaxckpt.api.plan import plan_program

ARGS = chain_args("float64", layers=6, rows=128, width=16)
WEIGHTS, X = ARGS
BUDGET = "80%"


@pytest.fixture(autouse=True)
def _quiet():
    """The warning of old CPU compilers has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "on CPU, jaxlib before 0.12", JaxckptWarning)
        yield


def decorated(fun, **options):
    return auto_remat(fun, budget=BUDGET, verify=False, **options)


def batch(x):
    return jnp.stack([x, 2 * x, 3 * x])


# A transformation of the loss, as a function of its arguments, each with whether it needs recomputation.
TRANSFORMED = {
    "call": (lambda f: f, False),
    "jit": (jax.jit, False),
    "grad": (jax.grad, True),
    "jit of grad": (lambda f: jax.jit(jax.grad(f)), True),
    "grad of jit": (lambda f: jax.grad(jax.jit(f)), True),
    "value_and_grad": (lambda f: jax.value_and_grad(f, argnums=(0, 1)), True),
    "grad of the data": (lambda f: jax.grad(f, argnums=1), True),
    "vjp": (lambda f: lambda ws, x: jax.vjp(f, ws, x)[1](jnp.ones((), x.dtype)), True),
    "grad of vmap": (lambda f: jax.grad(lambda ws, x: jax.vmap(f, (None, 0))(ws, batch(x)).mean()), True),
    "vmap of grad": (lambda f: lambda ws, x: jax.vmap(jax.grad(f), (None, 0))(ws, batch(x)), True),
    "vmap": (lambda f: lambda ws, x: jax.vmap(f, (None, 0))(ws, batch(x)), False),
    "jvp": (lambda f: lambda ws, x: jax.jvp(f, (ws, x), (ws, x)), False),
    "linearize": (lambda f: lambda ws, x: jax.linearize(f, ws, x)[1](ws, x), False),
    "hessian-vector": (lambda f: lambda ws, x: jax.jvp(lambda w: jax.grad(f)(w, x), (ws,), (ws,))[1], True),
    "reverse over reverse": (lambda f: jax.grad(lambda ws, x: sum(map(jnp.sum, jax.grad(f)(ws, x)))), True),
    "in a scan": (
        lambda f: jax.grad(lambda ws, x: jax.lax.scan(lambda c, _: (c + f(ws, x), None), 0.0, None, length=3)[0]),
        True,
    ),
    "in a cond": (lambda f: jax.grad(lambda ws, x: jax.lax.cond(x[0, 0] < 9, f, lambda *_: 0.0, ws, x)), True),
    "in a checkpoint": (lambda f: jax.grad(jax.checkpoint(f)), True),
    "in another one": (
        lambda f: jax.grad(decorated(lambda ws, x: jnp.sin(f(ws, x)))),
        False,
    ),
    "with keywords": (lambda f: jax.grad(lambda ws, x: f(x=x, weights=ws)), True),
    "with tracers closed over": (lambda f: jax.jit(lambda ws, x: jax.grad(lambda s: f(ws, s * x))(1.0)), True),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_every_transformation_gives_the_same_numbers(name):
    transform, _ = TRANSFORMED[name]
    with x64():
        wanted, got = jit(transform(chain_loss))(*ARGS), jit(transform(decorated(chain_loss)))(*ARGS)
        assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize("name", [name for name, (_, recomputes) in TRANSFORMED.items() if recomputes])
def test_every_gradient_recomputes(name):
    transform, _ = TRANSFORMED[name]
    with x64():
        plain, planned = count(transform(chain_loss), *ARGS), count(transform(decorated(chain_loss)), *ARGS)
    assert planned["checkpoint"] > plain["checkpoint"]
    assert planned["tanh"] + planned["dot_general"] > plain["tanh"] + plain["dot_general"]


def test_eager_calls_need_no_jit():
    assert_close(decorated(chain_loss)(*chain_args(layers=3)), chain_loss(*chain_args(layers=3)), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_own_gradient(name):
    model = MODELS[name]
    with x64():
        args = model.args("float64")
        wanted, got = (
            jit(jax.value_and_grad(f, has_aux=model.has_aux))(*args) for f in (model.fun, decorated(model.fun))
        )
        assert_close(got, wanted, 1e-10)


def planned_shapes(monkeypatch):
    """Shapes of the inputs of every program that is planned from here on."""
    seen = []

    def spy(program, *args):
        seen.append([program.avals[v].shape for v in program.inputs])
        return plan_program(program, *args)

    monkeypatch.setattr(decorator, "plan_program", spy)
    return seen


def test_a_mapped_function_is_planned_at_its_mapped_shapes(monkeypatch):
    seen = planned_shapes(monkeypatch)
    args = chain_args(layers=5, rows=96, width=16)
    jax.make_jaxpr(TRANSFORMED["grad of vmap"][0](decorated(chain_loss)))(*args)
    assert seen
    for shapes in seen:
        assert (3, 96, 16) in shapes and (96, 16) not in shapes


def test_a_mapped_gradient_is_never_planned_for_one_example_silently():
    decorator._warn_mapped.cache_clear()
    with pytest.warns(JaxckptWarning, match=r"one example.*Differentiate outside"):
        jax.make_jaxpr(TRANSFORMED["vmap of grad"][0](decorated(chain_loss)))(*chain_args(layers=5, rows=97, width=16))


def test_what_is_not_differentiated_is_no_part_of_the_plan(monkeypatch):
    goals = []
    monkeypatch.setattr(
        decorator, "plan_program", lambda p, goal, *rest: goals.append(goal.inputs) or plan_program(p, goal, *rest)
    )
    f = decorated(chain_loss)
    args = chain_args(layers=6, rows=80, width=16)
    jax.make_jaxpr(jax.grad(f))(*args)
    jax.make_jaxpr(jax.grad(f, argnums=1))(*args)
    assert goals == [(0, 1, 2, 3, 4, 5), (6,)]


def test_static_arguments_and_leaves():
    def loss(weights, activation, x, *, power, layers=None):
        for w in weights[:layers]:
            x = activation(x @ w)
        return jnp.sum(x**power)

    wanted = jit(lambda w, x: jax.grad(loss)(w, jnp.tanh, x, power=2, layers=5))(*ARGS)
    by_number = decorated(loss, static_argnums=1, static_argnames=("power", "layers"))
    by_leaf = decorated(lambda w, act, x: loss(w, act["fn"], x, power=2, layers=5))
    for fun in (
        lambda w, x: jax.grad(by_number)(w, jnp.tanh, x, power=2, layers=5),
        lambda w, x: jax.grad(by_leaf)(w, {"fn": jnp.tanh, "name": "tanh"}, x),
    ):
        assert_close(jit(fun)(*ARGS), wanted, 1e-4)
        assert count(fun, *ARGS)["checkpoint"]


def test_methods_and_names_survive():
    class Model:
        def __init__(self, power):
            self.power = power

        @partial(auto_remat, budget=BUDGET, verify=False)
        def loss(self, weights, x):
            """Doc."""
            return chain_loss(weights, x) ** self.power

    model = Model(2)
    assert Model.loss.__name__ == "loss" and Model.loss.__doc__ == "Doc."
    got = jit(jax.grad(lambda w, x: Model.loss(model, w, x)))(*ARGS)
    assert_close(got, jit(jax.grad(lambda w, x: chain_loss(w, x) ** 2))(*ARGS), 1e-4)


def test_an_outer_plan_takes_the_place_of_an_inner_one():
    outer = decorated(lambda ws, x: jnp.sin(decorated(chain_loss)(ws, x)))
    plain = decorated(lambda ws, x: jnp.sin(chain_loss(ws, x)))
    found, wanted = (count(jax.grad(f), *ARGS) for f in (outer, plain))
    assert found == wanted and found["checkpoint"]


def test_where_nothing_can_be_saved_a_tight_budget_is_refused():
    weights, x = chain_args(layers=4)
    with pytest.raises(InfeasibleBudgetError) as caught:
        jax.grad(lambda s: decorated(lambda w: chain_loss(w, x) * s)(weights))(2.0)
    assert caught.value.expected_least_bytes <= caught.value.unplanned_peak_bytes


def forget():
    decorator._PLANS.clear()
    jaxckpt.search.analysis._ANALYSES.clear()


def plan_once(cache_dir, budget="85%", **options):
    args = chain_args(layers=16, rows=256, width=16)
    jax.make_jaxpr(jax.grad(auto_remat(chain_loss, budget=budget, cache_dir=cache_dir, **options)))(*args)


# The smaller one is so far below what the program takes that nobody compiles that without a plan.
@pytest.mark.parametrize("budget", ["85%", 170_000])
def test_plans_are_kept_on_disk_and_found_there(tmp_path, budget):
    decorator._PLANS.clear()
    plan_once(tmp_path, budget)
    (kept,) = tmp_path.glob("*.json")
    plan = jaxckpt.Plan.load(kept)
    assert plan.measured_peak_bytes and plan.is_unplanned_measured == (budget == "85%")
    forget()
    with no_compiles():
        plan_once(tmp_path, budget)
    assert list(tmp_path.glob("*.json")) == [kept]


def test_plans_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decorator._PLANS.clear()
    plan_once(None, verify=False)
    assert list((tmp_path / "jaxckpt").glob("*.json"))


@pytest.mark.parametrize(
    "damage", [lambda t: t[: len(t) // 2], lambda t: "{}", lambda t: t.replace('"schema": ', '"schema": 9')]
)
def test_a_damaged_plan_in_the_cache_is_made_again(tmp_path, damage, caplog):
    decorator._PLANS.clear()
    plan_once(tmp_path, verify=False)
    (kept,) = tmp_path.iterdir()
    text = kept.read_text()
    kept.write_text(damage(text))
    decorator._PLANS.clear()
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        plan_once(tmp_path, verify=False)
    assert "made again" in caplog.text
    assert json.loads(kept.read_text()) == json.loads(text)


def test_another_budget_is_another_plan(tmp_path):
    args = chain_args(layers=6, rows=64, width=16)
    decorator._PLANS.clear()
    for budget in ("85%", "90%"):
        f = auto_remat(chain_loss, budget=budget, verify=False, cache_dir=tmp_path)
        jax.make_jaxpr(jax.grad(f))(*args)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    decorator._PLANS.clear()
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        plan_once(tmp_path / "file", verify=False)
    assert "could not be kept" in caplog.text


def test_a_second_trace_finds_its_plan_in_memory(monkeypatch):
    f, args = decorated(chain_loss), chain_args(layers=6, rows=72, width=16)
    jax.make_jaxpr(jax.grad(f))(*args)
    monkeypatch.setattr(decorator, "plan_program", lambda *a: pytest.fail("planned again"))
    jax.make_jaxpr(jax.grad(f))(*args)


TRACED = []  # global, since a function may not change what it closes over


def test_equal_calls_are_traced_once_and_others_again():
    traced = TRACED

    def loss(weights, x, activation, model=None):
        TRACED.append(activation)
        return chain_loss([activation(w) for w in weights], x)

    class Model:
        pass

    f, (weights, x) = decorated(loss), chain_args(layers=5, rows=88, width=16)
    step = lambda *args: jax.make_jaxpr(lambda w: jax.grad(f)(w, x, *args))(weights)  # noqa: E731
    step(jnp.tanh), step(jnp.tanh)
    assert traced == [jnp.tanh]
    step(jnp.sin), step(jnp.sin), step(jnp.tanh)
    assert traced == [jnp.tanh, jnp.sin]
    # An object may have changed since.
    model = Model()
    step(jnp.sin, model), step(jnp.sin, model)
    assert traced[2:] == [jnp.sin, jnp.sin]
    # Other shapes are other programs.
    jax.make_jaxpr(lambda w: jax.grad(f)(w, x[:64], jnp.tanh))(weights)
    assert len(traced) == 5


def test_tracers_that_are_closed_over_are_those_of_the_call():
    def scaled(w, x):
        return jax.grad(decorated(lambda s: chain_loss(w, s * x)))(1.0)

    weights, x = chain_args("float64", layers=5, rows=128, width=16)
    with x64():
        for f in (scaled, lambda w, x: scaled(w, 2 * x)):
            wanted = jit(lambda w, x, f=f: jax.grad(lambda s: chain_loss(w, s * (x if f is scaled else 2 * x)))(1.0))
            assert_close(jit(f)(weights, x), wanted(weights, x), 1e-10)


def test_without_a_budget_the_function_runs_unchanged_and_warns_once():
    decorator._warn_no_budget.cache_clear()
    f = auto_remat(chain_loss)
    args = chain_args(layers=3)
    with pytest.warns(JaxckptWarning, match="give budget="):
        jaxpr = jax.make_jaxpr(f)(*args)
    assert str(jaxpr) == str(jax.make_jaxpr(chain_loss)(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(*args)


@pytest.mark.parametrize("undoes", [True, False])
def test_an_old_cpu_compiler_is_warned_of_once(undoes, monkeypatch):
    monkeypatch.setattr(_compat, "CPU_UNDOES_REMAT", undoes)
    monkeypatch.setattr(_compat, "cpu_option_is_set", lambda: False)
    decorator._warn_on_old_cpu.cache_clear()
    f = decorated(chain_loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.make_jaxpr(jax.grad(f))(*chain_args(layers=5))
        jax.make_jaxpr(jax.grad(f))(*chain_args(layers=6))
    text = [str(w.message) for w in caught if issubclass(w.category, JaxckptWarning)]
    assert len(text) == undoes
    assert not text or "xla_disable_hlo_passes=cse_barrier_expander" in text[0]
    decorator._warn_on_old_cpu.cache_clear()


def test_the_compiler_options_keep_what_a_plan_saves():
    f, args = auto_remat(chain_loss, budget="70%"), chain_args(layers=16, rows=512)
    options = jaxckpt.compiler_options()
    assert bool(options) == _compat.CPU_UNDOES_REMAT
    plain, planned = (
        jax.jit(jax.value_and_grad(g), compiler_options=options).lower(*args).compile().memory_analysis()
        for g in (chain_loss, f)
    )
    assert planned.temp_size_in_bytes < 0.75 * plain.temp_size_in_bytes


def test_results_keep_their_tree_and_dtypes():
    def fun(x, i):
        return {"loss": jnp.sum(jnp.tanh(x)), "index": i + 1, "none": None}, (x.astype(jnp.bfloat16),)

    args = jnp.ones((4, 4)), jnp.arange(3)
    got, wanted = decorated(fun)(*args), fun(*args)
    assert_close(got, wanted, 1e-6)
    assert isinstance(got[0]["loss"], jax.Array) and np.shape(got[0]["loss"]) == ()
