"""ResNet-50 in plain JAX: bottleneck blocks, batch normalisation with the batch's own statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from zoo.gpt2 import cross_entropy
from zoo.handmade import PLAIN, Case, How, array, policies

# Keeping the convolutions and making normalisation and relu again is what people do by hand.
NAMES = {"conv": ("conv",)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    image: int = 128
    num_classes: int = 1000
    batch: int = 8


SIZES = {
    "tiny": Config(stages=(1, 1), width=8, image=16, num_classes=10, batch=4),
    "base": Config(),
}


def conv(w: jax.Array, x: jax.Array, stride: int = 1) -> jax.Array:
    """A named convolution, NHWC."""
    y = lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return checkpoint_name(y, "conv")


def batch_norm(p: Any, x: jax.Array) -> jax.Array:
    """Normalise each channel over the batch and the image."""
    mean = x.mean((0, 1, 2))
    variance = (x * x).mean((0, 1, 2)) - mean * mean
    return (x - mean) * (lax.rsqrt(variance + 1e-5) * p["scale"]) + p["bias"]


def block(p: Any, x: jax.Array, stride: int) -> jax.Array:
    """A bottleneck block; the first one of a stage projects its shortcut."""
    y = jax.nn.relu(batch_norm(p["norm_1"], conv(p["conv_1"], x)))
    y = jax.nn.relu(batch_norm(p["norm_2"], conv(p["conv_2"], y, stride)))
    y = batch_norm(p["norm_3"], conv(p["conv_3"], y))
    if "project" in p:
        x = batch_norm(p["norm_project"], conv(p["project"], x, stride))
    return jax.nn.relu(x + y)


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean cross entropy, `loss(params, images, labels)`."""

    def run(blocks: Sequence[Any], x: jax.Array, strides: Sequence[int]) -> jax.Array:
        for p, stride in zip(blocks, strides, strict=True):
            x = how.wrap(lambda p, x, stride=stride: block(p, x, stride))(p, x)
        return x

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        x = jax.nn.relu(batch_norm(params["stem_norm"], conv(params["stem"], images, 2)))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        strides = [2 if i and not j else 1 for i, n in enumerate(config.stages) for j in range(n)]
        group = how.group or len(strides)
        for start in range(0, len(strides), group):
            part = lambda some, x, at=start: run(some, x, strides[at : at + len(some)])  # noqa: E731
            x = (jax.checkpoint(part) if how.group else part)(params["blocks"][start : start + group], x)
        return cross_entropy(x.mean((1, 2)) @ params["head"]["w"] + params["head"]["b"], labels)

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c = config
    norm = lambda width: {"scale": array(width), "bias": array(width)}  # noqa: E731
    blocks, features = [], c.width
    for i, num_blocks in enumerate(c.stages):
        width = c.width * 2**i
        for j in range(num_blocks):
            p = {
                "conv_1": array(1, 1, features, width),
                "norm_1": norm(width),
                "conv_2": array(3, 3, width, width),
                "norm_2": norm(width),
                "conv_3": array(1, 1, width, 4 * width),
                "norm_3": norm(4 * width),
            }
            if not j:
                p |= {"project": array(1, 1, features, 4 * width), "norm_project": norm(4 * width)}
            blocks.append(p)
            features = 4 * width
    params = {
        "stem": array(7, 7, 3, c.width),
        "stem_norm": norm(c.width),
        "blocks": blocks,
        "head": {"w": array(features, c.num_classes), "b": array(c.num_classes)},
    }
    return params, array(c.batch, c.image, c.image, 3), array(c.batch, dtype="int32")


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    config = replace(SIZES[size], stages=(1,)) if is_cut else SIZES[size]
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), sum(config.stages), NAMES),
        vocab=config.num_classes,
    )
