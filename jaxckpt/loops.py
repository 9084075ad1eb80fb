"""Loops of known length with few stored states: nested scans of checkpointed scans, and the binomial schedule.

`lax.scan` stores what each iteration's backward reads, for every iteration. Two families of schedules store less:

- *nested scans*: an outer scan over chunks, each chunk a checkpointed scan. A chunk of m among n iterations stores
  n / m carries and one chunk's residuals, and repeats every iteration once. The jaxpr does not grow with the length.
- the *binomial* schedule of Griewank and Walther (`ckptsolvers.revolve`): the fewest repetitions for a number of
  stored states, as a tree of nested `jax.checkpoint`. Runs of steps that no state is missing for are scans, so the
  jaxpr grows with the number of regions only.

The remainder of a length that the chunk does not divide runs last, as a scan of its own that is not recomputed, since
its backward comes at once. It costs no more than padding with masked iterations or indexing into the whole input, and
less where the input is large.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from ckptsolvers.revolve import num_forwards, num_repeats, split_length
from jax import lax
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.errors import InfeasibleBudgetError, NotDifferentiableError, OptionError
from jaxckpt.ladder import Ladder
from jaxckpt.measurement import compiled_bytes, cotangent_specs, input_specs, output_objective
from jaxckpt.trace import Constant, Equation, Program, evaluate, is_differentiable, outputs_of, run, size_bytes, trace
from jaxckpt.units import Budget, parse_budget, show_bytes

# JAX traces nested checkpoints by recursion: as deep as this goes with Python's own limit, and no schedule that runs a
# step more often than the second number is worth having.
_SAFE_DEPTH = 20
_MAX_REPEATS = 200
_FRAMES_PER_LEVEL = 60
# Binomial schedules with more regions than this take longer to compile than they are worth, unless they are asked for.
_MAX_REGIONS = 100
# Candidates for a budget stand this far apart in predicted bytes.
_STEP = 1.05

RECOMPUTE_ALL = jax.checkpoint_policies.nothing_saveable


def scan(
    body: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    *,
    budget: int | str | None = None,
    num_checkpoints: int | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Do what `lax.scan` does, with a fixed number of stored states, or within a budget, when it is differentiated.

    With neither `budget` nor `num_checkpoints` it stores about `sqrt(length)` states and runs every step twice.

    Args:
        body: `(carry, x) -> (carry, y)`, as in `lax.scan`.
        init: the first carry.
        xs: pytree of arrays, `[length, ...]` each.
        length: the number of steps, where `xs` does not say.
        budget: device bytes of the loop's own value and gradient, as its compiled vjp takes: init, xs, closed-over
            arrays, results, cotangents, gradients, and every temporary between. The cheapest schedule that is measured
            to fit is taken.
        num_checkpoints: how many states are held at once, the initial one included, by the binomial schedule: no other
            runs fewer steps. What one step's own backward reads comes on top.
        reverse: from the last x to the first.

    Returns:
        The last carry and the stacked ys, as `lax.scan` does.

    Raises:
        OptionError: both `budget` and `num_checkpoints`, or a number of states that makes no sense for the length.
        InfeasibleBudgetError: no schedule fits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def step(x, _):
        ...     return jnp.sin(x), x
        >>> f = lambda x: jnp.sum(scan(step, x, length=100, num_checkpoints=5)[0])
        >>> g = lambda x: jnp.sum(jax.lax.scan(step, x, length=100)[0])
        >>> bool(jnp.allclose(jax.grad(f)(jnp.ones(3)), jax.grad(g)(jnp.ones(3))))
        True
    """
    check_options(budget, num_checkpoints)
    wanted = None if budget is None else parse_budget(budget)
    plain = functools.partial(lax.scan, body, length=length, reverse=reverse)
    # lax.scan itself checks the arguments and settles the carry's types; its equation is then run another way.
    traced = trace(plain, (init, xs))
    program = traced.program
    loop = next((eqn for eqn in program.equations if eqn.primitive is prims.scan_p), None)
    # As positional arguments they are the tree (args, kwargs) that was traced.
    leaves = [x for x, dyn in zip(jax.tree.leaves((init, xs)), traced.is_array, strict=True) if dyn]
    if loop is None or loop.params["length"] <= 1:
        fun = functools.partial(run, program)
    elif wanted is not None:
        fun = _within(program, loop, wanted)
    elif num_checkpoints is not None:
        fun = _rewritten(program, loop, Binomial(num_checkpoints))
    else:
        fun = _rewritten(program, loop, Nested((math.ceil(loop.params["length"] ** 0.5),), RECOMPUTE_ALL))
    return jax.tree.unflatten(traced.out_tree, fun(*traced.consts, *leaves))


