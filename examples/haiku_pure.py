"""Haiku: a transformed function is a pure one of its parameters, and a decorated method plans like any function.

python examples/haiku_pure.py --budget 70%
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from examples import digits


def net(x: jax.Array) -> jax.Array:
    """Map images `[batch, 64]` to logits `[batch, 10]`."""
    for _ in range(6):
        x = x + hk.Linear(64)(jax.nn.gelu(hk.Linear(256)(x)))
        x = hk.dropout(hk.next_rng_key(), 0.1, x)
    return hk.Linear(10)(x)


class Trainer:
    """Holds what does not change; its loss is a method."""

    def __init__(self, decorate: Callable):
        """Decorate the method on this instance."""
        self.net = hk.transform(net)
        self.optimizer = optax.adam(1e-3)
        self.loss = decorate(self.plain_loss)

    def plain_loss(self, params: Any, key: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        """Mean cross entropy."""
        logits = self.net.apply(params, key, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(self, params: Any, state: Any, *batch: Any) -> Any:
        """One step of the optimizer."""
        value, grads = jax.value_and_grad(self.loss)(params, *batch)
        updates, state = self.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value


def train(decorate: Callable, num_steps: int) -> list[float]:
    """Train from the same start on the same batches and keys and return the losses."""
    trainer = Trainer(decorate)
    params = trainer.net.init(jax.random.key(0), jnp.zeros((1, 64)))
    state, step, values = trainer.optimizer.init(params), digits.jit(trainer.step), []
    for i, (images, labels) in enumerate(digits.batches(num_steps)):
        params, state, value = step(params, state, jax.random.key(i), images, labels)
        values.append(float(value))
    return values


if __name__ == "__main__":
    sys.exit(digits.main(train, "Train a Haiku model with and without a plan."))
