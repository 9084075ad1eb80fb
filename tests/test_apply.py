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
from zoo import gpt, models
from zoo.models import MODELS

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
    assert count(s.objective.differentiated(fun), *specs) == wanted


@pytest.mark.parametrize("name", CASES)
def test_every_saved_name_occurs(name):
    s, specs = analysis_of(name), jax.tree.leaves(CASES[name][1])
    for candidate in s.candidates[:: max(1, len(s.candidates) // 4)]:
        saved = s.saved(candidate)
        wanted = {f"jaxckpt.{k}.{i}" for k, save in enumerate(saved) for i in range(len(save.named_values))}
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
