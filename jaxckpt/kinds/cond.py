"""Conditionals: a `lax.cond` or `lax.switch` of which a branch makes something large is a block of its own."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from jaxckpt.compilation.records import Record
from jaxckpt.kinds.base import Analyser, KeptBlock, describe_tree, tree_from_json, tree_to_json
from jaxckpt.kinds.check import check_tree
from jaxckpt.kinds.cond_options import analyse_conditional
from jaxckpt.kinds.cond_run import BranchPlan, run_conditional
from jaxckpt.kinds.schema import TreeRecord
from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import BlockAnalysis
from jaxckpt.program.control_flow import branches_of
from jaxckpt.program.ir import Equation


class BranchesRecord(Record):
    """The plan of a conditional, in a file."""

    branches: Annotated[list[TreeRecord], Field(min_length=1)]


class Cond:
    """A conditional with a plan for each of its branches."""

    name = BranchPlan.kind
    schema: type[BaseModel] = BranchesRecord

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

    def check(self, save: BranchPlan, equations: Sequence[Equation], where: str) -> None:
        """Refuse what is not a plan of each of the conditional's branches."""
        branches = branches_of(equations[-1])
        if len(branches) != len(save.branches):
            raise ValueError(f"{where}.branches has {len(save.branches)} plans for {len(branches)} branches")
        for i, (branch, tree) in enumerate(zip(branches, save.branches, strict=True)):
            check_tree(branch.body, tree, f"{where}.branches[{i}].")

    def describe(self, save: BranchPlan) -> Iterator[str]:
        """How the branches are run, a line for each."""
        for i, tree in enumerate(save.branches):
            yield f"branch {i} {describe_tree(tree)}"

    def held(self, eqn: Equation) -> str:
        """What is held of a block without a name."""
        del eqn
        return "what JAX keeps"
