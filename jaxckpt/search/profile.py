"""Blocks profiled one by one: what each takes on the target as its compiler builds it, and how long, where it is here.

The solver's numbers of a block come from a model. Here each distinct block is compiled for the target on its own, its
forward and its backward under every option, and the compiler's temporaries take the place of the model's transients.
What is held, saved and waiting is counted as before. On a device that is here the forward, the backward and what each
option makes again are run too, and their times take the place of the modelled ones.

A block on its own is not the block in its program: there the compiler fuses over its borders and shares buffers. So a
profile corrects what the model says of single operations, and the whole program is still measured in the end.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxckpt import _compat
from jaxckpt.compilation.measure import Measurement, lowered_for
from jaxckpt.compilation.pool import side_by_side
from jaxckpt.memory.peak import peak_bytes
from jaxckpt.model.block import Model
from jaxckpt.model.option import BlockAnalysis, Option
from jaxckpt.model.time import Timer
from jaxckpt.program.interpret import evaluate
from jaxckpt.program.ir import Equation, spec_of
from jaxckpt.targets.chip import Target

_NUM_RUNS = 5
_PICOSECONDS = 1e12


@dataclass(frozen=True, eq=False)
class _Run:
    """Equations of a block as a program of their own."""

    equations: tuple[Equation, ...]
    outputs: tuple[int, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for the same equations of one block with the same results."""
        return (*map(id, self.equations), -1, *self.outputs)

    @functools.cached_property
    def inputs(self) -> list[int]:
        made = {v for eqn in self.equations for v in eqn.outputs}
        read = [v for eqn in self.equations for v in eqn.reads] + list(self.outputs)
        return list(dict.fromkeys(v for v in read if v not in made))

    def __call__(self, *values: Any) -> list[Any]:
        env = dict(zip(self.inputs, values, strict=True))
        evaluate(self.equations, env)
        return [env[v] for v in self.outputs]


