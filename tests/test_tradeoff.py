"""The frontier: few points that stand for all, policies counted as they run, and the command that prints it."""

import itertools
import json

import jax
import numpy as np
import pytest
from helpers import count
from zoo.models import chain_args, chain_loss, residual_args, residual_loss

import jaxckpt
from jaxckpt import cli

ARGS = residual_args(layers=5)
POLICIES = ["unplanned", "full remat", "dots_saveable", "dots_with_no_batch_dims_saveable"]


@pytest.fixture(scope="module")
def found():
    return jaxckpt.frontier(residual_loss, *ARGS, cost="flops", num_points=8)


def test_no_plan_of_the_curve_is_beaten_by_another(found):
    assert len(found.plans) == 8 < found.num_candidates
    plans = [p for p in found.points if p.plan is not None]
    for less, more in itertools.pairwise(plans):
        assert less.peak_bytes < more.peak_bytes
        assert less.cost_ratio > more.cost_ratio >= 1


def test_more_points_stand_closer_to_all_candidates():
    every = jaxckpt.frontier(residual_loss, *ARGS, cost="flops", num_points=1000)
    assert len(every.plans) == every.num_candidates

    def error(num_points):
        some = jaxckpt.frontier(residual_loss, *ARGS, cost="flops", num_points=num_points).plans
        xs, ys = zip(*((p.predicted_peak_bytes, p.recompute_flops) for p in some), strict=True)
        return max(abs(np.interp(p.predicted_peak_bytes, xs, ys) - p.recompute_flops) for p in every.plans)

    assert error(16) < error(8) < error(3)
    assert error(16) < 0.05 * every.plans[0].recompute_flops


def test_its_plans_are_plans(found):
    plan = found.plans[3]
    assert plan.measured_peak_bytes is None and plan.budget_bytes is None
    assert "regions:" in str(plan) and "budget  " not in str(plan)
    planned, plain = (count(jax.grad(f), *ARGS) for f in (plan.apply(residual_loss), residual_loss))
    assert planned["checkpoint"] > 0 == plain["checkpoint"]


def test_policies_are_counted_in_the_differentiated_program(found):
    points = {p.name: p for p in found.points if p.plan is None}
    assert list(points) == sorted(points, key=lambda n: (points[n].peak_bytes, -points[n].cost_ratio))
    assert set(points) == set(POLICIES)
    unplanned, full = points["unplanned"], points["full remat"]
    assert unplanned.recompute_flops == 0 and unplanned.cost_ratio == 1
    # All but the last matmul, which no derivative reads, and the loss itself.
    matmuls = 2 * 128 * 16 * 64 * (2 * 5 - 1)
    assert matmuls <= full.recompute_flops <= found.forward_flops
    assert 0 < points["dots_saveable"].recompute_flops < full.recompute_flops / 4


def test_verified_points_are_measured():
    chain = chain_args(layers=10)
    found = jaxckpt.frontier(chain_loss, *chain, num_points=3, verify=True)
    assert found.is_measured
    measured = jaxckpt.measure(chain_loss, *chain).device_bytes
    assert next(p for p in found.points if p.name == "unplanned").measured_peak_bytes == measured
    plan = found.plans[0]
    assert jaxckpt.measure(plan.apply(chain_loss), *chain).device_bytes == plan.measured_peak_bytes < measured
    full = next(p for p in found.points if p.name == "full remat")
    assert full.measured_peak_bytes == jaxckpt.measure(jax.checkpoint(chain_loss), *chain).device_bytes


def test_the_table_says_predicted_until_it_is_measured(found):
    text = str(found)
    assert "predicted" in text and "verify=True compiles" in text
    assert all(name in text for name in POLICIES)
    assert max(map(len, text.splitlines())) <= 118


@pytest.mark.parametrize("num_points", [1, True, 2.5])
def test_a_number_of_points_that_is_no_curve_is_refused(num_points):
    with pytest.raises(jaxckpt.OptionError, match="num_points"):
        jaxckpt.frontier(residual_loss, *ARGS, num_points=num_points)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(
        "import jax\n"
        "def loss(w, x):\n    for _ in range(8):\n        x = jax.numpy.tanh(x @ w)\n    return (x**2).sum()\n"
        "def example_args():\n    spec = lambda *s: jax.ShapeDtypeStruct(s, 'float32')\n"
        "    return spec(64, 64), spec(1024, 64)\n"
    )
    return f"{path}:loss"


def test_the_command_prints_json(model, capsys):
    assert cli.main(["frontier", model, "--num-points", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [p["plan"] for p in data["points"] if p["name"] == "plan"] == [0, 1, 2]
    assert {p["name"] for p in data["points"]} == {"plan", *POLICIES}
    assert all(p["measured_peak_bytes"] is None for p in data["points"])


def test_the_command_draws(model, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.png"
    assert cli.main(["frontier", model, "--num-points", "3", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["frontier", model, "--num-points", "3", "--plot", str(tmp_path / "curve.nonsense")]) == 2
    assert "cannot be drawn" in capsys.readouterr().err


def test_drawing_without_matplotlib_says_what_to_install(model, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.main(["frontier", model, "--num-points", "3", "--plot", str(tmp_path / "curve.png")]) == 2
    assert "pip install 'jaxckpt[plot]'" in capsys.readouterr().err


def test_cite_prints_bibtex_once(capsys):
    assert cli.main(["cite"]) == 0
    text = capsys.readouterr().out
    assert "beaumont2019optimal" in text and "zhao2023rockmate" in text
    assert cli.main(["cite", "all"]) == 0
    text = capsys.readouterr().out
    keys = [line.split("{")[1] for line in text.splitlines() if line.startswith("@")]
    assert len(keys) == len(set(keys)) >= 8
    assert cli.main(["cite", "nonsense"]) == 2
    assert "revolve" in capsys.readouterr().err


def test_what_was_measured_corrects_the_next_curve():
    cold = jaxckpt.frontier(residual_loss, *ARGS, num_points=4)
    measured = jaxckpt.frontier(residual_loss, *ARGS, num_points=4, verify=True)
    warm = jaxckpt.frontier(residual_loss, *ARGS, num_points=4)
    assert cold.calibration is None and warm.calibration == warm.plans[0].calibration is not None
    by_digest = {p.plan.schedule: p for p in measured.points if p.plan}
    compared = [(p, by_digest[p.plan.schedule]) for p in warm.points if p.plan and p.plan.schedule in by_digest]
    assert compared
    for point, known in compared:
        assert point.predicted_peak_bytes == pytest.approx(known.measured_peak_bytes, rel=0.02)
