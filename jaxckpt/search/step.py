"""A whole step with decorated functions inside: traced for what they are, compiled under any choice of their plans."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxckpt import _compat
from jaxckpt.compilation import cache
from jaxckpt.compilation.measure import Measurement, compiled_bytes, donated_leaves
from jaxckpt.compilation.objective import Objective
from jaxckpt.errors import OptionError, PlanMismatchError
from jaxckpt.model.schedules import Candidate
from jaxckpt.program.describe import show_aval
from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Program, size_bytes
from jaxckpt.program.nnx import Pure, pure
from jaxckpt.program.objects import call_unchanged
from jaxckpt.search.analysis import Analysis
from jaxckpt.search.shared_budget import Picks
from jaxckpt.targets.sharding import local_bytes, step_split

# What decorated functions ask while a step is traced; jit traces again when it changes.
FITTING = jax.make_user_context(None)


# Characters of a message.
_MOST_SHOWN = 600


@dataclass(eq=False)
class Choice:
    """What every decorated function does: one of its candidates, or, where none is chosen, no plan at all."""

    cost: str
    target: str | None
    split: int = 1
    analyses: dict[tuple, Analysis] = field(default_factory=dict)
    chosen: Mapping[tuple, Candidate] = field(default_factory=dict)

    def planned(self, program: Program, goal: Objective, *, is_forward_mode: bool = False) -> Callable[..., list[Any]]:
        """Return the program as it is chosen to run, and analyse it where it is new."""
        key = (program.fingerprint(), goal)
        if key not in self.analyses:
            # Inside shard_map shapes are those of one device already.
            split = 1 if jax.sharding.get_abstract_mesh().manual_axes else self.split
            self.analyses[key] = Analysis(program, goal, self.cost, "auto", self.target, split)
        if key not in self.chosen:
            return functools.partial(run, program)
        # Equal fingerprints share a plan, and each runs its own program under it.
        return self.analyses[key].planned(self.chosen[key], program, is_forward_mode=is_forward_mode)


class Step:
    """A step at one shape of its arguments, with the options of each function that has any.

    Args:
        fun: the step.
        args: its arguments, pytrees of arrays or `ShapeDtypeStruct`s.
        cost: "time" or "flops".
        target: a chip's name; None is the default backend.
        donate_argnums: as in `jax.jit`.

    Raises:
        OptionError: the step differentiates no decorated function.
    """

    def __init__(
        self,
        fun: Callable,
        args: Sequence[Any],
        cost: str,
        target: str | None,
        donate_argnums: int | Sequence[int],
    ):
        self._given, self.target, self.donate_argnums = fun, target, donate_argnums
        self.fun, self.args = self._pure(tuple(args)).positional
        self.free = Choice(cost, target, step_split(args))
        self.results = jax.eval_shape(_under(self.free, self.fun), *self.args)
        if not self.free.analyses:
            raise OptionError(
                f"{getattr(fun, '__name__', 'the step')} differentiates no function that auto_remat decorates without "
                "a budget, so there is nothing to plan; decorate the loss with @jaxckpt.auto_remat"
            )
        self.keys = [key for key, analysis in self.free.analyses.items() if analysis.candidates]
        analyses = [self.free.analyses[key] for key in self.keys]
        # The last option of each is no plan.
        self.options: list[list[Candidate | None]] = [[*analysis.candidates, None] for analysis in analyses]
        self.peaks = [
            [(c or analysis.unplanned).judgement.peak_bytes for c in row]
            for analysis, row in zip(analyses, self.options, strict=True)
        ]
        total = max(1, sum(analysis.unplanned_cost for analysis in analyses))
        self.costs = [
            [analysis.extra_cost(c) / total if c else 0.0 for c in row]
            for analysis, row in zip(analyses, self.options, strict=True)
        ]
        self.measured: dict[Picks, Measurement] = {}

    @property
    def without(self) -> Picks:
        """The picks that leave every function without a plan."""
        return tuple(len(row) - 1 for row in self.options)

    @property
    def programs(self) -> list[Program]:
        """The decorated functions' programs."""
        return [analysis.program for analysis in self.free.analyses.values()]

    @property
    def name(self) -> str:
        """A digest of the step's arguments and of what is planned in it."""
        shapes = [(x.shape, str(x.dtype), str(getattr(x, "sharding", None))) for x in jax.tree.leaves(self.args)]
        return cache.digest((*shapes, self.donate_argnums, *(p.fingerprint() for p in self.programs)))

    @property
    def gradient_bytes(self) -> int:
        """Of all decorated functions, on each device; temporaries of the step."""
        return sum(
            -(-size_bytes(analysis.program.avals[analysis.program.inputs[i]]) // analysis.split)
            for analysis in self.free.analyses.values()
            for i in analysis.objective.inputs
        )

    @property
    def state_bytes(self) -> int:
        """Arguments and results on each device, from their shapes: what no plan changes."""
        donated = donated_leaves(self.args, self.donate_argnums)
        read = sum(local_bytes(x, getattr(x, "sharding", None)) for x in jax.tree.leaves(self.args))
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
        ranks = range(min(most, max(map(len, self.options), default=1)))
        return list(dict.fromkeys(tuple(min(i, len(row) - 1) for row in self.options) for i in ranks))

    def choice(self, picks: Picks) -> Choice:
        """The choice that these picks are."""
        found = {key: c for key, row, i in zip(self.keys, self.options, picks, strict=True) if (c := row[i])}
        return Choice(self.free.cost, self.target, self.free.split, self.free.analyses, found)

    def measure(self, picks: Picks) -> Measurement:
        """Compile the step; each choice is compiled once."""
        if picks not in self.measured:
            fun = _under(self.choice(picks), self.fun)
            self.measured[picks] = compiled_bytes(fun, self.args, self.target, self.donate_argnums)
        return self.measured[picks]

    def cost(self, picks: Picks) -> float:
        """Work beyond that without plans, as a fraction of what the decorated functions take."""
        return sum(row[i] for row, i in zip(self.costs, picks, strict=True))

    @property
    def least_cost(self) -> float:
        """Of the picks with the least work; below 0 where plans are faster than none."""
        return sum(map(min, self.costs))

    def jitted(self, picks: Picks) -> Callable:
        """The step with these plans inside; it refuses arguments that it was not planned for."""
        planned = _under(self.choice(picks), self.fun)

        @functools.wraps(self.fun)
        def fitted(*args: Any) -> Any:
            self._check(args)
            return planned(*args)

        options = _compat.here_options() or None
        jitted = jax.jit(fitted, donate_argnums=self.donate_argnums, compiler_options=options)
        if self.fun is self._given:
            return jitted

        @functools.wraps(self._given)
        def with_objects(*args: Any) -> Any:
            call = self._pure(args)
            return call.finish(jitted(*call.positional[1]))

        return with_objects

    def _pure(self, args: tuple[Any, ...]) -> Pure:
        """The step as a function of the state of its objects; what is donated comes back whatever became of it."""
        return pure(self._given, args, {}, returns_all=self.donate_argnums not in ((), []))

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
                    what = f"args{jax.tree_util.keystr(path)} is {shown[0]}, and it was planned for {shown[1]}"
                    break
        if what is not None:
            raise PlanMismatchError(
                f"the fitted step is called at other arguments than it was planned and measured for: "
                f"{what[:_MOST_SHOWN]}; call jaxckpt.fit again with these"
            )


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


def _under(choice: Choice, fun: Callable) -> Callable:
    @functools.wraps(fun)
    def chosen(*args: Any) -> Any:
        with FITTING(choice):
            return call_unchanged(fun, args, {})

    return chosen
