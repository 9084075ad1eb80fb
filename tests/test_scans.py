"""Loops inside a planned function: run as planned, they give the same numbers and take what was predicted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_saves, analysed, assert_close, count, jit, x64
from jax import lax

import jaxckpt
from jaxckpt.compilation.objective import objective
from jaxckpt.kinds.binomial_table import num_again
from jaxckpt.kinds.scan_run import LoopPlan, Run, run_loop
from jaxckpt.program.control_flow import loop_of
from jaxckpt.program.flops import gradient_cost, jaxpr_cost
from jaxckpt.program.interpret import run
from jaxckpt.program.trace import trace
from jaxckpt.result.build import saved_groups
from jaxckpt.search.analysis import Analysis

LENGTH, ROWS, WIDTH = 12, 64, 16


def checkpointed(layer):
    return jax.checkpoint(layer, prevent_cse=False)


def decoder_loss(params, x, reverse=False, wrap=lambda layer: layer):
    """Residual two-matmul layers by scan, with a stacked result that the loss reads too."""

    def layer(x, p):
        y = x + jnp.tanh(x @ p["up"]) @ p["down"]
        return y, jnp.mean(y**2)

    x, norms = lax.scan(wrap(layer), x, params, reverse=reverse)
    return jnp.sum(x**2) + jnp.sum(norms)


def decoder_args(length=LENGTH, dtype="float32", rows=ROWS):
    random = np.random.default_rng(0)
    array = lambda *s: (random.normal(size=s) / s[-1]).astype(dtype)  # noqa: E731
    return {"up": array(length, WIDTH, 4 * WIDTH), "down": array(length, 4 * WIDTH, WIDTH)}, array(rows, WIDTH)


def rnn_loss(weights, inputs):
    """A recurrent network: weights are the loop's constants, an integer counts its steps."""

    def cell(carry, x):
        h, i = carry
        h = jnp.tanh(h @ weights["h"] + x @ weights["x"] + i.astype(x.dtype) * 0.01)
        return (h, i + 1), None

    start = jnp.zeros((inputs.shape[1], weights["h"].shape[0]), inputs.dtype)
    (h, _), _ = lax.scan(cell, (start, jnp.int32(0)), inputs)
    return jnp.sum(h**2)


def rnn_args(length=60, dtype="float32"):
    random = np.random.default_rng(0)
    array = lambda *s: (random.normal(size=s) / 4).astype(dtype)  # noqa: E731
    return {"h": array(WIDTH, WIDTH), "x": array(4, WIDTH)}, array(length, 8, 4)


def nested_loss(weights, x):
    """A loop in a loop."""

    def outer(x, group):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, group)

    return jnp.sum(lax.scan(outer, x, weights)[0] ** 2)


def nested_args(dtype="float32"):
    random = np.random.default_rng(0)
    return (
        (random.normal(size=(4, 6, WIDTH, WIDTH)) / 4).astype(dtype),
        random.normal(size=(ROWS, WIDTH)).astype(dtype),
    )


LOOPS = {
    "decoder": (decoder_loss, decoder_args),
    "reverse": (functools.partial(decoder_loss, reverse=True), decoder_args),
    "prime length": (decoder_loss, functools.partial(decoder_args, 13)),
    "rnn": (rnn_loss, rnn_args),
    "nested": (nested_loss, nested_args),
}


def shapes(args):
    return jax.eval_shape(lambda *a: a, *args)


def has_binomial(saved):
    parts = [part for plan in saved if isinstance(plan, LoopPlan) for part in plan.parts]
    return any(part.num_states or has_binomial(part.body.saved) for part in parts)


def some_candidates(s, most=5):
    step = max(1, len(s.candidates) // most)
    return s.candidates[::step]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("decoder", "reverse") else n for n in LOOPS]
)
def test_gradients_are_those_of_the_plain_loop(name):
    fun, make = LOOPS[name]
    with x64():
        args = make(dtype="float64")
        s = analysed(fun, *args)
        assert any(isinstance(c, LoopPlan) for choices in all_saves(s) for c in choices)
        flat = jax.tree.leaves(args)
        wanted = jit(s.objective.differentiated(lambda *x: run(s.program, *x)))(*flat)
        for candidate in some_candidates(s):
            found = jit(s.objective.differentiated(s.planned(candidate)))(*flat)
            assert_close(found, wanted, 1e-12)


