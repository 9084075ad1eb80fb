"""What the verbs have in common: named and static arguments, comparisons, reports of steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt.result.comparison import Difference

W = jnp.eye(32) + 0.1
X = jnp.cos(jnp.arange(256 * 32.0)).reshape(256, 32)


def loss(w, x, *, num_layers=8, scale=1.0, name="tanh"):
    for _ in range(num_layers):
        x = getattr(jnp, name)(x @ (scale * w))
    return jnp.mean(x**2)


def by_place(w, num_layers, x, scale=1.0):
    return loss(w, x, num_layers=num_layers, scale=scale)


def gradients_equal(found, wanted, *args, **kwargs):
    ours, own = (jax.jit(jax.value_and_grad(functools.partial(f, **kwargs)))(*args) for f in (found, wanted))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, own)


def test_named_and_static_arguments_are_those_of_the_function():
    plan = jaxckpt.plan(loss, W, x=X, num_layers=12, static_argnames="num_layers", budget="70%", calibration=None)
    same = jaxckpt.plan(lambda w, x: loss(w, x, num_layers=12), W, X, budget="70%", calibration=None)
    assert (plan.fingerprint, plan.peak_bytes, plan.schedule) == (same.fingerprint, same.peak_bytes, same.schedule)
    planned = plan.apply(loss, static_argnames="num_layers")
    gradients_equal(lambda w: planned(w, x=X, num_layers=12), lambda w: loss(w, X, num_layers=12), W)
    with pytest.raises(jaxckpt.PlanMismatchError):
        planned(W, x=X, num_layers=11)
    # Numbers that are not static are traced, as in auto_remat.
    other = jaxckpt.plan(loss, W, x=X, scale=0.5, budget="70%", calibration=None)
    gradients_equal(other.apply(loss), loss, W, x=X, scale=0.25)


def test_argnums_are_positions_of_the_call():
    plan = jaxckpt.plan(by_place, W, 6, X, static_argnums=1, argnums=2, budget="80%", calibration=None)
    own = jaxckpt.plan(lambda w, x: by_place(w, 6, x), W, X, argnums=1, budget="80%", calibration=None)
    assert plan.peak_bytes == own.peak_bytes and plan.parameter_bytes == X.nbytes
    measured = jaxckpt.measure(by_place, W, 6, x=X, static_argnums=1)
    assert measured.device_bytes == jaxckpt.measure(lambda w, x: by_place(w, 6, x), W, X).device_bytes
    curve = jaxckpt.frontier(by_place, W, x=X, num_layers=6, static_argnames="num_layers", num_points=3)
    assert curve.fingerprint == jaxckpt.frontier(by_place, W, x=X, num_layers=6, static_argnums=1).fingerprint
    assert curve.fingerprint != jaxckpt.frontier(by_place, W, x=X, num_layers=7, static_argnums=1).fingerprint
    with pytest.raises(jaxckpt.NotDifferentiableError):
        jaxckpt.plan(by_place, W, 6, X, static_argnums=1, argnums=1, budget="80%")


@pytest.mark.parametrize("verb", [jaxckpt.plan, jaxckpt.measure, jaxckpt.frontier, jaxckpt.fit])
def test_a_name_that_nothing_has_is_refused(verb):
    budget = {} if verb in (jaxckpt.measure, jaxckpt.frontier) else {"budget": "80%"}
    with pytest.raises(jaxckpt.OptionError, match=f"'targett' is neither an option of {verb.__name__} nor an argument"):
        verb(loss, W, X, targett="cpu", **budget)
    with pytest.raises(jaxckpt.OptionError, match="static_argnames='lyers'"):
        verb(loss, W, X, static_argnames="lyers", **budget)


def test_a_plan_in_a_folder_is_found_again_and_is_auto_remats(tmp_path, monkeypatch):
    plan = jaxckpt.plan(loss, W, X, budget="70%", cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1

    def fail(*args, **kwargs):
        raise AssertionError("planned again")

    monkeypatch.setattr("jaxckpt.api.plan._planned", fail)
    again = jaxckpt.plan(loss, W, X, budget="70%", cache_dir=str(tmp_path))
    assert again.to_json() == plan.to_json()
    decorated = jaxckpt.auto_remat(lambda w: loss(w, X), budget="70%", cache_dir=tmp_path)
    with pytest.raises(AssertionError, match="planned again"):  # a closed-over array is another program
        jax.grad(decorated)(W)
    decorated = jaxckpt.auto_remat(lambda w, x: loss(w, x), budget="70%", cache_dir=tmp_path)
    np.testing.assert_allclose(jax.grad(decorated)(W, X), jax.grad(loss)(W, X), rtol=1e-5)


def test_compare_names_the_leaf_that_differs_most():
    def of_tree(params, x):
        return loss(params["w"], x) + jnp.sum(params["b"]), {"rows": x.shape[0] * jnp.ones((), int)}

    params = {"w": W, "b": jnp.ones(4)}
    plan = jaxckpt.plan(of_tree, params, X, budget="70%", has_aux=True, calibration=None)
    found = plan.compare(of_tree, params, X, has_aux=True)
    assert found.is_close and found.value.relative < 1e-6 and found.gradients.relative < 1e-5
    wrong = jax.custom_vjp(lambda w: w)
    wrong.defvjp(lambda w: (w, None), lambda _, g: (1.01 * g,))
    # The same plan, beside a function whose gradient differs: the program is patched under the comparison.
    from jaxckpt.compilation.objective import objective
    from jaxckpt.program.trace import trace
    from jaxckpt.result.comparison import compare_runs

    traced = trace(of_tree, (params, X))
    other = lambda params, x: of_tree({**params, "w": wrong(params["w"])}, x)  # noqa: E731
    flat = plan.flat(traced.program)
    found = compare_runs(other, traced, flat, objective(traced, 0, True), jax.tree.leaves((params, X)))
    assert not found.is_close and found.gradients.path == "args[0]['w']" and found.value.is_close
    assert found.gradients.relative == pytest.approx(0.01, rel=0.02)
    assert "args[0]['w'], more than rounding makes" in str(found)
    assert found.to_json()["gradients"]["path"] == "args[0]['w']"


def test_compare_makes_arrays_of_specs_and_wants_the_plans_function():
    specs = jax.eval_shape(lambda: (W, X))
    plan = jaxckpt.plan(loss, *specs, budget="70%", calibration=None)
    assert plan.compare(loss, *specs) == plan.compare(loss, *specs)
    assert plan.compare(loss, specs[0], x=specs[1]).is_close
    with pytest.raises(jaxckpt.PlanMismatchError):
        plan.compare(loss, W, X[:8])


def test_compare_of_a_function_that_is_not_scalar_and_of_none():
    def rows(w, x):
        return jnp.tanh(x @ w), x.astype(int)

    plan = jaxckpt.plan(rows, W, X, budget="100%", calibration=None)
    found = plan.compare(rows, W, X)
    assert found.is_close and found.gradients.path.startswith("args[0]")
    assert str(Difference(path="", absolute=0.0, relative=0.0, tolerance=0.0)) == "nothing to compare"