def check_options(budget: Any, num_checkpoints: Any) -> None:
    """Refuse options of a loop that make no sense.

    Raises:
        OptionError: with what is accepted.
    """
    if budget is not None and num_checkpoints is not None:
        raise OptionError(f"give one of {budget=} and {num_checkpoints=}, not both")
    if num_checkpoints is None:
        return
    if isinstance(num_checkpoints, bool) or not isinstance(num_checkpoints, int):
        raise OptionError(f"{num_checkpoints=} is not a number of states; write an int of at least 1")
    if num_checkpoints < 1:
        raise OptionError(f"{num_checkpoints=} must be at least 1: the initial state is one of them")


def nested_scan(
    body: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    chunks: Sequence[int] = (),
    *,
    reverse: bool = False,
    policy: Callable | None = None,
    keep_last: bool | None = None,
    unroll: int = 1,
) -> tuple[Any, Any]:
    """Run a scan as one to three levels of scans of checkpointed scans.

    Args:
        body: as in `lax.scan`.
        init: the first carry.
        xs: as in `lax.scan`.
        length: the number of steps, where `xs` does not say.
        chunks: steps in a chunk, from the outermost level in: `()` is one scan, `(8,)` a scan over checkpointed scans
            of 8 steps, `(16, 4)` one over checkpointed scans over four checkpointed scans of 4 steps each.
        reverse: from the last x to the first.
        policy: of the checkpoint around the body; `nothing_saveable` recomputes all of it, None leaves it without one.
        keep_last: do not recompute the last chunk of a level. It is split off the stacked arrays, which copies them
            once; None does it where they are smaller than one carry. A remainder is always last and always kept.
        unroll: of the innermost scans.

    Returns:
        The last carry and the stacked ys.

    Raises:
        OptionError: chunks that do not get smaller, or are smaller than 2.
    """
    chunks = tuple(int(m) for m in chunks)
    if any(m < 2 for m in chunks) or any(a <= b for a, b in itertools.pairwise(chunks)):
        raise OptionError(f"{chunks=} must be numbers of steps, at least 2, each smaller than the one before")
    n = _length(xs, length)
    step = body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=unroll != 1)
    return _level(step, init, xs, n, chunks, reverse, keep_last, unroll)


def _level(
    step: Callable,
    carry: Any,
    xs: Any,
    length: int,
    chunks: tuple[int, ...],
    reverse: bool,
    keep_last: bool | None,
    unroll: int,
) -> tuple[Any, Any]:
    if not chunks or chunks[0] >= length:
        if chunks:
            return _level(step, carry, xs, length, chunks[1:], reverse, keep_last, unroll)
        return lax.scan(step, carry, xs, length, reverse=reverse, unroll=unroll)
    m = chunks[0]

    def chunk(carry: Any, xs: Any) -> tuple[Any, Any]:
        return _level(step, carry, xs, m, chunks[1:], reverse, keep_last, unroll)

    num_chunks, rest = divmod(length, m)
    if rest == 0 and (_is_small(xs, carry) if keep_last is None else keep_last):
        num_chunks, rest = num_chunks - 1, m
    parts = _split(xs, (num_chunks * m, rest) if rest else (length,), reverse)
    if num_chunks == 1:
        # Outside of a scan only a barrier keeps the recomputation apart.
        carry, ys = jax.checkpoint(chunk)(carry, parts[0])
    else:
        stacked = jax.tree.map(lambda x: x.reshape(num_chunks, m, *x.shape[1:]), parts[0])
        carry, ys = lax.scan(jax.checkpoint(chunk, prevent_cse=False), carry, stacked, num_chunks, reverse=reverse)
        ys = jax.tree.map(lambda y: y.reshape(num_chunks * m, *y.shape[2:]), ys)
    if not rest:
        return carry, ys
    carry, last = _level(step, carry, parts[1], rest, chunks[1:], reverse, keep_last, unroll)
    return carry, _joined([ys, last], reverse)


