"""Hand-written policies that can be put around any function, with their cost counted in the differentiated program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
from jax.extend.core import primitives as prims

from jaxckpt import _compat, costs, liveness, targets
from jaxckpt.measurement import cotangent_specs, input_specs
from jaxckpt.study import Study
from jaxckpt.trace import flatten, size_bytes

Flat = Callable[..., list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferentiatedCost:
    """What a function's value and gradient take once dead code is gone.

    Attributes:
        flops: recomputation included.
        cost: in the unit of the study's cost.
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


def differentiated_cost(study: Study, fun: Flat) -> DifferentiatedCost:
    """Count the value and gradient of a function that computes what the study's program does."""
    specs = [*input_specs(study.program), *cotangent_specs(study.program, study.objective)]
    closed = jax.make_jaxpr(study.objective.differentiated(fun))(*specs)
    live = _compat.dce(closed)
    flat = flatten(jax.make_jaxpr(lambda *args: _evaluate(live, closed.consts, *args))(*specs).jaxpr)
    outputs = {x for x in flat.outputs if isinstance(x, int)}
    return DifferentiatedCost(
        flops=costs.jaxpr_cost(live).flops,
        cost=sum(targets.timer(study.cost, study.chip)(flat.equations, flat.avals, outputs)),
        peak_bytes=liveness.peak_bytes(flat.equations, lambda v: size_bytes(flat.avals[v]), external=outputs),
    )


def _evaluate(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    """Run a jaxpr with what is inside checkpointed regions in line, as the model of time sees it."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda x: x.val if isinstance(x, jex.Literal) else env[x]  # noqa: E731
    for eqn in jaxpr.eqns:
        operands = [read(x) for x in eqn.invars]
        if eqn.primitive is prims.remat_p:
            results = _evaluate(eqn.params["jaxpr"], (), *operands)
        else:
            results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            results = results if eqn.primitive.multiple_results else [results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]
