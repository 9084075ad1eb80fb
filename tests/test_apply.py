"""A schedule applied: the same values and gradients, and recomputation really there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ckptsolvers import Keep, Schedule, simulate
from ckptsolvers.schedule import region
from helpers import CASES, analysed, analysis_of, assert_close, count, jit, names, x64
from jax.extend.core import primitives as prims
from zoo import gpt, models
from zoo.models import MODELS

from jaxckpt.apply import planned as apply_planned
from jaxckpt.model.cut import spans_at
from jaxckpt.model.option import SavedValues
from jaxckpt.model.schedules import Candidate
from jaxckpt.program.flops import gradient_cost
from jaxckpt.program.interpret import run


def planned(s, candidate):
    return s.planned(candidate)


def judged(s, schedule):
    """A candidate of any schedule over the fine cut."""
    return Candidate(schedule, simulate(s.blocks.problem, schedule), s.blocks.problem)


def unplanned(s):
    return functools.partial(run, s.program)


def random_schedule(problem, rng):
    """Any tree over the blocks, under any options, some four regions deep."""

    def nodes(start, stop, depth):
        found, at = [], start
        while at < stop:
            end = int(rng.integers(at + 1, stop + 1))
            if depth < 4 and end - at < stop - start and rng.random() < 0.5:
                found.append(region(nodes(at, end, depth + 1)))
                at = end
            else:
                found.append(Keep(at, int(rng.integers(len(problem.blocks[at].options)))))
                at += 1
        return tuple(found)

    return Schedule(nodes(0, problem.num_blocks, 0))


@functools.cache
def double(name):
    """A case in float64: its analysis, its arguments and its gradient without a plan."""
    with x64():
        if name == "gpt":
            config = dataclasses.replace(gpt.TINY, dtype="float64")
            fun, args, aux = gpt.make_loss(config), jax.jit(gpt.init, static_argnums=0)(config), False
        else:
            fun, args, aux = MODELS[name].fun, MODELS[name].args("float64"), MODELS[name].has_aux
        s = analysed(fun, *args, has_aux=aux)
        leaves = jax.tree.leaves(args)
        return s, leaves, jit(s.objective.differentiated(unplanned(s)))(*leaves)


@pytest.mark.parametrize("name", [*MODELS, pytest.param("gpt", marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_the_function(name):
    s, leaves, wanted = double(name)
    for candidate in s.candidates[:: len(s.candidates) // 2 + 1]:
        with x64():
            got = jit(s.objective.differentiated(planned(s, candidate)))(*leaves)
        assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["chain", "unet", "conv"])
def test_any_schedule_gives_the_same_gradients(name, seed):
    s, leaves, wanted = double(name)
    schedule = random_schedule(s.blocks.problem, np.random.default_rng(seed))
    with x64():
        got = jit(s.objective.differentiated(planned(s, judged(s, schedule))))(*leaves)
    assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["chain", "unet", "residual"])
def test_no_schedule_recomputes_more_than_the_judge_says(name, seed):
    s = analysis_of(name)
    schedule = random_schedule(s.blocks.problem, np.random.default_rng(seed))
    specs = jax.tree.leaves(CASES[name][1])
    base = gradient_cost(s.objective.differentiated(unplanned(s)), *specs).flops
    found = gradient_cost(s.objective.differentiated(planned(s, judged(s, schedule))), *specs).flops - base
    judgement = simulate(s.blocks.problem, schedule)
    predicted = s.blocks.flops(schedule, judgement) - s.blocks.forward_flops
    assert predicted == judgement.extra_work, "times are FLOPs here"
    # Less where a region makes what only a dead value reads; what solvers choose agrees both ways (test_blocks).
    assert 0 <= found <= predicted + 0.005 * base


def test_counting_sees_a_checkpoint_and_what_it_repeats():
    plain = lambda x: jnp.sin(jnp.sin(x))  # noqa: E731
    checkpointed, kept = count(jax.grad(jax.checkpoint(plain)), 1.0), count(jax.grad(plain), 1.0)
    assert checkpointed["checkpoint"] == 1 and not kept["checkpoint"]
    assert checkpointed["sin"] + checkpointed["cos"] > 0


@pytest.mark.parametrize("name", CASES)
def test_recomputation_is_really_there(name):
    s, specs = analysis_of(name), jax.tree.leaves(CASES[name][1])
    heavy = MODELS[name].heavy if name in MODELS else "dot_general"
    base = count(s.objective.differentiated(unplanned(s)), *specs)
    least = count(s.objective.differentiated(planned(s, s.candidates[0])), *specs)
    assert least[heavy] > base[heavy]
    assert not base["checkpoint"] and least["checkpoint"]


def test_a_plan_that_keeps_everything_has_no_checkpoint():
    s, specs = analysis_of("chain"), jax.tree.leaves(CASES["chain"][1])
    fun = planned(s, s.unplanned)
    assert not count(fun, *specs)["checkpoint"]
    wanted = count(s.objective.differentiated(unplanned(s)), *specs)
    found = count(s.objective.differentiated(fun), *specs)
    # What equal blocks have in common is one function, and its derivative is a call.
    assert {name: n for name, n in found.items() if name != "jit"} == wanted


@pytest.mark.parametrize("name", CASES)
def test_every_saved_name_occurs(name):
    s, specs = analysis_of(name), jax.tree.leaves(CASES[name][1])
    for candidate in s.candidates[:: max(1, len(s.candidates) // 4)]:
        saved = s.saved(candidate)
        # Equal blocks have equal names.
        wanted = {f"jaxckpt.{i}" for save in saved for i in range(len(save.named_values))}
        assert names(planned(s, candidate), *specs) >= wanted


def control_flow(w, x):
    """Every construct with a jaxpr of its own, two with a rule of their own."""
    double_sine = jax.custom_jvp(lambda x: jnp.sin(2 * x))
    double_sine.defjvp(lambda p, t: (double_sine(*p), 2 * jnp.cos(2 * p[0]) * t[0]))
    clipped = jax.custom_vjp(lambda x: x * 2)
    clipped.defvjp(lambda x: (x * 2, x), lambda x, ct: (jnp.clip(2 * ct, -1, 1),))
    x = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]
    x = jax.lax.cond(x[0, 0] > 0, lambda x: jnp.sin(x @ w), lambda x: x @ w, x)
    x = jax.checkpoint(lambda x: double_sine(x @ w))(x)
    x = jax.lax.fori_loop(0, 3, lambda _, c: c @ w, x)
    x = clipped(jnp.tanh(x @ w))
    return jnp.sum(x @ w)


def test_control_flow_and_custom_rules_survive():
    weights, x = models.chain_args("float64", layers=1, rows=8, width=8)
    with x64():
        s = analysed(control_flow, weights[0], x)
        wanted = jit(s.objective.differentiated(unplanned(s)))(weights[0], x)
        last = s.blocks.problem.num_blocks - 1
        keep_nothing = Schedule((region(tuple(Keep(k, 0) for k in range(last))), Keep(last, 0)))
        got = jit(s.objective.differentiated(planned(s, judged(s, keep_nothing))))(weights[0], x)
    assert_close(got, wanted, 1e-10)


def layers(weights, x):
    """Equal layers in scopes of their own."""
    for i, w in enumerate(weights):
        with jax.named_scope(f"h{i}"):
            x = jnp.tanh(jnp.sin(x) @ w) + 0.5
            x = jnp.where(x > 0.1, x, 0.25 * x)
    return jnp.sum(x**2)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_equal_regions_are_one_function_whatever_their_values_and_scopes_are_called(num_layers):
    weights, x = models.chain_args("float64", layers=8, rows=16, width=8)
    with x64():
        s = analysed(layers, weights, x)
        # A cut of our own, so that a region is one layer, or reaches over two.
        starts = [k for k, eqn in enumerate(s.program.equations) if eqn.primitive.name == "sin"]
        ends = [*starts[num_layers::num_layers], len(s.program.equations)]
        spans = spans_at(s.program, [tuple(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)])
        nodes = tuple(region((Keep(k, 0),)) for k in range(len(spans) - 1))
        schedule = Schedule((*nodes, Keep(len(spans) - 1, 0)))
        fun = apply_planned(s.program, spans, schedule, [SavedValues(())] * len(spans))
        leaves = [*weights, x]
        regions = [e for e in jax.make_jaxpr(fun)(*leaves).eqns if e.primitive is prims.remat_p]
        assert len(regions) == len(spans)
        assert len({id(e.params["jaxpr"]) for e in regions[:-1]}) == 1
        scopes = [str(e.source_info.name_stack) for e in regions[:-1]]
        firsts = range(0, 8 - num_layers, num_layers)
        assert scopes == [f"h{i}" if num_layers == 1 else f"h{i}..h{i + 1}" for i in firsts]
        wanted = jit(s.objective.differentiated(unplanned(s)))(*leaves)
        assert_close(jit(s.objective.differentiated(fun))(*leaves), wanted, 1e-12)


def test_regions_that_differ_in_a_number_are_two_functions():
    def fun(x):
        for scale in (2.0, 3.0, 2.0, -0.0, 0.0):
            x = jnp.sin(x) * scale + x
        return jnp.sum(x)

    with x64():
        x = jnp.linspace(0.0, 1.0, 64)
        s = analysed(fun, x)
        starts = [k for k, eqn in enumerate(s.program.equations) if eqn.primitive.name == "sin"]
        ends = [*starts[1:], len(s.program.equations)]
        spans = spans_at(s.program, [tuple(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)])
        schedule = Schedule(tuple(Keep(k, 0) for k in range(len(spans))))
        planned_fun = apply_planned(s.program, spans, schedule, [SavedValues(())] * len(spans))
        regions = [e for e in jax.make_jaxpr(planned_fun)(x).eqns if e.primitive is prims.remat_p]
        first, second, third, *zeros = (id(e.params["jaxpr"]) for e in regions)
        assert first == third != second and len(set(zeros)) == 2
        assert_close(jax.grad(lambda x: planned_fun(x)[0])(x), jax.grad(fun)(x), 1e-12)


def test_a_result_that_is_also_used_inside_is_returned():
    def fun(weights, x):
        values = []
        for w in weights:
            x = jnp.tanh(x @ w)
            values.append(x)
        return jnp.sum(x), values[::2]

    args = models.chain_args("float64", layers=5, rows=16, width=8)
    with x64():
        s = analysed(fun, *args, has_aux=True)
        leaves = jax.tree.leaves(args)
        wanted = jit(s.objective.differentiated(unplanned(s)))(*leaves)
        got = jit(s.objective.differentiated(planned(s, s.candidates[0])))(*leaves)
    assert_close(got, wanted, 1e-10)
