"""Whole steps: what `fit` chooses is measured on the step, and the step computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, count

import jaxckpt
from jaxckpt.search.shared_budget import apart, together

X = jax.ShapeDtypeStruct((2048, 64), jnp.float32)
WS = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 12


def chain(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def make_step(*losses):
    """A momentum step over the sum of the losses."""

    def step(ws, momentum, x):
        def total(ws):
            return sum(loss(ws, x * (i + 1.0)) for i, loss in enumerate(losses))

        value, grads = jax.value_and_grad(total)(ws)
        momentum = [0.9 * m + g for m, g in zip(momentum, grads, strict=True)]
        return [w - 0.1 * m for w, m in zip(ws, momentum, strict=True)], momentum, value

    return step


def arrays():
    keys = jax.random.split(jax.random.key(0), 13)
    ws = [jax.random.normal(k, (64, 64)) / 8 for k in keys[:12]]
    return ws, [jnp.zeros_like(w) for w in ws], jax.random.normal(keys[12], (2048, 64))


@pytest.mark.parametrize("share", ["75%", "50%"])
def test_the_step_is_measured_within_its_budget(share):
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget=share)
    budget = int(share[:-1]) * fitted.unplanned.device_bytes // 100
    assert fitted.measurement.device_bytes <= budget
    assert fitted.plans[0].schedule is not None
    assert fitted.plans[0].recompute_flops > 0


def test_the_fitted_step_computes_what_the_step_does():
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget="60%")
    for ours, theirs in zip(
        jax.tree.leaves(fitted.step(*arrays())), jax.tree.leaves(jax.jit(make_step(chain))(*arrays())), strict=True
    ):
        # Float32 with sums of 2048 terms in another order.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    planned, plain = count(fitted.step.__wrapped__, WS, WS, X), count(make_step(chain), WS, WS, X)
    assert planned["tanh"] > plain["tanh"]


def test_donated_arguments_give_their_buffers_back():
    step = make_step(jaxckpt.auto_remat(chain))
    kept = jaxckpt.fit(step, WS, WS, X, budget="100%")
    donated = jaxckpt.fit(step, WS, WS, X, budget="100%", donate_argnums=(0, 1))
    assert donated.measurement.alias_bytes > kept.measurement.alias_bytes
    assert donated.measurement.device_bytes < kept.measurement.device_bytes


def test_a_step_that_fits_is_left_alone():
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget="100%")
    assert [plan.schedule for plan in fitted.plans] == [None]
    assert fitted.num_compiles == 1
    assert count(fitted.step.__wrapped__, WS, WS, X)["checkpoint"] == 0


def test_a_step_that_fits_gets_plans_that_make_it_faster():
    def loss(ws, x):
        """A scan that stacks many values which take little to make."""

        def layer(x, w):
            for _ in range(4):
                x = x + 0.1 * jnp.sin(x * w)
            return x, None

        return jnp.sum(jax.lax.scan(layer, x, jnp.stack([w[:1] for w in ws]))[0] ** 2)

    step = make_step(jaxckpt.auto_remat(loss), jaxckpt.auto_remat(chain))
    fitted = jaxckpt.fit(step, WS, WS, X, budget="8GB")
    assert [plan.schedule is None for plan in fitted.plans] == [False, True]
    assert fitted.plans[0].recompute_cost < 0 and fitted.measurement.device_bytes < fitted.unplanned.device_bytes
    counted = jaxckpt.fit(step, WS, WS, X, budget="8GB", cost="flops")
    assert [plan.schedule for plan in counted.plans] == [None, None]


def test_several_functions_and_an_inner_jit_are_planned_together():
    other = jax.jit(jaxckpt.auto_remat(lambda ws, x: chain(ws[:6], x)))
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain), other), WS, WS, X, budget="70%")
    assert len(fitted.plans) == 2
    assert fitted.measurement.device_bytes <= 0.7 * fitted.unplanned.device_bytes


def test_a_step_that_differentiates_nothing_is_refused():
    with pytest.raises(jaxckpt.OptionError, match=r"differentiates nothing .* use jax.jit"):
        jaxckpt.fit(lambda ws, x: chain(ws, x), WS, X, budget="60%")


def test_functions_that_cannot_be_seen_are_named():
    vjp = jax.vjp.__wrapped__  # as one that was imported by name before

    def step(ws, x):
        value, pull = vjp(lambda ws: chain(ws, x), ws)
        return pull(jnp.ones_like(value))

    with pytest.raises(jaxckpt.OptionError, match=r"test_fitting.py:\d+.*\(chain\).*Decorate them"):
        jaxckpt.fit(step, WS, X, budget="60%")


def test_an_undecorated_step_is_planned_like_a_decorated_one():
    ours = jaxckpt.fit(make_step(chain), WS, WS, X, budget="60%")
    theirs = jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget="60%")
    assert ours.plans[0].schedule is not None and len(ours.plans) == 1
    assert ours.measurement.device_bytes <= 0.6 * ours.unplanned.device_bytes
    # Without plans it is the user's own step, to the byte.
    plain = jax.jit(make_step(chain), compiler_options=jaxckpt.compiler_options()).lower(WS, WS, X).compile()
    assert ours.unplanned.temp_bytes == plain.memory_analysis().temp_size_in_bytes
    assert abs(ours.measurement.device_bytes - theirs.measurement.device_bytes) < 0.02 * theirs.measurement.device_bytes


def test_tiny_functions_and_those_around_decorated_ones_are_left_alone():
    def tiny(ws, x):
        return jnp.mean(jnp.sin(x[:2] @ ws[0]))

    loss = jaxckpt.auto_remat(lambda ws, x: chain(ws[:6], x), keep_checkpoints=False)

    def step(ws, x):
        grads = [jax.grad(f)(ws, x) for f in (chain, tiny, lambda ws, x: 2.0 * loss(ws, x))]
        return jax.tree.map(lambda *leaves: sum(leaves), *grads)

    fitted = jaxckpt.fit(step, WS, X, budget="70%")
    assert [plan.keeps_checkpoints for plan in fitted.plans] == [True, False]
    assert fitted.measurement.device_bytes <= 0.7 * fitted.unplanned.device_bytes


def test_a_budget_below_the_state_says_what_no_plan_changes():
    with pytest.raises(jaxckpt.InfeasibleBudgetError, match="which no plan changes") as caught:
        jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget=1000)
    assert 1000 < caught.value.least_peak_bytes <= caught.value.unplanned_peak_bytes


def test_microbatches_accumulated_in_a_scan_are_planned_inside_it():
    loss = jaxckpt.auto_remat(chain)

    def make(loss):
        def step(ws, xs):
            def one(total, x):
                value, grads = jax.value_and_grad(loss)(ws, x)
                return jax.tree.map(jnp.add, total, grads), value

            total, values = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, ws), xs)
            return [w - 0.1 * g for w, g in zip(ws, total, strict=True)], values

        return step

    xs = jax.ShapeDtypeStruct((4, *X.shape), X.dtype)
    fitted = jaxckpt.fit(make(loss), WS, xs, budget="60%", donate_argnums=0)
    assert fitted.measurement.device_bytes <= 0.6 * fitted.unplanned.device_bytes
    ws, _, x = arrays()
    xs = jnp.stack([x * (i + 1.0) for i in range(4)])
    wanted = jax.jit(make(chain))(ws, xs)
    for ours, theirs in zip(jax.tree.leaves(fitted.step(ws, xs)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_mixed_precision_with_donated_state_is_planned_in_half_the_bytes():
    @jaxckpt.auto_remat
    def loss(ws, x):
        half = [w.astype(jnp.bfloat16) for w in ws]
        return chain(half, x.astype(jnp.bfloat16)).astype(jnp.float32)

    fitted = jaxckpt.fit(make_step(loss), WS, WS, X, budget="60%", donate_argnums=(0, 1))
    assert fitted.measurement.device_bytes <= 0.6 * fitted.unplanned.device_bytes
    assert fitted.measurement.alias_bytes >= 2 * 12 * 64 * 64 * 4
    saved = (g.shape_dtype.split("[")[0] for g in fitted.plans[0].saved)
    assert set(saved) - {"what JAX keeps"} == {"bfloat16"}


def cost(fitted):
    return sum(plan.recompute_cost for plan in fitted.plans)


def test_functions_that_are_differentiated_in_turn_get_what_the_others_leave():
    wide, narrow = jaxckpt.auto_remat(chain), jaxckpt.auto_remat(lambda ws, x: chain(ws[:5], x[:512]))

    def step(ws, x):
        grads = jax.grad(wide)(ws, x)
        # The second starts when the first is done.
        moved = [w - 0.1 * g for w, g in zip(ws, grads, strict=True)]
        return jax.grad(narrow)(moved, x)

    fitted = jaxckpt.fit(step, WS, X, budget="60%", cost="flops")
    assert fitted.measurement.device_bytes <= 0.6 * fitted.unplanned.device_bytes
    first, second = fitted.plans
    assert first.recompute_cost > 0 and second.schedule is None


def test_bytes_that_add_up_go_where_they_save_most():
    # Both halves hold the same bytes, and those of the second take five times the work to make again.
    mix = jnp.eye(64)

    def dear(ws, x):
        for w in ws:
            for _ in range(4):
                x = x @ mix
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def cheap(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return x

    first, second = jaxckpt.auto_remat(cheap), jaxckpt.auto_remat(dear)

    def step(ws, x):
        return jax.grad(lambda ws: second(ws, first(ws, x)))(ws)

    fitted = jaxckpt.fit(step, WS, X, budget="75%", cost="flops")
    assert fitted.measurement.device_bytes <= 0.75 * fitted.unplanned.device_bytes
    recomputed = {plan.forward_flops: plan.recompute_flops / plan.forward_flops for plan in fitted.plans}
    assert 0 < recomputed[max(recomputed)] < 0.5 * recomputed[min(recomputed)]


def test_paths_lead_from_the_least_bytes_to_the_least_work():
    peaks, costs = [[100, 400, 900], [200, 300, 2000]], [[0.8, 0.3, 0.0], [0.5, 0.1, 0.0]]
    assert apart(peaks, costs) == [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2)]
    # By the sum, (1, 0) takes as many bytes as (0, 1) and two hundred more, and less work than neither.
    assert together(peaks, costs) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 2)]
    assert together([[0, 50, 100]], [[1.0, 0.9, 0.0]]) == [(0,), (1,), (2,)]
    # What lies between two that are all but equal in bytes is left out.
    assert together([[1000, 5000, 5001, 5002]], [[1.0, 0.9, 0.8, 0.0]]) == [(0,), (1,), (3,)]


def test_the_second_fit_of_a_step_takes_fewer_compiles():
    step, args = make_step(jaxckpt.auto_remat(chain)), (WS, WS, X)
    first = jaxckpt.fit(step, *args, budget="55%")
    again = jaxckpt.fit(step, *args, budget="55%")
    assert first.calibration is None and again.calibration is not None
    # One without plans, for the percentage, and one with.
    assert again.num_compiles == 2 <= first.num_compiles
    assert again.measurement.device_bytes <= 0.55 * again.unplanned.device_bytes


def test_a_step_far_above_a_budget_in_bytes_is_not_compiled_without_plans():
    step, args = make_step(jaxckpt.auto_remat(chain)), (WS, WS, X)
    whole = jaxckpt.fit(step, *args, budget="100%").measurement
    budget = whole.argument_bytes + whole.output_bytes + whole.temp_bytes // 3
    fitted = jaxckpt.fit(step, *args, budget=budget)
    assert fitted.unplanned is None and fitted.measurement.device_bytes <= budget
    roomy = jaxckpt.fit(step, *args, budget=2 * whole.device_bytes)
    assert roomy.unplanned is not None and roomy.plans[0].schedule is None


def test_state_and_gradients_that_are_too_large_are_named():
    with pytest.raises(jaxckpt.InfeasibleBudgetError, match=r"gradients .* more than the budget"):
        jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), WS, WS, X, budget=1_000_000)


def test_a_fitted_step_refuses_what_it_was_not_planned_for():
    @jaxckpt.auto_remat
    def inner(ws, batch):
        x = batch["x"]
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2) * batch["scale"]

    def step(ws, batch):
        return [w - g for w, g in zip(ws, jax.grad(inner)(ws, batch), strict=True)]

    def args(rows=256, dtype="float32", layers=4, **more):
        spec = jax.ShapeDtypeStruct
        return [spec((32, 32), dtype)] * layers, {"x": spec((rows, 32), dtype), "scale": spec((), dtype), **more}

    fitted = jaxckpt.fit(step, *args(), budget="90%")
    fitted.step.lower(*args())
    for other, what in [
        (args(rows=255), r"args\[1\]\['x'\] is float32\[255,32\], and it was planned for float32\[256,32\]"),
        (args(dtype="bfloat16"), "is bfloat16"),
        (args(layers=5), "its arguments are"),
        (args(more=jax.ShapeDtypeStruct((), "float32")), "its arguments are"),
    ]:
        with pytest.raises(jaxckpt.PlanMismatchError, match=f"{what}.*call jaxckpt.fit again"):
            fitted.step.lower(*other)
    # Another weak type is the same plan.
    ws, x = [jnp.eye(32)] * 4, jnp.ones((256, 32))
    assert_close(fitted.step(ws, {"x": x, "scale": 2.0}), fitted.step(ws, {"x": x, "scale": jnp.float32(2)}), 1e-6)
