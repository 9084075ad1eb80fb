"""Loops of known length: a `lax.scan` that tangents flow through is a block of its own."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from jaxckpt.compilation.records import Positive, Record
from jaxckpt.kinds.base import Analyser, KeptBlock, describe_tree, tree_from_json, tree_to_json
from jaxckpt.kinds.check import check_tree
from jaxckpt.kinds.scan_options import analyse_loop
from jaxckpt.kinds.scan_run import LoopPart, LoopPlan, run_planned
from jaxckpt.kinds.schema import TreeRecord
from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import BlockAnalysis
from jaxckpt.program.control_flow import loop_of
from jaxckpt.program.ir import Equation

# No division of a loop has so many levels: each has two iterations at least.
_MAX_LEVELS = 64


class PartRecord(TreeRecord):
    """A part of a loop, in a file: the plan of its body, and how often that is run."""

    lengths: Annotated[list[Positive], Field(min_length=1, max_length=_MAX_LEVELS)]
    num_states: Positive | None


class PartsRecord(Record):
    """The plan of a loop, in a file."""

    parts: Annotated[list[PartRecord], Field(min_length=1)]


class Scan:
    """A loop of two iterations or more, whose body is planned and which is run in parts."""

    name = LoopPlan.kind
    schema: type[BaseModel] = PartsRecord

    def matches(self, eqn: Equation, is_active: bool) -> bool:
        """Whether a block that ends with this equation is of this kind."""
        return is_active and loop_of(eqn) is not None

    def analyse(self, local: LocalBlock, analyser: Analyser) -> BlockAnalysis:
        """Find the block's options."""
        return analyse_loop(local, analyser)

    def run(self, block: KeptBlock) -> None:
        """Run the block as planned."""
        assert isinstance(block.save, LoopPlan)
        run_planned(block.equations, block.save, block.prefix, block.values, block.applier)

    def to_json(self, save: LoopPlan) -> dict[str, Any]:
        """The plan as plain data."""
        return {"parts": [_part_to_json(part) for part in save.parts]}

    def from_json(self, data: dict[str, Any]) -> LoopPlan:
        """Read what `to_json` made."""
        return LoopPlan(parts=tuple(map(_part_from_json, data["parts"])))

    def check(self, save: LoopPlan, equations: Sequence[Equation], where: str) -> None:
        """Refuse parts that do not make up the loop, and plans that are not of its body."""
        loop = loop_of(equations[-1])
        if loop is None:
            raise ValueError(f"{where} is the plan of a loop, and the block ends with {equations[-1].primitive.name}")
        length = sum(math.prod(part.lengths) for part in save.parts)
        if length != loop.length:
            raise ValueError(f"{where}.parts: lengths make {length} iterations, and the loop has {loop.length}")
        for i, part in enumerate(save.parts):
            at = f"{where}.parts[{i}]"
            if part.num_states is not None and (len(part.lengths) > 1 or part.num_states > max(part.lengths)):
                raise ValueError(f"{at}.num_states is {part.num_states} for {part.lengths} iterations")
            check_tree(loop.body, part.body, f"{at}.")

    def describe(self, save: LoopPlan) -> Iterator[str]:
        """How the loop's iterations are run, a line for each part."""
        for part in save.parts:
            levels = " x ".join(map(str, part.lengths))
            states = "" if part.num_states is None else f" with {part.num_states} carries held"
            yield f"{levels} iterations{states}, each {describe_tree(part.body)}"

    def held(self, eqn: Equation) -> str:
        """What is held of a block without a name."""
        loop = loop_of(eqn)
        return "what JAX keeps" if loop is None else f"stacks of {loop.length} iterations"


def _part_to_json(part: LoopPart) -> dict[str, Any]:
    return {"lengths": part.lengths, "num_states": part.num_states, **tree_to_json(part.body)}


def _part_from_json(data: dict[str, Any]) -> LoopPart:
    lengths = tuple(map(int, data["lengths"]))
    num_states = None if data["num_states"] is None else int(data["num_states"])
    return LoopPart(lengths=lengths, body=tree_from_json(data), num_states=num_states)
