"""The largest batch that fits: what checkpointing is for."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxckpt.api.arguments import check_argnums, check_function, is_count
from jaxckpt.api.differentiated import see_differentiated
from jaxckpt.api.host import check_host_budget
from jaxckpt.errors import BudgetError, OptionError
from jaxckpt.program.static import check_names, places_and_names
from jaxckpt.result.build import build_step
from jaxckpt.result.fitted import Fitted
from jaxckpt.search.budget_search import NUM_LEAST
from jaxckpt.search.step import Step, StepOptions
from jaxckpt.search.step_search import refuse, search_step
from jaxckpt.units import parse_budget, show_bytes

_MAX_BATCH = 2**24
# Without a batch that does not fit, the next guess is this many times the last at most.
_MOST_GROWTH = 4
# Lines that have not closed the bracket by then are followed by halving it.
_MAX_LINES = 6
# A plan this far above the budget says that the others with few bytes will not fit either. A TPU's compiler refuses a
# program before it packs it: one batch's least plan was refused at 1.26 of the budget, and its third took 0.88 of it.
_FAR = 1.5


def largest_batch(
    step: Callable,
    make_args: Callable[[int], Sequence[Any] | Mapping[str, Any]],
    *,
    budget: int | str,
    cost: str = "time",
    target: str | None = None,
    donate_argnums: int | Sequence[int] = (),
    host_budget: int | str | None = None,
    donate_argnames: str | Sequence[str] = (),
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    global_batch: int | None = None,
    **kwargs: Any,
) -> Fitted:
    """Find the largest batch whose step fits the budget under some plan, and the cheapest plans for it.

    A guess comes from predicted bytes at one and two, and is then corrected by what is measured. In the end the batch
    is measured to fit and the next one not to, whichever of the plans with the least predicted bytes it takes.

    Args:
        step: as in `fit`.
        make_args: the step's arguments at a batch: a tuple of pytrees of arrays or `ShapeDtypeStruct`s, or a dict of
            named ones. Where only some sizes make sense, such as multiples of eight, let it count those:
            `lambda n: specs(8 * n)`.
        budget: device bytes of the compiled step: an int, `"16GB"` or `"16GiB"`.
        cost: what is minimised: "time" or "flops".
        target: a chip's name; None is the default backend.
        donate_argnums: as in `jax.jit`.
        host_budget: as in `fit`.
        donate_argnames: as in `jax.jit`.
        static_argnums: as in `jax.jit`.
        static_argnames: as in `jax.jit`.
        global_batch: how much is trained on between two updates. The batch is then one that divides it, and
            `.accumulation_steps` is how many of them make an update: as few as fit. The step may be the one that
            accumulates, or one microbatch of it.
        **kwargs: named arguments of the step that are the same at every batch.

    Returns:
        The fitted step, with `.batch`, and in `.next_bytes` what the next larger batch takes at least.

    Raises:
        BudgetError: a budget that cannot be read, or a percentage: there is no one unplanned peak.
        OptionError: a cost that is none, a step that differentiates nothing, bytes that do not grow with the batch, a
            global batch that is no number, a static or donated argument that the step does not have, or a name that is
            neither an option nor one of its arguments.
        InfeasibleBudgetError: not even a batch of one fits.

    Example:
        >>> import jax, jax.numpy as jnp, jaxckpt
        >>> def loss(w, x):
        ...     for _ in range(8):
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> def step(w, x):
        ...     return w - 0.1 * jax.grad(loss)(w, x)
        >>> def args(batch):
        ...     return jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((batch, 64), jnp.float32)
        >>> largest_batch(step, args, budget="1MB").batch > 500
        True
    """
    check_function(step, "largest_batch")
    check_function(make_args, "largest_batch(..., make_args)")
    check_argnums(donate_argnums, "donate_argnums")
    wanted = parse_budget(budget)
    if wanted.size_bytes is None:
        raise BudgetError(f"budget={budget!r} is a share of an unplanned peak, and every batch has another; give bytes")

    if not (global_batch is None or (is_count(global_batch) and global_batch >= 1)):
        raise OptionError(f"global_batch={global_batch!r} is not accepted; write how many examples an update takes")
    check_names(step, kwargs, "largest_batch")
    see_differentiated()
    options = StepOptions(
        cost=cost,
        target=target,
        host_budget=check_host_budget(host_budget, target),
        static=places_and_names(step, static_argnums, static_argnames),
        donated=places_and_names(step, donate_argnums, donate_argnames, "donate"),
    )

    def at(batch: int) -> Step:
        made = make_args(batch)
        if isinstance(made, Mapping):
            check_names(step, made, "largest_batch")
            return Step(step, (), options, {**kwargs, **made})
        return Step(step, tuple(made), options, kwargs)

    return _Search(at, wanted.size_bytes, None if global_batch is None else _divisors(int(global_batch))).run()


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


class _Search:
    """A bracket of batches, one that fits and one that does not, closed by straight lines through what is known.

    Args:
        at: the step at a batch.
        budget_bytes: of the compiled step.
        sizes: the batches that make sense, in order; None is all of them.
    """

    def __init__(self, at: Callable[[int], Step], budget_bytes: int, sizes: Sequence[int] | None = None):
        self.at, self.budget_bytes, self.sizes = at, budget_bytes, sizes
        self.steps: dict[int, Step] = {}
        self.least: dict[int, int] = {}  # batch -> measured device bytes of its least plans
        self.predicted: tuple[float, float] | None = None  # device bytes of none and of each one more

    def run(self) -> Fitted:
        fits, over = 0, None
        while (following := self._following(fits)) is not None and following != over:
            batch = self._guess(fits, over)
            if self._is_within(batch):
                fits = batch
            else:
                over = batch
        if not fits:
            refuse(self.steps[1], self.budget_bytes, "the step at a batch of 1")
        fitted = build_step(search_step(self.steps[fits], self.budget_bytes))
        num_compiles = sum(len(step.measured) for step in self.steps.values())
        return replace(
            fitted,
            batch=fits,
            num_compiles=num_compiles,
            next_bytes=None if following is None else self.least[following],
            global_batch=self.sizes[-1] if self.sizes else None,
        )

    def _following(self, batch: int) -> int | None:
        """The next larger batch; None where there is none."""
        if self.sizes is None:
            return batch + 1
        return next((size for size in self.sizes if size > batch), None)

    def _sensible(self, batch: int, fits: int) -> int:
        """The largest batch up to this one, beyond one that fits."""
        following = self._following(fits)
        assert following is not None
        if self.sizes is None:
            return batch
        return max(following, max(size for size in self.sizes if size <= max(1, batch)))

    def _is_within(self, batch: int) -> bool:
        step = self.steps[batch] = self.steps.get(batch) or self.at(batch)
        for picks in step.least_picks(NUM_LEAST):
            size = step.measure(picks).device_bytes
            if step.is_over_on_host(picks):
                size = max(size, self.budget_bytes + 1)
            self.least[batch] = min(size, self.least.get(batch, size))
            if size <= self.budget_bytes or size > _FAR * self.budget_bytes:
                break
        return self.least[batch] <= self.budget_bytes

    def _guess(self, fits: int, over: int | None) -> int:
        """The batch that a line through the two nearest points has last within the budget, inside the bracket."""
        return self._sensible(self._guessed(fits, over), fits)

    def _guessed(self, fits: int, over: int | None) -> int:
        most = over - 1 if over is not None else max(1, min(_MAX_BATCH, _MOST_GROWTH * max(fits, self._first())))
        if fits >= _MAX_BATCH:
            raise OptionError(f"a batch of {fits:,} still fits; does make_args use its argument?")
        if over is not None and len(self.least) > _MAX_LINES:
            return (fits + over) // 2
        none, each = self._line()
        guess = math.floor((self.budget_bytes - none) / each) if each > 0 else most
        return min(max(guess, fits + 1), most)

    def _line(self) -> tuple[float, float]:
        """Device bytes of a batch of none and of each one more."""
        none, each = self._predicted()
        near = sorted(self.least.items(), key=lambda known: abs(known[1] - self.budget_bytes))[:2]
        if not near:
            return none, each
        (a, at_a), (b, at_b) = near[0], near[1] if len(near) > 1 else (0, none)
        each = (at_a - at_b) / (a - b)
        return at_a - each * a, each

    def _first(self) -> int:
        none, each = self._predicted()
        return max(1, math.floor((self.budget_bytes - none) / each))

    def _predicted(self) -> tuple[float, float]:
        if self.predicted is None:
            second = self._following(1)
            if second is None:
                return 0.0, 1.0
            one, two = (self.steps.setdefault(b, self.at(b)).predicted_least_bytes for b in (1, second))
            if two <= one:
                raise OptionError(
                    f"make_args({second}) takes no more bytes than make_args(1) ({show_bytes(one)}, predicted), so no "
                    "batch is the largest; does it use its argument?"
                )
            each = (two - one) / (second - 1)
            self.predicted = one - each, each
        return self.predicted
