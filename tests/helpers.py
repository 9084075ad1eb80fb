"""What several tests ask of JAX."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
import pytest
from jax.extend.core import primitives as prims
from zoo import gpt
from zoo.models import MODELS

import jaxckpt
from jaxckpt import _compat
from jaxckpt.compilation import measure
from jaxckpt.compilation.objective import objective
from jaxckpt.program.trace import trace
from jaxckpt.search.analysis import Analysis


def x64() -> contextlib.AbstractContextManager:
    """Double precision inside."""
    return jax.enable_x64(True)


def jit(fun: Callable, **options: Any) -> Callable:
    """Compile fast, and keep recomputation on every CPU."""
    compiler_options = {"xla_backend_optimization_level": 0, **_compat.CPU_REMAT_OPTIONS}
    return jax.jit(fun, compiler_options=compiler_options, **options)


def slow_but(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Parameters of a test, of which only some run in the ordinary suite: the others are of the same kind."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def no_compiles() -> contextlib.AbstractContextManager:
    """Inside, the test fails at the first compile, whatever asks for it."""
    return measure.through(lambda name, compile_: pytest.fail("compiled"))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of nested jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def count(fun: Callable, *args: Any) -> Counter:
    """How often each primitive is in the function's jaxpr once dead code is removed: what will really run."""
    found = equations(_compat.dce(jax.make_jaxpr(fun)(*args)))
    return Counter("checkpoint" if e.primitive is prims.remat_p else e.primitive.name for e in found)


def names(fun: Callable, *args: Any) -> set[str]:
    """The names that `checkpoint_name` gives in the function's jaxpr."""
    return {e.params["name"] for e in equations(jax.make_jaxpr(fun)(*args).jaxpr) if e.primitive.name == "name"}


def value_and_grad(fun: Callable, has_aux: bool = False) -> Callable:
    """Of the first argument."""
    return jax.value_and_grad(fun, has_aux=has_aux)


def assert_close(got: Any, wanted: Any, tolerance: float) -> None:
    """Two trees agree, each leaf relative to its largest element."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.max(np.abs(a.astype(float) - b), initial=0) <= tolerance * max(1e-30, np.max(np.abs(b), initial=0))


def analysed(
    fun: Callable,
    *args: Any,
    has_aux: bool = False,
    cost: str = "flops",
    solver: Any = "auto",
    target: str | None = None,
) -> Analysis:
    """A program cut, analysed and solved, without a compile."""
    traced = trace(fun, args)
    return Analysis(traced.program, objective(traced, 0, has_aux), cost, solver, target)


def all_saves(found: Analysis) -> list[list[Any]]:
    """What each option of each block saves, in the program's values."""
    assert found.blocks is not None
    return [[block.save(i) for i in range(len(block.options))] for block in found.blocks.blocks]


# Name -> function, shapes of its arguments, has_aux.
CASES = {name: (model.fun, model.specs(), model.has_aux) for name, model in MODELS.items()}
CASES["gpt"] = gpt.make_loss(gpt.TINY), gpt.specs(gpt.TINY), False


@functools.cache
def analysis_of(name: str) -> Analysis:
    """The analysis of a case, made once for all tests that only look at it."""
    fun, args, has_aux = CASES[name]
    return analysed(fun, *args, has_aux=has_aux)


def least_budget(fun, *args, **options):
    """The least bytes that a refusal names: measured, or predicted where nothing is compiled."""
    fixed = 1
    for _ in range(2):
        # At first it is refused for what no plan changes, without a compile.
        with pytest.raises(jaxckpt.InfeasibleBudgetError) as caught:
            jaxckpt.plan(fun, *args, budget=fixed, **options)
        fixed = caught.value.forced_by[0][1]
    return caught.value.expected_least_bytes if options.get("verify") is False else caught.value.least_peak_bytes
