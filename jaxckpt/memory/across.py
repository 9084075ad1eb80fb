"""What is held from a forward to a backward that one compiler sees together, without a checkpoint between them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from jaxckpt.memory.fusion import Copy, resolve, roots_of
from jaxckpt.memory.peak import peak_of_runs
from jaxckpt.program.ir import Equation
from jaxckpt.targets.rules import FusionRules


@dataclass(frozen=True, slots=True, kw_only=True)
class Across:
    """What is held from a forward to a backward that one compiler sees together.

    Attributes:
        values: that the forward makes, as buffers.
        copies: of such values and of what was there before.
        read: values from before that the backward reads, by itself or through what is fused.
        forward_peak_bytes: most bytes alive while the forward runs, results included.
    """

    values: frozenset[int]
    copies: frozenset[Copy]
    read: frozenset[int]
    forward_peak_bytes: int


def held_across(
    forward: Sequence[Equation],
    backward: Sequence[Equation],
    size: Callable[[int], int],
    *,
    results: Collection[int],
    cotangents: Collection[int],
    kept: Collection[int],
    external: Collection[int] = (),
    rules: FusionRules,
) -> Across:
    """Find what is held from a forward to a backward without a checkpoint between them.

    Args:
        forward: in order.
        backward: in order.
        size: bytes of a value.
        results: of the forward, which are there after it in any case.
        cotangents: what is there for the backward only.
        kept: further values that outlive both.
        external: results whose storage is counted elsewhere.
        rules: what the compiler does of its own accord.

    Returns:
        What is held. What is fused is made again from the buffers it is fused from.
    """
    found = resolve([*forward, *backward], size, rules, [*results, *kept, *external])
    late = {v for eqn in backward for v in eqn.outputs} | set(cotangents)
    # A copy of what needs nothing of the backward is made as soon as that is there.
    is_copy = lambda run: run.makes[0] < 0  # noqa: E731
    first = [r for r in found.runs if late.isdisjoint(r.makes) and not (is_copy(r) and late.intersection(r.reads))]
    before = {v for run in found.runs for v in run.reads} - {v for run in found.runs for v in run.makes}
    roots = roots_of(found.runs, found.buffers, before)
    early = {v for run in first for v in run.makes}
    read = {root for run in found.runs if early.isdisjoint(run.makes) for v in run.reads for root in roots.get(v, ())}
    across = read & early
    return Across(
        values=frozenset(v for v in across if v >= 0),
        copies=frozenset(found.copies[v] for v in across if v < 0),
        read=frozenset(read & before),
        forward_peak_bytes=peak_of_runs(
            first,
            found,
            size,
            at_end=across | found.find(results) - found.find(external),
            at_start=(),
            elsewhere=found.find(external),
            is_breadth_first=rules.is_breadth_first,
        ),
    )
