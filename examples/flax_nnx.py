"""flax nnx: modules hold their state, and the decorated loss is a function of the module itself.

    python examples/flax_nnx.py --budget 70%

The averages that a call changes go into the decorated function and come out of it, as under `nnx.remat`.
`nnx.value_and_grad` works around it, as around any function.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import jax
import optax
from flax import nnx

from examples import digits


class Net(nnx.Module):
    """Dense layers, each normalised over the batch."""

    def __init__(self, rngs: nnx.Rngs):
        """Make the layers."""
        widths = [64] + [128] * 6
        self.layers = nnx.List(nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths))
        self.norms = nnx.List(nnx.BatchNorm(width, rngs=rngs) for width in widths[1:])
        self.out = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `[batch, 64]` to logits `[batch, 10]`."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.gelu(norm(layer(x)))
        return self.out(x)


def train(decorate: Callable, num_steps: int) -> list[float]:
    """Train from the same start on the same batches and return the losses."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @decorate
    def loss(model: Net, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    # nnx.jit takes no compiler options: on CPU with jaxlib before 0.12, XLA_FLAGS must keep the recomputation.
    @nnx.jit
    def step(model: Net, optimizer: nnx.Optimizer, *batch: Any) -> jax.Array:
        value, grads = nnx.value_and_grad(loss)(model, *batch)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer, *batch)) for batch in digits.batches(num_steps)]


if __name__ == "__main__":
    sys.exit(digits.main(train, "Train a flax nnx model with and without a plan."))