@pytest.mark.parametrize("name", LOOPS)
def test_predicted_recomputation_is_what_jax_does(name):
    fun, make = LOOPS[name]
    s = analysed(fun, *shapes(make()))
    specs = [jax.ShapeDtypeStruct(s.program.avals[v].shape, s.program.avals[v].dtype) for v in s.program.inputs]
    counted = lambda f: gradient_cost(s.objective.differentiated(f), *specs).flops  # noqa: E731
    base = counted(lambda *x: run(s.program, *x))
    for candidate in some_candidates(s):
        if has_binomial(s.saved(candidate)):
            continue  # how often its loops run is in a table, not in the jaxpr: tests/test_binomial.py counts it
        extra = counted(s.planned(candidate)) - base
        assert s.recompute_flops(candidate) == pytest.approx(extra, abs=0.02 * base)


def test_predicted_recomputation_of_a_binomial_loop_counts_what_its_table_runs_again():
    specs = shapes(rnn_args())
    s = analysed(rnn_loss, *specs)
    flat = jax.tree.leaves(specs)
    counted = lambda f: gradient_cost(s.objective.differentiated(f), *flat).flops  # noqa: E731
    base = counted(lambda *x: run(s.program, *x))
    (eqn,) = [e for e in s.program.equations if loop_of(e)]
    forward = jaxpr_cost(eqn.params["jaxpr"].jaxpr).flops
    seen = 0
    for candidate in some_candidates(s, 20):
        (loop,) = [saved for saved in s.saved(candidate) if isinstance(saved, LoopPlan)]
        if loop.parts[0].num_states is None:
            continue
        (part,) = loop.parts
        # The jaxpr counts one trip of the inner loop for every iteration of the outer one.
        missing = num_again(60, part.num_states) - 60
        extra = counted(s.planned(candidate)) - base + missing * forward
        assert s.recompute_flops(candidate) == pytest.approx(extra, abs=0.02 * base)
        seen += 1
    assert seen > 1


@pytest.mark.parametrize("length", [13, 24])
def test_a_checkpointed_body_is_never_better(length):
    specs = shapes(decoder_args(length, rows=512))
    by_hand = lambda params, x: decoder_loss(params, x, wrap=checkpointed)  # noqa: E731
    flops = [gradient_cost(jax.value_and_grad(f), *specs).flops for f in (by_hand, decoder_loss)]
    s = analysed(decoder_loss, *specs)
    alike = next(c for c in s.candidates if s.recompute_flops(c) <= flops[0] - flops[1])
    # Small buffers are aligned as they come.
    assert s.measure(alike).temp_bytes <= jaxckpt.measure(by_hand, *specs).temp_bytes + 1024


def test_options_of_a_long_loop_stand_close_together():
    # A CPU copies the slices of a loop that is cut in two, so there is a gap beyond the last plan of one part.
    s = analysed(rnn_loss, *shapes(rnn_args(1000)), target="h100")
    peaks = [c.judgement.peak_bytes for c in s.candidates]
    assert max(b / a for a, b in itertools.pairwise(peaks)) < 1.25
    (options,) = [b.options for b in s.blocks.problem.blocks if len(b.options) > 20]
    assert len(options) <= 129


def test_a_limit_that_is_the_cost_of_a_checkpointed_body_is_met_exactly():
    specs = shapes(decoder_args(13, rows=512))
    by_hand = lambda params, x: decoder_loss(params, x, wrap=checkpointed)  # noqa: E731
    flops = [gradient_cost(jax.value_and_grad(f), *specs).flops for f in (by_hand, decoder_loss)]
    plan = jaxckpt.plan(decoder_loss, *specs, max_cost=flops[0] / flops[1], cost="flops")
    assert plan.unplanned_cost == flops[1] and plan.recompute_cost <= flops[0] - flops[1]
    # Small buffers are aligned as they come.
    assert plan.measured_peak_bytes <= jaxckpt.measure(by_hand, *specs).device_bytes + 1024


def stacking_loss(weights, x):
    """A cheap layer that keeps many values of its input's size, so that stacking them takes longer than making them."""

    def layer(x, w):
        for _ in range(4):
            x = x + 0.1 * jnp.sin(x * w[None])
        return x, None

    return jnp.sum(lax.scan(layer, x, weights)[0] ** 2)


