"""Loops of known length: a `lax.scan` that tangents flow through is a block of its own."""

import math
from collections.abc import Iterator
from typing import Any

from jaxckpt.kinds.base import Analyser, KeptBlock, describe_tree, tree_from_json, tree_to_json
from jaxckpt.kinds.scan_options import analyse_loop
from jaxckpt.kinds.scan_run import LoopPart, LoopPlan, run_planned
from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import BlockAnalysis
from jaxckpt.program.control_flow import loop_of
from jaxckpt.program.ir import Equation


class Scan:
    """A loop of two iterations or more, whose body is planned and which is run in parts."""

    name = LoopPlan.kind

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
    if not lengths or min(lengths) < 1 or (num_states is not None and (num_states < 1 or len(lengths) > 1)):
        raise ValueError(f"a loop's lengths are {lengths}, {math.prod(lengths)} iterations, its states {num_states}")
    return LoopPart(lengths=lengths, body=tree_from_json(data), num_states=num_states)
