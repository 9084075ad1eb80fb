"""From a budget to a plan, measured at every step."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ckptsolvers import solve_chain
from helpers import analysed, assert_close, count, jit, least_budget, no_compiles
from test_trace import run_python
from zoo.models import MODELS, chain_args, chain_loss, residual_args, residual_loss, unet_args, unet_loss

import jaxckpt
from jaxckpt import InfeasibleBudgetError
from jaxckpt.search import analysis

ARGS = chain_args(layers=12)
RESIDUAL = residual_args(layers=4)
UNET = unet_args(levels=5)
CASES = [
    pytest.param((chain_loss, ARGS), id="chain"),
    pytest.param((unet_loss, UNET), id="unet", marks=pytest.mark.slow),
    pytest.param((residual_loss, RESIDUAL), id="residual", marks=pytest.mark.slow),
]
BOTH_COSTS = ["flops", pytest.param("time", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def unplanned():
    return jaxckpt.measure(chain_loss, *ARGS).device_bytes


@pytest.mark.parametrize("share", [50, 70, 90])
def test_a_budget_is_kept_and_measured_however_it_is_written(unplanned, share):
    size = unplanned * share // 100
    budgets = [size, f"{share}%", f"{size / 1000:.3f}KB"]
    plans = [jaxckpt.plan(chain_loss, *ARGS, budget=budget) for budget in budgets]
    for plan in plans:
        assert plan.measured_peak_bytes <= plan.budget_bytes and abs(plan.budget_bytes - size) <= 1
        # A budget in bytes that is far below needs no compile without a plan.
        assert plan.is_unplanned_measured == (share > 50 or plan is plans[1])
        assert plan.unplanned_peak_bytes == (unplanned if plan.is_unplanned_measured else pytest.approx(unplanned, 0.1))
        assert plan.schedule == plans[0].schedule
        again = jaxckpt.measure(plan.apply(chain_loss), *ARGS).device_bytes
        assert again == plan.measured_peak_bytes


@pytest.mark.parametrize("budget", ["1GB", "100%"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_budget_that_fits_gives_the_function_back(budget, verify):
    plan = jaxckpt.plan(chain_loss, *ARGS, budget=budget, verify=verify)
    assert plan.schedule is None and plan.recompute_flops == 0 and plan.saved == ()
    assert not count(jax.grad(plan.apply(chain_loss)), *ARGS)["checkpoint"]
    assert "fits as it is" in str(plan)


def test_reserve_is_taken_off_the_budget(unplanned):
    plan = jaxckpt.plan(chain_loss, *ARGS, budget=unplanned, reserve=unplanned // 4)
    assert plan.measured_peak_bytes <= plan.budget_bytes == unplanned - unplanned // 4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cost", BOTH_COSTS)
def test_the_least_feasible_peak_is_feasible(case, cost):
    fun, args = case
    size = least_budget(fun, *args, cost=cost)
    plan = jaxckpt.plan(fun, *args, budget=size, cost=cost)
    assert plan.measured_peak_bytes <= size
    with pytest.raises(InfeasibleBudgetError) as caught:
        jaxckpt.plan(fun, *args, budget=size - 1, cost=cost)
    assert caught.value.least_peak_bytes == size


def test_the_least_feasible_peak_is_feasible_without_a_compile_too():
    size = least_budget(chain_loss, *ARGS, verify=False)
    plan = jaxckpt.plan(chain_loss, *ARGS, budget=size, verify=False)
    assert plan.predicted_peak_bytes <= size


@pytest.mark.parametrize("cost", BOTH_COSTS)
def test_a_lower_budget_never_takes_more_bytes_nor_less_work(cost):
    full = jaxckpt.measure(residual_loss, *RESIDUAL).device_bytes
    low = least_budget(residual_loss, *RESIDUAL, cost=cost)
    budgets = [low + (full - low) * i // 15 for i in range(16)]
    plans = [jaxckpt.plan(residual_loss, *RESIDUAL, budget=b, cost=cost) for b in budgets]
    for lower, higher in itertools.pairwise(plans):
        assert lower.measured_peak_bytes <= 1.01 * higher.measured_peak_bytes
        assert lower.recompute_cost >= higher.recompute_cost
    for budget, plan in zip(budgets, plans, strict=True):
        assert plan.measured_peak_bytes <= budget == plan.budget_bytes
    assert len({p.recompute_cost for p in plans}) > 5


@pytest.mark.parametrize("max_cost", [1, 1.05, 1.2])
def test_a_limit_on_cost_is_kept(max_cost):
    plan = jaxckpt.plan(residual_loss, *RESIDUAL, max_cost=max_cost, cost="flops")
    assert plan.budget_bytes is None and plan.max_cost == max_cost
    assert plan.recompute_cost <= (max_cost - 1) * plan.unplanned_cost
    assert plan.measured_peak_bytes <= plan.unplanned_peak_bytes


def test_more_cost_buys_bytes():
    peaks = [
        jaxckpt.plan(residual_loss, *RESIDUAL, max_cost=m, cost="flops").measured_peak_bytes for m in (1.01, 1.1, 1.3)
    ]
    assert peaks[2] < peaks[1] < peaks[0]


def test_without_a_compile_sizes_are_predicted_and_a_margin_is_left():
    with no_compiles():
        plan = jaxckpt.plan(residual_loss, *residual_args(layers=7), budget="60%", verify=False)
    assert plan.measured_peak_bytes is None and plan.num_compiles == 0
    assert not plan.is_unplanned_measured and plan.least_peak_bytes is None
    assert plan.predicted_peak_bytes < 0.97 * plan.budget_bytes
    report = str(plan)
    assert "margin" in report and "measured" not in report.replace("verify=True measures", "")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", ["chen", "revolve"])
def test_textbook_solvers_fit_and_do_no_better_than_auto(case, solver):
    fun, args = case
    full = jaxckpt.measure(fun, *args).device_bytes
    budget = (least_budget(fun, *args, solver=solver, cost="flops") + full) // 2
    book = jaxckpt.plan(fun, *args, budget=budget, solver=solver, cost="flops")
    auto = jaxckpt.plan(fun, *args, budget=budget, cost="flops")
    assert book.solver == solver and book.schedule is not None
    assert max(book.measured_peak_bytes, auto.measured_peak_bytes) <= budget
    # Half a percent of the step is not worth another compile.
    least_work = auto.recompute_cost - 0.005 * auto.unplanned_cost
    assert book.measured_peak_bytes > auto.measured_peak_bytes or book.recompute_cost >= least_work
    wanted, got = (jit(jax.grad(f))(*args) for f in (fun, book.apply(fun)))
    assert_close(got, wanted, 1e-4)
    # Both compile a few candidates, and how small buffers are packed differs by more than some of them do.
    assert least_budget(fun, *args, cost="flops") <= 1.02 * least_budget(fun, *args, solver=solver, cost="flops")


def test_a_function_may_be_the_solver():
    asked = []

    def my_solver(problem, *, budget_bytes):
        asked.append(budget_bytes)
        return solve_chain(problem, budget_bytes=budget_bytes).schedule

    plan = jaxckpt.plan(chain_loss, *ARGS, budget="60%", solver=my_solver)
    assert asked and plan.solver == "my_solver"
    assert plan.measured_peak_bytes <= plan.budget_bytes and plan.schedule is not None


def test_auxiliary_results_integers_and_keys_are_planned_around():
    model = MODELS["dropout"]
    plan = jaxckpt.plan(model.fun, *model.specs(), budget="80%", has_aux=True, verify=False)
    assert plan.schedule is not None
    args = model.args()
    (loss, aux), grads = jit(jax.value_and_grad(model.fun, has_aux=True))(*args)
    (got, got_aux), got_grads = jit(jax.value_and_grad(plan.apply(model.fun), has_aux=True))(*args)
    assert_close((got, got_aux, got_grads), (loss, aux, grads), 1e-4)


def test_argnums_say_what_is_differentiated():
    both = jaxckpt.plan(chain_loss, *ARGS, budget="70%", argnums=(0, 1))
    data = jaxckpt.plan(chain_loss, *ARGS, budget="70%", argnums=-1)
    assert both.parameter_bytes - data.parameter_bytes == sum(w.nbytes for w in ARGS[0])
    assert max(both.measured_peak_bytes / both.budget_bytes, data.measured_peak_bytes / data.budget_bytes) <= 1


def test_a_function_that_is_not_scalar_is_planned_by_its_vjp():
    def features(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x, {"mean": x.mean(0)}

    plan = jaxckpt.plan(features, *ARGS, budget="70%")
    assert plan.schedule is not None and plan.measured_peak_bytes <= plan.budget_bytes


def test_the_report_labels_every_number():
    plan = jaxckpt.plan(chain_loss, *ARGS, budget="70%")
    lines = {line.split("  ")[0]: line.rstrip() for line in str(plan).splitlines()}
    assert lines["budget"].endswith("given") and f"{plan.budget_bytes:,} bytes" in lines["budget"]
    assert lines["unplanned peak"].endswith("measured")
    assert lines["planned peak"].endswith("measured")
    assert lines["least feasible peak"].endswith(("predicted", "measured"))
    assert f"{plan.measured_peak_bytes:,}" in str(plan)
    assert "about" in lines["least feasible peak"] or f"{plan.least_peak_bytes:,}" in str(plan)
    for word in ("reserve", "fit", "Adam", "recompute", "models.py:", "f32[256,32]"):
        assert word in str(plan)


def test_what_is_saved_adds_up():
    plan = jaxckpt.plan(chain_loss, *ARGS, budget="70%")
    size = 4 * 256 * 32
    named = [g for g in plan.saved if g.shape_dtype != "what JAX keeps"]
    assert sum(g.count for g in named) * size == sum(g.size_bytes for g in named)
    assert {g.shape_dtype for g in named} == {"float32[256,32]"}
    assert sum(g.size_bytes for g in plan.saved) < plan.measured_peak_bytes


_PLAN_IN_A_PROCESS = """
import sys, json
sys.path.insert(0, {tests!r})
import jaxckpt
from zoo import gpt
from zoo.models import MODELS
cases = [(m.fun, m.specs(), m.has_aux) for m in (MODELS["unet"], MODELS["dropout"])]
options = dict(budget="70%", verify={verify}, calibration=None)
print(json.dumps([jaxckpt.plan(f, *a, has_aux=x, **options).to_json() for f, a, x in cases]))
"""


@pytest.mark.parametrize("verify", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plan_is_the_same_in_every_process(verify):
    code = _PLAN_IN_A_PROCESS.format(tests=str(Path(__file__).parent), verify=verify)
    first, second = (json.loads(run_python(code, seed)) for seed in (1, 2))
    assert first == second
    assert all(plan["schedule"] for plan in first)


def test_what_only_the_plans_of_another_cut_beat_is_a_rung_too():
    found = analysed(residual_loss, *RESIDUAL)
    unbeaten = {c.digest for c in found.candidates}
    assert unbeaten < {c.digest for c in found.all_candidates} and len(found.cuts) == 2
    of = [[c for c in found.all_candidates if found.kind(c) == kind] for kind in (0, 1)]
    for candidates in of:
        assert len(candidates) > 5
        works = [c.judgement.extra_work for c in candidates]
        assert works == sorted(set(works), reverse=True)
    for c in found.all_candidates:
        others = [d.judgement for d in of[1 - found.kind(c)]]
        as_good = (d.peak_bytes <= c.judgement.peak_bytes and d.extra_work <= c.judgement.extra_work for d in others)
        assert c.digest in unbeaten or any(as_good)


def test_a_plan_does_not_depend_on_what_was_planned_before():
    make = functools.partial(jaxckpt.plan, unet_loss, *UNET, calibration=None)
    low, high = make(budget="65%"), make(budget="80%")
    analysis._ANALYSES.clear()
    assert [make(budget="80%"), make(budget="65%")] == [high, low]


@pytest.mark.parametrize("solver", ["lower_sets", pytest.param("ilp", marks=pytest.mark.slow)])
def test_solvers_of_budgets_plan_within_them_and_do_no_less_work_than_auto(solver):
    args = chain_args(layers=6)
    budget = "75%"
    theirs = jaxckpt.plan(chain_loss, *args, budget=budget, solver=solver, cost="flops", verify=False)
    ours = jaxckpt.plan(chain_loss, *args, budget=budget, cost="flops", verify=False)
    assert theirs.solver == solver
    assert theirs.predicted_peak_bytes <= theirs.budget_bytes
    assert theirs.recompute_cost >= ours.recompute_cost
