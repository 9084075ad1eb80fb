"""Functions and steps whose own `jax.checkpoint` regions get other policies: traced, counted and compiled so."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import jax
from ckptsolvers.names import NameProblem, judge_names

from jaxckpt import _compat
from jaxckpt.compilation.measure import Measurement, compiled_bytes, donated_leaves
from jaxckpt.compilation.objective import Objective, cotangent_specs, input_specs, measured_specs
from jaxckpt.memory.peak import peak_bytes
from jaxckpt.model.named import name_problem
from jaxckpt.model.time import count_flops, stacking_time, timer
from jaxckpt.program.flatten import flatten
from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Program, elements, is_differentiable, size_bytes
from jaxckpt.program.nnx import pure
from jaxckpt.program.objects import call_unchanged
from jaxckpt.program.regions import Region, names_of, opened, regions_of, with_policy
from jaxckpt.search.names import WITHOUT, WRITTEN, Treatment
from jaxckpt.targets.chip import find_target
from jaxckpt.targets.sharding import step_split, without_values

# What differentiated functions ask while a step is traced; jit traces again when it changes.
TREATED = jax.make_user_context(None)


@dataclass(frozen=True)
class Treated:
    """What every function that a step differentiates becomes while it is traced; see `TREATED`.

    Attributes:
        program: from the function's jaxpr to the program that runs.
    """

    program: Callable[[Any], Program]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What a treatment costs.

    Attributes:
        flops: of the gradient or the step, recomputation included.
        cost: the same in the unit that is minimised.
    """

    flops: int
    cost: int