def binomial_scan(
    body: Callable, init: Any, xs: Any, length: int, num_states: int, *, reverse: bool = False
) -> tuple[Any, Any]:
    """Run a scan under the binomial schedule, as nested `jax.checkpoint`.

    Args:
        body: as in `lax.scan`.
        init: the first carry.
        xs: as in `lax.scan`.
        length: the number of steps, at least 1.
        num_states: states held at once, the initial one included.
        reverse: from the last x to the first.

    Returns:
        The last carry and the stacked ys.

    Raises:
        OptionError: so few states that a step would run more than 200 times.

    Source: Griewank and Walther 2000, section 2.
    """
    c = min(num_states, length)
    repeats = num_repeats(length, c)
    if repeats > _MAX_REPEATS:
        enough = next(c for c in itertools.count(num_states) if num_repeats(length, c) <= _MAX_REPEATS)
        raise OptionError(
            f"num_checkpoints={num_states} for {length:,} steps would run a step {repeats:,} times; give at least "
            f"num_checkpoints={enough}"
        )
    if repeats > _SAFE_DEPTH:
        # Whoever differentiates the result meets JAX's recursion, so there is no scope to raise the limit for.
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + _FRAMES_PER_LEVEL * repeats))
    pieces = _split(xs, _runs(length, c, repeats), reverse)
    carry, ys = _Binomial(body, reverse).part(length, c, repeats)(init, pieces)
    return carry, _joined(ys, reverse)


class _Binomial:
    """The tree of one loop: a part reverses `length` steps with c states when no step may run more than r times more.

    A part takes the carry and the pieces of xs of its own runs, and gives back the carry and a list of stacked ys.
    Equal parts are one function, so that JAX traces them once.
    """

    def __init__(self, body: Callable, reverse: bool):
        self.body, self.reverse = body, reverse
        self._parts: dict[tuple[int, int, int], Callable] = {}

    def part(self, length: int, c: int, r: int) -> Callable:
        key = (length, c, r)
        if key not in self._parts:
            self._parts[key] = functools.partial(self._run, key)
        return self._parts[key]

    def _run(self, key: tuple[int, int, int], carry: Any, pieces: list[Any]) -> tuple[Any, list[Any]]:
        length, c, r = key
        rest, ys = list(pieces), []
        if r <= 1 and length > 1:
            # A state for every step: each is recomputed on its own. Few steps are not worth a loop.
            carry, y = _scan_of_checkpoints(self.body, carry, rest.pop(0), length - 1, self.reverse)
            ys, length = [y], 1
        while length > 1:
            m = split_length(length, c, r)
            taken = len(_runs(m, c, r - 1))
            carry, inner = jax.checkpoint(self.part(m, c, r - 1))(carry, rest[:taken])
            ys, rest = [*ys, *inner], rest[taken:]
            length, c = length - m, c - 1
        carry, y = self.body(carry, jax.tree.map(lambda x: x[0], rest[0]))
        return carry, [*ys, jax.tree.map(lambda y: jnp.asarray(y)[None], y)]


def _scan_of_checkpoints(body: Callable, carry: Any, xs: Any, length: int, reverse: bool) -> tuple[Any, Any]:
    if length > 1:
        return lax.scan(jax.checkpoint(body, prevent_cse=False), carry, xs, length, reverse=reverse)
    carry, y = jax.checkpoint(body)(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: jnp.asarray(y)[None], y)


@functools.lru_cache(maxsize=4096)
def _runs(length: int, c: int, r: int) -> tuple[int, ...]:
    """Lengths of the runs of steps that a part consists of, in order."""
    if r <= 1:
        return (length - 1, 1) if length > 1 else (1,)
    runs: list[int] = []
    while length > 1:
        m = split_length(length, c, r)
        runs += _runs(m, c, r - 1)
        length, c = length - m, c - 1
    return (*runs, 1)


def _split(xs: Any, lengths: Sequence[int], reverse: bool) -> list[Any]:
    """Cut stacked arrays into runs, in the order they are scanned."""
    if len(lengths) == 1:
        return [xs]
    sizes = tuple(reversed(lengths)) if reverse else tuple(lengths)
    leaves, tree = jax.tree.flatten(xs)
    # One operation for all pieces: its transpose puts their cotangents together in one go.
    cut = [lax.split(leaf, sizes) for leaf in leaves]
    pieces = [jax.tree.unflatten(tree, [leaf[i] for leaf in cut]) for i in range(len(sizes))]
    return pieces[::-1] if reverse else pieces


