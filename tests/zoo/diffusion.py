"""A diffusion U-Net in plain JAX: group norm, a time embedding, attention at the low resolutions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from zoo.gpt2 import attention
from zoo.handmade import PLAIN, Case, How, array, policies
from zoo.resnet import conv
from zoo.unet import upsampled

NAMES = {"conv": ("conv",), "conv,attention": ("conv", "qkv", "context")}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape; attention from level `attend_from` down."""

    levels: int = 3
    blocks: int = 2
    width: int = 32
    num_heads: int = 4
    attend_from: int = 2
    image: int = 64
    batch: int = 8


SIZES = {
    "tiny": Config(levels=1, blocks=2, width=16, num_heads=2, image=8, batch=2),
    "base": Config(),
}


def group_norm(p: Any, x: jax.Array, groups: int = 8) -> jax.Array:
    """Normalise groups of channels over the image."""
    y = x.reshape(*x.shape[:3], groups, -1)
    y = y - y.mean((1, 2, 4), keepdims=True)
    y = y * lax.rsqrt((y * y).mean((1, 2, 4), keepdims=True) + 1e-5)
    return y.reshape(x.shape) * p["scale"] + p["bias"]


def residual(p: Any, x: jax.Array, time: jax.Array) -> jax.Array:
    """Two convolutions with the time between, added to a shortcut; attention after them where there are weights."""
    y = conv(p["conv_1"], jax.nn.silu(group_norm(p["norm_1"], x)))
    y = y + (jax.nn.silu(time) @ p["time"])[:, None, None]
    y = conv(p["conv_2"], jax.nn.silu(group_norm(p["norm_2"], y)))
    return y + (conv(p["project"], x) if "project" in p else x)


def attend(p: Any, x: jax.Array, num_heads: int) -> jax.Array:
    """Self-attention over the pixels."""
    pixels = group_norm(p["norm"], x).reshape(x.shape[0], -1, x.shape[-1])
    qkv = checkpoint_name(pixels @ p["qkv"], "qkv")
    q, k, v = jnp.split(qkv.reshape(*pixels.shape[:2], 3 * num_heads, -1), 3, axis=2)
    mixed = checkpoint_name(attention(q, k, v, causal=False).reshape(pixels.shape), "context")
    return x + (mixed @ p["out"]).reshape(x.shape)


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean squared error of the noise, `loss(params, images, times, noise)`."""

    def block(p: Any, x: jax.Array, time: jax.Array) -> jax.Array:
        x = residual(p, x, time)
        return attend(p["attend"], x, config.num_heads) if "attend" in p else x

    wrapped = how.wrap(block)

    def joined(p: Any, x: jax.Array, skip: jax.Array, time: jax.Array) -> jax.Array:
        return how.wrap(lambda p, x, skip, time: block(p, jnp.concatenate([x, skip], -1), time))(p, x, skip, time)

    def below(params: Any, x: jax.Array, time: jax.Array, level: int) -> jax.Array:
        """Everything from one level to the bottom and back."""
        skips = []
        for p in params["down"][level]:
            x = wrapped(p, x, time)
            skips.append(x)
        if level + 1 == config.levels:
            x = wrapped(params["middle"], x, time)
        else:
            deeper = lambda params, x, time: below(params, x, time, level + 1)  # noqa: E731
            small = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
            x = upsampled((jax.checkpoint(deeper) if how.group else deeper)(params, small, time))
        for p in params["up"][level]:
            x = joined(p, x, skips.pop(), time)
        return x

    def loss(params: Any, images: jax.Array, times: jax.Array, noise: jax.Array) -> jax.Array:
        rates = jnp.exp(-jnp.arange(params["time_1"].shape[0], dtype=times.dtype) / 8)
        time = jax.nn.silu(jnp.sin(times[:, None] * rates) @ params["time_1"]) @ params["time_2"]
        x = below(params, conv(params["stem"], images), time, 0)
        return ((conv(params["head"], jax.nn.silu(group_norm(params["norm"], x))) - noise) ** 2).mean()

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c = config
    norm = lambda width: {"scale": array(width), "bias": array(width)}  # noqa: E731

    def block(features: int, width: int, attends: bool) -> Any:
        p: dict[str, Any] = {
            "norm_1": norm(features),
            "conv_1": array(3, 3, features, width),
            "time": array(4 * c.width, width),
            "norm_2": norm(width),
            "conv_2": array(3, 3, width, width),
        }
        if features != width:
            p["project"] = array(1, 1, features, width)
        if attends:
            p["attend"] = {"norm": norm(width), "qkv": array(width, 3 * width), "out": array(width, width)}
        return p

    down, up, features = [], [], c.width
    for level in range(c.levels):
        width, attends = c.width * 2**level, level >= c.attend_from
        down.append([block(features if not i else width, width, attends) for i in range(c.blocks)])
        features = width
        deeper = 2 * width if level + 1 < c.levels else width
        up.append([block((deeper if not i else width) + width, width, attends) for i in range(c.blocks)])
    params = {
        "stem": array(3, 3, 3, c.width),
        "time_1": array(c.width, 4 * c.width),
        "time_2": array(4 * c.width, 4 * c.width),
        "down": down,
        "middle": block(features, features, True),
        "up": up,
        "norm": norm(c.width),
        "head": array(3, 3, c.width, 3),
    }
    images = array(c.batch, c.image, c.image, 3)
    return params, images, array(c.batch), images


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    config = replace(SIZES[size], blocks=1) if is_cut else SIZES[size]
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), 2 * config.levels * config.blocks, NAMES),
    )
