"""Blocks with side effects: they run once, where they stand, and no region covers them."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, RootModel

from jaxckpt.kinds.base import Analyser, KeptBlock
from jaxckpt.kinds.plain import analyse_block
from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import LEFT_NAME, LEFT_TO_JAX, BlockAnalysis, LeftToJax, Option, Work, kept_only, on_device
from jaxckpt.program.interpret import evaluate
from jaxckpt.program.ir import Equation, size_bytes


class Effect:
    """A block that ends with an operation that has an effect. What it saves is left to JAX, as any block may be."""

    name = LeftToJax.kind
    schema: type[BaseModel] = RootModel[None]

    def matches(self, eqn: Equation, is_active: bool) -> bool:
        """Whether a block that ends with this equation is of this kind."""
        del is_active
        return eqn.has_effects

    def analyse(self, local: LocalBlock, analyser: Analyser) -> BlockAnalysis:
        """The one option there is."""
        return kept_only(analyse_block(local, analyser)[0] if local.active_outputs else _without_tangents(local))

    def run(self, block: KeptBlock) -> None:
        """Run the block as it is."""
        if any(eqn.has_effects for eqn in block.equations):
            evaluate(block.equations, block.values)
        else:
            block.uncovered(functools.partial(evaluate, block.equations))

    def to_json(self, save: LeftToJax) -> Any:
        """Nothing is to be said."""
        del save

    def from_json(self, data: Any) -> LeftToJax:
        """Read what `to_json` made."""
        del data
        return LEFT_TO_JAX

    def check(self, save: LeftToJax, equations: Sequence[Equation], where: str) -> None:
        """Any block can be left to JAX."""
        del save, equations, where

    def describe(self, save: LeftToJax) -> Iterator[str]:
        """There is nothing to say."""
        del save
        return iter(())

    def held(self, eqn: Equation) -> str:
        """What is held of a block without a name."""
        del eqn
        return "what JAX keeps"


def _without_tangents(local: LocalBlock) -> BlockAnalysis:
    """It is run where it stands, costs nothing that a plan could change, and nothing of it is held."""
    size = sum(size_bytes(local.program.avals[v]) for v in local.outputs if v not in local.results)
    nothing = (Work(),) * (len(local.outputs) + 1)
    option = Option(
        name=LEFT_NAME,
        save=LEFT_TO_JAX,
        saved=on_device(0),
        recompute=Work(),
        forward=nothing,
        forward_peak_bytes=size,
        backward_peak_bytes=0,
        unread_inputs=tuple(range(len(local.span.inputs))),
    )
    return BlockAnalysis(
        forward=nothing, forward_peak_bytes=size, options=(option,), unplanned_cost=0, residual_bytes=0
    )
