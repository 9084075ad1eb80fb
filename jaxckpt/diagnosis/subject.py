"""What is examined: a differentiated function or a step, traced and compiled with other checkpoints than its own."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from jaxckpt import _compat
from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.compilation.measure import Measurement, compiled_bytes
from jaxckpt.compilation.program_memory import program_memory
from jaxckpt.diagnosis.sites import checkpoint_line, jaxpr_flops
from jaxckpt.program.flatten import flatten
from jaxckpt.search.subjects import TREATED, Treated, peak_of
from jaxckpt.targets.sharding import step_split

# What becomes of the checkpoints of a line: taken out; with barriers; without; saving nothing; saving kernels too.
Change = Literal["out", "barriers", "no barriers", "save nothing", "save kernels"]
# Changes by line of source; the empty line is every other one.
Treatment = frozenset[tuple[str, Change]]
AS_WRITTEN: Treatment = frozenset()
EVERY = ""

# What checkpoints ask while a function is traced; jit traces again when it changes.
_CHANGED = jax.make_user_context(None)


def change(source: str, what: Change) -> Treatment:
    """One change."""
    return frozenset({(source, what)})


@dataclass(eq=False, kw_only=True)
class Subject:
    """A function that differentiates, at one shape of its arguments.

    Attributes:
        fun: what is compiled: a value and gradient, or a step.
        specs: its positional arguments.
        target: a chip's name; None is the default backend.
        donate_argnums: as in `jax.jit`.
        jit_options: other keywords of `jax.jit`.
        closed_over: arrays that `fun` takes before the others and that are constants of the program.
        as_set: the same function under JAX's own flags where those say which kind of checkpoint there is, as
            `JAX_REMAT3` does; None elsewhere.
        most_compiles: how many programs may be compiled.
        num_compiles: how many were.
    """

    fun: Callable
    specs: Sequence[Any]
    target: str | None
    donate_argnums: int | Sequence[int] = ()
    jit_options: Mapping[str, Any] = field(default_factory=dict)
    closed_over: Sequence[Any] = ()
    as_set: Callable | None = None
    most_compiles: int = 12
    num_compiles: int = 0
    _measured: dict[Any, Measurement] = field(default_factory=dict)
    _jaxprs: dict[Treatment, Any] = field(default_factory=dict)

    def losses(self) -> list[Any]:
        """The jaxprs of the functions that it differentiates, as they are before."""
        found: list[Any] = []

        def note(jaxpr: Any) -> Any:
            found.append(jaxpr)
            return flatten(jaxpr)

        def chosen(*args: Any) -> Any:
            with TREATED(Treated(note)), _compat.plain_checkpoints():
                return self.fun(*args)

        jax.make_jaxpr(chosen)(*self.closed_over, *self.specs)
        return found

    def jaxpr(self, treatment: Treatment = AS_WRITTEN) -> Any:
        """Its jaxpr without dead code."""
        if treatment not in self._jaxprs:
            fun = _changed(self.fun, treatment)
            self._jaxprs[treatment] = _compat.dce(jax.make_jaxpr(fun)(*self.closed_over, *self.specs))
        return self._jaxprs[treatment]

    def flops(self, treatment: Treatment = AS_WRITTEN) -> int:
        """FLOPs of one run, recomputation included."""
        return jaxpr_flops(self.jaxpr(treatment))

    @property
    def can_compile(self) -> bool:
        """Whether there are compiles left."""
        return self.num_compiles < self.most_compiles

    def measure(
        self, treatment: Treatment = AS_WRITTEN, options: Mapping[str, Any] | None = None, *, as_set: bool = False
    ) -> Measurement | None:
        """Compile it so; each way is compiled once, and None is returned where no compile is left.

        Args:
            treatment: of its checkpoints.
            options: compiler options instead of its own; None for those.
            as_set: as JAX's own flags say, where they say it.
        """
        key = treatment, None if options is None else tuple(sorted(options.items())), as_set
        if key not in self._measured:
            if not self.can_compile:
                return None
            self.num_compiles += 1
            fun = self.as_set if as_set and self.as_set is not None else _changed(self.fun, treatment)
            given = dict(self.jit_options) if options is None else {**self.jit_options, "compiler_options": options}
            self._measured[key] = compiled_bytes(
                fun, self.specs, self.target, self.donate_argnums, self.closed_over, given
            )
        return self._measured[key]

    def memory(self) -> CompiledMemory:
        """Its buffers, as it is written."""
        self.num_compiles += 1
        return program_memory(
            self.as_set or _changed(self.fun, AS_WRITTEN),
            self.specs,
            self.target,
            self.donate_argnums,
            self.closed_over,
            self.jit_options,
        )

    def predict(self, treatment: Treatment, base: Measurement) -> int:
        """Device bytes to expect: the model's, off by as much as they are for the program as it is written."""
        split = step_split(self.specs)
        model = [peak_of(self.jaxpr(t), self.target, split) for t in (treatment, AS_WRITTEN)]
        return max(0, base.device_bytes + model[0] - model[1])


def _changed(fun: Callable, treatment: Treatment) -> Callable:
    """A function whose checkpoints are changed; it is another function for each treatment."""
    _compat.hand_over_checkpoints(lambda: _CHANGED.value)
    hand = _hand(treatment)

    @functools.wraps(fun)
    def chosen(*args: Any) -> Any:
        with _CHANGED(hand), _compat.plain_checkpoints():
            return fun(*args)

    return chosen


@functools.lru_cache(maxsize=64)
def _hand(treatment: Treatment) -> Any:
    changes = dict(treatment)

    def hand(line: str, params: dict[str, Any]) -> dict[str, Any] | None:
        what = changes.get(checkpoint_line(line, params["jaxpr"]), changes.get(EVERY))
        if what == "out":
            return None
        if what in ("barriers", "no barriers"):
            return {**params, "prevent_cse": what == "barriers"}
        if what == "save nothing":
            return {**params, "policy": None}
        if what == "save kernels":
            return {**params, "policy": _with_kernels(params["policy"])}
        return params

    return hand


@functools.lru_cache(maxsize=64)
def _with_kernels(policy: Any) -> Callable[..., Any]:
    """A policy that saves what Pallas kernels make, too."""

    def saves(primitive: Any, *avals: Any, **params: Any) -> Any:
        if _compat.runs_kernel(primitive, params):
            return True
        return policy is not None and policy(primitive, *avals, **params)

    return saves
