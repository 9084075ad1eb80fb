"""Predicted bytes against measured ones: models by name, budgets between the least and the unplanned peak.

    python benchmarks/fidelity.py [--models gpt2 unet] [--targets cpu h100 v5e] [--budgets 40] [--minutes 25]

At each budget a plan is made with `verify=False`, without a record ("before") and with the record that the compile of
one plan left ("after"), and the plan is compiled to see what it takes. With `--verified` plans are made as usual,
too. Each program is compiled once: what was measured is kept in benchmarks/out, so a run goes on where it stopped, and
`--minutes` ends it in time. Returns 1 if a verified plan is over its budget, or more than 2 % of the predicted ones.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "solvers"), str(_ROOT / "tests")]

import jax
from rich.console import Console
from rich.table import Table

import jaxckpt
from benchmarks import fidelity_models
from benchmarks.store import OUT, Store, code_digest, remembering
from jaxckpt import _compat
from jaxckpt.compilation.measure import compiled_bytes

_MOST_OVER = 0.02
# On accelerators: those whose shapes mean something there.
_ON_TARGETS = ("gpt2-scan", "llama-scan", "llama-64-scan", "vit", "unet", "lstm", "diffusion", "moe")


def main() -> int:
    """Run the cases that are due, and print what there is of all."""
    options = _parser().parse_args()
    if options.worker:
        _work(options)
        return 0
    ends = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    left = []
    for target in options.targets:
        for name in options.models or (fidelity_models.MODELS if target == "cpu" else _ON_TARGETS):
            found, is_whole = _run_worker(name, target, options, ends - time.monotonic())
            rows += found
            left += [] if is_whole else [f"{name}@{target}"]
    (OUT / "fidelity.json").write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1))
    console = Console(width=130)
    for target in options.targets:
        console.print(_table(target, [row for row in rows if row["target"] == target]))
    is_good = True
    for kind in ("before", "after", "verified"):
        some = [row for row in rows if row["kind"] == kind]
        if some:
            over, allowed = sum(map(_is_over, some)), 0.0 if kind == "verified" else _MOST_OVER
            is_good &= over <= allowed * len(some)
            print("PASS" if over <= allowed * len(some) else "FAIL", f"{kind}: {over} of {len(some)} over budget")
    if left:
        print(f"not finished: {', '.join(left)}; run the same again")
    return 0 if is_good and not left else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = fidelity_models.MODELS
    parser.add_argument("--models", nargs="+", choices=list(known), metavar="MODEL", help=", ".join(known))
    parser.add_argument("--targets", nargs="+", default=["cpu"])
    parser.add_argument("--budgets", type=int, default=40)
    parser.add_argument("--verified", action="store_true", help="measured plans too")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop; the next run goes on")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run_worker(
    name: str, target: str, options: argparse.Namespace, left_s: float
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of one model on one target, from a process of its own, and whether they are all."""
    command = [sys.executable, __file__, "--worker", "--models", name, "--targets", target]
    command += ["--budgets", str(options.budgets), *["--verified"] * options.verified]
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=os.environ | {"XDG_CACHE_HOME": cache}, stdout=output)
        try:
            is_whole = process.wait(max(1.0, min(left_s, 1e7))) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            is_whole = False
        output.seek(0)
        return [json.loads(line) for line in output if line.startswith("{") and line.endswith("\n")], is_whole


