"""A deep chain of equal layers, where the textbooks say how often every layer must run: revolve, Chen, and "auto".

From the repository's root:

    python examples/mlp_revolve.py --layers 32

plans one chain at a few budgets with each of three solvers and prints the measured peaks next to the counts, each taken
three times: from the textbook's formula, from the schedule, and from the gradient that JAX traces.

What is counted. A layer is a tanh and a matmul, and its state is the matmul's result. Griewank and Walther's t(n, c) is
the number of forward steps that only lead to another state, the first sweep's among them, with c states held, the one
before the first layer included:

    t(n, c) = r n - binomial(c + r, c + 1),    r the least with binomial(c + r, c) >= n.

What a layer runs again right before its own backward is not in it. Here that is the tanh and never the matmul, since
nothing reads the matmul's result. Only the last layer's is read, by the loss, so value and gradient hold t(n, c) + 1
matmuls that go forward. Chen's segments run each matmul once and then again in every segment but the last, save for
each segment's own last: n + sum(length - 1). Recomputing nothing takes n of them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives
from jax.interpreters import partial_eval

if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

from ckptsolvers import Keep, Schedule
from ckptsolvers.revolve import revolve_schedule

import jaxckpt

SOLVERS = ("auto", "revolve", "chen")
BUDGETS = ("35%", "40%", "50%", "75%")


def loss(weights: Sequence[jax.Array], x: jax.Array, direction: jax.Array) -> jax.Array:
    """Project the last of a chain of states; linear in it, so that the last layer is like the others.

    Args:
        weights: `[num_layers]`, each `[width, width]`.
        x: `[batch, width]`.
        direction: `[batch, width]`.
    """
    for w in weights:
        x = jnp.tanh(x) @ w
    return jnp.sum(x * direction)


def specs(num_layers: int, batch: int = 2048, width: int = 128) -> tuple[Any, ...]:
    """Shapes of the loss's arguments."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return [array(width, width)] * num_layers, array(batch, width), array(batch, width)


def example_args() -> tuple[Any, ...]:
    """A chain of 32 layers, for `jaxckpt plan examples.mlp_revolve:loss`."""
    return specs(32)


def num_advances(num_layers: int, num_states: int) -> int:
    """t(n, c), Griewank and Walther's formula."""
    r = 0
    while comb(num_states + r, num_states) < num_layers:
        r += 1
    return r * num_layers - comb(num_states + r, num_states + 1)


def matmuls_of_schedule(schedule: Schedule) -> int:
    """Forward matmuls of a schedule's every sweep: in each but the outermost, nothing reads the last one's result."""
    total, sweeps = 1, [schedule.nodes]
    while sweeps:
        nodes = sweeps.pop()
        total += nodes[-1].stop - nodes[0].start - 1
        sweeps += [node.children for node in nodes if not isinstance(node, Keep)]
    return total


def matmuls_of_gradient(fun: Callable, weights: Sequence[Any], *args: Any) -> int:
    """Forward matmuls in the traced value and gradient once dead code is gone.

    All of them, less those that go backward: two per layer, and one for the first, whose input has no gradient.
    """
    closed = jax.make_jaxpr(jax.value_and_grad(fun))(weights, *args)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _num_matmuls(live) - (2 * len(weights) - 1)


def _num_matmuls(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive is primitives.dot_general_p
        inner = eqn.params.get("jaxpr")
        total += 0 if inner is None else _num_matmuls(getattr(inner, "jaxpr", inner))
    return total


def textbook(plan: jaxckpt.Plan) -> tuple[str, int | None]:
    """What a plan is in its textbook's terms, and the forward matmuls of the gradient by its formula."""
    schedule = plan.schedule
    n = len(plan.blocks)
    if schedule is None:
        return "no plan", n
    if plan.solver == "chen":
        lengths = [node.stop - node.start for node in schedule.nodes if not isinstance(node, Keep)]
        return f"{len(lengths) + 1} segments", n + sum(length - 1 for length in lengths)
    options = tuple(node.option for node, _ in schedule.walk() if isinstance(node, Keep))
    for c in range(1, n):
        if revolve_schedule(n, c, options=options) == schedule:
            return f"{c} states", num_advances(n, c) + 1
    return f"{schedule.depth} levels", None


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a count is not the textbook's."""
    parser = argparse.ArgumentParser(description="Count a deep chain's layer runs under three solvers.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help='such as "12MB", or "40%%" of the unplanned peak')
    args = parser.parse_args(argv)
    n, shapes, wrong = args.layers, specs(args.layers), 0
    print(f"{n} layers; bytes are measured, matmuls are those that go forward, {n} without recomputation")
    _row("budget", "MiB", "solver", "peak MiB", "plan", "textbook", "schedule", "gradient")
    for budget in args.budgets:
        for solver in SOLVERS:
            try:
                plan = jaxckpt.plan(loss, *shapes, budget=budget, solver=solver, cost="flops")
            except jaxckpt.InfeasibleBudgetError as error:
                _row(budget, _mib(error.budget_bytes), solver, "-", f"needs {_mib(error.expected_least_bytes)} MiB")
                continue
            what, formula = textbook(plan)
            scheduled = n if plan.schedule is None else matmuls_of_schedule(plan.schedule)
            traced = matmuls_of_gradient(plan.apply(loss), *shapes)
            wrong += traced != scheduled or formula not in (None, scheduled)
            counts = ("-" if formula is None else formula, scheduled, traced)
            _row(budget, _mib(plan.budget_bytes or 0), solver, _mib(plan.peak_bytes), what, *counts)
    print("every count is the textbook's" if not wrong else f"{wrong} counts are not the textbook's")
    return 1 if wrong else 0


def _row(*cells: Any) -> None:
    widths = (">7", ">8", "<8", ">9", "<12", ">9", ">9", ">9")
    print("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False)))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f}"


if __name__ == "__main__":
    sys.exit(main())
