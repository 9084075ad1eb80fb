"""Conditionals inside a planned function: planned inside, the same numbers, the bytes and FLOPs that were predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_saves, analysed, assert_close, equations, jit, slow_but, x64
from jax import lax
from jax.extend.core import primitives as prims

import jaxckpt
from jaxckpt.kinds.cond_run import BranchPlan
from jaxckpt.kinds.scan_run import LoopPlan
from jaxckpt.program.flops import gradient_cost
from jaxckpt.program.interpret import run

LENGTH, ROWS, WIDTH = 12, 64, 16


def scanned(x, ws):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, ws)[0]


def stacked(x, ws):
    for w in ws[:5]:
        x = jnp.tanh(x @ w)
    return x


def light(x, ws):
    del ws
    return jnp.sin(x)


def constant(x, ws):
    del ws
    return jnp.ones_like(x)


def switched(*branches):
    """A conditional between two layers; which branch runs depends on the data."""

    def loss(ws, x):
        x = jnp.tanh(x @ ws[0])
        index = (jnp.sum(x) > 0).astype("int32")
        return jnp.sum(jnp.tanh(lax.switch(index, branches, x, ws) @ ws[1]) ** 2)

    return loss


def in_a_loop(ws, x):
    """A conditional in every iteration, with a loop in one branch."""

    def step(c, w):
        inner = lambda c: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, length=6)[0]  # noqa: E731
        return lax.cond(jnp.sum(c) > 0, inner, lambda c: jnp.sin(c @ w), c), None

    return jnp.sum(lax.scan(step, x, ws)[0] ** 2)


def nested(ws, x):
    """A conditional in a branch of another one."""
    inner = lambda x: lax.cond(jnp.max(x) > 2, scanned, light, x, ws)  # noqa: E731
    return jnp.sum(jnp.tanh(lax.cond(jnp.sum(x) > 0, inner, lambda x: x * 2, x)) ** 2)


LOSSES = {
    "scan": switched(light, scanned),
    "layers": switched(stacked, light),
    "two": switched(stacked, scanned),
    "constant": switched(constant, scanned),
    "in a loop": in_a_loop,
    "nested": nested,
}

QUICK = ("scan", "in a loop")
EACH = slow_but(LOSSES, *QUICK)


def args(dtype="float32", rows=ROWS):
    random = np.random.default_rng(0)
    return (random.normal(size=(LENGTH, WIDTH, WIDTH)) / 3).astype(dtype), random.normal(size=(rows, WIDTH)).astype(
        dtype
    )


def shapes(rows=ROWS):
    return jax.eval_shape(lambda *a: a, *args(rows=rows))


def kinds(saved):
    """The kinds of plans in what blocks save, those inside of them too."""
    for plan in saved:
        trees = plan.branches if isinstance(plan, BranchPlan) else ()
        trees = [part.body for part in plan.parts] if isinstance(plan, LoopPlan) else trees
        if isinstance(plan, BranchPlan | LoopPlan):
            yield plan
        for tree in trees:
            yield from kinds(tree.saved)


def inside(conditional):
    """The equations of all branches."""
    for branch in conditional.params["branches"]:
        yield from equations(getattr(branch, "jaxpr", branch))


def has_binomial(saved):
    return any(part.num_states for plan in kinds(saved) if isinstance(plan, LoopPlan) for part in plan.parts)


def some(candidates, most=5):
    return candidates[:: -(-len(candidates) // most)]


@pytest.mark.parametrize("name", EACH)
def test_gradients_are_those_of_the_plain_conditional(name):
    with x64():
        ws, x = args("float64")
        s = analysed(LOSSES[name], ws, x)
        found = [list(kinds(s.saved(c))) for c in s.candidates]
        assert any(isinstance(plan, BranchPlan) for plans in found for plan in plans)
        if name != "layers":
            assert any(isinstance(plan, LoopPlan) for plans in found for plan in plans)
        # Whichever branch runs.
        plain = jit(s.objective.differentiated(lambda *a: run(s.program, *a)))
        for candidate in some(s.candidates, 2):
            planned = jit(s.objective.differentiated(s.planned(candidate)))
            for shift in (-1, 1):
                assert_close(planned(ws, x + shift), plain(ws, x + shift), 1e-11)


# How often a loop with few states runs is in no jaxpr, and every plan of the nested one has such loops.
@pytest.mark.parametrize("name", slow_but([name for name in LOSSES if name != "nested"], *QUICK))
def test_predicted_recomputation_is_what_jax_does(name):
    s = analysed(LOSSES[name], *shapes())
    flat = [jax.ShapeDtypeStruct(s.program.avals[v].shape, s.program.avals[v].dtype) for v in s.program.inputs]
    counted = lambda f: gradient_cost(s.objective.differentiated(f), *flat).flops  # noqa: E731
    base = counted(lambda *a: run(s.program, *a))
    countable = [candidate for candidate in s.candidates if not has_binomial(s.saved(candidate))]
    assert countable
    for candidate in some(countable):
        extra = counted(s.planned(candidate)) - base
        assert s.recompute_flops(candidate) == pytest.approx(extra, abs=0.03 * base)


@pytest.mark.parametrize("name", ["scan", pytest.param("layers", marks=pytest.mark.slow)])
def test_predicted_peak_is_what_the_compiler_measures(name):
    s = analysed(LOSSES[name], *shapes(rows=4096))
    for candidate in some(s.candidates, 3):
        measured = s.measure(candidate).temp_bytes
        assert 0.9 * measured <= candidate.judgement.peak_bytes <= 1.7 * measured
    unplanned, least = (s.measure(c).temp_bytes for c in (None, s.candidates[0]))
    assert least < 0.4 * unplanned


def test_a_plan_survives_a_file(tmp_path):
    ws, x = args(rows=4096)
    plan = jaxckpt.plan(LOSSES["scan"], ws, x, budget="50%")
    assert plan.measured_peak_bytes <= plan.budget_bytes
    plan.save(tmp_path / "plan.json")
    loaded = jaxckpt.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    fun = LOSSES["scan"]
    assert_close(jit(jax.grad(loaded.apply(fun)))(ws, x), jit(jax.grad(fun))(ws, x), 1e-4)


def test_what_is_not_worth_a_plan_is_left_whole():
    branches = jnp.sin, jnp.cos  # nothing in them takes a buffer
    s = analysed(lambda x: jnp.sum(lax.cond(x[0] > 0, *branches, x) ** 2), jnp.ones(8))
    assert not any(isinstance(saved, BranchPlan) for choices in all_saves(s) for saved in choices)

    def by_platform(x):
        return jnp.sum(lax.platform_dependent(x, cpu=lambda x: jnp.tanh(x @ x), default=lambda x: jnp.cos(x @ x)))

    s = analysed(by_platform, jnp.ones((8, 8)))
    assert not any(isinstance(saved, BranchPlan) for choices in all_saves(s) for saved in choices)


def test_the_plan_is_inside_the_branches():
    ws, x = args(rows=4096)
    planned = jaxckpt.auto_remat(LOSSES["layers"], budget="60%", cost="flops", verify=False)
    gradient = jax.make_jaxpr(jax.grad(planned))(ws, x)
    conditionals = [eqn for eqn in equations(gradient.jaxpr) if eqn.primitive is prims.cond_p]
    assert sum(e.primitive is prims.remat_p for eqn in conditionals for e in inside(eqn)) > 1


def test_every_option_of_a_conditional_is_another_one():
    (choices,) = [c for c in all_saves(analysed(LOSSES["scan"], *shapes())) if isinstance(c[0], BranchPlan)]
    assert len(set(choices)) == len(choices) > 3