def stacking_args():
    random = np.random.default_rng(0)
    return random.normal(size=(32, 128)).astype(np.float32), random.normal(size=(4096, 128)).astype(np.float32)


def test_what_a_loop_stacks_takes_time_and_no_flops():
    specs = shapes(stacking_args())
    timed, counted = (analysed(stacking_loss, *specs, cost=cost) for cost in ("time", "flops"))
    assert timed.unplanned.judgement.extra_work > 0 == counted.unplanned.judgement.extra_work
    assert timed.extra_cost(timed.unplanned) == 0
    # Twice the time goes into the stacks of twice the iterations.
    twice = analysed(stacking_loss, *shapes((np.zeros((64, 128), np.float32), stacking_args()[1])), cost="time")
    assert twice.unplanned.judgement.extra_work == pytest.approx(2 * timed.unplanned.judgement.extra_work, rel=0.01)


def test_a_plan_that_stacks_less_is_taken_where_everything_fits():
    args = stacking_args()
    plan = jaxckpt.plan(stacking_loss, *shapes(args), budget="8GB")
    assert plan.schedule is not None and plan.recompute_cost < -0.05 * plan.unplanned_cost
    assert plan.measured_peak_bytes < plan.unplanned_peak_bytes and plan.is_unplanned_measured
    assert "saved: less stacking" in str(plan)
    wanted, got = (jit(jax.grad(f))(*args) for f in (stacking_loss, plan.apply(stacking_loss)))
    assert_close(got, wanted, 1e-5)
    predicted = jaxckpt.plan(stacking_loss, *shapes(args), budget="8GB", verify=False, calibration=None)
    assert predicted.recompute_cost == plan.recompute_cost and predicted.measured_peak_bytes is None


def test_a_report_says_how_a_loop_is_run():
    specs = shapes(rnn_args(60))
    plan = jaxckpt.plan(rnn_loss, *specs, max_cost=1.3, verify=False, cost="flops")
    (loop,) = [saved for saved in plan.block_saves if isinstance(saved, LoopPlan)]
    report = str(plan)
    for part in loop.parts:
        assert f"{' x '.join(map(str, part.lengths))} iterations" in report
    (stacks,) = [group for group in plan.saved if group.shape_dtype == "stacks of 60 iterations"]
    assert stacks.size_bytes > 60 * 8 * WIDTH * 4 // 10 and "stacks of 60 iterations" in report


def test_what_is_saved_is_shown_in_bytes_of_all_devices():
    traced = trace(rnn_loss, shapes(rnn_args(60)))
    goal = objective(traced, 0, False)
    whole, halves = (Analysis(traced.program, goal, "flops", "auto", None, split) for split in (1, 2))
    pairs = list(zip(whole.candidates, halves.candidates, strict=True))
    assert any("stacks" in group.shape_dtype for c, _ in pairs for group in saved_groups(whole, c))
    assert all(saved_groups(whole, a) == saved_groups(halves, b) for a, b in pairs)


def test_where_everything_fits_nothing_is_planned_for_little():
    assert jaxckpt.plan(stacking_loss, *shapes(stacking_args()), budget="8GB", cost="flops").schedule is None
    specs = shapes(
        ({"up": np.zeros((8, 256, 1024), "f4"), "down": np.zeros((8, 1024, 256), "f4")}, np.zeros((256, 256), "f4"))
    )
    assert jaxckpt.plan(decoder_loss, *specs, budget="8GB", cost="time").schedule is None


def test_no_iteration_of_a_loop_is_left_alone():
    # Compilers put a loop of one iteration in line, and then hold more than the model says.
    s = analysed(rnn_loss, *shapes(rnn_args(60)))
    plans = [x for choices in all_saves(s) for x in choices if isinstance(x, LoopPlan)]
    assert len(plans) > 20 and all(p.lengths != (1,) for plan in plans for p in plan.parts)


@pytest.mark.slow
def test_predicted_bytes_are_those_that_xla_measures():
    s = analysed(decoder_loss, *shapes(decoder_args(64, rows=4096)))
    for candidate in some_candidates(s):
        measured = s.measure(candidate).temp_bytes
        assert candidate.judgement.peak_bytes == pytest.approx(measured, rel=0.15)


