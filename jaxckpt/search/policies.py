"""Hand-written policies that can be put around any function, with their cost counted in the differentiated program."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxckpt import _compat
from jaxckpt.compilation.objective import cotangent_specs, input_specs
from jaxckpt.memory.peak import peak_bytes
from jaxckpt.model.time import timer
from jaxckpt.program.flatten import flatten
from jaxckpt.program.flops import jaxpr_cost
from jaxckpt.program.ir import size_bytes
from jaxckpt.search.analysis import Analysis

Flat = Callable[..., list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferentiatedCost:
    """What a function's value and gradient take once dead code is gone.

    Attributes:
        flops: recomputation included.
        cost: in the unit of the analysis's cost.
        peak_bytes: of temporaries, from the model, in the order the program is written.
    """

    flops: int
    cost: int
    peak_bytes: int


def policy_functions(fun: Flat) -> dict[str, Flat]:
    """Name -> the function under one `jax.checkpoint` around everything, as `jax.checkpoint_policies` names them."""
    names = ("dots_saveable", "dots_with_no_batch_dims_saveable")
    found = {"full remat": jax.checkpoint(fun)}
    return found | {name: jax.checkpoint(fun, policy=getattr(jax.checkpoint_policies, name)) for name in names}


def differentiated_cost(analysis: Analysis, fun: Flat) -> DifferentiatedCost:
    """Count the value and gradient of a function that computes what the analysis's program does."""
    specs = [*input_specs(analysis.program), *cotangent_specs(analysis.program, analysis.objective)]
    closed = jax.make_jaxpr(analysis.objective.differentiated(fun))(*specs)
    live = _compat.dce(closed)
    # The model of time sees what is inside checkpointed regions in line.
    flat = flatten(live, keep_checkpoints=False)
    outputs = {x for x in flat.outputs if isinstance(x, int)}
    return DifferentiatedCost(
        flops=jaxpr_cost(live).flops,
        cost=sum(timer(analysis.cost, analysis.chip)(flat.equations, flat.avals, outputs)),
        peak_bytes=peak_bytes(flat.equations, lambda v: size_bytes(flat.avals[v]), external=outputs),
    )
