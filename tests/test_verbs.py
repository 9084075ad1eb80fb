"""What the verbs have in common: named and static arguments, comparisons, reports of steps."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow_but

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


@pytest.mark.slow
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


def step(w, x, rate=0.1, *, num_layers=8):
    value, gradient = jax.value_and_grad(loss)(w, x, num_layers=num_layers)
    return w - rate * gradient, value


def test_a_step_takes_named_static_and_donated_arguments():
    fitted = jaxckpt.fit(step, W, x=X, num_layers=12, static_argnames="num_layers", donate_argnums=0, budget="70%")
    same = jaxckpt.fit(lambda w, x: step(w, x, num_layers=12), W, X, donate_argnums=0, budget="70%")
    assert fitted.unplanned.device_bytes == same.unplanned.device_bytes
    assert fitted.measurement.alias_bytes == W.nbytes
    w, value = fitted.step(W + 0, x=X, num_layers=12)
    wanted = jax.jit(step, static_argnames="num_layers")(W, X, num_layers=12)
    np.testing.assert_allclose(w, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(value, wanted[1], rtol=1e-6)
    memory = fitted.step.lower(W, x=X, num_layers=12).compile().memory_analysis()
    assert memory.alias_size_in_bytes == W.nbytes and memory.temp_size_in_bytes == fitted.measurement.temp_bytes
    with pytest.raises(jaxckpt.PlanMismatchError, match="static arguments are"):
        fitted.step(W, x=X, num_layers=11)
    with pytest.raises(jaxckpt.PlanMismatchError, match=r"x is float32\[8,32\]"):
        fitted.step(W, x=X[:8], num_layers=12)


@pytest.mark.slow
def test_arguments_by_name_are_donated_too():
    fitted = jaxckpt.fit(step, x=X, w=W, donate_argnames="w", budget="80%")
    assert fitted.measurement.alias_bytes == W.nbytes
    given = W + 0
    fitted.step(w=given, x=X)
    assert given.is_deleted()
    by_place = jaxckpt.fit(step, x=X, w=W, donate_argnums=0, budget="80%")
    assert by_place.measurement.alias_bytes == W.nbytes
    with pytest.raises(jaxckpt.OptionError, match="donate_argnames='v'"):
        jaxckpt.fit(step, W, X, donate_argnames="v", budget="80%")


def test_a_fitted_step_prints_a_report():
    fitted = jaxckpt.fit(step, W, X, budget="70%")
    text = str(fitted)
    assert text.startswith(f"Step for {fitted.measurement.target}: ") and "1 of 1 function planned" in text
    assert f"{fitted.budget_bytes:,} bytes" in text and f"{fitted.unplanned.device_bytes:,} bytes" in text
    assert text.count("Plan for") == 1 and "max_compiles" not in text
    stopped = jaxckpt.fit(step, W, X, budget="70%", max_compiles=2)
    assert stopped.is_stopped == ("The search stopped at max_compiles" in str(stopped))
    data = stopped.to_json()
    assert data["budget_bytes"] == stopped.budget_bytes and len(data["plans"]) == 1 and "step" not in data


def test_max_compiles_that_ended_a_steps_search_are_said():
    from dataclasses import replace

    fitted = jaxckpt.fit(step, W, X, budget="70%")
    assert "The search stopped at max_compiles" in str(replace(fitted, is_stopped=True))


def specs(batch):
    return {"w": jax.ShapeDtypeStruct(W.shape, W.dtype), "x": jax.ShapeDtypeStruct((batch, 32), W.dtype)}


def test_the_largest_batch_that_divides_a_global_one():
    free = jaxckpt.largest_batch(step, specs, budget="400kB")
    found = jaxckpt.largest_batch(step, specs, budget="400kB", global_batch=1000)
    assert found.batch == max(n for n in range(1, free.batch + 1) if 1000 % n == 0)
    assert found.accumulation_steps == 1000 // found.batch and found.next_bytes > 400_000
    assert found.measurement.device_bytes <= 400_000
    text = str(found)
    assert f"accumulation steps     {found.accumulation_steps}" in text and "does not fit" in text
    whole = jaxckpt.largest_batch(step, specs, budget="400kB", global_batch=free.batch // 2)
    assert (whole.accumulation_steps, whole.batch, whole.next_bytes) == (1, free.batch // 2, None)
    prime = jaxckpt.largest_batch(step, specs, budget="400kB", global_batch=10007)
    assert (prime.batch, prime.accumulation_steps) == (1, 10007)
    one = jaxckpt.largest_batch(step, specs, budget="400kB", global_batch=1)
    assert (one.batch, one.accumulation_steps, one.next_bytes) == (1, 1, None)
    for wrong in (0, -8, 2.0, True, "8"):
        with pytest.raises(jaxckpt.OptionError, match="global_batch="):
            jaxckpt.largest_batch(step, specs, budget="400kB", global_batch=wrong)


@pytest.mark.slow
def test_a_step_that_accumulates_itself():
    def accumulated(w, xs):
        def one(total, x):
            return total + jax.grad(loss)(w, x), None

        return w - 0.1 * jax.lax.scan(one, jnp.zeros_like(w), xs)[0]

    args = lambda n: (specs(n)["w"], jax.ShapeDtypeStruct((4096 // n, n, 32), W.dtype))  # noqa: E731
    found = jaxckpt.largest_batch(accumulated, args, budget="1MB", global_batch=4096)
    assert 1 < found.batch < 4096 and found.batch * found.accumulation_steps == 4096
    assert found.measurement.device_bytes <= 1_000_000 < found.next_bytes


@pytest.mark.slow
def test_the_largest_batch_with_static_and_named_arguments():
    found = jaxckpt.largest_batch(
        step, specs, budget="300kB", num_layers=6, static_argnames="num_layers", donate_argnames="w"
    )
    same = jaxckpt.largest_batch(
        lambda w, x: step(w, x, num_layers=6), lambda n: tuple(specs(n).values()), budget="300kB", donate_argnums=0
    )
    assert (found.batch, found.next_bytes) == (same.batch, same.next_bytes)
    assert found.measurement.device_bytes == same.measurement.device_bytes
    with pytest.raises(jaxckpt.OptionError, match="'y' is neither"):
        jaxckpt.largest_batch(step, lambda n: {**specs(n), "y": W}, budget="300kB")


DATA = jnp.sin(jnp.arange(256 * 64.0)).reshape(256, 64)


def closing(w):
    @jax.jit
    def inner(w):
        return loss(w, DATA[:, :32] + DATA[:, 32:])

    return inner(w)


def scanned(w):
    def body(x, _):
        return jnp.tanh(x @ w + DATA[:, 32:]), None

    return jnp.mean(jax.lax.scan(body, DATA[:, :32], None, length=8)[0])


def of_data(data, w):
    return loss(w, data[:, :32] + data[:, 32:])


def own_bytes(fun, *args):
    jitted = fun if hasattr(fun, "lower") else jax.jit(fun)
    m = jitted.lower(*args).compile(jaxckpt.compiler_options()).memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


@pytest.mark.parametrize("fun", [closing, *slow_but([scanned, functools.partial(of_data, DATA)])])
def test_arrays_that_are_closed_over_are_named_and_are_what_they_are_to_jit(fun):
    plan = jaxckpt.plan(fun, W, budget="70%", calibration=None)
    assert plan.constant_bytes == DATA.nbytes and plan.to_json()["constant_bytes"] == DATA.nbytes
    assert "closed-over arrays   64.000 KiB (65,536 bytes)" in str(plan)
    assert own_bytes(jax.value_and_grad(plan.apply(fun)), W) == plan.measured_peak_bytes
    with pytest.raises(jaxckpt.InfeasibleBudgetError, match=r"64\.000 KiB \(65,536 bytes\), are constants"):
        jaxckpt.plan(fun, W, budget=20_000)

    def step(w):
        return w - 0.1 * jax.grad(fun)(w)

    fitted = jaxckpt.fit(step, W, budget="80%")
    assert fitted.constant_bytes == DATA.nbytes and "65,536 bytes" in str(fitted)
    assert own_bytes(fitted.step, W) == fitted.measurement.device_bytes
    with pytest.raises(jaxckpt.InfeasibleBudgetError, match=r"closes over, 64\.000 KiB"):
        jaxckpt.fit(step, W, budget=20_000)
    planned = jaxckpt.jit(step, budget="80%")
    planned(W)
    assert planned.measurement.device_bytes == fitted.measurement.device_bytes and "65,536" in planned.report()


def test_arrays_that_are_arguments_are_no_constants():
    plan = jaxckpt.plan(loss, W, X, budget="70%", calibration=None)
    assert plan.constant_bytes == 0 and "closed-over" not in str(plan)


def test_an_old_cpu_compiler_is_not_warned_of_where_the_option_is_given(monkeypatch):
    from jaxckpt import _compat
    from jaxckpt.api import auto_remat as decorator

    monkeypatch.setattr(_compat, "CPU_UNDOES_REMAT", True)
    monkeypatch.setattr(_compat, "cpu_option_is_set", lambda: False)
    decorator._warn_on_old_cpu.cache_clear()
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    make = lambda: jaxckpt.auto_remat(lambda w, x: loss(w, x), budget="70%", verify=False)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error", jaxckpt.JaxckptWarning)
        jax.jit(jax.grad(make()), compiler_options=options).trace(W, X)
        jax.jit(lambda w: jax.jit(jax.grad(make()))(w, X), compiler_options=options).trace(W)
        decorated = make()
        jaxckpt.fit(lambda w, x: w - jax.grad(decorated)(w, x) - jax.grad(loss)(w, x), W, X, budget="100%")
    with pytest.warns(jaxckpt.JaxckptWarning, match="merges recomputation back"):
        jax.jit(jax.grad(make()), compiler_options={"xla_cpu_enable_fast_math": False}).trace(W, X)
    decorator._warn_on_old_cpu.cache_clear()


def test_what_differentiates_already_is_measured_as_it_is():
    def accumulated(w, xs):
        def one(total, x):
            return total + jax.grad(loss)(w, x), None

        return jax.lax.scan(one, jnp.zeros_like(w), xs)[0]

    xs = X.reshape(-1, 64, 32)
    for fun, args in ((step, (W, X)), (accumulated, (W, xs)), (jax.jit(jax.grad(loss)), (W, X))):
        with pytest.warns(jaxckpt.JaxckptWarning, match="differentiates already, and is measured as it is"):
            found = jaxckpt.measure(fun, *args)
        assert found.device_bytes == own_bytes(fun, *args)
        again = jaxckpt.measure(fun, *args, differentiate=True)
        assert again.device_bytes > found.device_bytes
        if fun is not accumulated:  # a trajectory may be what has a derivative inside a loop
            with pytest.raises(jaxckpt.NotDifferentiableError, match="differentiates already"):
                jaxckpt.plan(fun, *args, budget="80%")


def test_turns_are_bounded_and_never_given_twice():
    from jaxckpt.api.processes import _Turns

    turns, given = _Turns(4), set()
    for i in range(200):
        label = f"f{i * i % 13}"
        turn = turns.take(label), label
        assert turn not in given
        given.add(turn)
    assert len(turns._next) == 4
    assert [_Turns(4).take("f") for _ in range(2)] == [0, 0]


def test_kept_step_plans_over_the_budget_warn_again(tmp_path):
    def make():
        return jaxckpt.jit(lambda w, x: step(w, x), budget=50_000, on_infeasible="least", cache_dir=tmp_path)

    for _ in range(2):
        planned = make()
        with pytest.warns(jaxckpt.JaxckptWarning, match="nothing fits budget="):
            planned(W, X)
        assert "Nothing fits the budget" in planned.report()
    assert len(list(tmp_path.glob("step-*.json"))) == 1


def test_named_arguments_of_a_plan_of_names_are_not_differentiated():
    from jax.ad_checkpoint import checkpoint_name

    layer = jax.checkpoint(lambda x, w: x + jnp.tanh(checkpoint_name(x @ w, "h")) @ w)

    def loss(w, x, mask):
        for _ in range(4):
            x = layer(x, w)
        return jnp.sum((x * mask) ** 2)

    w, x, mask = jnp.eye(32), jnp.ones((256, 32)), jnp.ones((256, 1))
    by_name = jaxckpt.plan(loss, w, x, mask=mask, argnums=-1, solver="names", budget="90%", on_infeasible="least")
    by_place = jaxckpt.plan(loss, w, x, mask, argnums=1, solver="names", budget="90%", on_infeasible="least")
    assert (by_name.code, by_name.peak_bytes) == (by_place.code, by_place.peak_bytes)
    with pytest.raises(jaxckpt.NotDifferentiableError):
        jaxckpt.plan(loss, w=w, x=x, mask=mask, solver="names", budget="90%")


def test_a_step_that_counts_first_is_measured_as_it_is():
    def step(count, w, x):
        return count + 1, w - jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)

    with pytest.warns(jaxckpt.JaxckptWarning, match="differentiates already"):
        found = jaxckpt.measure(step, jnp.int32(0), jnp.eye(32), jnp.ones((256, 32)))
    as_it_is = jaxckpt.measure(step, jnp.int32(0), jnp.eye(32), jnp.ones((256, 32)), differentiate=False)
    assert found.device_bytes == as_it_is.device_bytes


def test_arguments_may_have_the_names_of_the_verbs_own():
    def train(w, x, step):
        return w - 0.1 / (1 + step) * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)

    w, x = jnp.eye(32), jnp.ones((256, 32))
    fitted = jaxckpt.fit(train, w, x, step=jnp.float32(1), budget="1GB")
    np.testing.assert_allclose(fitted.step(w, x, step=jnp.float32(1)), train(w, x, jnp.float32(1)), rtol=1e-5)
    assert jaxckpt.measure(lambda w, fun: jnp.sum(w * fun), w, fun=w).device_bytes > 0
