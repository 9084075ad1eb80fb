"""GPT-2 in plain JAX, of any size."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    vocab: int = 256
    num_layers: int = 6
    width: int = 384
    num_heads: int = 6
    num_tokens: int = 512
    batch: int = 8
    dtype: str = "float32"


TINY = Config(vocab=64, num_layers=2, width=32, num_heads=2, num_tokens=32, batch=2)
BASE = Config()
SMALL = Config(vocab=50257, num_layers=12, width=768, num_heads=12, num_tokens=1024)


def specs(config: Config) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Shapes of the loss's arguments: parameters, and tokens `[batch, num_tokens + 1]`."""
    c = config
    array = lambda *shape: jax.ShapeDtypeStruct(shape, c.dtype)  # noqa: E731
    norm = lambda: {"scale": array(c.width), "bias": array(c.width)}  # noqa: E731
    dense = lambda rows, cols: {"w": array(rows, cols), "b": array(cols)}  # noqa: E731
    layer = lambda: {  # noqa: E731
        "ln_1": norm(),
        "qkv": dense(c.width, 3 * c.width),
        "proj": dense(c.width, c.width),
        "ln_2": norm(),
        "up": dense(c.width, 4 * c.width),
        "down": dense(4 * c.width, c.width),
    }
    layers = [layer() for _ in range(c.num_layers)]
    params = {"wte": array(c.vocab, c.width), "wpe": array(c.num_tokens, c.width), "layers": layers, "ln_f": norm()}
    return params, jax.ShapeDtypeStruct((c.batch, c.num_tokens + 1), "int32")


def init(config: Config, seed: int = 0) -> tuple[Any, jax.Array]:
    """Arrays of these shapes."""
    params, tokens = specs(config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves) + 1)
    made = [0.05 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(tree, made), jax.random.randint(keys[-1], tokens.shape, 0, config.vocab, tokens.dtype)


def make_loss(config: Config) -> Callable[[Any, jax.Array], jax.Array]:
    """Mean cross entropy of the next token, `loss(params, tokens)`."""
    heads, size = config.num_heads, config.width // config.num_heads

    def norm(p: Any, x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * (1 + p["scale"])[None, None] + p["bias"][None, None]

    def dense(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + p["b"][None, None]

    def attention(p: Any, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        q, k, v = jnp.split(dense(p["qkv"], x).reshape(batch, tokens, 3 * heads, size), 3, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * size**-0.5
        causal = jnp.tril(jnp.ones((tokens, tokens), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
        return dense(p["proj"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["wte"][tokens[:, :-1]] + params["wpe"][None]
        for i, p in enumerate(params["layers"]):
            with jax.named_scope(f"h{i}"):
                x = x + attention(p, norm(p["ln_1"], x))
                x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["ln_2"], x))))
        logits = norm(params["ln_f"], x) @ params["wte"].T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()

    return loss
