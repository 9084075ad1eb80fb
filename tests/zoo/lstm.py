"""A long LSTM as one scan over its steps, in plain JAX."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zoo.handmade import PLAIN, Case, How, array, policies, scan_layers

NAMES = {"gates": ("gates",)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    num_steps: int = 512
    width: int = 256
    batch: int = 32


SIZES = {
    "tiny": Config(num_steps=16, width=8, batch=4),
    "base": Config(),
}


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean squared error of the last state's projection, `loss(params, inputs, targets)`, steps first."""

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        def step(x: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, cell = state
            gates = checkpoint_name(jnp.concatenate([x, hidden], -1) @ params["w"] + params["b"], "gates")
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            return jax.nn.sigmoid(o) * jnp.tanh(cell), cell

        zeros = jnp.zeros((config.batch, config.width), inputs.dtype)
        hidden, _ = scan_layers(step, inputs, (zeros, zeros), how)
        return ((hidden @ params["out"] - targets) ** 2).mean()

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c = config
    params = {"w": array(2 * c.width, 4 * c.width), "b": array(4 * c.width), "out": array(c.width, c.width)}
    return params, array(c.num_steps, c.batch, c.width), array(c.batch, c.width)


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    config = replace(SIZES[size], num_steps=1) if is_cut else SIZES[size]
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), config.num_steps, NAMES, scanned=True),
    )