class Profiler:
    """Puts what compiled, and on a device that is here also ran, in the place of a block's modelled numbers.

    Args:
        target: for which chip, as users write it.
        chip: the same.
        timer: modelled times of equations.
        is_timed: run the blocks too; the target is the device that is here.
    """

    def __init__(self, target: str | None, chip: Target, timer: Timer, *, is_timed: bool):
        # A block is compiled for one device: its shapes are those of the whole program.
        self.target = None if target is None else target.partition(":")[0]
        self.chip, self.timer, self.is_timed = chip, timer, is_timed
        self.num_programs = 0

    def profiled(self, model: Model, analysis: BlockAnalysis, saved: Sequence[frozenset[int]]) -> BlockAnalysis:
        """Return the block with its profiled numbers; its options stay what they are. See `kinds.base.Profiler`."""
        local, joint = model.local, model.joint
        results = {joint.value[v] for v in local.results if v in joint.value}
        size = lambda values: sum(map(model.size, values))  # noqa: E731
        kept = [{v for v in (*model.outputs, *values) if v >= 0} for values in (frozenset(), *saved)]
        gradients = {*joint.waiting, *joint.gradients}
        forwards = [_Run(tuple(model.forward_equations(values)), tuple(sorted(values))) for values in kept]
        backwards = [_Run(tuple(model.backward_equations(values)), tuple(sorted(gradients))) for values in saved]
        again = self._corrections([*forwards, *backwards], joint.avals, model)
        forward_peaks = [
            max(size(values - results), peak + again[run])
            for values, peak, run in zip(
                kept,
                [analysis.forward_peak_bytes, *(o.forward_peak_bytes for o in analysis.options)],
                forwards,
                strict=True,
            )
        ]
        options = [
            replace(
                option,
                forward_peak_bytes=forward_peak,
                backward_peak_bytes=max(size({*values, *joint.cotangents}), option.backward_peak_bytes + again[run]),
                # Of a loop's body there are peaks of another reading too, with what is saved elsewhere.
                stacked_peak_bytes=(
                    None if option.stacked_peak_bytes is None else max(0, option.stacked_peak_bytes + again[run])
                ),
            )
            for option, values, run, forward_peak in zip(
                analysis.options, saved, backwards, forward_peaks[1:], strict=True
            )
        ]
        if local.is_last:
            # Left to JAX, its backward runs behind its forward, and nothing of it is left to run later.
            last, run = analysis.options[-1], backwards[-1]
            peak = max(last.saved_bytes, last.forward_peak_bytes + again[run])
            options[-1] = replace(last, forward_peak_bytes=peak)
        found = replace(analysis, forward_peak_bytes=forward_peaks[0], options=tuple(options))
        return self._timed(found, model, forwards[0], backwards[-1], saved)

    def _corrections(self, runs: Iterable[_Run], avals: list[Any], model: Model) -> dict[_Run, int]:
        """For each run, the compiler's temporaries less the model's."""
        runs = list(runs)
        distinct = list({run.key: run for run in runs if run.equations}.values())
        self.num_programs += len(distinct)
        measured: list[Measurement] = side_by_side(
            lowered_for(run, [spec_of(avals[v]) for v in run.inputs], self.target) for run in distinct
        )
        found: dict[tuple[int, ...], int] = {}
        for run, what in zip(distinct, measured, strict=True):
            modelled = peak_bytes(run.equations, model.size, external=run.outputs, rules=model.rules)
            found[run.key] = what.temp_bytes - modelled
        return {run: found.get(run.key, 0) for run in runs}

    def _timed(
        self, analysis: BlockAnalysis, model: Model, forward: _Run, backward: _Run, saved: Sequence[Collection[int]]
    ) -> BlockAnalysis:
        """The same with measured times, where there is something to measure them on."""
        avals = model.joint.avals
        if not self.is_timed or not all(_can_be_made(avals[v]) for run in (forward, backward) for v in run.inputs):
            return analysis
        known: dict[tuple[int, ...], int] = {}

        def picoseconds(run: _Run) -> int:
            if run.key not in known:
                known[run.key] = math.ceil(_PICOSECONDS * _seconds(avals, run)) if run.equations else 0
            return known[run.key]

        whole = picoseconds(forward)
        # Parts of the forward take their modelled share of it.
        share = whole / max(1, analysis.forward[-1].time)
        scaled = lambda runs: tuple(replace(w, time=math.ceil(share * w.time)) for w in runs)  # noqa: E731

        def timed(option: Option, values: Collection[int]) -> Option:
            time = 0 if option.is_left_to_jax else picoseconds(_again(model, values))
            return replace(option, recompute=replace(option.recompute, time=time), forward=scaled(option.forward))

        options = tuple(timed(option, values) for option, values in zip(analysis.options, saved, strict=True))
        cost = whole + picoseconds(backward)
        return replace(analysis, forward=scaled(analysis.forward), options=options, unplanned_cost=cost)


def _again(model: Model, saved: Collection[int]) -> _Run:
    """What leads from the inputs and what is saved to what the backward reads."""
    equations = model.backward_equations(frozenset(saved))
    backward = set(map(id, model.joint.backward))
    forward = tuple(eqn for eqn in equations if id(eqn) not in backward)
    made = {v for eqn in forward for v in eqn.outputs}
    return _Run(forward, tuple(v for v in model.joint.residuals if v in made))


def _can_be_made(aval: Any) -> bool:
    return not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _seconds(avals: list[Any], run: _Run) -> float:
    """The median time of a run on the device that is here."""
    compiled = jax.jit(run, compiler_options=_compat.here_options() or None)
    values = list(_made(avals[v] for v in run.inputs))
    return statistics.median(_timings(compiled, values))


def _made(avals: Iterable[Any]) -> Iterator[jax.Array]:
    """Values that neither overflow nor divide by zero: ones, and zeros to index by."""
    for aval in avals:
        is_float = jnp.issubdtype(aval.dtype, jnp.inexact)
        yield jnp.full(aval.shape, 1 if is_float else 0, aval.dtype)


def _timings(fun: Callable, values: Sequence[Any]) -> Iterator[float]:
    jax.block_until_ready(fun(*values))
    for _ in range(_NUM_RUNS):
        started = time.perf_counter()
        jax.block_until_ready(fun(*values))
        yield time.perf_counter() - started
