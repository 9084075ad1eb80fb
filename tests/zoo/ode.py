"""A neural ODE: an Equinox MLP as the field, integrated by Runge-Kutta steps in a scan."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zoo.handmade import PLAIN, Case, How, array, policies, scan_layers

NAMES = {"slopes": ("slope",)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    num_steps: int = 128
    size: int = 32
    width: int = 128
    depth: int = 2
    batch: int = 256


SIZES = {
    "tiny": Config(num_steps=9, size=4, width=8, batch=8),
    "base": Config(),
}


@cache
def _field(config: Config) -> tuple[Any, Any]:
    """The MLP's array specs and what else there is of it."""
    c = config
    made = eqx.filter_eval_shape(eqx.nn.MLP, c.size, c.size, c.width, c.depth, jnp.tanh, key=jax.random.key(0))
    return eqx.partition(made, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean squared error of the state at time 1, `loss(field, start, goal)`."""
    static = _field(config)[1]

    def loss(params: Any, start: jax.Array, goal: jax.Array) -> jax.Array:
        field = jax.vmap(eqx.combine(params, static))

        def slope(y: jax.Array) -> jax.Array:
            return checkpoint_name(field(y), "slope")

        def step(dt: jax.Array, y: jax.Array) -> jax.Array:
            a = slope(y)
            b = slope(y + dt / 2 * a)
            c = slope(y + dt / 2 * b)
            d = slope(y + dt * c)
            return y + dt / 6 * (a + 2 * b + 2 * c + d)

        steps = jnp.full((config.num_steps,), 1 / config.num_steps, start.dtype)
        return ((scan_layers(step, steps, start, how) - goal) ** 2).mean()

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    states = array(config.batch, config.size)
    return _field(config)[0], states, states


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    config = replace(SIZES[size], num_steps=1) if is_cut else SIZES[size]
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), config.num_steps, NAMES, scanned=True),
    )
