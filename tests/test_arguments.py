"""Arguments that make no sense are refused before any work, with what does; failures that are not ours pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import no_compiles

import jaxckpt
from jaxckpt import BudgetError, JaxckptWarning, NotDifferentiableError, TargetError
from jaxckpt.errors import JaxckptError, OptionError

W, X = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((64, 16), jnp.float32)


def loss(w, x):
    for _ in range(4):
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def step(w, x):
    return w - 0.1 * jax.grad(loss)(w, x)


def with_aux(w, x):
    return loss(w, x), x


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        pytest.param("9" * 10_000, "cannot be read", id="digits"),
        pytest.param("9" * 10_000 + "GB", "cannot be read", id="digits of GB"),
        pytest.param("9" * 10_000 + "%", "cannot be read", id="digits of %"),
        pytest.param(10**10_000, "more than any machine has", id="a long int"),
        pytest.param(-(10**10_000), "at least 1", id="a long negative int"),
        ("9" * 30 + "TB", "more than any machine has"),
        (8e9, 'write 8000000000 or "8GB"'),
        ("8e9", 'write 8000000000 or "8GB"'),
        (0.8, 'write "0.8GB" or "80%"'),
        (80.0, 'write "80GB" or "80%"'),
        (np.float32(1e9), 'write 1000000000 or "1GB"'),
        (float("nan"), "Accepted is"),
        (float("inf"), "Accepted is"),
        (True, "is not accepted"),
        (np.True_, "is not accepted"),
        (b"8GB", "is not accepted"),
        (["8GB"], "is not accepted"),
        ("1e400GB", "cannot be read"),
        (0, "at least 1"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "auto_remat", "fit", "jit", "largest_batch"])
def test_a_budget_that_makes_no_sense_is_refused_at_once(verb, budget, said):
    calls = {
        "plan": lambda: jaxckpt.plan(loss, W, X, budget=budget),
        "auto_remat": lambda: jaxckpt.auto_remat(loss, budget=budget),
        "fit": lambda: jaxckpt.fit(step, W, X, budget=budget),
        "jit": lambda: jaxckpt.jit(step, budget=budget),
        "largest_batch": lambda: jaxckpt.largest_batch(step, lambda n: (W, X), budget=budget),
    }
    with no_compiles(), pytest.raises(BudgetError) as caught:
        calls[verb]()
    assert said in str(caught.value) and len(str(caught.value)) < 400


def test_integers_of_numpy_are_integers():
    plan = jaxckpt.plan(loss, W, X, budget=np.int64(10**9), reserve=np.uint8(3), argnums=np.int32(1), verify=False)
    assert plan.budget_bytes == 10**9 - 3 and type(plan.budget_bytes) is int


@pytest.mark.parametrize("argnums", ["w", 1.0, True, None, [0, "x"], 2, -3])
@pytest.mark.parametrize("verb", [jaxckpt.plan, jaxckpt.measure, jaxckpt.frontier])
def test_positions_that_are_none_are_refused(verb, argnums):
    options = {"budget": "1GB"} if verb is jaxckpt.plan else {}
    with no_compiles(), pytest.raises((OptionError, NotDifferentiableError), match="argnums"):
        verb(loss, W, X, argnums=argnums, **options)


@pytest.mark.parametrize("donated", ["w", 1.0, 2, (0, 5)])
def test_donated_positions_that_are_none_are_refused(donated):
    with no_compiles(), pytest.raises(OptionError, match="donate_argnums"):
        jaxckpt.fit(step, W, X, budget="1GB", donate_argnums=donated)


@pytest.mark.parametrize("option", ["verify", "has_aux", "profile", "keep_checkpoints"])
def test_flags_that_are_none_are_refused(option):
    with no_compiles(), pytest.raises(OptionError, match=option):
        jaxckpt.plan(loss, W, X, budget="1GB", **{option: "no"})


@pytest.mark.parametrize("fun", [None, "model:loss", 5])
def test_what_cannot_be_called_is_refused(fun):
    with pytest.raises(OptionError, match="plan takes a function"):
        jaxckpt.plan(fun, W, X, budget="1GB")
    with pytest.raises(OptionError, match="measure takes a function"):
        jaxckpt.measure(fun, W, X)
    with pytest.raises(OptionError, match="fit takes a function"):
        jaxckpt.fit(fun, W, X, budget="1GB")
    if fun is not None:
        with pytest.raises(OptionError, match='budget="1GB"'):
            jaxckpt.auto_remat(fun)


def test_auxiliary_results_that_are_none_are_refused():
    for fun in (loss, lambda w, x: [loss(w, x), x], lambda w, x: (loss(w, x),)):
        with no_compiles(), pytest.raises(NotDifferentiableError, match="has_aux=True"):
            jaxckpt.plan(fun, W, X, budget="1GB", has_aux=True)
    assert jaxckpt.plan(with_aux, W, X, budget="1GB", has_aux=True, verify=False).schedule is None


@pytest.mark.parametrize("fun", [step, jax.grad(loss), jax.value_and_grad(loss)])
def test_a_gradient_or_a_step_is_no_loss(fun):
    for verb, options in ((jaxckpt.plan, {"budget": "80%"}), (jaxckpt.frontier, {})):
        with no_compiles(), pytest.raises(NotDifferentiableError, match=r"differentiates already.*jaxckpt\.fit"):
            verb(fun, W, X, **options)
    with pytest.warns(JaxckptWarning, match="measured as it is"):
        found = jaxckpt.measure(fun, W, X)
    assert found.device_bytes == jaxckpt.measure(fun, W, X, differentiate=False).device_bytes


def test_a_loss_that_has_derivatives_inside_is_a_loss():
    def physics(w, x):
        slope = jax.grad(lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w)))(x)
        return jnp.mean(slope**2)

    assert jaxckpt.plan(physics, W, X, budget="90%", calibration=None).measured_peak_bytes is not None


@pytest.mark.parametrize(("platform", "chip"), [("gpu", "h100"), ("tpu", "v5e"), ("cuda", "h100")])
def test_a_platform_is_no_chip_and_its_chips_are_named(platform, chip):
    with pytest.raises(TargetError, match=chip):
        jaxckpt.plan(loss, W, X, budget="1GB", target=platform)


class AlarmError(Exception):
    """What a handler of SIGALRM might raise."""


@pytest.mark.parametrize("kind", [AlarmError, MemoryError, KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("where", ["read", "num_asked_of"])
def test_failures_that_are_not_the_compilers_pass(monkeypatch, kind, where):
    def fail(*args):
        raise kind("not yours")

    monkeypatch.setattr(f"jaxckpt.compilation.measure.{where}", fail)
    with pytest.raises(kind, match="not yours"):
        jaxckpt.plan(loss, W, X, budget="80%", calibration=None)
    monkeypatch.undo()
    assert jaxckpt.plan(loss, W, X, budget="90%", calibration=None).measured_peak_bytes


def test_the_compilers_own_failure_is_a_warning_and_a_prediction(monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    def other(w, x):  # of which nothing was compiled yet
        return loss(w, jnp.sin(x))

    monkeypatch.setattr("jaxckpt.compilation.measure.read", fail)
    with pytest.warns(JaxckptWarning, match="INTERNAL: no"):
        assert jaxckpt.plan(other, W, X, budget="90%", calibration=None).measured_peak_bytes is None
    with pytest.raises(JaxckptError, match="INTERNAL: no"):
        jaxckpt.measure(other, W, X)
