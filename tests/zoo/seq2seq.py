"""An encoder-decoder transformer in flax nnx: every layer of the decoder reads the encoder's result."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo.gpt2 import NAMES, attention, cross_entropy
from zoo.handmade import PLAIN, Case, How, array, policies


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape; as many layers in the encoder as in the decoder."""

    num_layers: int = 6
    width: int = 256
    num_heads: int = 4
    num_tokens: int = 256
    vocab: int = 4096
    batch: int = 8


SIZES = {
    "tiny": Config(num_layers=1, width=32, num_heads=2, num_tokens=16, vocab=64, batch=2),
    "base": Config(),
}


class Attention(nnx.Module):
    """Multi-head attention of one sequence to another."""

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs):
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key_value = nnx.Linear(width, 2 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, memory: jax.Array, *, causal: bool) -> jax.Array:
        split = lambda y, n: y.reshape(*y.shape[:2], n, -1)  # noqa: E731
        q = split(checkpoint_name(self.query(x), "qkv"), self.num_heads)
        k, v = jnp.split(split(checkpoint_name(self.key_value(memory), "qkv"), 2 * self.num_heads), 2, axis=2)
        mixed = checkpoint_name(attention(q, k, v, causal=causal).reshape(x.shape), "context")
        return checkpoint_name(self.out(mixed), "attention_out")


class Layer(nnx.Module):
    """A pre-norm layer, with attention to `memory` where it is given."""

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs, *, crosses: bool):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(3 if crosses else 2)])
        self.attention = Attention(width, num_heads, rngs)
        self.cross = Attention(width, num_heads, rngs) if crosses else None
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array | None) -> jax.Array:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, causal=memory is not None)
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x), memory, causal=False)
        up = checkpoint_name(self.up(self.norms[-1](x)), "mlp_up")
        return x + checkpoint_name(self.down(nnx.gelu(up)), "mlp_down")


class Seq2Seq(nnx.Module):
    """Two embedded sequences to scores of the second one's next tokens."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(c.vocab, c.width, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((c.num_tokens, c.width)))
        layer = lambda crosses: Layer(c.width, c.num_heads, rngs, crosses=crosses)  # noqa: E731
        self.encoder = nnx.List([layer(False) for _ in range(c.num_layers)])
        self.decoder = nnx.List([layer(True) for _ in range(c.num_layers)])
        self.norm = nnx.LayerNorm(c.width, rngs=rngs)

    def __call__(self, source: jax.Array, target: jax.Array, how: How) -> jax.Array:
        memory = _run(self.encoder, self.embed(source) + self.positions[...], None, how)
        x = _run(self.decoder, self.embed(target) + self.positions[...], memory, how)
        return self.embed.attend(self.norm(x))


def _run(layers: Any, x: jax.Array, memory: jax.Array | None, how: How) -> jax.Array:
    """Layers in a row; parameters leave their modules, so that `jax.checkpoint` sees arrays."""

    def apply(layer: Layer) -> Callable:
        graph, params = nnx.split(layer)
        call = how.wrap(lambda params, x, memory: nnx.merge(graph, params)(x, memory))
        return lambda x, memory: call(params, x, memory)

    def run(x: jax.Array, memory: jax.Array | None, some: Any) -> jax.Array:
        for layer in some:
            x = apply(layer)(x, memory)
        return x

    group = how.group or len(layers)
    for start in range(0, len(layers), group):
        some = layers[start : start + group]
        part = lambda x, memory, some=some: run(x, memory, some)  # noqa: E731
        x = (jax.checkpoint(part) if how.group else part)(x, memory)
    return x


@cache
def _abstract(config: Config) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Seq2Seq(config, nnx.Rngs(0))))


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean cross entropy of the target's next token, `loss(params, source, target)`."""

    def loss(params: Any, source: jax.Array, target: jax.Array) -> jax.Array:
        graph, state = _abstract(config)
        model = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params)))
        return cross_entropy(model(source, target[:, :-1], how), target[:, 1:])

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c = config
    params = jax.tree.map(lambda s: array(*s.shape, dtype=s.dtype), jax.tree.leaves(_abstract(c)[1]))
    tokens = lambda n: array(c.batch, n, dtype="int32")  # noqa: E731
    return params, tokens(c.num_tokens), tokens(c.num_tokens + 1)


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    config = replace(SIZES[size], num_layers=1) if is_cut else SIZES[size]
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), config.num_layers, NAMES),
        vocab=config.vocab,
    )