def _work(options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    (name,), (target,) = options.models, options.targets
    store = Store(OUT / f"fidelity-{target.replace(':', '-')}.jsonl")
    with remembering(store):
        for row in _Sweep(name, target, store).rows(options.budgets, options.verified):
            print(json.dumps({"model": name, "target": target, **row}), flush=True)


class _Sweep:
    """One model on one target."""

    def __init__(self, name: str, target: str, store: Store):
        self.model = fidelity_models.load(name)
        self.target = None if target == jax.default_backend() else target
        self.store, self.name = store, name
        self.measured: dict[str, int] = {}
        self.unplanned_bytes = self._bytes_of(self.model.fun)

    def rows(self, num_budgets: int, verified: bool) -> Iterator[dict[str, Any]]:
        """Before any compile, after one, and of measured plans."""
        low, high = self._least_bytes(), self.unplanned_bytes
        budgets = [low + (high - low) * (2 * i + 1) // (2 * num_budgets) for i in range(num_budgets)]
        kinds = ["before", "after", *["verified"] * verified]
        for kind in kinds:
            for budget in budgets:
                yield {
                    "kind": kind,
                    "budget_bytes": budget,
                    "unplanned_bytes": high,
                    **self._kept((kind, budget), lambda kind=kind, budget=budget: self._row(kind, budget)),
                }

    def _kept(self, what: Any, make: Any) -> dict[str, Any]:
        key = (self.name, what, self.unplanned_bytes, code_digest(), _compat.JAX_VERSION)
        return dict(self.store.get(key, make))

    def _row(self, kind: str, budget: int) -> dict[str, Any]:
        record = self._record() if kind == "after" else None
        try:
            plan = self._plan(budget=budget, verify=kind == "verified", calibration=record)
        except jaxckpt.InfeasibleBudgetError:
            return {"bytes": None}
        digest = json.dumps([plan.to_json()[key] for key in ("schedule", "blocks") if key in plan.to_json()])
        if digest not in self.measured:
            self.measured[digest] = self._bytes_of(plan.apply(self.model.fun))
        return {"bytes": self.measured[digest], "predicted_bytes": plan.predicted_peak_bytes}

    def _plan(self, **options: Any) -> jaxckpt.Plan:
        model = self.model
        return jaxckpt.plan(model.fun, *model.specs, target=self.target, has_aux=model.has_aux, **options)

    def _least_bytes(self) -> int:
        try:
            return self._plan(budget=1, verify=False, calibration=None).peak_bytes
        except jaxckpt.InfeasibleBudgetError as error:
            return min(error.expected_least_bytes, self.unplanned_bytes)

    def _record(self) -> jaxckpt.Calibration:
        """What a search leaves that compiles no more than the unplanned program and one plan."""
        if not hasattr(self, "_left"):
            with tempfile.TemporaryDirectory() as folder:
                middle = (self._least_bytes() + self.unplanned_bytes) // 2
                old, os.environ["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"], folder
                try:
                    self._plan(budget=middle, max_compiles=2, on_infeasible="least")
                    (file,) = Path(folder).rglob("calibration/*.json")
                    self._left = jaxckpt.Calibration.load(file)
                finally:
                    os.environ["XDG_CACHE_HOME"] = old
        return self._left

    def _bytes_of(self, fun: Any) -> int:
        gradient = jax.value_and_grad(fun, has_aux=self.model.has_aux)
        return compiled_bytes(gradient, self.model.specs, self.target).device_bytes


def _is_over(row: dict[str, Any]) -> bool:
    return row["bytes"] is not None and row["bytes"] > row["budget_bytes"]


def _table(target: str, rows: list[dict[str, Any]]) -> Table:
    """For each model the share over budget and how far predictions are off."""
    table = Table(title=f"{target}, jax {jax.__version__}: over budget; |predicted - measured| / measured")
    for column in ("model", "kind", "budgets", "over", "median", "99 %", "used"):
        table.add_column(column, justify="left" if column in ("model", "kind") else "right")
    for kind in ("before", "after", "verified"):
        of_kind = [row for row in rows if row["kind"] == kind]
        for name in dict.fromkeys(row["model"] for row in of_kind):
            table.add_row(*_cells(name, kind, [row for row in of_kind if row["model"] == name]))
        if of_kind:
            table.add_row(*_cells("all", kind, of_kind), end_section=True, style="bold")
    return table


def _cells(name: str, kind: str, rows: list[dict[str, Any]]) -> list[str]:
    made = [row for row in rows if row["bytes"] is not None]
    if not made:
        return [name, kind, "0", "", "", "", ""]
    off = sorted(abs(row["predicted_bytes"] / row["bytes"] - 1) for row in made)
    over = sum(map(_is_over, made))
    used = statistics.mean(min(1.0, row["bytes"] / row["budget_bytes"]) for row in made)
    shares = [statistics.median(off), off[math.ceil(0.99 * len(off)) - 1], used]
    return [name, kind, f"{len(made)} of {len(rows)}", str(over), *(f"{share:.1%}" for share in shares)]


if __name__ == "__main__":
    sys.exit(main())
