"""What a call of `jaxckpt.jit` takes beside one of `jax.jit`: medians in µs, measured in turn, arguments donated.

The step does next to nothing, so that the time is that of the call. `python benchmarks/dispatch.py [--calls 6000]`.
"""

import argparse
import random
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


def compare(num_leaves: int, num_calls: int) -> list[float]:
    """Median µs of `jax.jit`, of `jax.jit` again and of `jaxckpt.jit`, called in turn in any order."""
    step, leaves, x = make_step(num_leaves)
    plain = [jax.jit(step, donate_argnums=0) for _ in range(2)]
    calls = [*plain, jaxckpt.jit(step, budget="8GB", donate_argnums=0)]
    for call in calls:
        call(jax.tree.map(jnp.copy, leaves), x)
    # Nothing of the planning lies between the buffers.
    states = [call(jax.tree.map(jnp.copy, leaves), x) for call in calls]
    found: list[list[int]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(num_calls):
        random.shuffle(order)
        for k in order:
            taken, states[k] = timed(calls[k], states[k], x)
            found[k].append(taken)
    return [statistics.median(times) / 1000 for times in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=6000, help="of each, at one leaf; fewer at more")
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.default_backend()}: µs a call, donated; the two of jax.jit say what is noise")
    print(f"{'leaves':>8} {'jax.jit':>10} {'again':>10} {'jaxckpt.jit':>12}")
    for num_leaves in (1, 148, 1000):
        found = compare(num_leaves, max(200, options.calls // (1 + num_leaves // 100)))
        print(f"{num_leaves:>8} {found[0]:>10.2f} {found[1]:>10.2f} {found[2]:>12.2f}")


if __name__ == "__main__":
    main()
