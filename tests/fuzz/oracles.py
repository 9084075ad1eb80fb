"""What a planned program is compared with. An oracle returns None, or in a few words what differs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxckpt
from jaxckpt import _compat

from .constructs import CALLS
from .programs import Case, Spec, build

# A prediction may be off by this factor and so many bytes: these programs are so small that alignment counts.
FACTOR, SPARE_BYTES = 3.0, 16384
OPTIONS = {"xla_backend_optimization_level": 0, **_compat.CPU_REMAT_OPTIONS}


def derivative(case: Case, fun: Callable) -> Callable:
    """The value and the gradients of a function like the case's, of the case's arguments."""
    if case.is_vector:

        def pulled(*args: Any) -> Any:
            numbers = [case.argnums] if isinstance(case.argnums, int) else list(case.argnums)

            def active(*values: Any) -> Any:
                full = list(args[:-1])
                for i, value in zip(numbers, values, strict=True):
                    full[i] = value
                return fun(*full)

            value, pull = jax.vjp(active, *(args[i] for i in numbers))
            return value, pull(args[-1])

        return pulled
    found = jax.value_and_grad(fun, argnums=case.argnums, has_aux=case.has_aux)
    return jax.vmap(found, (None, 0, 0, None), axis_name="examples") if case.batched else found


def arguments(case: Case) -> tuple:
    """Of `derivative`: a cotangent comes last where the result is an array."""
    if not case.is_vector:
        return case.args
    spec = jax.eval_shape(case.fun, *case.args)
    return (*case.args, jnp.cos(jnp.arange(spec.size, dtype=spec.dtype)).reshape(spec.shape))


def compiled(case: Case, fun: Callable) -> Any:
    """The derivative, compiled as a user would who minds memory."""
    return jax.jit(derivative(case, fun)).lower(*arguments(case)).compile(compiler_options=OPTIONS)


def called(case: Case, run: Callable) -> tuple[Any, dict[str, int]]:
    """Results as NumPy arrays, and how often it called back."""
    CALLS.clear()
    found = jax.tree.map(_numpy, run(*arguments(case)))
    jax.effects_barrier()
    return found, dict(CALLS)


def _numpy(x: Any) -> Any:
    x = jnp.asarray(x)
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def difference(got: Any, wanted: Any, tolerance: float) -> str | None:
    """Where two trees of arrays differ first."""
    if jax.tree.structure(got) != jax.tree.structure(wanted):
        return f"structure {jax.tree.structure(got)} where {jax.tree.structure(wanted)} is due"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    for path, a, b in zip(paths, jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{path} is {a.dtype}{a.shape} where {b.dtype}{b.shape} is due"
        if a.size == 0 or a.dtype == jax.dtypes.float0:
            continue
        kind = complex if np.iscomplexobj(b) else float
        off = np.max(np.abs(a.astype(kind) - b.astype(kind)))
        if not off <= tolerance * max(1e-3, float(np.max(np.abs(b.astype(kind))))):
            return f"{path} is off by {off:.3e} of {np.max(np.abs(b.astype(kind))):.3e}"
    return None


class Truth:
    """What the undecorated function does, each answer found once.

    Args:
        spec: the program.
    """

    def __init__(self, spec: Spec):
        self.spec, self.case = spec, build(spec)

    @functools.cached_property
    def results(self) -> tuple[Any, dict[str, int]]:
        """Its value and gradients, and how often it called back."""
        return called(self.case, compiled(self.case, self.case.fun))

    @functools.cached_property
    def by_hand(self) -> Any:
        """The same with `jax.checkpoint` around every few operations."""
        return called(self.case, compiled(self.case, build(self.spec, by_hand=True).fun))[0]

    @property
    def is_finite(self) -> bool:
        """Whether equality says anything."""
        leaves = jax.tree.leaves(self.results[0])
        return all(np.all(np.isfinite(x.astype(complex))) for x in leaves if x.dtype != jax.dtypes.float0)


def undecorated(truth: Truth, run: Callable) -> str | None:
    """The undecorated function in double precision, compiled; callbacks run as often."""
    got, calls = called(truth.case, run)
    wanted, due = truth.results
    if truth.spec["transform"] == "none" and calls != due:
        return f"called back {calls} times where {due} is due"
    return difference(got, wanted, truth.case.tolerance)


def checkpointed(truth: Truth, run: Callable) -> str | None:
    """The same function with `jax.checkpoint` written by hand."""
    return difference(called(truth.case, run)[0], truth.by_hand, truth.case.tolerance)


def eager(truth: Truth, fun: Callable) -> str | None:
    """The planned function without `jit`, against the undecorated one."""
    return difference(called(truth.case, derivative(truth.case, fun))[0], truth.results[0], truth.case.tolerance)


def forward(truth: Truth, fun: Callable) -> str | None:
    """The planned function in forward mode, against the gradients: a derivative along one direction."""
    case = truth.case
    numbers = (case.argnums,) if isinstance(case.argnums, int) else case.argnums
    active = [case.args[i] for i in numbers]
    tangents = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) + 0.1, active)

    def pushed(*active: Any) -> Any:
        def of(*values: Any) -> Any:
            full = list(case.args)
            for i, value in zip(numbers, values, strict=True):
                full[i] = value
            found = fun(*full)
            return found[0] if case.has_aux else found

        return jax.jvp(of, active, tuple(tangents))[1]

    pushed_out = np.asarray(jax.jit(pushed).lower(*active).compile(compiler_options=OPTIONS)(*active))
    grads = truth.results[0][1]
    grads = grads if isinstance(grads, tuple) else (grads,)
    pairs = list(zip(jax.tree.leaves(list(grads)), jax.tree.leaves(tangents), strict=True))
    wanted = sum(float(np.sum(g * np.asarray(t))) for g, t in pairs)
    scale = sum(float(np.sum(np.abs(g * np.asarray(t)))) for g, t in pairs)
    if case.is_vector:
        pushed_out = np.sum(pushed_out * np.asarray(arguments(case)[-1]))
    off = abs(float(pushed_out) - wanted)
    # bfloat16 in forward mode rounds other things than in reverse mode.
    if off <= 10 * case.tolerance * max(1e-3, scale):
        return None
    return f"{float(pushed_out):.10e} along a direction, where the gradients say {wanted:.10e}"


def device_bytes(executable: Any) -> int:
    """As the compiler counts them."""
    stats = executable.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + results + stats.temp_size_in_bytes


def judge(plan: jaxckpt.Plan, executable: Any, *, fits: bool, is_same: bool) -> str | None:
    """What a plan says of its bytes, against the compiler's own count for one's own step.

    Args:
        plan: the plan.
        executable: one's own step.
        fits: the plan is within its budget.
        is_same: the plan is in the step; `auto_remat` makes one of its own within the same budget.
    """
    found = device_bytes(executable)
    if plan.measured_peak_bytes is not None:
        if is_same and plan.measured_peak_bytes != found:
            return f"the plan says {plan.measured_peak_bytes} bytes measured, and one's own step takes {found}"
        if fits and plan.budget_bytes is not None and found > plan.budget_bytes:
            return f"{found} bytes measured for a budget of {plan.budget_bytes}"
    low, high = found / FACTOR - SPARE_BYTES, FACTOR * found + SPARE_BYTES
    if is_same and plan.target == "cpu" and not low <= plan.predicted_peak_bytes <= high:
        return f"{plan.predicted_peak_bytes} bytes predicted and {found} measured"
    return None
