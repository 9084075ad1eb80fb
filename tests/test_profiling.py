"""Blocks compiled one by one: the compiler's bytes and this device's times in the place of the model's."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.compilation.objective import objective
from jaxckpt.search import analysis
from jaxckpt.targets import install
from jaxckpt.targets.chip import find_chip
from jaxckpt.targets.sharding import trace_placed

X = jax.ShapeDtypeStruct((2048, 64), jnp.float32)
WS = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 8


def loss(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def analyses(fun, *args, cost="time"):
    traced = trace_placed(fun, args)
    goal = objective(traced, 0, False)
    return [
        analysis.find_analysis(traced.program, goal, cost, "auto", None, is_profiled) for is_profiled in (False, True)
    ]


def test_a_profiled_plan_says_so_and_fits():
    plan = jaxckpt.plan(loss, WS, X, budget="60%", profile=True)
    assert plan.is_profiled and plan.measured_peak_bytes <= plan.budget_bytes
    assert "profiled" in str(plan) and jaxckpt.Plan.from_json(plan.to_json()) == plan
    assert plan.calibration is None
    assert not jaxckpt.plan(loss, WS, X, budget="60%").is_profiled


def test_each_distinct_block_is_compiled_once():
    modelled, profiled = analyses(loss, WS, X)
    assert modelled.profiler is None
    longer = analyses(loss, WS * 2, X)[1]
    # More layers are more of the same blocks.
    assert 0 < longer.profiler.num_programs <= 1.2 * profiled.profiler.num_programs


def test_options_keep_their_bytes_and_take_measured_times():
    modelled, profiled = analyses(loss, WS, X)
    for ours, theirs in zip(profiled.blocks.problem.blocks, modelled.blocks.problem.blocks, strict=True):
        assert [o.saved_bytes for o in ours.options] == [o.saved_bytes for o in theirs.options]
        assert ours.options[-1].recompute_time == 0
        assert all(o.backward_peak_bytes >= o.saved_bytes for o in ours.options)
    assert profiled.unplanned_cost != modelled.unplanned_cost > 0
    # FLOPs are counted either way.
    assert profiled.blocks.forward_flops == modelled.blocks.forward_flops


def test_what_the_model_does_not_know_is_in_the_profile():
    # A sort needs its operand again and the positions, which the model takes for one result.
    def sorted_loss(w, x):
        return jnp.sum(jnp.sort(jnp.tanh(x @ w), axis=0)[::7] ** 2)

    modelled, profiled = analyses(sorted_loss, WS[0], X, cost="flops")
    peaks = [[b.forward_peak_bytes for b in s.blocks.problem.blocks] for s in (modelled, profiled)]
    assert peaks[0] != peaks[1] and profiled.unplanned_cost == modelled.unplanned_cost


def test_a_loops_body_is_profiled_too():
    def scanned(ws, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0] ** 2)

    stacked = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)
    assert analyses(scanned, stacked, X)[1].profiler.num_programs > 0
    plan = jaxckpt.plan(scanned, stacked, X, budget="60%", profile=True)
    assert plan.measured_peak_bytes <= plan.budget_bytes


def test_a_body_that_reads_its_saved_values_from_stacks_is_profiled_so():
    def layer(x, w):
        return x + jnp.sort(jnp.tanh(x @ w), axis=0), None

    stacked = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)
    studied = analyses(lambda ws, x: jnp.mean(jax.lax.scan(layer, x, ws)[0] ** 2), stacked, X, cost="flops")
    options = [[o for block in s.blocks.problem.blocks for o in block.options] for s in studied]
    peaks = [{o.saved_bytes: o.backward_peak_bytes for o in each} for each in options]
    plain = [o.saved_bytes for o in options[0] if o.name == "scan 8"]
    assert plain and all(peaks[0][size] != peaks[1].get(size) for size in plain)


@pytest.mark.slow
def test_a_block_that_reads_a_key_keeps_its_modelled_times():
    def dropped(ws, x, key):
        for w in ws:
            key, own = jax.random.split(key)
            x = jnp.where(jax.random.bernoulli(own, 0.5, x.shape), jnp.tanh(x @ w), 0.0)
        return jnp.mean(x**2)

    key = jax.eval_shape(jax.random.key, 0)
    modelled, profiled = analyses(dropped, WS[:3], X, key)
    assert profiled.profiler.num_programs > 0 and profiled.candidates
    assert len(profiled.blocks.spans) == len(modelled.blocks.spans)


@pytest.mark.targets
def test_blocks_are_profiled_by_a_compiler_of_a_chip_that_is_not_here():
    if install.unusable(find_chip("h100")):
        pytest.skip("its compiler is not installed")
    x, ws = jax.ShapeDtypeStruct((131072, 256), jnp.float32), [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 6
    plan = jaxckpt.plan(loss, ws, x, budget="70%", target="h100:1", profile=True)
    assert plan.is_profiled and plan.measured_peak_bytes <= plan.budget_bytes
