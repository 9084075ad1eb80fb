"""What of a program is differentiated, and the specs of what its value and gradient read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxckpt.errors import NotDifferentiableError
from jaxckpt.program.describe import show_aval
from jaxckpt.program.ir import Program, is_differentiable, spec_of
from jaxckpt.program.nnx import is_differentiated, position_of
from jaxckpt.program.trace import Traced


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What of a program is differentiated.

    Attributes:
        inputs: positions among the program's inputs, in the order of the gradients.
        outputs: positions among its outputs.
        is_scalar: the one output is a scalar, as `jax.value_and_grad` wants; otherwise cotangents are arguments.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_scalar: bool

    def differentiated(self, fun: Callable[..., list[Any]]) -> Callable[..., Any]:
        """Return a flat function's results with its gradients; cotangents, where needed, follow the inputs."""

        def value_and_gradients(*args: Any) -> tuple[list[Any], Any]:
            num_inputs = len(args) - (0 if self.is_scalar else len(self.outputs))
            inputs, cotangents = list(args[:num_inputs]), list(args[num_inputs:])

            def active(*values: Any) -> tuple[list[Any], list[Any]]:
                full = list(inputs)
                for position, value in zip(self.inputs, values, strict=True):
                    full[position] = value
                results = fun(*full)
                return [results[i] for i in self.outputs], results

            outs, pull, results = jax.vjp(active, *(inputs[i] for i in self.inputs), has_aux=True)
            return results, pull([jnp.ones_like(outs[0])] if self.is_scalar else cotangents)

        return value_and_gradients


def objective(traced: Traced, argnums: Any, has_aux: bool) -> Objective:
    """Find what `jax.value_and_grad(fun, argnums, has_aux)` would differentiate; a vjp where `fun` is not scalar.

    Of modules of flax NNX that is what `nnx.value_and_grad` would: their `nnx.Param`, or what a `nnx.DiffState` among
    the argnums names.

    Raises:
        NotDifferentiableError: no floating-point leaf in these arguments, or none in the result.
    """
    program, num_consts = traced.program, len(traced.consts)
    given = list(argnums) if isinstance(argnums, Sequence) else [argnums]
    wanted = list(map(position_of, given))
    args_tree = traced.in_tree.children()[0]
    num_args = args_tree.num_leaves and len(args_tree.children())
    if any(not -num_args <= a < num_args for a in wanted):
        raise NotDifferentiableError(f"argnums={argnums} names an argument that is not there; the call has {num_args}")
    # Gradients are results, and a compiler schedules them in their order, which is that of the user's own call.
    filters = {a % num_args: one for a, one in zip(wanted, given, strict=True)}
    wanted = list(dict.fromkeys(a % num_args for a in wanted))
    variables = traced.variables or (None,) * len(traced.arg_names)
    owner = [i for i, child in enumerate(args_tree.children()) for _ in range(child.num_leaves)]
    owner += [-1] * (len(traced.is_array) - len(owner))
    owner = [i for i, dyn in zip(owner, traced.is_array, strict=True) if dyn]
    inputs = [
        num_consts + i
        for arg in wanted
        for i, owning in enumerate(owner)
        if owning == arg
        and is_differentiable(program.avals[program.inputs[num_consts + i]])
        and (variables[i] is None or is_differentiated(variables[i], filters[arg]))
    ]
    if not inputs:
        shown = ", ".join(
            f"{name}: {show_aval(program.avals[v])}"
            for name, v in zip(traced.arg_names, program.inputs[num_consts:], strict=True)
        )
        raise NotDifferentiableError(
            f"no floating-point array among the arguments argnums={argnums}, so there is nothing to differentiate "
            f"(the arguments are {shown or 'no arrays at all'})"
        )
    parts = traced.out_tree.children()
    if has_aux and (len(parts) != 2 or traced.out_tree.node_data()[0] is not tuple):  # type: ignore[index]
        raise NotDifferentiableError(
            "has_aux=True is for a function that returns a pair, (value, auxiliary results), and this one returns "
            f"{str(traced.out_tree)[:200]}"
        )
    num_outputs = parts[0].num_leaves if has_aux else traced.out_tree.num_leaves
    return output_objective(program, tuple(inputs), num_outputs)


def output_objective(program: Any, inputs: tuple[int, ...], num_outputs: int) -> Objective:
    """Choose among a program's first outputs those that have a gradient.

    Raises:
        NotDifferentiableError: none of them is floating point.
    """
    avals = [program.avals[x] if isinstance(x, int) else x.aval for x in program.outputs[:num_outputs]]
    outputs = tuple(i for i, aval in enumerate(avals) if is_differentiable(aval))
    if not outputs:
        shown = ", ".join(map(show_aval, avals)) or "nothing"
        raise NotDifferentiableError(f"the function returns {shown}, and no gradient flows from that")
    is_scalar = num_outputs == 1 and avals[0].shape == ()
    return Objective(inputs=inputs, outputs=outputs, is_scalar=is_scalar)


def measured_specs(program: Program, goal: Objective) -> list[jax.ShapeDtypeStruct]:
    """What the differentiated program is given when it is measured: no closed-over arrays, cotangents at the end."""
    return [*input_specs(program)[len(program.closed_over) :], *cotangent_specs(program, goal)]


def input_specs(program: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a program's inputs, `[num_inputs]`."""
    specs = [spec_of(program.avals[v]) for v in program.inputs]
    if not program.shardings:
        return specs
    return [s.update(sharding=sharding) for s, sharding in zip(specs, program.shardings, strict=True)]


def cotangent_specs(program: Any, goal: Objective) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the cotangents that are arguments; none for a scalar."""
    if goal.is_scalar:
        return []
    outputs = [program.outputs[i] for i in goal.outputs]
    return [spec_of((program.avals[x] if isinstance(x, int) else x.aval).to_ct_aval()) for x in outputs]
