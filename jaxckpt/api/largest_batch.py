"""The largest batch that fits: what checkpointing is for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxckpt.api.arguments import check_argnums, check_function
from jaxckpt.api.differentiated import see_differentiated
from jaxckpt.api.host import check_host_budget
from jaxckpt.errors import BudgetError, OptionError
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
    make_args: Callable[[int], Sequence[Any]],
    *,
    budget: int | str,
    cost: str = "time",
    target: str | None = None,
    donate_argnums: int | Sequence[int] = (),
    host_budget: int | str | None = None,
) -> Fitted:
    """Find the largest batch whose step fits the budget under some plan, and the cheapest plans for it.

    A guess comes from predicted bytes at one and two, and is then corrected by what is measured. In the end the batch
    is measured to fit and the next one not to, whichever of the plans with the least predicted bytes it takes.

    Args:
        step: as in `fit`.
        make_args: the step's arguments at a batch: a tuple of pytrees of arrays or `ShapeDtypeStruct`s. Where only some
            sizes make sense, such as multiples of eight, let it count those: `lambda n: specs(8 * n)`.
        budget: device bytes of the compiled step: an int, `"16GB"` or `"16GiB"`.
        cost: what is minimised: "time" or "flops".
        target: a chip's name; None is the default backend.
        donate_argnums: as in `jax.jit`.
        host_budget: as in `fit`.

    Returns:
        The fitted step, with `.batch`, and in `.next_bytes` what a batch larger by one takes at least.

    Raises:
        BudgetError: a budget that cannot be read, or a percentage: there is no one unplanned peak.
        OptionError: a cost that is none, a step that differentiates nothing, or bytes that do not grow
            with the batch.
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

    see_differentiated()
    options = StepOptions(
        cost=cost, target=target, donate_argnums=donate_argnums, host_budget=check_host_budget(host_budget, target)
    )

    def at(batch: int) -> Step:
        return Step(step, tuple(make_args(batch)), options)

    return _Search(at, wanted.size_bytes).run()


class _Search:
    """A bracket of batches, one that fits and one that does not, closed by straight lines through what is known."""

    def __init__(self, at: Callable[[int], Step], budget_bytes: int):
        self.at, self.budget_bytes = at, budget_bytes
        self.steps: dict[int, Step] = {}
        self.least: dict[int, int] = {}  # batch -> measured device bytes of its least plans
        self.predicted: tuple[float, float] | None = None  # device bytes of none and of each one more

    def run(self) -> Fitted:
        fits, over = 0, None
        while over is None or over - fits > 1:
            batch = self._guess(fits, over)
            if self._is_within(batch):
                fits = batch
            else:
                over = batch
        if not fits:
            refuse(self.steps[1], self.budget_bytes, "the step at a batch of 1")
        fitted = build_step(search_step(self.steps[fits], self.budget_bytes))
        num_compiles = sum(len(step.measured) for step in self.steps.values())
        return replace(fitted, batch=fits, num_compiles=num_compiles, next_bytes=self.least[fits + 1])

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
            one, two = (self.steps.setdefault(b, self.at(b)).predicted_least_bytes for b in (1, 2))
            if two <= one:
                raise OptionError(
                    f"make_args(2) takes no more bytes than make_args(1) ({show_bytes(one)}, predicted), so no batch "
                    "is the largest; does it use its argument?"
                )
            self.predicted = 2 * one - two, two - one
        return self.predicted
