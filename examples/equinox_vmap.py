"""Equinox: a model is a pytree with functions among its leaves, and is mapped over the batch.

    python examples/equinox_vmap.py --budget 70%

The loss is decorated outside of the map, so the plan is for the whole batch. Activation functions and other leaves that
are no arrays are static without being told so.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from examples import digits


class Net(eqx.Module):
    """A residual MLP of one image."""

    layers: list
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        """Make the layers."""
        *keys, last = jax.random.split(key, 7)
        self.layers = [eqx.nn.MLP(64, 64, 128, 1, jax.nn.gelu, key=k) for k in keys]
        self.out = eqx.nn.Linear(64, 10, key=last)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map an image `[64]` to logits `[10]`."""
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


def loss(model: Net, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(decorate: Callable, num_steps: int) -> list[float]:
    """Train from the same start on the same batches and return the losses."""
    optimizer, fun, model = optax.adam(1e-3), decorate(loss), Net(jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    state = optimizer.init(arrays)

    def step(arrays: Any, state: Any, *batch: Any) -> Any:
        model = eqx.combine(arrays, static)
        value, grads = eqx.filter_value_and_grad(fun)(model, *batch)
        updates, state = optimizer.update(grads, state, arrays)
        return eqx.apply_updates(arrays, updates), state, value

    step, values = digits.jit(step), []
    for batch in digits.batches(num_steps):
        arrays, state, value = step(arrays, state, *map(jnp.asarray, batch))
        values.append(float(value))
    return values


if __name__ == "__main__":
    sys.exit(digits.main(train, "Train an Equinox model with and without a plan."))
