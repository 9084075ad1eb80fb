"""A whole step and the functions it differentiates: traced for what they are, compiled under any choice of plans."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NoReturn

import jax

from jaxckpt import _compat
from jaxckpt.compilation import cache
from jaxckpt.compilation.measure import Measurement, compiled_bytes, donated_leaves
from jaxckpt.compilation.objective import Objective
from jaxckpt.errors import OptionError, PlanMismatchError
from jaxckpt.model.schedules import Candidate
from jaxckpt.model.time import check_cost
from jaxckpt.program.describe import show_aval
from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Program, size_bytes
from jaxckpt.program.nnx import Pure, pure
from jaxckpt.program.objects import call_unchanged
from jaxckpt.program.static import Bound, bind_static
from jaxckpt.search.analysis import Analysis
from jaxckpt.search.candidates import check_solver
from jaxckpt.search.shared_budget import Picks
from jaxckpt.targets.chip import find_target
from jaxckpt.targets.sharding import is_on_host, local_bytes, step_split, without_values

# What differentiated functions ask while a step is traced; jit traces again when it changes.
FITTING = jax.make_user_context(None)


# Characters of a message.
_MOST_SHOWN = 600
# Set while a function is traced that is planned as a whole: what is differentiated inside belongs to it.
INSIDE = jax.make_user_context(False)
# An undecorated function that holds less than this share of what all of them hold is left alone.
_LEAST_SHARE = 0.01

# Runs a program with the same fingerprint as it was planned: `runner(program)(*inputs)`.
Runner = Callable[..., Callable[..., list[Any]]]
# A program's fingerprint and what of it is differentiated.
Key = tuple[str, Objective]


@dataclass(frozen=True, slots=True, kw_only=True)
class Differentiated:
    """A function that a step differentiates.

    Attributes:
        program: as it is differentiated.
        goal: what of it is.
        label: its name.
        is_decorated: by hand.
        solver: which finds its schedules.
        split: over how many devices its values are cut.
        analysis: where named axes are mapped, since it is made where those have a meaning; None elsewhere.
    """

    program: Program
    goal: Objective
    label: str
    is_decorated: bool
    solver: Any
    split: int
    analysis: Analysis | None


@dataclass(eq=False, kw_only=True)
class Choice:
    """What every differentiated function does while a step is traced: run as it is planned, or as it is.

    Attributes:
        split: over how many devices the step's values are cut.
        keep_checkpoints: as in `auto_remat`, for functions that are not decorated.
        solver: likewise.
        functions: what was found; only a choice that collects adds to it.
        chosen: how those run that are planned.
        collects: whether functions are only looked for.
        analyse: makes the analysis of a program, its objective, solver and split.
        used: those of the chosen ones that were met.
    """

    split: int = 1
    keep_checkpoints: bool = True
    solver: Any = "auto"
    functions: dict[Key, Differentiated] = field(default_factory=dict)
    chosen: Mapping[Key, Runner] = field(default_factory=dict)
    collects: bool = False
    analyse: Callable[[Program, Objective, Any, int], Analysis] | None = None
    used: set[Key] = field(default_factory=set)

    def planned(
        self,
        program: Program,
        goal: Objective,
        *,
        label: str,
        is_decorated: bool,
        solver: Any,
    ) -> Callable[..., list[Any]]:
        """Return the program as it is chosen to run, and note it where it is new."""
        key = (program.fingerprint(), goal)
        if self.collects and key not in self.functions:
            # Inside shard_map shapes are those of one device already.
            split = 1 if jax.sharding.get_abstract_mesh().manual_axes else self.split
            analysis = None
            if self.analyse is not None and _compat.axis_sizes():
                with INSIDE(True):  # it differentiates, too
                    analysis = self.analyse(program, goal, solver, split)
            self.functions[key] = Differentiated(
                program=program,
                goal=goal,
                label=label,
                is_decorated=is_decorated,
                solver=solver,
                split=split,
                analysis=analysis,
            )
        if key not in self.chosen:
            return functools.partial(run, program)
        self.used.add(key)
        # Equal fingerprints share a plan, and each runs its own program under it.
        return self.chosen[key](program)

    @property
    def wants_undecorated(self) -> bool:
        """Whether functions that nobody decorated are of interest; without plans the step is the user's own."""
        return self.collects or bool(self.chosen)

    def may_plan(self, program: Program) -> bool:
        """Whether a program may be one of the chosen ones, whatever is differentiated of it."""
        return self.collects or any(fingerprint == program.fingerprint() for fingerprint, _ in self.chosen)


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is planned and compiled.

    Attributes:
        cost: "time" or "flops".
        target: a chip's name; None is the default backend.
        solver: of functions that are not decorated, as in `plan`.
        keep_checkpoints: of functions that are not decorated, as in `auto_remat`.
        host_budget: bytes of the host that saved values may take, on each device's behalf; None sends none there.
        static: places and names of static arguments.
        donated: places and names of arguments that give their buffers away.
        jit: what else it is compiled with, keywords of `jax.jit`.
    """

    cost: str = "time"
    target: str | None = None
    solver: Any = "auto"
    keep_checkpoints: bool = True
    host_budget: int | None = None
    static: tuple[tuple[int, ...], tuple[str, ...]] = ((), ())
    donated: tuple[tuple[int, ...], tuple[str, ...]] = ((), ())
    jit: Mapping[str, Any] = field(default_factory=dict)


class Step:
    """A step at one shape of its arguments, with the options of each function that has any.

    Args:
        fun: the step.
        args: its arguments, pytrees of arrays or `ShapeDtypeStruct`s.
        options: how it is planned and compiled.
        kwargs: its named arguments.

    Raises:
        OptionError: the step differentiates nothing.
    """

    def __init__(
        self,
        fun: Callable,
        args: Sequence[Any],
        options: StepOptions,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ):
        check_cost(options.cost)
        check_solver(options.solver)
        self._given, self.options = fun, options
        self.target = options.target
        bound = bind_static(fun, args, kwargs, *options.static)
        self._names = tuple(sorted(bound.kwargs))
        places, names = options.donated
        self.donate_argnums = tuple(p % len(args) for p in places if -len(args) <= p < len(args))
        self.donate_argnums += tuple(len(args) + i for i, name in enumerate(self._names) if name in names)
        call = self._pure(bound)
        self.fun, given = call.positional
        # What is fitted holds the step, and so do JAX's caches: the arrays that it is planned with must not stay alive.
        self.args = without_values(given)
        self._static, self._num_args = bound.static, len(args)
        self._has_objects = call.objects is not None
        self._split = step_split((args, kwargs))
        self._trace()

    def _trace(self) -> None:
        """Find the functions that it differentiates."""
        self.free = Choice(
            split=self._split,
            keep_checkpoints=self.options.keep_checkpoints,
            solver=self.options.solver,
            collects=True,
            analyse=self._analysis,
        )
        # Shapes of a whole step are all that is asked for; its jaxpr says whether another one is the same.
        self.closed, self.results = jax.make_jaxpr(under(self.free, self.fun), return_shape=True)(*self.args)
        if not self.free.functions:
            raise OptionError(_nothing_found(getattr(self._given, "__name__", "the step"), self.closed))
        self.measured: dict[Picks, Measurement] = {}

    @functools.cached_property
    def analyses(self) -> dict[Key, Analysis]:
        """Of each function that is planned, in the order they are differentiated."""
        found = {
            key: f.analysis or self._analysis(f.program, f.goal, f.solver, f.split)
            for key, f in self.free.functions.items()
        }
        held = {key: a.unplanned.judgement.peak_bytes if a.candidates else 0 for key, a in found.items()}
        least = _LEAST_SHARE * sum(held.values())
        return {key: a for key, a in found.items() if self.free.functions[key].is_decorated or held[key] >= least}

    def _analysis(self, program: Program, goal: Objective, solver: Any, split: int) -> Analysis:
        options = self.options
        return Analysis(program, goal, options.cost, solver, self.target, split, host_budget=self.host_room)

    @property
    def host_room(self) -> int | None:
        """Of the host's budget, what arguments leave that live there."""
        most = self.options.host_budget
        return None if most is None else max(0, most - self.host_state_bytes)

    @property
    def host_state_bytes(self) -> int:
        """Arguments that live on the host, on each device's behalf."""
        leaves = ((x, getattr(x, "sharding", None)) for x in jax.tree.leaves(self.args))
        return sum(local_bytes(x, sharding) for x, sharding in leaves if is_on_host(sharding))

    def without_host(self) -> "Step":
        """The same step, which sends nothing to the host."""
        found = copy.copy(self)
        found.__dict__ = {name: value for name, value in vars(self).items() if name not in _CACHED}
        found.options = replace(self.options, host_budget=None)
        found._trace()
        return found

    def is_sending(self, picks: Picks) -> bool:
        """Whether a function sends something to the host."""
        chosen = (row[i] for row, i in zip(self.options_of, picks, strict=True))
        return any(c is not None and c.judgement.host_bytes for c in chosen)

    def is_over_on_host(self, picks: Picks) -> bool:
        """Whether picks that were measured take more of the host than they may."""
        most = self.options.host_budget
        return most is not None and self.measure(picks).host_bytes > most

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What it is compiled with beside what users say: all of it alike, whether values are sent or not."""
        sending = self.options.host_budget is not None
        return dict(find_target(self.target).compiler.offload_options or {}) if sending else {}

    @functools.cached_property
    def keys(self) -> list[Key]:
        """The functions that have options."""
        return [key for key, analysis in self.analyses.items() if analysis.candidates]

    @functools.cached_property
    def options_of(self) -> list[list[Candidate | None]]:
        """The candidates of each of them, from the least bytes to the least work; the last option is no plan."""
        return [[*self.analyses[key].candidates, None] for key in self.keys]

    @functools.cached_property
    def peaks(self) -> list[list[int]]:
        """Predicted bytes of each option."""
        pairs = zip(self.keys, self.options_of, strict=True)
        return [[(c or self.analyses[key].unplanned).judgement.peak_bytes for c in row] for key, row in pairs]

    @functools.cached_property
    def costs(self) -> list[list[float]]:
        """Work of each option, as a fraction of what all functions take without plans."""
        total = max(1, sum(self.analyses[key].unplanned_cost for key in self.keys))
        pairs = zip(self.keys, self.options_of, strict=True)
        return [[self.analyses[key].extra_cost(c) / total if c else 0.0 for c in row] for key, row in pairs]

    @property
    def without(self) -> Picks:
        """The picks that leave every function without a plan."""
        return tuple(len(row) - 1 for row in self.options_of)

    @property
    def programs(self) -> list[Program]:
        """The programs of the functions that are planned."""
        return [analysis.program for analysis in self.analyses.values()]

    @property
    def name(self) -> str:
        """A digest of the step's arguments and of what is planned in it."""
        leaves = [(jax.typeof(x), getattr(x, "sharding", None)) for x in jax.tree.leaves(self.args)]
        shapes = [(aval.shape, str(aval.dtype), str(sharding)) for aval, sharding in leaves]
        return cache.digest((*shapes, self.donate_argnums, *(p.fingerprint() for p in self.programs)))

    @property
    def gradient_bytes(self) -> int:
        """Of all functions that are planned, on each device; temporaries of the step."""
        return sum(
            -(-size_bytes(analysis.program.avals[analysis.program.inputs[i]]) // analysis.split)
            for analysis in self.analyses.values()
            for i in analysis.objective.inputs
        )

    @property
    def state_bytes(self) -> int:
        """Arguments and results on each device, from their shapes: what no plan changes."""
        donated = donated_leaves(self.args, self.donate_argnums)
        leaves = ((x, getattr(x, "sharding", None)) for x in jax.tree.leaves(self.args))
        read = sum(local_bytes(x, sharding) for x, sharding in leaves if not is_on_host(sharding))
        # A result takes the buffer of a donated argument that is like it.
        made = Counter(map(_spec, jax.tree.leaves(self.results))) - Counter(map(_spec, donated))
        return read + sum(count * -(-size_bytes(spec) // self.free.split) for spec, count in made.items())

    def predicted_bytes(self, predicted_peak: int) -> int:
        """Device bytes of the step, from the model, where this is the largest peak of its functions."""
        return self.state_bytes + self.gradient_bytes + predicted_peak

    @property
    def predicted_least_bytes(self) -> int:
        """The same under the plans with least."""
        return self.predicted_bytes(max((row[0] for row in self.peaks), default=0))

    def least_picks(self, most: int) -> list[Picks]:
        """The picks with the least predicted bytes."""
        ranks = range(min(most, max(map(len, self.options_of), default=1)))
        return list(dict.fromkeys(tuple(min(i, len(row) - 1) for row in self.options_of) for i in ranks))

    def choice(self, picks: Picks) -> Choice:
        """The choice that these picks are."""
        rows = zip(self.keys, self.options_of, picks, strict=True)
        found = {key: functools.partial(self.analyses[key].planned, c) for key, row, i in rows if (c := row[i])}
        return self.choice_of(found)

    def choice_of(self, chosen: Mapping[Key, Runner]) -> Choice:
        """The choice that these functions run so, and the others as they are."""
        return Choice(split=self.free.split, keep_checkpoints=self.options.keep_checkpoints, chosen=chosen)

    def measure(self, picks: Picks) -> Measurement:
        """Compile the step; each choice is compiled once."""
        if picks not in self.measured:
            fun, options = self.under(picks), self.jit_options
            self.measured[picks] = compiled_bytes(fun, self.args, self.target, self.donate_argnums, jit_options=options)
        return self.measured[picks]

    def under(self, picks: Picks) -> Callable:
        """The step with these plans inside, to be compiled."""
        return under(self.choice(picks), self.fun)

    @property
    def jit_options(self) -> dict[str, Any]:
        """The keywords of `jax.jit` that it is compiled with."""
        given = dict(self.options.jit)
        options = {**self.compiler_options, **(given.pop("compiler_options", None) or {})}
        return given | ({"compiler_options": options} if options else {})

    def jaxpr(self, picks: Picks) -> Any:
        """The closed jaxpr of the step with these plans inside."""
        return jax.make_jaxpr(self.under(picks))(*self.args)

    def cost(self, picks: Picks) -> float:
        """Work beyond that without plans, as a fraction of what the functions take."""
        return sum(row[i] for row, i in zip(self.costs, picks, strict=True))

    @property
    def least_cost(self) -> float:
        """Of the picks with the least work; below 0 where plans are faster than none."""
        return sum(map(min, self.costs))

    def jitted(self, picks: Picks) -> Callable:
        """The step with these plans inside; it refuses arguments that it was not planned for."""
        planned = self.under(picks)

        def fitted(*args: Any, **kwargs: Any) -> Any:
            given = args if self._has_objects else self._pure(self._rebound(args, kwargs)).positional[1]
            self._check(given)
            return planned(*given)

        options: dict[str, Any] = {"compiler_options": {**_compat.here_options(), **self.compiler_options} or None}
        if not self._has_objects:
            # As users call it: it is `jax.jit` that tells static arguments and donated ones from others.
            for kind, (places, names) in (("static", self.options.static), ("donate", self.options.donated)):
                options |= {f"{kind}_argnums": places, f"{kind}_argnames": names}
            return jax.jit(functools.wraps(self._given)(fitted), **options)
        jitted = jax.jit(functools.wraps(self.fun)(fitted), donate_argnums=self.donate_argnums, **options)

        @functools.wraps(self._given)
        def with_objects(*args: Any, **kwargs: Any) -> Any:
            call = self._pure(self._rebound(args, kwargs))
            return call.finish(jitted(*call.positional[1]))

        return with_objects

    def _rebound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Another call of the step.

        Raises:
            PlanMismatchError: its static arguments are others.
        """
        found = bind_static(self._given, args, kwargs, *self.options.static)
        ours, theirs = self._static, found.static
        if len(ours) != len(theirs) or any(type(a) is not type(b) or a != b for a, b in zip(ours, theirs, strict=True)):
            self._refuse_call(f"its static arguments are {theirs}, and it was planned for {ours}")
        return found

    def _pure(self, call: Bound) -> Pure:
        """The step as a function of the state of its objects; what is donated comes back whatever became of it."""
        named = {name: call.kwargs[name] for name in sorted(call.kwargs)}
        return pure(call.fun, call.args, named, returns_all=bool(self.donate_argnums))

    def _check(self, args: tuple[Any, ...]) -> None:
        """Refuse another tree, shape or dtype: at those nothing was planned or measured. Weak types are no difference.

        Raises:
            PlanMismatchError: with the first argument that differs.
        """
        (ours, our_tree), (theirs, their_tree) = map(jax.tree_util.tree_flatten_with_path, (self.args, args))
        what = None if our_tree == their_tree else _tree_difference(our_tree, their_tree)
        if what is None:
            for (path, mine), (_, given) in zip(ours, theirs, strict=True):
                # Python numbers among the arguments have a shape and a dtype once they are traced.
                wanted = _spec(mine if hasattr(mine, "shape") else jax.typeof(mine))
                if wanted != _spec(jax.typeof(given)):
                    shown = show_aval(jax.typeof(given)), show_aval(wanted)
                    what = f"{self._shown(path)} is {shown[0]}, and it was planned for {shown[1]}"
                    break
        if what is not None:
            self._refuse_call(what)

    def _shown(self, path: Any) -> str:
        """A path among the arguments, as a user would write it."""
        number = path[0].idx - self._num_args
        named = number >= 0 and number < len(self._names)
        return f"{self._names[number] if named else 'args'}{jax.tree_util.keystr(path[named:])}"

    def _refuse_call(self, what: str) -> NoReturn:
        raise PlanMismatchError(
            f"the fitted step is called at other arguments than it was planned and measured for: "
            f"{what[:_MOST_SHOWN]}; call jaxckpt.fit again with these"
        )


_CACHED = frozenset(name for name, value in vars(Step).items() if isinstance(value, functools.cached_property))


def _tree_difference(ours: Any, theirs: Any) -> str:
    shown = f"its arguments are {theirs}, and it was planned for {ours}"
    differ = [i for i, (a, b) in enumerate(zip(ours.children(), theirs.children(), strict=False)) if a != b]
    if len(shown) < _MOST_SHOWN or not differ:
        return shown
    return (
        f"args[{differ[0]}] has another structure or another field that is no array, where objects and functions, such "
        "as those of an optimizer that was made anew, are the same by identity"
    )


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def under(choice: Choice, fun: Callable) -> Callable:
    """A step in which the differentiated functions do as is chosen.

    It raises `PlanMismatchError` where not all that are planned are met: it would run without their plans.
    """

    @functools.wraps(fun)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        with FITTING(choice):
            result = call_unchanged(fun, args, kwargs)
        if choice.used != set(choice.chosen):
            raise PlanMismatchError(
                f"{getattr(fun, '__name__', 'the step')} differentiates another program than when it was planned a "
                "moment ago; does it read something that changes, such as a counter or a random number of NumPy's?"
            )
        return result

    return chosen


def _nothing_found(name: str, closed: Any) -> str:
    """What to do about a step in which no differentiated function was found."""
    lines = _compat.backward_lines(closed)
    if not lines:
        return f"{name} differentiates nothing backward, so there is nothing to plan; use jax.jit"
    return (
        f"{name} differentiates functions that cannot be seen, at {', '.join(lines[:5])}. Seen are those that "
        "jax.grad, jax.value_and_grad, jax.vjp and jax.jacrev are given, unless vjp was imported from jax by name "
        "before jaxckpt. Decorate them with @jaxckpt.auto_remat"
    )
