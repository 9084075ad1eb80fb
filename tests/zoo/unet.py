"""A U-Net with long skips for high-resolution images, in plain JAX."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from zoo.handmade import PLAIN, Case, How, array, policies
from zoo.resnet import batch_norm, conv

NAMES = {"conv": ("conv",)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    levels: int = 4
    width: int = 16
    image: int = 512
    batch: int = 2


SIZES = {
    "tiny": Config(levels=2, width=4, image=16, batch=1),
    "base": Config(),
    "large": Config(width=64, batch=8),
}


def double_conv(p: Any, x: jax.Array) -> jax.Array:
    """Two convolutions, each normalised and rectified."""
    for i in ("1", "2"):
        x = jax.nn.relu(batch_norm(p[f"norm_{i}"], conv(p[f"conv_{i}"], x)))
    return x


def upsampled(x: jax.Array) -> jax.Array:
    """Twice the image's size, nearest neighbour."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean squared error of a mask, `loss(params, images, masks)`.

    A checkpoint is put around each double convolution, the joining of the skip with it; a group is a run of levels.
    """

    def down(p: Any, x: jax.Array) -> jax.Array:
        return how.wrap(double_conv)(p, x)

    def up(p: Any, x: jax.Array, skip: jax.Array) -> jax.Array:
        return how.wrap(lambda p, x, skip: double_conv(p, jnp.concatenate([upsampled(x), skip], -1)))(p, x, skip)

    def below(params: Any, x: jax.Array, level: int) -> jax.Array:
        """Everything from one level to the bottom and back."""
        x = down(params["down"][level], x)
        if level == config.levels:
            return x
        pooled = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        deeper = lambda params, pooled: below(params, pooled, level + 1)  # noqa: E731
        at_border = how.group and level % how.group == 0
        deep = (jax.checkpoint(deeper) if at_border else deeper)(params, pooled)
        return up(params["up"][level], deep, x)

    def loss(params: Any, images: jax.Array, masks: jax.Array) -> jax.Array:
        return ((conv(params["head"], below(params, images, 0)) - masks) ** 2).mean()

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c = config
    norm = lambda width: {"scale": array(width), "bias": array(width)}  # noqa: E731
    widths = [c.width * 2**i for i in range(c.levels + 1)]
    block = lambda features, width: {  # noqa: E731
        "conv_1": array(3, 3, features, width),
        "norm_1": norm(width),
        "conv_2": array(3, 3, width, width),
        "norm_2": norm(width),
    }
    params = {
        "down": [block(a, b) for a, b in zip([3, *widths], widths, strict=False)],
        "up": [block(a + b, a) for a, b in itertools.pairwise(widths)],
        "head": array(1, 1, c.width, 1),
    }
    return params, array(c.batch, c.image, c.image, 3), array(c.batch, c.image, c.image, 1)


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    config = replace(SIZES[size], levels=1) if is_cut else SIZES[size]
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), config.levels, NAMES),
    )
