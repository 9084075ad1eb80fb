"""GPT-2 in plain JAX, unrolled and scanned, with the names that MaxText gives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zoo.handmade import PLAIN, Case, How, array, decoder_case, run_layers, scan_layers, stacked

NAMES = {
    "qkv": ("qkv",),
    "qkv,context": ("qkv", "context", "attention_out"),
    "qkv,context,mlp": ("qkv", "context", "attention_out", "mlp_up", "mlp_down"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    num_layers: int = 12
    width: int = 256
    num_heads: int = 4
    num_tokens: int = 512
    vocab: int = 4096
    batch: int = 4
    scanned: bool = False


SIZES = {
    "tiny": Config(num_layers=4, width=32, num_heads=2, num_tokens=32, vocab=64, batch=2),
    "base": Config(),
    "deep": Config(num_layers=24, batch=2, vocab=256),
    "large": Config(width=768, num_heads=12, num_tokens=1024, vocab=50257, batch=8),
}


def norm(p: Any, x: jax.Array) -> jax.Array:
    """Layer norm over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * (1 + p["scale"]) + p["bias"]


def dense(p: Any, x: jax.Array) -> jax.Array:
    """A linear layer with a bias."""
    return x @ p["w"] + p["b"]


def norm_specs(width: int) -> Any:
    """Parameters of `norm`."""
    return {"scale": array(width), "bias": array(width)}


def dense_specs(rows: int, cols: int) -> Any:
    """Parameters of `dense`."""
    return {"w": array(rows, cols), "b": array(cols)}


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """Scaled dot-product attention, written out, over `[batch, tokens, heads, size]`."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all tokens."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean()


def self_attention(p: Any, x: jax.Array, num_heads: int, *, causal: bool) -> jax.Array:
    """Multi-head self-attention with its projections, named."""
    qkv = checkpoint_name(dense(p["qkv"], x), "qkv")
    q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * num_heads, -1), 3, axis=2)
    mixed = checkpoint_name(attention(q, k, v, causal=causal).reshape(x.shape), "context")
    return checkpoint_name(dense(p["proj"], mixed), "attention_out")


def mlp(p: Any, x: jax.Array) -> jax.Array:
    """Two linear layers with a gelu between, named."""
    return checkpoint_name(dense(p["down"], jax.nn.gelu(checkpoint_name(dense(p["up"], x), "mlp_up"))), "mlp_down")


def layer_specs(width: int) -> Any:
    """Parameters of a pre-norm transformer block."""
    return {
        "ln_1": norm_specs(width),
        "qkv": dense_specs(width, 3 * width),
        "proj": dense_specs(width, width),
        "ln_2": norm_specs(width),
        "up": dense_specs(width, 4 * width),
        "down": dense_specs(4 * width, width),
    }


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean cross entropy of the next token, `loss(params, tokens)`."""

    def layer(p: Any, x: jax.Array) -> jax.Array:
        x = x + self_attention(p, norm(p["ln_1"], x), config.num_heads, causal=True)
        return x + mlp(p, norm(p["ln_2"], x))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["wte"][tokens[:, :-1]] + params["wpe"]
        run = scan_layers if config.scanned else run_layers
        x = norm(params["ln_f"], run(layer, params["layers"], x, how))
        return cross_entropy(x @ params["wte"].T, tokens[:, 1:])

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c, layer = config, layer_specs(config.width)
    params = {
        "wte": array(c.vocab, c.width),
        "wpe": array(c.num_tokens, c.width),
        "layers": stacked(c.num_layers, layer) if c.scanned else [layer] * c.num_layers,
        "ln_f": norm_specs(c.width),
    }
    return params, array(c.batch, c.num_tokens + 1, dtype="int32")


def case(size: str, *, is_cut: bool = False, scanned: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    return decoder_case(replace(SIZES[size], scanned=scanned), make_loss, specs, NAMES, is_cut=is_cut)