def test_least_bytes_are_far_below_those_of_a_checkpointed_body():
    params, x = shapes(decoder_args(64, rows=4096))

    def checkpointed(params, x):
        layer = lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None)  # noqa: E731
        return jnp.sum(lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params)[0] ** 2)

    by_hand = jaxckpt.measure(checkpointed, params, x).temp_bytes
    floor = jaxckpt.measure(decoder_loss, *shapes(decoder_args(1, rows=4096))).temp_bytes
    s = analysed(decoder_loss, params, x)
    least = min(s.measure(c).temp_bytes for c in s.candidates[:3])
    assert least - floor <= 0.5 * (by_hand - floor)


def test_a_plan_within_a_budget_survives_a_file(tmp_path):
    args = shapes(decoder_args(24, rows=1024))
    plan = jaxckpt.plan(decoder_loss, *args, budget="30%")
    assert plan.measured_peak_bytes <= plan.budget_bytes
    plan.save(tmp_path / "plan.json")
    loaded = jaxckpt.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    params, x = decoder_args(24, rows=1024)
    again = jax.jit(jax.value_and_grad(loaded.apply(decoder_loss)))(params, x)
    assert_close(again, jax.jit(jax.value_and_grad(decoder_loss))(params, x), 1e-4)


def test_the_jaxpr_does_not_grow_with_the_length():
    sizes = []
    for length in (16, 64):
        args = shapes(rnn_args(length))
        s = analysed(rnn_loss, *args)
        least = s.planned(s.candidates[0])
        sizes.append(count(s.objective.differentiated(least), *jax.tree.leaves(args)).total())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[(7,)], [(2, 3), (1,)], [(2, 1, 3), (1,)], [(3,), (2, 2)]])
def test_parts_and_levels_run_every_iteration_in_order(lengths, reverse):
    def fun(x, xs):
        return lax.scan(lambda c, x: (c * 0.5 + x, (c, 2.0)), x, xs, reverse=reverse)

    args = jnp.float32(3.0), jnp.arange(7, dtype="float32")
    program = trace(fun, args).program
    (eqn,) = [e for e in program.equations if loop_of(e)]
    body = functools.partial(run, loop_of(eqn).body)
    found = run_loop(eqn, list(args), [Run(lengths=part, body=body) for part in lengths])
    assert_close(found, jax.tree.leaves(fun(*args)), 0)


def test_a_loop_without_tangents_is_left_alone():
    def fun(w, n):
        steps = lax.scan(lambda c, x: (c + x, c), 0.0, n)[0]
        return jnp.sum(jnp.tanh(w @ w) ** 2) + lax.stop_gradient(steps)

    s = analysed(fun, jnp.ones((8, 8)), jnp.ones(5))
    assert not any(isinstance(c, LoopPlan) for choices in all_saves(s) for c in choices)


def gated_loss(params, x, wrap=lambda layer: layer):
    """Layers of three products of the same depth and one more, by scan."""

    def layer(x, p):
        gate, up, shift = (jax.ad_checkpoint.checkpoint_name(x @ p[name], name) for name in ("gate", "up", "shift"))
        return x + (jax.nn.silu(gate) * up + jnp.sin(shift)) @ p["down"], None

    return jnp.sum(lax.scan(wrap(layer), x, params)[0] ** 2)


def gated_args():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    names = ("gate", "up", "shift", "down")
    return {name: shape(LENGTH, 4 * WIDTH, 4 * WIDTH) for name in names}, shape(1024, 4 * WIDTH)


_POLICIES = jax.checkpoint_policies


@pytest.mark.parametrize(
    "policy",
    [
        _POLICIES.dots_saveable,
        _POLICIES.save_only_these_names("gate"),
        _POLICIES.save_only_these_names("up", "shift"),
    ],
)
def test_a_policy_on_the_body_is_met_at_its_cost(policy):
    specs = gated_args()
    by_hand = functools.partial(gated_loss, wrap=lambda f: jax.checkpoint(f, prevent_cse=False, policy=policy))
    theirs, plain = (gradient_cost(jax.value_and_grad(f), *specs).flops for f in (by_hand, gated_loss))
    s = analysed(gated_loss, *specs)
    alike = next(c for c in s.candidates if s.recompute_flops(c) <= theirs - plain)
    # Which two of three like products are saved makes a matrix of 16 KiB.
    assert s.measure(alike).temp_bytes <= 1.002 * jaxckpt.measure(by_hand, *specs).temp_bytes
