"""Equal `tanh` layers with small weights: nearly all memory is activations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from zoo.handmade import PLAIN, Case, How, array, policies, run_layers

# Layers, rows, width.
SIZES = {"tiny": (8, 64, 8), "base": (64, 16384, 64)}


def make_loss(how: How = PLAIN) -> Callable:
    """Sum of squares, `loss(weights, x)`."""

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sum(run_layers(lambda w, x: jnp.tanh(x @ w), weights, x, how) ** 2)

    return loss


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    num_layers, rows, width = SIZES[size]
    num_layers = 1 if is_cut else num_layers
    return Case(
        fun=make_loss(),
        specs=([array(width, width)] * num_layers, array(rows, width)),
        policies=policies(make_loss, num_layers, {}),
    )
