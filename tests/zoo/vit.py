"""A vision transformer in flax linen, its policies written with `flax.linen.remat`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zoo.gpt2 import NAMES, attention, cross_entropy
from zoo.handmade import PLAIN, Case, How, array, policies


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    num_layers: int = 12
    width: int = 192
    num_heads: int = 3
    patch: int = 16
    image: int = 224
    num_classes: int = 1000
    batch: int = 8


SIZES = {
    "tiny": Config(num_layers=2, width=32, num_heads=2, patch=8, image=32, num_classes=10, batch=2),
    "base": Config(),
}


class Layer(nn.Module):
    """A pre-norm transformer block."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        qkv = checkpoint_name(nn.Dense(3 * width)(nn.LayerNorm()(x)), "qkv")
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * self.num_heads, -1), 3, axis=2)
        mixed = checkpoint_name(attention(q, k, v, causal=False).reshape(x.shape), "context")
        x = x + checkpoint_name(nn.Dense(width)(mixed), "attention_out")
        up = checkpoint_name(nn.Dense(4 * width)(nn.LayerNorm()(x)), "mlp_up")
        return x + checkpoint_name(nn.Dense(width)(nn.gelu(up)), "mlp_down")


class ViT(nn.Module):
    """Patches to class scores."""

    config: Config
    how: How

    def setup(self) -> None:
        c = self.config
        self.embed = nn.Conv(c.width, (c.patch, c.patch), (c.patch, c.patch), "VALID")
        self.positions = self.param("positions", nn.initializers.normal(0.02), ((c.image // c.patch) ** 2, c.width))
        layer = _lifted(self.how.wrap)(Layer)
        self.layers = [layer(c.num_heads) for _ in range(c.num_layers)]
        self.norm, self.head = nn.LayerNorm(), nn.Dense(c.num_classes)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images)
        x = x.reshape(x.shape[0], -1, self.config.width) + self.positions
        group = self.how.group or self.config.num_layers
        for start in range(0, self.config.num_layers, group):
            run = nn.remat(_run, static_argnums=(2, 3)) if self.how.group else _run
            x = run(self, x, start, start + group)
        return self.head(self.norm(x).mean(axis=1))


def _run(model: ViT, x: jax.Array, start: int, stop: int) -> jax.Array:
    for layer in model.layers[start:stop]:
        x = layer(x)
    return x


def _lifted(wrap: Callable) -> Callable:
    """`nn.remat` with the policy of a `jax.checkpoint`; the module itself where there is none."""
    keywords = getattr(wrap, "keywords", None)
    return (lambda module: module) if keywords is None else (lambda module: nn.remat(module, **keywords))


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean cross entropy, `loss(params, images, labels)`."""
    model = ViT(config, how)
    return lambda params, images, labels: cross_entropy(model.apply(params, images), labels)


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c = config
    images = array(c.batch, c.image, c.image, 3)
    params: Any = jax.eval_shape(ViT(c, PLAIN).init, jax.eval_shape(jax.random.key, 0), images)
    return params, images, array(c.batch, dtype="int32")


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    config = replace(SIZES[size], num_layers=1) if is_cut else SIZES[size]
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), config.num_layers, NAMES),
        vocab=config.num_classes,
    )
