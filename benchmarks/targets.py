"""Plans for chips that are not here: GPT-2 small at 8 x 1024 tokens, measured by each chip's own compiler.

    python benchmarks/targets.py [--target h100 v5e] [--budget 75 50 35 25] [--size small] [--fresh]

For each budget, a share of the unplanned peak, the plan must measure within it, use at least 90 % of it unless the next
cheaper plan is measured not to fit, and take three compiles at most. A share that no plan reaches says the least that
one does. Compiles of an earlier run are read from disk, but counted; --fresh makes them again.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no chip is needed, and looking for one takes time

import jax
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import jaxckpt
from examples.gpt2 import SIZES, make_loss, specs
from jaxckpt.compilation import cache
from jaxckpt.units import short_bytes

_OUT = Path(__file__).parent / "out" / "targets.json"
_ENOUGH = 0.9
_MOST_COMPILES = 3
_COLUMNS = ("target", "budget", "asked", "measured", "used", "predicted", "next", "step", "compiles", "took", "ok")


def main() -> int:
    """Run every case and return 1 if one falls short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["h100", "v5e"])
    parser.add_argument("--budget", nargs="+", type=int, default=[75, 50, 35, 25], help="percent of the unplanned peak")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--fresh", action="store_true", help="compile again what an earlier run has compiled")
    options = parser.parse_args()
    if options.fresh:
        os.environ[cache.SWITCH] = "1"
    rows = []
    for target in options.target:
        for share in options.budget:
            rows.append(_row(target, share, options.size))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    Console(width=130).print(_table(rows, options.size))
    _OUT.parent.mkdir(exist_ok=True)
    _OUT.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1))
    bad = [row for row in rows if not row["ok"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} cases hold; written to {_OUT}", file=sys.stderr)
    return 1 if bad else 0


def _row(target: str, share: int, size: str) -> dict[str, Any]:
    started = time.perf_counter()
    row: dict[str, Any] = {"target": target, "share": share}
    try:
        plan = jaxckpt.plan(make_loss(SIZES[size]), *specs(SIZES[size]), budget=f"{share}%", target=target)
    except jaxckpt.InfeasibleBudgetError as error:
        return row | {
            "budget_bytes": error.budget_bytes,
            "least_bytes": error.expected_least_bytes,
            "plan_s": time.perf_counter() - started,
            "ok": error.measured,
        }
    budget, measured = plan.budget_bytes or 0, plan.measured_peak_bytes or 0
    used_well = measured >= _ENOUGH * budget or (plan.next_peak_bytes or 0) > budget
    return row | {
        "budget_bytes": budget,
        "unplanned_bytes": plan.unplanned_peak_bytes,
        "measured_bytes": measured,
        "predicted_bytes": plan.predicted_peak_bytes,
        "next_bytes": plan.next_peak_bytes,
        "recompute_share": plan.recompute_cost / plan.unplanned_cost,
        "num_compiles": plan.num_compiles,
        "plan_s": time.perf_counter() - started,
        "ok": 0 < measured <= budget and used_well and plan.num_compiles <= _MOST_COMPILES,
    }


def _table(rows: list[dict[str, Any]], size: str) -> Table:
    table = Table(title=f"GPT-2 {size}, {SIZES[size].batch} x {SIZES[size].num_tokens} tokens, jax {jax.__version__}")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        shown = (
            [
                short_bytes(row["measured_bytes"]),
                f"{row['measured_bytes'] / row['budget_bytes']:.1%}",
                short_bytes(row["predicted_bytes"]),
                short_bytes(row["next_bytes"]) if row["next_bytes"] else "",
                f"+{row['recompute_share']:.1%}",
                str(row["num_compiles"]),
            ]
            if "measured_bytes" in row
            else [f"none fits; least {short_bytes(row['least_bytes'])}", "", "", "", "", ""]
        )
        asked = short_bytes(row["budget_bytes"])
        ok = "yes" if row["ok"] else "NO"
        table.add_row(row["target"], f"{row['share']}%", asked, *shown, f"{row['plan_s']:.0f} s", ok)
    return table


if __name__ == "__main__":
    sys.exit(main())