def _joined(pieces: list[Any], reverse: bool) -> Any:
    """Put stacked ys together again."""
    ordered = pieces[::-1] if reverse else pieces
    return jax.tree.map(lambda *ys: lax.concatenate(ys, 0), *ordered)


def _is_small(xs: Any, carry: Any) -> bool:
    total = lambda tree: sum(size_bytes(jax.typeof(x)) for x in jax.tree.leaves(tree))  # noqa: E731
    return total(xs) <= total(carry)


def _length(xs: Any, length: int | None) -> int:
    sizes = {x.shape[0] for x in jax.tree.leaves(xs)} | (set() if length is None else {length})
    if len(sizes) != 1:
        raise OptionError(f"{length=} and the leading axes of xs do not agree on a number of steps: {sorted(sizes)}")
    return sizes.pop()


@dataclass(frozen=True, slots=True)
class Nested:
    """A schedule of nested scans, as `nested_scan` takes it."""

    chunks: tuple[int, ...]
    policy: Callable | None

    def __call__(self, step: Callable, carry: Any, xs: Any, length: int, reverse: bool) -> tuple[Any, Any]:
        """Run the loop so."""
        return nested_scan(step, carry, xs, length, self.chunks, reverse=reverse, policy=self.policy)


@dataclass(frozen=True, slots=True)
class Binomial:
    """The binomial schedule with this many states."""

    num_states: int

    def __call__(self, step: Callable, carry: Any, xs: Any, length: int, reverse: bool) -> tuple[Any, Any]:
        """Run the loop so."""
        return binomial_scan(step, carry, xs, length, self.num_states, reverse=reverse)


def loop_parts(params: dict[str, Any], operands: Sequence[Any]) -> tuple[Callable, list[Any], list[Any]]:
    """Take a scan equation apart.

    Args:
        params: the equation's parameters.
        operands: its operands: constants, carry, stacked inputs.

    Returns:
        `step(carry, x) -> (carry, y)` over flat lists, the constants closed over, and the carry and the xs.
    """
    num_consts, num_carry = _compat.scan_counts(params)
    consts, carry = list(operands[:num_consts]), list(operands[num_consts : num_consts + num_carry])
    flat = jex.jaxpr_as_fun(params["jaxpr"])

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        results = flat(*consts, *carry, *x)
        return list(results[:num_carry]), list(results[num_carry:])

    return step, carry, list(operands[num_consts + num_carry :])


def _rewritten(program: Program, loop: Equation, schedule: Any) -> Callable[..., list[Any]]:
    """The program with its loop run under a schedule."""

    def fun(*inputs: Any) -> list[Any]:
        env = dict(zip(program.inputs, inputs, strict=True))
        for eqn in program.equations:
            if eqn is not loop:
                evaluate([eqn], env)
                continue
            operands = [x.value if isinstance(x, Constant) else env[x] for x in eqn.inputs]
            step, carry, xs = loop_parts(eqn.params, operands)
            carry, ys = schedule(step, carry, xs, eqn.params["length"], eqn.params["reverse"])
            env.update(zip(eqn.outputs, [*carry, *ys], strict=True))
        return outputs_of(program, env)

    return fun


def _within(program: Program, loop: Equation, budget: Budget) -> Callable[..., list[Any]]:
    """The program under the cheapest schedule of its loop that is measured to fit."""
    candidates = [(size, _rewritten(program, loop, schedule)) for size, _, schedule in _candidates(program, loop)]
    return cheapest_within(program, functools.partial(run, program), candidates, budget, "scan")


