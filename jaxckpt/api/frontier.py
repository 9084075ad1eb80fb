"""The trade-off of peak bytes against step cost: a few plans that stand for all, beside hand-written policies."""

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxckpt.api.arguments import check_argnums, check_flags, check_function, refuse_differentiated
from jaxckpt.api.host import check_host_budget
from jaxckpt.compilation.measure import compiled_bytes
from jaxckpt.compilation.objective import Objective, measured_specs, objective
from jaxckpt.errors import OptionError
from jaxckpt.model.schedules import Candidate
from jaxckpt.program.interpret import run
from jaxckpt.program.static import bound_call
from jaxckpt.program.trace import Traced
from jaxckpt.result.build import build
from jaxckpt.result.frontier import Frontier, Point
from jaxckpt.search.analysis import Analysis, find_analysis
from jaxckpt.search.calibration import Calibration, add_samples, remembered
from jaxckpt.search.found import Found
from jaxckpt.search.policies import DifferentiatedCost, differentiated_cost, policy_functions
from jaxckpt.targets.chip import device_label
from jaxckpt.targets.sharding import described, trace_placed

UNPLANNED = "unplanned"
PLAN = "plan"
# Predicted temporaries to the device bytes to expect.
Expected = Callable[[int], int]


def frontier(
    fun: Callable,
    /,
    *args: Any,
    cost: str = "time",
    target: str | None = None,
    num_points: int = 12,
    host_budget: int | str | None = None,
    verify: bool = False,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    keep_checkpoints: bool = True,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    **kwargs: Any,
) -> Frontier:
    """Trace the trade-off of peak bytes against step cost, refined where it bends.

    It costs one solve, whatever the number of points. What earlier plans of such programs measured corrects the
    predictions, and points that are measured are remembered in turn. Beside the plans stand the program without one,
    and the policies that can be written around any function: one checkpoint that saves nothing, all matmuls, or those
    without batch dimensions.

    Args:
        fun: a function of pytrees; leaves that are not arrays are static.
        *args: arrays or `ShapeDtypeStruct`s.
        cost: "time", modelled for the target, or "flops".
        target: a chip's name; None is the default backend.
        num_points: how many plans at most.
        host_budget: as in `plan`.
        verify: compile every point and measure it; a plan that then takes more bytes than a cheaper one is left out.
        argnums: as in `jax.grad`.
        has_aux: as in `jax.grad`.
        keep_checkpoints: as in `plan`.
        static_argnums: as in `plan`.
        static_argnames: as in `plan`.
        **kwargs: named arguments of `fun`, as in `plan`.

    Returns:
        The frontier. Its `str` is a table.

    Raises:
        OptionError: `num_points` below 2, a cost that is none, a static argument that `fun` does not have, or a name
            that is neither an option nor one of its arguments.
        BudgetError: a host budget that cannot be read, or where the platform has no such memory.
        NotDifferentiableError: nothing to differentiate.
        ShardingError: arguments on several devices, of which one does not say where it lies.
        TargetError: an unknown target; with `verify`, a compiler that is not here or fails (`CompilerError`).
        UnsupportedProgramError: side effects inside the function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(w, x):
        ...     for _ in range(16):
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> w, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((1024, 64), jnp.float32)
        >>> found = frontier(loss, w, x, num_points=4)
        >>> found.plans[0].peak_bytes < found.plans[-1].peak_bytes
        True
    """
    if isinstance(num_points, bool) or not isinstance(num_points, int) or num_points < 2:
        raise OptionError(f"num_points={num_points!r} is not accepted; a curve takes an int of at least 2")
    check_function(fun, "frontier")
    check_argnums(argnums)
    check_flags(has_aux=has_aux, verify=verify, keep_checkpoints=keep_checkpoints)
    call = bound_call(fun, args, kwargs, static_argnums, static_argnames, "frontier")
    host_bytes = check_host_budget(host_budget, target)
    with described(target):
        traced = trace_placed(call.fun, call.args, call.kwargs, keep_checkpoints=keep_checkpoints)
        goal = objective(traced, argnums, has_aux)
        refuse_differentiated(traced.program, goal, "frontier")
        return _frontier(traced, goal, cost, target, verify, num_points, host_bytes)


def _frontier(
    traced: Traced,
    goal: Objective,
    cost: str,
    target: str | None,
    verify: bool,
    num_points: int,
    host_budget: int | None,
) -> Frontier:
    analysis = find_analysis(traced.program, goal, cost, "auto", target, host_budget=host_budget)
    record = remembered(traced.program, target)
    expected, calibration = functools.partial(_expected, analysis, record), record.hash if record.samples else None
    policies = _policy_points(analysis, verify, expected)
    unplanned = next(point for point in policies if point.name == UNPLANNED)
    chosen = _chosen(analysis.candidates, num_points)
    if verify:
        analysis.measure_all(chosen)
        chosen = [c for c in chosen if host_budget is None or analysis.measure(c).host_bytes <= host_budget]
    points = [_plan_point(analysis, c, unplanned, verify, expected, calibration) for c in chosen]
    if verify:
        _remember(analysis, record, chosen)
        points = _unbeaten(points)
    return Frontier(
        points=tuple(sorted([*points, *policies], key=lambda p: (p.peak_bytes, -p.cost_ratio))),
        cost=cost,
        target=device_label(target),
        fingerprint=traced.program.fingerprint(),
        forward_flops=analysis.forward_flops,
        num_candidates=len(analysis.candidates),
        calibration=calibration,
    )


