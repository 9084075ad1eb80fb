"""Plans against every hand-written policy, over a zoo of models: tables, a plot and JSON.

    python benchmarks/dominance.py [--quick] [--models gpt2 unet] [--targets cpu h100 v5e] [--time] [--jobs 2]

For each model, target and policy: the policy's measured peak becomes our budget, and extra FLOPs are compared; then
the policy's FLOPs become our limit, and peaks are compared. Extra FLOPs are those of the differentiated program's
jaxpr after dead code, loops times their trips, beyond the program without any checkpoint. With `--time`, on CPU, both
programs also run, interleaved. Ten budgets a model show how well a budget is kept and used, and how far off the
predicted peak is. Each model runs in a process of its own; what was measured is kept in benchmarks/out and not
measured again.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "solvers"), str(_ROOT / "tests")]

import jax
from rich.console import Console
from rich.table import Table
from zoo.catalogue import CATALOGUE, DEEP
from zoo.handmade import Case, arrays

import jaxckpt
from benchmarks.store import OUT, Store, code_digest, remembering
from jaxckpt import _compat
from jaxckpt.compilation.measure import Measurement, compiled_bytes
from jaxckpt.program.flops import gradient_cost

_NUM_BUDGETS = 10
_QUICK = ("tanh-64", "lstm", "llama")
# Below this share of extra FLOPs a policy hardly recomputes, and a ratio to it says nothing.
_RECOMPUTES = 0.02
_LEAST_RATIO = 0.05
_FLOP_TOLERANCE = 0.002
_TIME_TOLERANCE = 1.03
_NUM_RUNS = 7
ALL = CATALOGUE | DEEP


def main() -> int:
    """Run every case, print the tables, and return 1 if a criterion fails."""
    options = _parser().parse_args()
    if options.worker:
        _work(options)
        return 0
    names = options.models or (list(_QUICK) if options.quick else list(ALL))
    jobs = [(name, target) for target in options.targets for name in names]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = [row for found in pool.map(lambda job: _run_worker(*job, options), jobs) for row in found]
    Console(width=150).print(_policy_table(rows), _budget_table(rows), _time_table(rows))
    OUT.mkdir(exist_ok=True)
    (OUT / "dominance.json").write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1))
    _plot(rows)
    verdicts = list(_criteria(rows))
    if options.quick:
        # Tiny shapes say whether everything runs and budgets are kept, not how plans compare at real ones.
        verdicts = [verdict for verdict in verdicts if "budgets kept" in verdict[1]]
        assert verdicts, "no model gave a row"
    for holds, text in verdicts:
        print("PASS" if holds else "FAIL", text)
    return 0 if all(holds for holds, _ in verdicts) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="three models at a tiny size, where only kept budgets are asked for"
    )
    parser.add_argument("--models", nargs="+", choices=list(ALL), metavar="MODEL", help=", ".join(ALL))
    parser.add_argument("--targets", nargs="+", default=["cpu"])
    parser.add_argument("--time", action="store_true", help="wall time too, on the device that is here")
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help="only these")
    parser.add_argument("--size", help="of the models that have it, such as large, for accelerators")
    parser.add_argument("--jobs", type=int, default=1, help="models at the same time")
    parser.add_argument("--skip", nargs="+", default=[], choices=("policies", "reverse", "budgets"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run_worker(name: str, target: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One model on one target, in a process of its own, which gives its memory back."""
    command = [sys.executable, __file__, "--worker", "--models", name, "--targets", target]
    command += ["--quick"] * options.quick + ["--time"] * options.time
    command += ["--skip", *options.skip] if options.skip else []
    command += ["--size", options.size] if options.size else []
    command += ["--policies", *options.policies] if options.policies else []
    # What an earlier planner's predictions were off by is not what this one's are.
    place = os.environ | {"XDG_CACHE_HOME": str(OUT / "cache" / code_digest())}
    done = subprocess.run(command, env=place, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{name} on {target} ended with status {done.returncode}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _work(options: argparse.Namespace) -> None:
    """The rows of one model, each printed as soon as it is there."""
    (name,), (target,) = options.models, options.targets
    store = Store(OUT / f"{'quick' if options.quick else 'measured'}-{target.replace(':', '-')}.jsonl")
    with remembering(store):
        try:
            size = "tiny" if options.quick else options.size
            bench = _Bench(name, target, store, size=size, is_quick=options.quick)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            return
        for row in bench.rows(options):
            row |= {"model": name, "target": target, "is_deep": name in DEEP}
            print(json.dumps(row), flush=True)
            print(_line(row), file=sys.stderr, flush=True)


class _Bench:
    """One model on one target."""

    def __init__(self, name: str, target: str, store: Store, *, size: str | None, is_quick: bool):
        self.case: Case = ALL[name].case(size)
        self.cut: Case = ALL[name].case(size, is_cut=True)
        self.target = None if target == jax.default_backend() else target
        self.num_budgets = 2 if is_quick else _NUM_BUDGETS
        self.store = store
        self.plain = self.measure(self.case.fun, self.case.specs)
        self.plain_flops = self.flops(self.case.fun)
        self.fixed_bytes = self.plain.device_bytes - self.plain.temp_bytes

    @functools.cached_property
    def _args(self) -> Any:
        return jax.device_put(arrays(self.case.specs, self.case.vocab))

    @functools.cached_property
    def _plain_run(self) -> Callable:
        return _runnable(self.case.fun)

    def rows(self, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
        """Policies, then budgets; each row is kept by the planner's code and the program."""
        for policy, fun in self.case.policies.items():
            if options.policies and policy not in options.policies:
                continue
            if "policies" not in options.skip:
                is_skipped = "reverse" in options.skip
                yield self._kept(
                    ("policy", policy, is_skipped), lambda fun=fun, p=policy: self._policy(p, fun, options)
                )
            if options.time and self.target is None:
                yield self._kept(("time", policy), lambda fun=fun, policy=policy: self._time(policy, fun))
        if "budgets" not in options.skip:
            least = self._kept("least", self._least)
            low, high = least["least_bytes"], self.plain.device_bytes
            for i in range(self.num_budgets):
                budget = low + (high - low) * i // self.num_budgets
                yield self._kept(("budget", budget), lambda budget=budget: self._budget(budget))

    def measure(self, fun: Callable, specs: tuple) -> Measurement:
        """Device bytes of value and gradient."""
        return compiled_bytes(jax.value_and_grad(fun), specs, self.target)

    def flops(self, fun: Callable) -> int:
        """Of the differentiated program."""
        return gradient_cost(jax.value_and_grad(fun), *self.case.specs).flops

    def extra(self, fun: Callable) -> float:
        """FLOPs beyond the unplanned program, as a share of it."""
        return self.flops(fun) / self.plain_flops - 1

    def plan(self, cost: str = "flops", **limit: Any) -> jaxckpt.Plan:
        """Our plan of the model."""
        return jaxckpt.plan(self.case.fun, *self.case.specs, cost=cost, target=self.target, **limit)

    def _kept(self, what: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        program = str(jax.eval_shape(lambda *a: a, *self.case.specs))
        key = (what, program, self.plain_flops, self.plain.device_bytes, code_digest(), _compat.JAX_VERSION)
        return dict(self.store.get(key, make))

    def _policy(self, policy: str, fun: Callable, options: argparse.Namespace) -> dict[str, Any]:
        theirs = self.measure(fun, self.case.specs)
        row = {
            "kind": "policy",
            "policy": policy,
            "plain_bytes": self.plain.device_bytes,
            "fixed_bytes": self.fixed_bytes,
            "floor_bytes": self._floor_bytes(),
            "policy_bytes": theirs.device_bytes,
            "policy_extra": self.extra(fun),
            **self._ours(lambda: self.plan(budget=theirs.device_bytes)),
        }
        if "reverse" not in options.skip:
            limit = max(1.0, 1 + row["policy_extra"])
            row |= {f"reverse_{k}": v for k, v in self._ours(lambda: self.plan(max_cost=limit)).items()}
        return row

    def _ours(self, make: Callable[[], jaxckpt.Plan]) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            plan = make()
        except jaxckpt.InfeasibleBudgetError as error:
            return {"bytes": None, "least_bytes": error.expected_least_bytes}
        found = {"bytes": plan.measured_peak_bytes, "predicted_bytes": plan.predicted_peak_bytes}
        found |= {"claimed_extra": plan.recompute_flops / self.plain_flops, "num_compiles": plan.num_compiles}
        found |= {"next_bytes": plan.next_peak_bytes, "plan_s": time.perf_counter() - started}
        planned = plan.apply(self.case.fun)
        # A jaxpr does not say how often a binomial loop's inner loop runs; the table in the plan does.
        unknown = gradient_cost(jax.value_and_grad(planned), *self.case.specs).unknown
        is_counted = not any(name.startswith("while") for name in unknown)
        return found | {"extra": self.extra(planned) if is_counted else found["claimed_extra"]}

    def _floor_bytes(self) -> int:
        """Temporaries of the model cut to one layer, by the policy that needs least there."""
        funs = [self.cut.fun, *self.cut.policies.values()]
        return min(self.measure(fun, self.cut.specs).temp_bytes for fun in funs)

    def _least(self) -> dict[str, Any]:
        try:
            return {"least_bytes": self.plan(budget=1).peak_bytes}
        except jaxckpt.InfeasibleBudgetError as error:
            return {"least_bytes": error.expected_least_bytes}

    def _budget(self, budget: int) -> dict[str, Any]:
        return {"kind": "budget", "budget_bytes": budget, **self._ours(lambda: self.plan(budget=budget))}

    def _time(self, policy: str, fun: Callable) -> dict[str, Any]:
        """Medians of interleaved runs of the policy and of our plan for its peak, chosen by modelled time."""
        row = {"kind": "time", "policy": policy}
        try:
            plan = self.plan("time", budget=self.measure(fun, self.case.specs).device_bytes)
        except jaxckpt.InfeasibleBudgetError:
            return row | {"ratio": None}
        args = self._args
        runs = [_runnable(fun), _runnable(plan.apply(self.case.fun)), self._plain_run]
        took: list[list[float]] = [[], [], []]
        for i in range(_NUM_RUNS + 1):
            for j in (0, 1, 2) if i % 2 else (2, 1, 0):
                started = time.perf_counter()
                jax.block_until_ready(runs[j](*args))
                if i:  # the first run compiles
                    took[j].append(time.perf_counter() - started)
        ratio = statistics.median(ours / theirs for theirs, ours, _ in zip(*took, strict=True))
        medians = dict(zip(("policy_s", "ours_s", "plain_s"), map(statistics.median, took), strict=True))
        return row | medians | {"ratio": ratio, "modelled": plan.recompute_cost / plan.unplanned_cost}


def _runnable(fun: Callable) -> Callable:
    return jax.jit(jax.value_and_grad(fun), compiler_options=jaxckpt.compiler_options() or None)


def _line(row: dict[str, Any]) -> str:
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k not in ("model", "target")}
    return f"{row['model']} {row['target']} {shown}"


def _ratio(ours: float, theirs: float) -> float:
    return max(_LEAST_RATIO, ours / theirs)


def _above_floor(row: dict[str, Any]) -> float | None:
    """Our temporaries above the floor against the policy's, at the policy's cost."""
    if row.get("reverse_bytes") is None:
        return None
    base = row["fixed_bytes"] + row["floor_bytes"]
    theirs = row["policy_bytes"] - base
    return _ratio(row["reverse_bytes"] - base, theirs) if theirs > 0 else None


def _loses(row: dict[str, Any]) -> bool:
    return row["bytes"] is None or row["extra"] > row["policy_extra"] + _FLOP_TOLERANCE


def _mean(ratios: list[float]) -> str:
    if not ratios:
        return "of no case"
    mean, median = statistics.geometric_mean(ratios), statistics.median(ratios)
    return f"{mean:.2f}, median {median:.2f}, of {len(ratios)} cases"


def _criteria(rows: list[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    """Whether each promise holds, in words."""
    policies = [r for r in rows if r["kind"] == "policy"]
    if policies:
        lost = [f"{r['model']}/{r['policy']}@{r['target']}" for r in policies if _loses(r)]
        share = f"{len(policies) - len(lost)} of {len(policies)} cases"
        named = f"; lost: {', '.join(lost)}" if lost else ""
        yield len(lost) <= 0.05 * len(policies), f"extra FLOPs at a policy's peak at most the policy's: {share}{named}"
        fair = [r for r in policies if r["policy_extra"] >= _RECOMPUTES]
        ratios = [_ratio(r["extra"], r["policy_extra"]) for r in fair if r["bytes"] is not None]
        nothing = f", {len(fair) - len(ratios)} infeasible left out" if len(fair) > len(ratios) else ""
        holds = bool(ratios) and len(ratios) == len(fair) and statistics.geometric_mean(ratios) <= 0.5
        yield holds, f"extra FLOPs at most half of the policy's: geometric mean {_mean(ratios)}{nothing}"
    reverse = [r for r in policies if "reverse_bytes" in r]
    if reverse:
        above = [f"{r['model']}/{r['policy']}@{r['target']}" for r in reverse if _peak_above(r)]
        named = f"; lost: {', '.join(above)}" if above else ""
        yield (
            not above,
            f"peak at a policy's cost at most the policy's: {len(reverse) - len(above)} of {len(reverse)}{named}",
        )
        ratios = [x for x in map(_above_floor, reverse) if x is not None]
        holds = bool(ratios) and statistics.geometric_mean(ratios) <= 0.75
        yield holds, f"temporaries above the floor at most 0.75 of the policy's: geometric mean {_mean(ratios)}"
    yield from _reach(rows)
    budgets = [r for r in rows if r["kind"] == "budget"]
    if budgets:
        bad = [r for r in budgets if not _is_kept(r)]
        yield not bad, f"budgets kept and used: {len(budgets) - len(bad)} of {len(budgets)}"
        off = [(abs(r["predicted_bytes"] / r["bytes"] - 1), r["model"]) for r in budgets if r["bytes"]]
        good = sum(error <= 0.1 for error, _ in off)
        worst = "{:.0%} on {}".format(*max(off)) if off else "none"
        yield good >= 0.9 * len(off), f"predicted peak within 10 % of measured: {good} of {len(off)}, worst {worst}"
    times = [r for r in rows if r["kind"] == "time"]
    if times:
        good = [r for r in times if r["ratio"] is not None and r["ratio"] <= _TIME_TOLERANCE]
        slow = [f"{r['model']}/{r['policy']}" for r in times if r not in good]
        named = f"; slower: {', '.join(slow)}" if slow else ""
        yield (
            len(good) >= 0.95 * len(times),
            f"wall time within 3 % of the policy's: {len(good)} of {len(times)}{named}",
        )


def _peak_above(row: dict[str, Any]) -> bool:
    return row["reverse_bytes"] is None or row["reverse_bytes"] > row["policy_bytes"]


def _reach(rows: list[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    """The least peak of deep models against the best policy's."""
    places = sorted({(r["model"], r["target"]) for r in rows if r["is_deep"] and r["kind"] == "policy"})
    for model, target in places:
        mine = [r for r in rows if (r["model"], r["target"]) == (model, target)]
        policies = [r for r in mine if r["kind"] == "policy"]
        ours = [r["bytes"] for r in mine if r["kind"] in ("budget", "policy") and r.get("bytes")]
        ours += [r["reverse_bytes"] for r in policies if r.get("reverse_bytes")]
        # Equal tanh layers are judged by their whole peak.
        base = 0 if model == "tanh-64" else policies[0]["fixed_bytes"] + policies[0]["floor_bytes"]
        best = min(r["policy_bytes"] for r in policies) - base
        share = (min(ours) - base) / best if ours and best > 0 else math.inf
        yield share <= 0.5, f"reach of {model} on {target}: {share:.2f} of the best policy's"


def _is_kept(row: dict[str, Any]) -> bool:
    budget = row["budget_bytes"]
    return bool(
        row["bytes"] and row["bytes"] <= budget and (row["bytes"] >= 0.9 * budget or (row["next_bytes"] or 0) > budget)
    )


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}"


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "target", "policy") else "right")
    return table


def _policy_table(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        f"MiB on the device and extra FLOPs, jax {jax.__version__}",
        ("model", "target", "policy", "plain", "floor", "peak", "extra", "ours", "extra", "at its cost", "wall", "ok"),
    )
    wall = {(r["model"], r["target"], r["policy"]): r["ratio"] for r in rows if r["kind"] == "time"}
    for r in rows:
        if r["kind"] != "policy":
            continue
        ratio = wall.get((r["model"], r["target"], r["policy"]))
        infeasible = f"least {_mib(r.get('least_bytes'))}"
        table.add_row(
            *(r["model"], r["target"], r["policy"], _mib(r["plain_bytes"])),
            *(_mib(r["fixed_bytes"] + r["floor_bytes"]), _mib(r["policy_bytes"]), f"{r['policy_extra']:.2%}"),
            *(_mib(r["bytes"]), infeasible if r["bytes"] is None else f"{r['extra']:.2%}"),
            *(_mib(r.get("reverse_bytes")), "" if ratio is None else f"{ratio:.2f}", "NO" if _loses(r) else "yes"),
        )
    return table


def _budget_table(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "Budgets in MiB", ("model", "target", "budget", "measured", "used", "predicted", "off", "next", "extra", "ok")
    )
    for r in rows:
        if r["kind"] != "budget":
            continue
        ok = "yes" if _is_kept(r) else "NO"
        if r["bytes"] is None:
            table.add_row(r["model"], r["target"], _mib(r["budget_bytes"]), *["-"] * 6, ok)
            continue
        table.add_row(
            *(r["model"], r["target"], _mib(r["budget_bytes"]), _mib(r["bytes"])),
            *(f"{r['bytes'] / r['budget_bytes']:.1%}", _mib(r["predicted_bytes"])),
            *(f"{r['predicted_bytes'] / r['bytes'] - 1:+.1%}", _mib(r["next_bytes"]), f"{r['extra']:.2%}", ok),
        )
    return table


def _time_table(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "Medians of interleaved runs in ms, and beyond the program without a plan",
        ("model", "target", "policy", "plain", "policy's", "beyond", "ours", "beyond", "modelled", "ratio"),
    )
    for r in rows:
        if r["kind"] != "time" or r["ratio"] is None:
            continue
        plain, theirs, ours = r["plain_s"], r["policy_s"], r["ours_s"]
        table.add_row(
            *(r["model"], r["target"], r["policy"], f"{plain * 1e3:,.1f}"),
            *(f"{theirs * 1e3:,.1f}", f"{theirs / plain - 1:+.1%}", f"{ours * 1e3:,.1f}", f"{ours / plain - 1:+.1%}"),
            *(f"{r['modelled']:+.1%}", f"{r['ratio']:.3f}"),
        )
    return table


def _plot(rows: list[dict[str, Any]]) -> None:
    """Peak against extra FLOPs, one panel a model and target; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    places = sorted({(r["model"], r["target"]) for r in rows})
    if not places:
        return
    columns = min(4, len(places))
    height = math.ceil(len(places) / columns)
    figure = Figure(figsize=(4 * columns, 3 * height), layout="constrained")
    for i, place in enumerate(places):
        axes = figure.add_subplot(height, columns, i + 1, title=" on ".join(place), xlabel="MiB", ylabel="extra FLOPs")
        mine = [r for r in rows if (r["model"], r["target"]) == place]
        policies = [r for r in mine if r["kind"] == "policy"]
        plans = sorted((r["bytes"], r["extra"]) for r in mine if r.get("bytes") and "extra" in r)
        axes.plot([b / 2**20 for b, _ in plans], [e for _, e in plans], ".-", label="plans")
        axes.plot([r["policy_bytes"] / 2**20 for r in policies], [r["policy_extra"] for r in policies], "x")
        for r in policies:
            axes.annotate(r["policy"], (r["policy_bytes"] / 2**20, r["policy_extra"]), fontsize=6)
    figure.savefig(OUT / "dominance.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
