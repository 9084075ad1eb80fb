"""The problem of which names to save, read from a gradient in which nothing is saved.

There the backward part of every `jax.checkpoint` makes again what it needs, and the names stand where they would cut
that. What is needed under a choice of names is what JAX's removal of dead code would leave: it is followed through
loops, branches and calls, operation by operation, so FLOPs come out as they would be counted in the gradient traced
under that choice.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ckptsolvers.names import NamedValue, NameProblem, simplified
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.model.time import Timer
from jaxckpt.program.flatten import flatten
from jaxckpt.program.ir import Atom, Equation, Program, size_bytes
from jaxckpt.program.regions import AGAIN, opened

# What it costs to save a value, from its aval and how many times it is made.
SavingWork = Callable[[Any, int], int]


def name_problem(jaxpr: Any, timer: Timer, saving_work: SavingWork, split: int = 1) -> NameProblem:
    """Read the problem from a gradient.

    Args:
        jaxpr: of the gradient, or of a whole step, with nothing saved in its regions and without dead code.
        timer: what equations cost.
        saving_work: what it costs to save a value.
        split: over how many devices values are cut.

    Returns:
        The problem; of its names those are no part that stand nowhere in the backward part of a region.
    """
    program = flatten(opened(jaxpr), is_differentiated=True)
    graph = _Graph(timer, saving_work, split)
    # Arguments are there anyway.
    results = graph.walk(program, [None] * len(program.inputs), 1, is_outermost=True)
    graph.needs_always(results)
    return simplified(graph.problem())


class _Graph:
    """Parts and who reads them, collected along a program."""

    def __init__(self, timer: Timer, saving_work: SavingWork, split: int):
        self._timer, self._saving_work, self._split = timer, saving_work, split
        self._readers: list[list[tuple[int, int]]] = [[]]
        self._work, self._held = [0], [0]
        self._names: dict[str, int] = {}
        self._values: list[NamedValue] = []

    def problem(self) -> NameProblem:
        """What was collected."""
        return NameProblem(
            names=tuple(self._names),
            readers=tuple(tuple(sorted(set(pairs))) for pairs in self._readers),
            work=tuple(self._work),
            held_bytes=tuple(self._held),
            values=tuple(self._values),
        )

    def needs_always(self, parts: Sequence[int | None]) -> None:
        """These parts are needed whatever is saved."""
        self._read(0, parts)

    def walk(
        self, program: Program, inputs: Sequence[int | None], trips: int, *, is_outermost: bool = False
    ) -> list[int | None]:
        """Add a program that runs so many times; from the parts that make its inputs to those that make its results."""
        env: dict[int, int | None] = dict(zip(program.inputs, inputs, strict=True))
        read = lambda x: env[x] if isinstance(x, int) else None  # noqa: E731
        outputs = {x for x in program.outputs if isinstance(x, int)}
        costs = self._timer(program.equations, program.avals, outputs)
        held: dict[int, int | None] = {}
        is_forward = {v: AGAIN not in eqn.params for eqn in program.equations for v in eqn.outputs}

        def operand(x: Atom, eqn: Equation) -> int | None:
            """The part that makes an operand, with what is held where a region reads what the forward pass made."""
            if not is_outermost or AGAIN not in eqn.params or not isinstance(x, int) or not is_forward.get(x):
                return read(x)
            if x not in held:
                held[x] = self._part(held=size_bytes(program.avals[x]))
                self._read(held[x], [env[x]])
            return held[x]

        for eqn, cost in zip(program.equations, costs, strict=True):
            operands = [operand(x, eqn) for x in eqn.inputs]
            avals = [program.avals[v] for v in eqn.outputs]
            if eqn.primitive is prims.scan_p:
                results = self._scan(eqn, operands, avals, trips, is_outermost)
            elif eqn.primitive is prims.cond_p and not eqn.has_effects:
                results = self._cond(eqn, operands, trips)
            else:
                part = self._part(work=trips * cost)
                cut = self._named(eqn, avals, part, trips)
                self._read(part, operands, cut)
                results = [part] * len(eqn.outputs)
                if eqn.has_effects:
                    self.needs_always([part])
            env.update(zip(eqn.outputs, results, strict=True))
        return [read(x) for x in program.outputs]

    def _named(self, eqn: Equation, avals: Sequence[Any], part: int, trips: int) -> int:
        """The name that stands here and cuts what leads to it; -1 for none."""
        if eqn.primitive is not prims.name_p or AGAIN not in eqn.params:
            return -1
        name = self._names.setdefault(eqn.params["name"], len(self._names))
        (aval,) = avals
        size = -(-trips * size_bytes(aval) // self._split)
        self._values.append(NamedValue(part=part, name=name, size_bytes=size, work=self._saving_work(aval, trips)))
        return name

    def _scan(
        self, eqn: Equation, operands: list[int | None], avals: Sequence[Any], trips: int, is_outermost: bool
    ) -> list[int | None]:
        num_consts, num_carry = _compat.scan_layout(eqn.params)
        length = eqn.params["length"]
        inner = eqn.params["jaxpr"]
        body = flatten(getattr(inner, "jaxpr", inner), is_differentiated=True)
        carries = [self._part() for _ in range(num_carry)]
        slices = operands[num_consts + num_carry :]
        closed_over = [None] * (len(body.inputs) - len(operands))
        made = self.walk(body, [*closed_over, *operands[:num_consts], *carries, *slices], trips * length)
        for carry, start, end in zip(carries, operands[num_consts:], made, strict=False):
            self._read(carry, [start, end])
        # What a loop of the forward pass stacks is held for the backward pass.
        is_stacked = is_outermost and AGAIN not in eqn.params
        results: list[int | None] = []
        for i, (part, aval) in enumerate(zip(made, avals, strict=True)):
            result = self._part(held=size_bytes(aval) if is_stacked and i >= num_carry else 0)
            self._read(result, [part, carries[i] if i < num_carry else None])
            results.append(result)
        return results

    def _cond(self, eqn: Equation, operands: list[int | None], trips: int) -> list[int | None]:
        index, rest = operands[0], operands[1:]
        branches = [flatten(getattr(b, "jaxpr", b), is_differentiated=True) for b in eqn.params["branches"]]
        costs = [sum(self._timer(b.equations, b.avals, ())) for b in branches]
        dearest = max(range(len(branches)), key=costs.__getitem__)
        # Which branch is taken is not known: that with the most work counts.
        made = [
            self.walk(b, [*[None] * (len(b.inputs) - len(rest)), *rest], trips if i == dearest else 0)
            for i, b in enumerate(branches)
        ]
        results: list[int | None] = []
        for parts in zip(*made, strict=True):
            result = self._part()
            self._read(result, [*parts, index])
            results.append(result)
        return results

    def _part(self, work: int = 0, held: int = 0) -> int:
        self._readers.append([])
        self._work.append(work)
        self._held.append(-(-held // self._split))
        return len(self._work) - 1

    def _read(self, reader: int | None, parts: Sequence[int | None], name: int = -1) -> None:
        assert reader is not None
        for part in parts:
            if part is not None:
                self._readers[part].append((reader, name))