def _expected(analysis: Analysis, record: Calibration, peak_bytes: int) -> int:
    """Device bytes to expect where the model says this of the temporaries."""
    if not analysis.candidates or not peak_bytes:
        return analysis.fixed_bytes + peak_bytes
    fraction = peak_bytes / max(1, analysis.unplanned.judgement.peak_bytes)
    return analysis.fixed_bytes + math.ceil(peak_bytes * record.ratio(analysis.program.fingerprint(), fraction))


def _remember(analysis: Analysis, record: Calibration, measured: Sequence[Candidate]) -> None:
    unplanned = max(1, analysis.unplanned.judgement.peak_bytes)
    temporaries = [
        (c, c.judgement.peak_bytes, analysis.measure(c).device_bytes - analysis.fixed_bytes) for c in measured
    ]
    kept = [(c, peak, size) for c, peak, size in temporaries if peak and not c.judgement.host_bytes]
    found = [(peak / unplanned, size / peak, analysis.kind(c)) for c, peak, size in kept]
    add_samples(record, analysis.program.fingerprint(), found)


def _chosen(candidates: Sequence[Candidate], num_points: int) -> list[Candidate]:
    """Both ends, then again and again the candidate that the curve so far misses by most."""
    if len(candidates) <= num_points:
        return list(candidates)
    # Halving the bytes is worth the same anywhere, and both axes are worth the same.
    bytes_ = _scaled([math.log(max(1, c.judgement.peak_bytes)) for c in candidates])
    work = _scaled([c.judgement.work for c in candidates])
    chosen = [0, len(candidates) - 1]
    while len(chosen) < num_points:
        misses = {i: _miss(bytes_, work, chosen, i) for i in range(len(candidates)) if i not in chosen}
        bisect.insort(chosen, max(misses, key=lambda i: misses[i]))
    return [candidates[i] for i in chosen]


def _scaled(xs: Sequence[float]) -> list[float]:
    low, high = min(xs), max(xs)
    return [(x - low) / max(1e-9, high - low) for x in xs]


def _miss(xs: Sequence[float], ys: Sequence[float], chosen: Sequence[int], i: int) -> float:
    """How far a point is from the line through its chosen neighbours."""
    at = bisect.bisect(chosen, i)
    a, b = chosen[at - 1], chosen[at]
    dx, dy = xs[b] - xs[a], ys[b] - ys[a]
    return abs(dx * (ys[i] - ys[a]) - dy * (xs[i] - xs[a])) / max(1e-9, math.hypot(dx, dy))


def _plan_point(
    analysis: Analysis,
    candidate: Candidate,
    unplanned: Point,
    verify: bool,
    expected: Expected,
    calibration: str | None,
) -> Point:
    measurement = analysis.measure(candidate) if verify else None
    plan = build(
        Found(
            analysis=analysis,
            candidate=candidate,
            unplanned_peak_bytes=unplanned.peak_bytes,
            predicted_peak_bytes=expected(candidate.judgement.peak_bytes),
            measurement=measurement,
            host_budget_bytes=analysis.host_budget,
            expected_least_bytes=expected(analysis.candidates[0].judgement.peak_bytes),
            is_unplanned_measured=verify,
            num_compiles=int(verify),
            calibration=calibration,
        )
    )
    return Point(
        name=PLAN,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=plan.measured_peak_bytes,
        recompute_flops=plan.recompute_flops,
        cost_ratio=1 + plan.recompute_cost / max(1, plan.unplanned_cost),
        plan=plan,
        host_bytes=plan.host_bytes,
    )


def _policy_points(analysis: Analysis, verify: bool, expected: Expected) -> list[Point]:
    """The program without a plan, and under one checkpoint around everything."""
    plain = functools.partial(run, analysis.program)
    without = differentiated_cost(analysis, plain)
    peak = analysis.unplanned.judgement.peak_bytes if analysis.candidates else without.peak_bytes
    measured = analysis.measure(None).device_bytes if verify else None
    points = [_policy_point(UNPLANNED, without, without, expected(peak), measured)]
    specs, constants = measured_specs(analysis.program, analysis.objective), analysis.program.closed_over
    for name, fun in policy_functions(plain).items():
        found = differentiated_cost(analysis, fun)
        if verify:
            differentiated = analysis.objective.differentiated(fun)
            measured = compiled_bytes(differentiated, specs, analysis.target, closed_over=constants).device_bytes
        points.append(_policy_point(name, found, without, expected(found.peak_bytes), measured))
    return points


def _policy_point(
    name: str, found: DifferentiatedCost, without: DifferentiatedCost, peak: int, measured: int | None
) -> Point:
    return Point(
        name=name,
        predicted_peak_bytes=peak,
        measured_peak_bytes=measured,
        recompute_flops=found.flops - without.flops,
        cost_ratio=found.cost / max(1, without.cost),
    )


def _unbeaten(points: Sequence[Point]) -> list[Point]:
    """Leave out a plan that a cheaper one undercuts in bytes too, or that takes no less than one as cheap."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost_ratio, p.peak_bytes)):
        if not kept or point.peak_bytes < kept[-1].peak_bytes:
            kept.append(point)
    return kept
