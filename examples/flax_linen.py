"""flax linen: batch statistics that the loss returns beside its value, dropout, and an optax state.

python examples/flax_linen.py --budget 70%
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from examples import digits


class Net(nn.Module):
    """Dense layers, each normalised over the batch, with dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Map images `[batch, 64]` to logits `[batch, 10]`."""
        for _ in range(6):
            x = nn.Dense(128)(x)
            x = nn.BatchNorm(use_running_average=not is_training)(x)
            x = nn.Dropout(0.1)(nn.gelu(x), deterministic=not is_training)
        return nn.Dense(10)(x)


def loss(params: Any, statistics: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    """Mean cross entropy, and the new batch statistics."""
    variables = {"params": params, "batch_stats": statistics}
    logits, changed = Net().apply(variables, images, True, rngs={"dropout": key}, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed["batch_stats"]


def train(decorate: Callable, num_steps: int) -> list[float]:
    """Train from the same start on the same batches and keys and return the losses."""
    optimizer, fun = optax.adam(1e-3), decorate(loss)
    variables = jax.jit(lambda key, x: Net().init(key, x, False))(jax.random.key(0), jnp.zeros((1, 64)))
    params, statistics = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    def step(params: Any, statistics: Any, state: Any, *batch: Any) -> Any:
        (value, statistics), grads = jax.value_and_grad(fun, has_aux=True)(params, statistics, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state, value

    step, values = digits.jit(step), []
    for i, batch in enumerate(digits.batches(num_steps)):
        params, statistics, state, value = step(params, statistics, state, *batch, jax.random.key(i))
        values.append(float(value))
    return values


if __name__ == "__main__":
    sys.exit(digits.main(train, "Train a flax linen model with and without a plan."))
