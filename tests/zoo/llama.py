"""A Llama-style decoder in plain JAX: RoPE, grouped queries, SwiGLU, RMSNorm; unrolled and scanned."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zoo.gpt2 import attention, cross_entropy
from zoo.handmade import PLAIN, Case, How, array, decoder_case, run_layers, scan_layers, stacked

NAMES = {
    "qkv": ("query_proj", "key_proj", "value_proj"),
    "qkv,context": ("query_proj", "key_proj", "value_proj", "context", "out_proj"),
    "qkv,context,mlp": (
        *("query_proj", "key_proj", "value_proj", "context", "out_proj"),
        *("mlpwi_0", "mlpwi_1", "mlpwo"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    num_layers: int = 12
    width: int = 256
    hidden: int = 704
    num_heads: int = 4
    num_kv_heads: int = 2
    num_tokens: int = 512
    vocab: int = 4096
    batch: int = 4
    scanned: bool = False


SIZES = {
    "tiny": Config(num_layers=2, width=32, hidden=64, num_heads=4, num_tokens=32, vocab=64, batch=2),
    "base": Config(),
    "deep": Config(num_layers=64, batch=8, num_tokens=128, vocab=256),
    "large": Config(width=1024, hidden=2816, num_heads=16, num_kv_heads=4, num_tokens=1024, vocab=32000, batch=8),
}


def rms_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    """Divide by the root mean square of the last axis."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions for `[batch, tokens, heads, size]`."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = jnp.arange(x.shape[1], dtype=x.dtype)[:, None, None] * rates
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean cross entropy of the next token, `loss(params, tokens)`."""
    heads, groups = config.num_heads, config.num_heads // config.num_kv_heads

    def self_attention(p: Any, x: jax.Array) -> jax.Array:
        split = lambda y, n: y.reshape(*x.shape[:2], n, -1)  # noqa: E731
        q = rotate(split(checkpoint_name(x @ p["q"], "query_proj"), heads))
        k = rotate(split(checkpoint_name(x @ p["k"], "key_proj"), config.num_kv_heads))
        v = split(checkpoint_name(x @ p["v"], "value_proj"), config.num_kv_heads)
        mixed = attention(q, jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2), causal=True)
        return checkpoint_name(checkpoint_name(mixed.reshape(x.shape), "context") @ p["o"], "out_proj")

    def swiglu(p: Any, x: jax.Array) -> jax.Array:
        gate, up = checkpoint_name(x @ p["gate"], "mlpwi_0"), checkpoint_name(x @ p["up"], "mlpwi_1")
        return checkpoint_name((jax.nn.silu(gate) * up) @ p["down"], "mlpwo")

    def layer(p: Any, x: jax.Array) -> jax.Array:
        x = x + self_attention(p, rms_norm(p["norm_1"], x))
        return x + swiglu(p, rms_norm(p["norm_2"], x))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        run = scan_layers if config.scanned else run_layers
        x = run(layer, params["layers"], params["embed"][tokens[:, :-1]], how)
        return cross_entropy(rms_norm(params["norm"], x) @ params["head"], tokens[:, 1:])

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c = config
    kv = c.width * c.num_kv_heads // c.num_heads
    layer = {
        "norm_1": array(c.width),
        "q": array(c.width, c.width),
        "k": array(c.width, kv),
        "v": array(c.width, kv),
        "o": array(c.width, c.width),
        "norm_2": array(c.width),
        "gate": array(c.width, c.hidden),
        "up": array(c.width, c.hidden),
        "down": array(c.hidden, c.width),
    }
    params = {
        "embed": array(c.vocab, c.width),
        "layers": stacked(c.num_layers, layer) if c.scanned else [layer] * c.num_layers,
        "norm": array(c.width),
        "head": array(c.width, c.vocab),
    }
    return params, array(c.batch, c.num_tokens + 1, dtype="int32")


def case(size: str, *, is_cut: bool = False, scanned: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    return decoder_case(replace(SIZES[size], scanned=scanned), make_loss, specs, NAMES, is_cut=is_cut)