def cheapest_within(
    program: Program, plain: Callable, candidates: Sequence[tuple[int, Callable]], budget: Budget, what: str
) -> Callable[..., list[Any]]:
    """Choose a loop's schedule by compiling its value and gradient for the default backend.

    Args:
        program: the loop's own program; all of its floating-point inputs are differentiated.
        plain: the program as it takes the most memory and the least work.
        candidates: predicted temporary bytes and the program under a schedule, from least bytes to least work.
        budget: of device bytes.
        what: the loop's name.

    Returns:
        The cheapest that fits.

    Raises:
        InfeasibleBudgetError: none does.
    """
    inputs = tuple(i for i, v in enumerate(program.inputs) if is_differentiable(program.avals[v]))
    try:
        goal = output_objective(program, inputs, len(program.outputs))
    except NotDifferentiableError:
        return plain
    goal = replace(goal, is_scalar=False)  # what follows the loop decides its cotangents
    specs = [*input_specs(program), *cotangent_specs(program, goal)]
    unplanned = compiled_bytes(goal.differentiated(plain), specs, None)
    budget_bytes = budget.resolve(unplanned.device_bytes)
    if unplanned.device_bytes <= budget_bytes or not inputs:
        return plain
    fixed = unplanned.device_bytes - unplanned.temp_bytes
    ladder = Ladder(
        fixed,
        [size for size, _ in candidates],
        lambda i: compiled_bytes(goal.differentiated(candidates[i][1]), specs, None).device_bytes,
    )
    chosen = ladder.cheapest(budget_bytes)
    if chosen is None:
        least = min(ladder.known.values())
        raise InfeasibleBudgetError(
            f"no schedule of the {what} fits budget={show_bytes(budget_bytes)}. The least that was measured is "
            f"{show_bytes(least)}; unplanned it is {show_bytes(unplanned.device_bytes)}, of which {show_bytes(fixed)} "
            "are arguments, results and gradients",
            budget_bytes=budget_bytes,
            least_peak_bytes=least,
            unplanned_peak_bytes=unplanned.device_bytes,
            measured=True,
            forced_by=((f"arguments, results and gradients of the {what}", fixed, ""),),
        )
    return candidates[chosen][1]


def _candidates(program: Program, loop: Equation) -> list[tuple[int, int, Any]]:
    """Schedules as (predicted temporary bytes, steps run again, schedule), from least bytes to least work."""
    n = loop.params["length"]
    state, residuals, inputs = _sizes(program, loop)
    found: list[tuple[int, int, Any]] = [(n * state + residuals, n, Nested((), RECOMPUTE_ALL))]
    for m in _chunk_lengths(n):
        # The remainder is split off, which copies the stacked inputs; each outer step copies its chunk of them.
        copies = (n * inputs if n % m else 0) + 2 * m * inputs
        found.append(((n // m + 1) * state + m * residuals + copies, n, Nested((m,), None)))
        found.append(((n // m + m) * state + residuals + copies, 2 * n, Nested((m,), RECOMPUTE_ALL)))
        for inner in _chunk_lengths(m):
            if m % inner == 0:
                held = (n // m + m // inner + inner) * state + residuals + copies
                found.append((held, 3 * n, Nested((m, inner), RECOMPUTE_ALL)))
    for c in sorted({max(2, round(n ** (i / 8))) for i in range(1, 8)}):
        repeats = num_repeats(n, c)
        if repeats <= _SAFE_DEPTH and len(_runs(n, c, repeats)) <= 2 * _MAX_REGIONS:
            again = num_forwards(n, c, turns=True) - n
            found.append((c * state + residuals + n * inputs, again, Binomial(c)))
    found.sort(key=lambda candidate: candidate[:2])
    best: list[tuple[int, int, Any]] = []
    for candidate in found:
        if not best or candidate[1] < best[-1][1]:
            best.append(candidate)
    spread: list[tuple[int, int, Any]] = []
    for candidate in reversed(best):
        if not spread or candidate[0] * _STEP <= spread[-1][0]:
            spread.append(candidate)
    return spread[::-1]


def _sizes(program: Program, loop: Equation) -> tuple[int, int, int]:
    """Bytes of one carry, of what one step's backward reads, and of one step's x."""
    avals = [program.avals[x] if isinstance(x, int) else x.aval for x in loop.inputs]
    specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    num_consts, num_carry = _compat.scan_counts(loop.params)
    consts, carry, xs = specs[:num_consts], specs[num_consts:][:num_carry], specs[num_consts + num_carry :]
    xs = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]

    def residuals(consts: Any, carry: Any, xs: Any) -> Any:
        step, *state = loop_parts(loop.params, [*consts, *carry, *xs])
        return jax.vjp(lambda state: step(*state), state)[1]

    total = lambda tree: sum(map(size_bytes, jax.tree.leaves(tree)))  # noqa: E731
    return total(carry), total(jax.eval_shape(residuals, consts, carry, xs)), total(xs)


def _chunk_lengths(n: int) -> list[int]:
    """Divisors, and a geometric grid for lengths that have few."""
    divisors = [m for m in range(2, n) if n % m == 0]
    grid = {round(n ** (i / 8)) for i in range(1, 8)} if len(divisors) < 4 else set()
    return sorted({*divisors, *(m for m in grid if 2 <= m < n)})
