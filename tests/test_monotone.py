"""A lower budget never yields a higher measured peak, whatever was planned before."""

import jax
import pytest
from zoo.models import MODELS

import jaxckpt
from jaxckpt.search import analysis

NUM_BUDGETS = 10
# Two plans of equal cost may differ by so much.
MOST = 1.01


def peaks(model, args, budgets):
    """Measured peaks by budget, planned in this order by one process that knows nothing."""
    analysis._ANALYSES.clear()
    plan = lambda budget: jaxckpt.plan(model.fun, *args, budget=budget, has_aux=model.has_aux)  # noqa: E731
    return {budget: plan(budget).measured_peak_bytes for budget in budgets}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_lower_budget_never_yields_a_higher_peak(name, tmp_path, monkeypatch):
    model = MODELS[name]
    args = jax.eval_shape(lambda: model.make("float32"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    ends = jaxckpt.plan(model.fun, *args, budget="1B", has_aux=model.has_aux, on_infeasible="least")
    low, high = ends.least_peak_bytes, ends.unplanned_peak_bytes
    assert low < high
    budgets = [low + (high - low) * i // (NUM_BUDGETS - 1) for i in range(NUM_BUDGETS)]
    for order, name in ((budgets, "upwards"), (budgets[::-1], "downwards")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        found = peaks(model, args, order)
        for i, budget in enumerate(budgets):
            assert found[budget] <= budget
            above = min(found[b] for b in budgets[i:])
            assert found[budget] <= MOST * above, (name, found)
