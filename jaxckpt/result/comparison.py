"""A planned function beside the same without a plan, run on the same arrays: how far value and gradients differ."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt import _compat
from jaxckpt.compilation.objective import Objective, cotangent_specs
from jaxckpt.program.trace import Traced, call_with_leaves

# Gradients from another order of sums differ by some rounding errors; the root of one leaves room for many.
_TOLERANCE_POWER = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far a leaf is from what it is without a plan.

    Attributes:
        path: how a user would write it, such as `result[1]` or `args[0]['w']`; empty where there is no leaf.
        absolute: the largest difference of an element.
        relative: that over the largest magnitude in the leaf without a plan.
        tolerance: what rounding may make of `relative` in this dtype: the root of its epsilon, 0 of integers.
    """

    path: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def is_close(self) -> bool:
        """Whether it is no more than rounding makes."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        """One line a person reads."""
        if not self.path:
            return "nothing to compare"
        if not self.absolute:
            return "equal to the bit"
        said = "" if self.is_close else f", more than rounding makes ({self.tolerance:.1e})"
        return f"at most {self.absolute:.3g}, relative {self.relative:.2g}, at {self.path}{said}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A function with a plan beside the same without.

    Attributes:
        value: the largest difference among the leaves of the result, auxiliary ones included.
        gradients: the largest difference among the gradients.
    """

    value: Difference
    gradients: Difference

    @property
    def is_close(self) -> bool:
        """Whether they differ by no more than rounding makes."""
        return self.value.is_close and self.gradients.is_close

    def __str__(self) -> str:
        """What a person reads."""
        return f"value      {self.value}\ngradients  {self.gradients}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; a difference that is not finite is None."""
        value, gradients = (
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(one).items()}
            for one in (self.value, self.gradients)
        )
        return {"is_close": self.is_close, "value": value, "gradients": gradients}


def compare_runs(
    fun: Callable, traced: Traced, planned: Callable[..., list[Any]], goal: Objective, leaves: Sequence[Any]
) -> Comparison:
    """Run value and gradients with and without a plan.

    Args:
        fun: the function without one.
        traced: it at these arguments.
        planned: the program under the plan, of flat inputs.
        goal: what is differentiated.
        leaves: traced leaves of the arguments, arrays.
    """
    program, num_consts = traced.program, len(traced.consts)

    def plain(*inputs: Any) -> list[Any]:
        given = traced.in_tree, traced.static_leaves, traced.is_array, inputs[num_consts:]
        return jax.tree.leaves(call_with_leaves(fun, *given))

    key = jax.random.key(0)
    cotangents = [array_like(s, jax.random.fold_in(key, i)) for i, s in enumerate(cotangent_specs(program, goal))]
    inputs = [*traced.consts, *leaves, *cotangents]
    options = _compat.here_options() or None
    (value, gradients), (own_value, own_gradients) = (
        jax.jit(goal.differentiated(f), compiler_options=options)(*inputs) for f in (planned, plain)
    )
    names = [traced.arg_names[i - num_consts] for i in goal.inputs]
    return Comparison(
        value=_largest(zip(_result_names(traced.out_tree, len(value)), value, own_value, strict=True)),
        gradients=_largest(zip(names, gradients, own_gradients, strict=True)),
    )


def arrays_like(tree: Any, seed: int = 0) -> Any:
    """Put random arrays into the places of specs; everything else stays.

    Args:
        tree: of arrays, specs and static values.
        seed: of the random numbers.
    """
    key = jax.random.key(seed)
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [array_like(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)])


def array_like(spec: Any, key: Any) -> Any:
    """Random values of a shape and dtype: normal ones, scaled as weights are, small integers, or keys.

    Args:
        spec: an array, which stays as it is, or a `ShapeDtypeStruct`.
        key: of `jax.random`.
    """
    if not isinstance(spec, jax.ShapeDtypeStruct):
        return spec
    shape, dtype = spec.shape, spec.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        made: Any = jax.random.split(key, shape)
    elif jnp.issubdtype(dtype, np.inexact):
        wide = jnp.complex64 if jnp.issubdtype(dtype, np.complexfloating) else jnp.float32
        scale = math.sqrt(max(1, shape[-2])) if len(shape) > 1 else 1.0
        made = (jax.random.normal(key, shape, wide) / scale).astype(dtype)
    else:
        made = jax.random.randint(key, shape, 0, 2).astype(dtype)
    return made if spec.sharding is None else jax.device_put(made, spec.sharding)


def _result_names(tree: Any, num_values: int) -> list[str]:
    """Paths of a result's leaves; what follows is the state of modules."""
    leaves = jax.tree.unflatten(tree, range(tree.num_leaves))
    names = [f"result{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_flatten_with_path(leaves)[0]]
    return names + [f"state {i}" for i in range(num_values - len(names))]


def _largest(leaves: Iterable[tuple[str, Any, Any]]) -> Difference:
    found = [_difference(*leaf) for leaf in leaves]
    nothing = Difference(path="", absolute=0.0, relative=0.0, tolerance=0.0)
    return max(found, key=lambda d: (not d.is_close, d.relative, d.absolute), default=nothing)


def _difference(path: str, given: Any, wanted: Any) -> Difference:
    if jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        given, wanted = map(jax.random.key_data, (given, wanted))
    dtype = given.dtype
    if dtype == jax.dtypes.float0 or not given.size:
        return Difference(path=path, absolute=0.0, relative=0.0, tolerance=0.0)
    is_inexact = jnp.issubdtype(dtype, np.inexact)
    kind = np.complex128 if jnp.issubdtype(dtype, np.complexfloating) else np.float64
    ours, own = (np.asarray(x).astype(kind) for x in (given, wanted))
    with np.errstate(invalid="ignore"):
        apart = np.where((ours == own) | (np.isnan(ours) & np.isnan(own)), 0.0, np.abs(ours - own))
    # What is finite on one side alone is infinitely far.
    absolute = float(np.max(np.where(np.isnan(apart), np.inf, apart)))
    size = float(np.max(np.abs(own), where=np.isfinite(own), initial=0.0))
    return Difference(
        path=path,
        absolute=absolute,
        relative=absolute / size if absolute and size else absolute,
        tolerance=float(jnp.finfo(dtype).eps) ** _TOLERANCE_POWER if is_inexact else 0.0,
    )
