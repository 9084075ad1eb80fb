"""Named leasts, limits on compiles, and what is used where nothing fits."""

import itertools
import json

import jax
import jax.numpy as jnp
import pytest
from helpers import least_budget

import jaxckpt
from jaxckpt import InfeasibleBudgetError, JaxckptWarning
from jaxckpt.cli import main
from jaxckpt.errors import OptionError

W, X = jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.ShapeDtypeStruct((512, 32), jnp.float32)


def mixed(w, x):
    for i in range(9):
        x = jnp.tanh(x @ w) if i % 3 else jnp.exp(-(x @ w)) * jnp.sin(x)
    return jnp.mean(x**2)


@pytest.fixture(scope="module")
def least():
    return least_budget(mixed, W, X, calibration=None)


@pytest.mark.parametrize("calibration", [None, "auto"])
def test_a_least_that_is_named_is_a_budget_that_works_and_none_yields_less(least, calibration):
    plan = jaxckpt.plan(mixed, W, X, budget=least, calibration=calibration)
    assert plan.measured_peak_bytes == least and plan.least_peak_bytes in (None, least)
    with pytest.raises(InfeasibleBudgetError) as caught:
        jaxckpt.plan(mixed, W, X, budget=least - 1, calibration=calibration)
    assert caught.value.least_peak_bytes == least


def test_what_a_report_names_is_measured_or_about(least):
    full = jaxckpt.measure(mixed, W, X).device_bytes
    budgets = [least + (full - least) * i // 9 for i in range(10)]
    plans = [jaxckpt.plan(mixed, W, X, budget=b, calibration=None) for b in budgets]
    again = [jaxckpt.plan(mixed, W, X, budget=b, calibration=None) for b in reversed(budgets)]
    assert [p.measured_peak_bytes for p in plans] == [p.measured_peak_bytes for p in reversed(again)]
    for lower, higher in itertools.pairwise(plans):
        assert lower.peak_bytes <= 1.01 * higher.peak_bytes
    for plan in plans:
        row = next(line for line in str(plan).splitlines() if line.startswith("least feasible peak"))
        if plan.least_peak_bytes is None:
            assert "about" in row and row.rstrip().endswith("predicted")
        else:
            assert plan.least_peak_bytes == least and f"{least:,}" in row
        assert plan.expected_least_bytes <= plan.peak_bytes


def test_a_search_stops_at_its_limit_with_a_plan_that_fits(least):
    budget = int(1.3 * least)
    free = jaxckpt.plan(mixed, W, X, budget=budget, calibration=None, cost="flops")
    for most in range(1, free.num_compiles + 2):
        try:
            plan = jaxckpt.plan(mixed, W, X, budget=budget, calibration=None, cost="flops", max_compiles=most)
        except InfeasibleBudgetError as error:
            assert error.num_compiles <= most and error.least_peak_bytes is None
            assert f"max_compiles={most}" in str(error)
            continue
        assert plan.num_compiles <= most and plan.measured_peak_bytes <= budget
        assert plan.is_stopped == ("stopped at max_compiles" in " ".join(str(plan).split()))
        assert plan.is_stopped or plan.recompute_cost == free.recompute_cost
    assert not free.is_stopped


def test_the_least_plan_is_used_where_that_is_asked_for(least):
    with pytest.warns(JaxckptWarning, match="nothing fits budget"):
        plan = jaxckpt.plan(mixed, W, X, budget=least // 2, calibration=None, on_infeasible="least")
    assert plan.measured_peak_bytes == least and plan.budget_bytes == least // 2
    w, x = jnp.eye(32), jnp.ones((512, 32))
    with pytest.warns(JaxckptWarning, match="nothing fits budget"):
        got = jax.grad(jaxckpt.auto_remat(mixed, budget=least // 2, on_infeasible="least"))(w, x)
    assert jnp.allclose(got, jax.grad(mixed)(w, x), rtol=1e-5)


def test_a_step_takes_its_least_plans_where_that_is_asked_for():
    def step(w, x):
        return w - 0.1 * jax.grad(jaxckpt.auto_remat(mixed))(w, x)

    with pytest.raises(InfeasibleBudgetError) as caught:
        jaxckpt.fit(step, W, X, budget=1000)
    least = caught.value.least_peak_bytes
    assert jaxckpt.fit(step, W, X, budget=least).measurement.device_bytes <= least
    with pytest.warns(JaxckptWarning, match="nothing fits budget"):
        fitted = jaxckpt.fit(step, W, X, budget=1000, on_infeasible="least")
    assert fitted.measurement.device_bytes == least
    assert jaxckpt.fit(step, W, X, budget="80%", max_compiles=2).num_compiles <= 2


@pytest.mark.parametrize(
    "option", [{"max_compiles": 0}, {"max_compiles": True}, {"max_compiles": 1.5}, {"on_infeasible": "ignore"}]
)
def test_limits_that_make_no_sense_are_refused(option):
    with pytest.raises(OptionError, match=next(iter(option))):
        jaxckpt.plan(mixed, W, X, budget="1GB", **option)
    with pytest.raises(OptionError, match=next(iter(option))):
        jaxckpt.auto_remat(mixed, budget="1GB", **option)
    with pytest.raises(OptionError, match=next(iter(option))):
        jaxckpt.fit(mixed, W, X, budget="1GB", **option)


def checkpointed(w, x):
    for _ in range(3):
        x = jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ w) @ w))(w, x)
    return jnp.mean(x**2)


def test_checkpoints_that_stand_in_the_way_are_named():
    with pytest.raises(InfeasibleBudgetError, match="keep_checkpoints=False"):
        jaxckpt.plan(checkpointed, W, X, budget=150_000, calibration=None)
    with pytest.raises(InfeasibleBudgetError) as caught:
        jaxckpt.plan(mixed, W, X, budget=150_000, calibration=None)
    assert "keep_checkpoints" not in str(caught.value)


def test_where_no_plan_saves_anything_a_refusal_says_so():
    with pytest.raises(InfeasibleBudgetError, match="No plan saves anything here"):
        jaxckpt.plan(lambda w: jnp.sum(w**2), W, budget=5000)


def test_a_share_without_its_own_checkpoints_says_what_is_written():
    with pytest.warns(JaxckptWarning, match="as it is written it takes"):
        plan = jaxckpt.plan(checkpointed, W, X, budget="95%", keep_checkpoints=False, calibration=None)
    assert plan.written_peak_bytes == jaxckpt.measure(checkpointed, W, X).device_bytes < plan.peak_bytes
    assert "as it is written" in str(plan)


def test_the_command_line_has_both(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "def loss(w, x):\n    for _ in range(6):\n        x = jnp.tanh(x @ w)\n    return jnp.mean(x**2)\n"
        "example_args = (jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.ShapeDtypeStruct((512, 32), jnp.float32))\n"
    )
    assert main(["plan", "model.py:loss", "--budget", "1000", "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)
    assert refused["least_peak_bytes"] == refused["expected_least_bytes"] > 1000
    assert main(["plan", "model.py:loss", "--budget", str(refused["least_peak_bytes"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured_peak_bytes"] <= refused["least_peak_bytes"]
    assert main(["plan", "model.py:loss", "--budget", "1000", "--no-verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["least_peak_bytes"] is None
    with pytest.warns(JaxckptWarning, match="nothing fits"):
        assert main(["plan", "model.py:loss", "--budget", "1000", "--least", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured_peak_bytes"] > 1000
    assert main(["plan", "model.py:loss", "--budget", "70%", "--max-compiles", "0"]) == 2
