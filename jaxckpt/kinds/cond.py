"""Conditionals: a `lax.cond` or `lax.switch` of which a branch makes something large is a block of its own."""

from collections.abc import Iterator
from typing import Any

from jaxckpt.kinds.base import Analyser, KeptBlock, describe_tree, tree_from_json, tree_to_json
from jaxckpt.kinds.cond_options import analyse_conditional
from jaxckpt.kinds.cond_run import BranchPlan, run_conditional
from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import BlockAnalysis
from jaxckpt.program.control_flow import branches_of
from jaxckpt.program.ir import Equation


class Cond:
    """A conditional with a plan for each of its branches."""

    name = BranchPlan.kind

    def matches(self, eqn: Equation, is_active: bool) -> bool:
        """Whether a block that ends with this equation is of this kind."""
        return is_active and bool(branches_of(eqn))

    def analyse(self, local: LocalBlock, analyser: Analyser) -> BlockAnalysis:
        """Find the block's options."""
        return analyse_conditional(local, analyser)

    def run(self, block: KeptBlock) -> None:
        """Run the block as planned."""
        assert isinstance(block.save, BranchPlan)
        run_conditional(block.equations, block.save, block.prefix, block.values, block.applier)

    def to_json(self, save: BranchPlan) -> dict[str, Any]:
        """The plan as plain data."""
        return {"branches": [tree_to_json(tree) for tree in save.branches]}

    def from_json(self, data: dict[str, Any]) -> BranchPlan:
        """Read what `to_json` made."""
        return BranchPlan(branches=tuple(map(tree_from_json, data["branches"])))

    def describe(self, save: BranchPlan) -> Iterator[str]:
        """How the branches are run, a line for each."""
        for i, tree in enumerate(save.branches):
            yield f"branch {i} {describe_tree(tree)}"

    def held(self, eqn: Equation) -> str:
        """What is held of a block without a name."""
        del eqn
        return "what JAX keeps"
