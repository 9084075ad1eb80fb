"""Several devices and several processes: the same losses with a plan, and one plan for all."""

import os
import subprocess
import sys

import jax
import pytest
from helpers import count, names
from zoo.models import chain_args, chain_loss

import jaxckpt
from jaxckpt import _compat, auto_remat
from jaxckpt.api import auto_remat as decorator
from jaxckpt.api import processes

pytest.importorskip("sklearn")
EXAMPLE = os.path.join(os.path.dirname(__file__), "..", "examples", "sharded_digits.py")


def run(*arguments):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, EXAMPLE, "--steps", "4", *arguments]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
    return found.stdout


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("data", marks=pytest.mark.slow),
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("tensor", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_to_the_same_losses(layout):
    shown = run("--devices", "8", "--layout", layout)
    assert f"8 devices, {layout}: largest relative difference" in shown


def test_two_processes_train_to_the_same_losses():
    shown = run("--processes", "2", "--devices", "2")
    for process in (0, 1):
        assert f"process {process}, 4 devices, data: largest relative difference" in shown


class Store:
    """The coordinator's key-value store, in this process."""

    def __init__(self):
        self.values = {}

    def key_value_set_bytes(self, key, value):
        assert key not in self.values
        self.values[key] = value

    def blocking_key_value_get_bytes(self, key, timeout_ms):
        if key not in self.values:
            raise RuntimeError(f"DEADLINE_EXCEEDED after {timeout_ms} ms")
        return self.values[key]


@pytest.fixture
def as_process(monkeypatch):
    """Become one of two processes, with nothing planned yet."""
    store = Store()
    monkeypatch.setattr(_compat, "distributed_client", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def become(index):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        decorator._PLANS.clear()
        processes._SEEN.clear()

    return become


def gradient(layers=6, budget="80%", cache_dir=None):
    f = auto_remat(chain_loss, budget=budget, verify=False, cache_dir=cache_dir)
    args = chain_args(layers=layers, rows=104, width=16)
    return count(jax.grad(f), *args), names(jax.grad(f), *args)


def test_the_first_process_plans_for_all(as_process, monkeypatch, tmp_path):
    as_process(0)
    first = gradient(cache_dir=tmp_path / "0")
    as_process(1)
    monkeypatch.setattr(decorator, "plan_program", lambda *a: pytest.fail("planned twice"))
    assert gradient(cache_dir=tmp_path / "1") == first
    assert first[0]["checkpoint"]
    assert (tmp_path / "0").exists() and not (tmp_path / "1").exists()


def test_processes_that_run_different_programs_are_told(as_process):
    as_process(0)
    gradient(layers=6)
    as_process(1)
    with pytest.raises(jaxckpt.PlanMismatchError, match=r"process 1 differentiates another program .*line \d+"):
        gradient(layers=7)


def test_a_process_that_waits_for_a_plan_in_vain_says_so(as_process):
    as_process(1)
    with pytest.raises(jaxckpt.JaxckptError, match=r"process 0 made no plan for chain_loss .* same program\?"):
        gradient()


def test_what_stops_the_first_process_stops_all(as_process):
    errors = []
    for index in (0, 1):
        as_process(index)
        with pytest.raises(jaxckpt.InfeasibleBudgetError) as caught:
            gradient(budget="1KB")
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert errors[0].forced_by == errors[1].forced_by and errors[0].least_peak_bytes == errors[1].least_peak_bytes
