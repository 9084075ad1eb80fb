"""One program through planning and all oracles."""

import functools
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jaxckpt
from jaxckpt.program.trace import trace

from . import oracles
from .counting import count_plan, counting
from .oracles import Truth
from .programs import Spec

ORACLES = ("planning", "undecorated", "judge", "checkpoint", "eager", "forward")


class Failed(Exception):
    """An oracle says no."""

    def __init__(self, oracle: str, text: str):
        super().__init__(text)
        self.oracle, self.text = oracle, text


def tried(spec: Spec, asked: Sequence[str] = ORACLES) -> dict[str, Any]:
    """Plan a program within each of its budgets and ask the oracles.

    Args:
        spec: the program.
        asked: which oracles.

    Returns:
        A row: seed, failures, what was exercised, and how often each oracle was asked.
    """
    counts: Counter = Counter({f"construct: {name}": 1 for name, *_ in spec["ops"]})
    counts[f"transform: {spec['transform']}"] = counts[f"output: {spec['output']}"] = 1
    for _, params, *_ in spec["ops"]:
        if "body" in params:
            counts[f"loop body: {params['body']}"] = counts[f"loop length: {params['length']}"] = 1
    comparisons: Counter = Counter()
    failures = []
    with warnings.catch_warnings(), counting() as found:
        warnings.simplefilter("ignore")
        found.clear()
        truth = Truth(spec)
        try:
            if not truth.is_finite:
                raise ArithmeticError("not finite")
        except TimeoutError:
            raise
        except Exception as error:
            failures.append({"oracle": "generator", "text": _shown(error), "plan": -1})
        for i in range(len(spec["plans"])) if not failures else ():
            try:
                _plan(truth, i, asked, counts, comparisons)
            except Exception as error:
                oracle = getattr(error, "oracle", "planning")
                failures.append({"oracle": oracle, "text": _shown(error), "plan": i})
                if isinstance(error, TimeoutError):
                    break
        counts.update(dict.fromkeys(found, 1))
    return {"seed": spec["seed"], "failures": failures, "counts": dict(counts), "oracles": dict(comparisons)}


def _shown(error: Exception) -> str:
    if isinstance(error, Failed):
        return error.text
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/jaxckpt/" in f.filename]
    where = f" at {ours[-1].filename.rsplit('/jaxckpt/')[-1]}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}: {error}"[:600] + where


def _ask(oracle: str, asked: Sequence[str], comparisons: Counter, answer: Callable[[], str | None]) -> None:
    if oracle not in asked:
        return
    try:
        text = answer()
    except TimeoutError:
        raise
    except Exception as error:
        raise Failed(oracle, _shown(error)) from error
    comparisons[oracle] += 1
    if text is not None:
        raise Failed(oracle, text)


def _plan(truth: Truth, number: int, asked: Sequence[str], counts: Counter, comparisons: Counter) -> None:
    case, how = truth.case, truth.spec["plans"][number]
    fun, plan, fits = planned(truth, how)
    comparisons["planning"] += 1
    for key, value in how.items():
        counts[f"plan: {key} {value}"] += 1
    executable = oracles.compiled(case, fun)
    if plan is not None:
        count_plan(plan, trace(case.fun, case.args, keep_checkpoints=plan.keeps_checkpoints).program)
        same = how["how"] != "auto_remat"
        _ask("judge", asked, comparisons, lambda: oracles.judge(plan, executable, fits=fits, is_same=same))
    _ask("undecorated", asked, comparisons, lambda: oracles.undecorated(truth, executable))
    _ask("checkpoint", asked, comparisons, lambda: oracles.checkpointed(truth, executable))
    # Once for each program, and without `jit` for every third one, where each operation is compiled alone.
    if number == truth.spec["seed"] % len(truth.spec["plans"]):
        if case.has_forward and not case.batched:
            _ask("forward", asked, comparisons, lambda: oracles.forward(truth, fun))
        if truth.spec["seed"] % 3 == 0:
            _ask("eager", asked, comparisons, lambda: oracles.eager(truth, fun))


def planned(truth: Truth, how: dict[str, Any]) -> tuple[Callable, jaxckpt.Plan | None, bool]:
    """The function under a plan, the plan where one can be had, and whether it must fit its budget."""
    case = truth.case
    options = {key: how[key] for key in ("cost", "solver", "target", "verify", "keep_checkpoints", "max_compiles")}
    if case.batched:
        share = {"high": "90%", "middle": "70%", "least": "50%"}[how["budget"]]
        return jaxckpt.auto_remat(case.fun, budget=share, on_infeasible="least", **options), None, False
    planning = {**options, "argnums": case.argnums, "has_aux": case.has_aux, "calibration": None}
    plan, fits = _within(case, how["budget"], planning)
    if how["how"] == "auto_remat":
        limits = {"budget": plan.budget_bytes, "on_infeasible": "raise" if fits else "least"}
        return jaxckpt.auto_remat(case.fun, **limits, **options), plan, fits
    if how["how"] == "file":
        plan = jaxckpt.Plan.from_json(plan.to_json())
    return plan.apply(case.fun), plan, fits


# Of what a program takes without a plan.
_SHARES = {"high": "95%", "middle": "75%", "least": 1}


def _within(case: Any, budget: str, planning: dict[str, Any]) -> tuple[jaxckpt.Plan, bool]:
    """A plan within a budget, or within the least that the refusal names, and whether it must fit.

    A plan that is predicted has no least that could be named.
    """
    plan = functools.partial(jaxckpt.plan, case.fun, *case.args, **planning)
    if planning["verify"]:
        try:
            return plan(budget=_SHARES[budget]), True
        except jaxckpt.InfeasibleBudgetError as error:
            least = error.least_peak_bytes
        if least is not None:
            return plan(budget=least), True
    return plan(budget=_SHARES[budget], on_infeasible="least"), False
