"""What tracing and lowering a planned gradient takes, beside the plain one and one with checkpoints by hand.

    python benchmarks/tracing.py [--layers 12 48 126] [--shares 10 50] [--rounds 3]

An unrolled transformer, value and gradient, in processor seconds: the median of some rounds, each of a function that
JAX has not seen before. The plan is known. By hand, every layer is one function inside one `jax.checkpoint`, which JAX
traces once. A planned function is traced flat first, whatever its layers are; the last column takes that off. It should
be at most 1.2, and the planned gradient quicker than the plain one.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import jaxckpt

_MOST_TIME = 1.2
_WIDTH, _HEADS, _TOKENS, _BATCH = 64, 4, 64, 4


def transformer(by_hand: bool = False) -> Callable:
    """A loss that JAX has not seen before."""

    def norm(p: Any, x: jax.Array) -> jax.Array:
        centred = x - jnp.mean(x, -1, keepdims=True)
        return p["scale"] * centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)

    def attention(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btd,dhe->bhte", x, p[name]) for name in ("q", "k", "v"))
        scores = jnp.einsum("bhte,bhse->bhts", q, k) / jnp.sqrt(q.shape[-1])
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
        return jnp.einsum("bhte,hed->btd", jnp.einsum("bhts,bhse->bhte", weights, v), p["o"])

    def layer(p: Any, x: jax.Array) -> jax.Array:
        x = x + attention(p, norm(p["norm_1"], x))
        return x + jax.nn.gelu(norm(p["norm_2"], x) @ p["up"]) @ p["down"]

    run = jax.checkpoint(layer) if by_hand else layer

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for i, p in enumerate(params):
            with jax.named_scope(f"h{i}"):
                x = run(p, x)
        return jnp.mean(x**2)

    return loss


def shapes(num_layers: int) -> tuple[Any, Any]:
    """Shapes of its arguments."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    heads, scale = spec(_WIDTH, _HEADS, _WIDTH // _HEADS), {"scale": spec(_WIDTH)}
    layer = {"q": heads, "k": heads, "v": heads, "o": spec(_HEADS, _WIDTH // _HEADS, _WIDTH)}
    layer |= {"norm_1": scale, "norm_2": scale, "up": spec(_WIDTH, 4 * _WIDTH), "down": spec(4 * _WIDTH, _WIDTH)}
    return [layer] * num_layers, spec(_BATCH, _TOKENS, _WIDTH)


def seconds(make: Callable[[], Callable[[], Any]], rounds: int) -> float:
    """Median processor seconds of what it makes."""
    times = []
    for _ in range(rounds):
        fun = make()
        started = time.process_time()
        fun()
        times.append(time.process_time() - started)
    return statistics.median(times)


def lowered(fun: Callable, specs: Any) -> Callable[[], Any]:
    """Traces and lowers a function's value and gradient."""
    return lambda: jax.jit(jax.value_and_grad(fun)).trace(*specs).lower()


def row(num_layers: int, share: int, rounds: int) -> dict[str, Any]:
    """One depth and one budget, a percentage of the unplanned peak."""
    specs = shapes(num_layers)
    plan = jaxckpt.plan(transformer(), *specs, budget=f"{share}%", verify=False, on_infeasible="least")
    decorated = lambda: jaxckpt.auto_remat(transformer(), budget=f"{share}%", verify=False, on_infeasible="least")  # noqa: E731
    lowered(decorated(), specs)()  # the plan is known from here on
    lowered(transformer(), specs)()
    found = {
        "layers": num_layers,
        "share": share,
        "kinds": len({(save.kind, len(save.named_values)) for save in plan.block_saves}),
        "regions": plan.schedule.num_regions if plan.schedule else 0,
        "flat": seconds(lambda: functools.partial(jax.make_jaxpr(transformer()), *specs), rounds),
        "plain": seconds(lambda: lowered(transformer(), specs), rounds),
        "by hand": seconds(lambda: lowered(transformer(by_hand=True), specs), rounds),
        "applied": seconds(lambda: lowered(plan.apply(transformer()), specs), rounds),
        "decorated": seconds(lambda: lowered(decorated(), specs), rounds),
    }
    limit = found["by hand"] + found["flat"]
    return found | {"ratio": max(found["applied"], found["decorated"]) / limit}


def main() -> int:
    """Run the cases and return 1 if one takes too long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48, 126])
    parser.add_argument("--shares", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for num_layers in options.layers:
        for share in options.shares:
            rows.append(row(num_layers, share, options.rounds))
            print(rows[-1], file=sys.stderr)
    table = Table(title=f"tracing and lowering, processor seconds, jax {jax.__version__}")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for found in rows:
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in found.values()))
    Console(width=140).print(table)
    good = all(found["ratio"] <= _MOST_TIME and found["decorated"] < found["plain"] for found in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
