"""What a call of `jaxckpt.jit` takes beside one of `jax.jit`: medians in µs, measured in turn, arguments donated.

The step does next to nothing, so that the time is that of the call. `python benchmarks/dispatch.py [--calls 4000]`.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import jaxckpt


def make_step(num_leaves: int):
    def loss(leaves, x):
        return jnp.sum(jnp.tanh(leaves[0] * x) ** 2)

    def step(leaves, x):
        first = jax.grad(lambda first: loss([first, *leaves[1:]], x))(leaves[0])
        return [leaves[0] - 0.1 * first, *leaves[1:]]

    return step, [jnp.full((8,), 1.0 + i) for i in range(num_leaves)], jnp.ones((8,))


def timed(call, leaves, x):
    """ns of a call, and what it returns once that is there: nothing runs beside the next call."""
    started = time.perf_counter_ns()
    leaves = call(leaves, x)
    taken = time.perf_counter_ns() - started
    return taken, jax.block_until_ready(leaves)


def compare(num_leaves: int, num_calls: int) -> tuple[float, float, float]:
    """Median µs of `jax.jit`, of `jaxckpt.jit`, and of the difference between neighbours."""
    step, leaves, x = make_step(num_leaves)
    calls = [jax.jit(step, donate_argnums=0), jaxckpt.jit(step, budget="8GB", donate_argnums=0)]
    states = [call(jax.tree.map(jnp.copy, leaves), x) for call in calls]
    found: list[list[int]] = [[], []]
    for i in range(num_calls):
        for k in (0, 1) if i % 2 else (1, 0):
            taken, states[k] = timed(calls[k], states[k], x)
            found[k].append(taken)
    differences = [ours - theirs for theirs, ours in zip(*found, strict=True)]
    theirs, ours, more = (statistics.median(times) / 1000 for times in (*found, differences))
    return theirs, ours, more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=4000, help="of each, at one leaf; fewer at more")
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.default_backend()}: µs a call, donated")
    print(f"{'leaves':>8} {'jax.jit':>10} {'jaxckpt.jit':>12} {'difference':>11}")
    for num_leaves in (1, 148, 1000):
        theirs, ours, more = compare(num_leaves, max(200, options.calls // (1 + num_leaves // 100)))
        print(f"{num_leaves:>8} {theirs:>10.2f} {ours:>12.2f} {more:>11.2f}")


if __name__ == "__main__":
    main()
