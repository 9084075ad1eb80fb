"""Small models, one for each shape of graph and each kind of argument."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True, kw_only=True)
class Model:
    """A function with arguments for it.

    Attributes:
        fun: the loss.
        make: makes its arguments, arrays of this dtype.
        heavy: a primitive of its forward that a plan recomputes.
        has_aux: as in `jax.grad`.
    """

    fun: Callable
    make: Callable[[str], tuple]
    heavy: str
    has_aux: bool = False

    def args(self, dtype: str = "float32") -> tuple:
        """Its arguments."""
        return self.make(dtype)

    def specs(self, dtype: str = "float32") -> tuple:
        """Their shapes."""
        return jax.eval_shape(lambda *args: args, *self.make(dtype))


def _normals(dtype: str, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(random.normal(size=s) / max(1, s[0]) ** 0.5).astype(dtype) for s in shapes]


def chain_loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
    """`tanh` layers in a row."""
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def chain_args(dtype: str = "float32", layers: int = 8, rows: int = 256, width: int = 32) -> tuple:
    """Arguments of `chain_loss`."""
    *weights, x = _normals(dtype, *[(width, width)] * layers, (rows, width))
    return weights, x


def residual_loss(layers: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """Two-matmul layers added to a stream that all of them read."""
    for up, down in layers:
        x = x + jax.nn.gelu(x @ up) @ down
    return jnp.mean(x * x)


def residual_args(dtype: str = "float32", layers: int = 5, rows: int = 128, width: int = 16) -> tuple:
    """Arguments of `residual_loss`."""
    *weights, x = _normals(dtype, *[(width, 4 * width), (4 * width, width)] * layers, (rows, width))
    return list(zip(weights[::2], weights[1::2], strict=True)), x


def unet_loss(weights: dict[str, list[jax.Array]], x: jax.Array) -> jax.Array:
    """Every step down is read again by the step up of its own level."""
    skips = []
    for w in weights["down"]:
        x = jnp.tanh(x @ w)
        skips.append(x)
    for w in weights["up"]:
        x = jnp.tanh(jnp.concatenate([x, skips.pop()], axis=-1) @ w)
    return jnp.sum(x**2)


def unet_args(dtype: str = "float32", levels: int = 4, rows: int = 256, width: int = 16) -> tuple:
    """Arguments of `unet_loss`."""
    *weights, x = _normals(dtype, *[(width, width)] * levels, *[(2 * width, width)] * levels, (rows, width))
    return {"down": weights[:levels], "up": weights[levels:]}, x


def conv_loss(params: dict[str, Any], images: jax.Array, labels: jax.Array) -> jax.Array:
    """Convolutions, pooling and a classifier over integer labels."""
    x = images
    for w in params["convs"]:
        x = jax.nn.relu(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    logits = x.mean(axis=(1, 2)) @ params["out"]
    return -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))


def conv_args(dtype: str = "float32", layers: int = 4, batch: int = 4, size: int = 12, channels: int = 8) -> tuple:
    """Arguments of `conv_loss`."""
    *convs, out, images = _normals(
        dtype, *[(3, 3, channels, channels)] * layers, (channels, 10), (batch, size, size, channels)
    )
    return {"convs": [w / channels for w in convs], "out": out}, images, np.arange(batch, dtype=np.int32) % 10


def dropout_loss(params: list[jax.Array], batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
    """Dropout under a key, integer labels, and an auxiliary result."""
    x = batch["x"]
    for i, w in enumerate(params):
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, x.shape)
        x = jnp.where(keep, jnp.tanh(x @ w), 0) / 0.8
    picked = jnp.take_along_axis(jax.nn.log_softmax(x), batch["labels"][:, None], axis=-1)
    return -picked.mean(), {"num_right": jnp.sum(jnp.argmax(x, -1).astype(jnp.int32) == batch["labels"]), "logits": x}


def dropout_args(dtype: str = "float32", layers: int = 6, rows: int = 128, width: int = 16) -> tuple:
    """Arguments of `dropout_loss`."""
    *weights, x = _normals(dtype, *[(width, width)] * layers, (rows, width))
    return weights, {"x": x, "labels": np.arange(rows, dtype=np.int32) % width}, jax.random.key(7)


MODELS = {
    "chain": Model(fun=chain_loss, make=chain_args, heavy="tanh"),
    "residual": Model(fun=residual_loss, make=residual_args, heavy="tanh"),
    "unet": Model(fun=unet_loss, make=unet_args, heavy="tanh"),
    "conv": Model(fun=conv_loss, make=conv_args, heavy="conv_general_dilated"),
    "dropout": Model(fun=dropout_loss, make=dropout_args, heavy="tanh", has_aux=True),
}