@dataclass(eq=False)
class Named:
    """A function or a step with policies for its regions; `search.names.Subject`.

    Attributes:
        target: a chip's name; None is the default backend.
        cost: "time" or "flops".
        label: what it is called.
        regions: its regions as they are written.
        lines: of each name that occurs in it the first line.
    """

    target: str | None
    cost: str
    label: str
    regions: dict[Region, None] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)

    def differentiated(self, treatment: Treatment) -> tuple[Callable, Sequence[Any]]:
        """The value and gradient, or the step, and what it is traced with."""
        raise NotImplementedError

    def measure(self, treatment: Treatment) -> Measurement:
        """Compile it for the target."""
        raise NotImplementedError

    def argument_bytes(self) -> int:
        """Of what is there before it runs, less what it may overwrite."""
        raise NotImplementedError

    @functools.cached_property
    def split(self) -> int:
        """Over how many devices its values are cut."""
        return step_split(self.differentiated(WRITTEN)[1])

    def written_names(self) -> frozenset[str] | None:
        """The names that its regions save as they are written, where all save the same ones and nothing else."""
        about = [region for region in self.regions if region.is_about_names]
        if any(region.num_others or region.offloads for region in about):
            return None
        told = {frozenset(name for name in region.names if name in region.saves) for region in about if region.names}
        return next(iter(told)) if len(told) == 1 else None

    def jaxpr(self, treatment: Treatment) -> Any:
        """Its jaxpr without dead code."""
        fun, specs = self.differentiated(treatment)
        closed = _compat.dce(jax.make_jaxpr(fun)(*specs))
        for name, line in names_of(closed.eqns).items():
            self.lines.setdefault(name, line)
        return closed

    def problem(self, cost: str | None = None) -> NameProblem:
        """Which names there are to save, and what they hold on each device."""
        return self._read(frozenset(), cost or self.cost)

    def counted(self, treatment: Treatment) -> Counted:
        """Count a treatment as it is traced."""
        nothing = [judge_names(self._read(treatment, cost), ()).work for cost in ("flops", self.cost)]
        return Counted(flops=nothing[0], cost=nothing[1])

    def predict(self, treatment: Treatment) -> int:
        """Device bytes from the model, in the order the program is written."""
        return self.argument_bytes() + peak_of(self._kept_jaxpr(treatment), self.target, self.split)

    def _read(self, treatment: Treatment, cost: str) -> NameProblem:
        chip, split = find_target(self.target), self.split
        time = timer(cost, chip)

        def saving(aval: Any, trips: int) -> int:
            if time is count_flops:
                # JAX rounds a saved value, so that it is what would be made again.
                return trips * elements(aval) if is_differentiable(aval) else 0
            # Outside of loops it is a buffer that there was anyway.
            return stacking_time(time, chip, -(-trips * size_bytes(aval) // split)) if trips > 1 else 0

        return name_problem(self._kept_jaxpr(treatment), time, saving, split)

    def _kept_jaxpr(self, treatment: Treatment) -> Any:
        if treatment not in self._jaxprs:
            self._jaxprs[treatment] = self.jaxpr(treatment)
        return self._jaxprs[treatment]

    @functools.cached_property
    def _jaxprs(self) -> dict[Treatment, Any]:
        return {}

    def _treat(self, treatment: Treatment, jaxpr: Any) -> Program:
        """A differentiated function as a program under a treatment."""
        self.regions.update(dict.fromkeys(regions_of(jaxpr.eqns)))
        for name, line in names_of(jaxpr.eqns).items():
            self.lines.setdefault(name, line)
        return treated(flatten(jaxpr, keep_checkpoints=treatment != WITHOUT), treatment)


def peak_of(jaxpr: Any, target: str | None, split: int) -> int:
    """Bytes of a differentiated jaxpr's temporaries and results on each device, from the model, as it is written.

    Args:
        jaxpr: without dead code.
        target: a chip's name.
        split: over how many devices its values are cut.
    """
    flat = flatten(opened(jaxpr), is_differentiated=True)
    outputs = {x for x in flat.outputs if isinstance(x, int)}
    size = lambda v: size_bytes(flat.avals[v])  # noqa: E731
    rules = find_target(target).compiler.rules(flat.avals, flat.equations)
    peak = peak_bytes(flat.equations, size, external=outputs, rules=rules)
    return -(-(peak + sum(map(size, outputs))) // split)


def treated(program: Program, treatment: Treatment) -> Program:
    """A program with its own regions that save these names."""
    if isinstance(treatment, str):
        return program
    return with_policy(program, _policy(treatment))


@functools.lru_cache(maxsize=256)
def _policy(names: frozenset[str]) -> Callable[..., Any]:
    # One object for one choice, so that JAX's caches know it again.
    return jax.checkpoint_policies.save_only_these_names(*sorted(names))


@dataclass(eq=False)
class NamedLoss(Named):
    """A function that is differentiated here.

    Attributes:
        programs: traced with its own checkpoints and without them, each with what is differentiated.
    """

    programs: Callable[[bool], tuple[Program, Objective]] = field(kw_only=True)

    def __post_init__(self) -> None:
        """Look at what there is."""
        program, _ = self.programs(True)
        self.regions.update(dict.fromkeys(regions_of(program.equations)))
        self.lines.update(names_of(program.equations))

    def differentiated(self, treatment: Treatment) -> tuple[Callable, Sequence[Any]]:
        """Its value and gradient."""
        program, goal = self._under(treatment)
        specs = [*input_specs(program), *cotangent_specs(program, goal)]
        return goal.differentiated(functools.partial(run, program)), specs

    def measure(self, treatment: Treatment) -> Measurement:
        """Compile its value and gradient."""
        program, goal = self._under(treatment)
        fun = goal.differentiated(functools.partial(run, program))
        return compiled_bytes(fun, measured_specs(program, goal), self.target, closed_over=program.closed_over)

    def argument_bytes(self) -> int:
        """Of its arguments on each device."""
        program, goal = self._under(WRITTEN)
        return sum(-(-size_bytes(x) // self.split) for x in measured_specs(program, goal))

    def _under(self, treatment: Treatment) -> tuple[Program, Objective]:
        program, goal = self.programs(treatment != WITHOUT)
        return treated(program, treatment), goal


@dataclass(eq=False)
class NamedStep(Named):
    """A step that differentiates functions of its own, which get the policies.

    Attributes:
        step: the step.
        args: its arguments, of which the shapes are held.
        donate_argnums: as in `jax.jit`.
    """

    step: Callable = field(kw_only=True)
    args: InitVar[tuple[Any, ...]] = field(kw_only=True)
    donate_argnums: int | Sequence[int] = field(kw_only=True, default=())

    def __post_init__(self, args: tuple[Any, ...]) -> None:
        """Take objects of flax NNX apart."""
        call = pure(self.step, args, {}, returns_all=self.donate_argnums not in ((), []))
        self._fun, given = call.positional
        self._args = without_values(given)

    def differentiated(self, treatment: Treatment) -> tuple[Callable, Sequence[Any]]:
        """The step."""
        # Also as it is written its functions are looked at.
        choice = Treated(functools.partial(self._treat, treatment))

        @functools.wraps(self._fun)
        def chosen(*args: Any) -> Any:
            with TREATED(choice):
                return call_unchanged(self._fun, args, {})

        return chosen, self._args

    def measure(self, treatment: Treatment) -> Measurement:
        """Compile the step."""
        fun = self._fun if treatment == WRITTEN else self.differentiated(treatment)[0]
        return compiled_bytes(fun, self._args, self.target, self.donate_argnums)

    def argument_bytes(self) -> int:
        """Of its arguments on each device, less the donated ones."""
        leaves = jax.tree.leaves(self._args)
        sizes = sum(-(-size_bytes(jax.typeof(x)) // self.split) for x in leaves if hasattr(x, "shape"))
        return sizes - sum(
            -(-size_bytes(jax.typeof(x)) // self.split) for x in donated_leaves(self._args, self.donate_argnums)
        )
