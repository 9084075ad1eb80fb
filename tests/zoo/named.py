"""Decoders with `jax.checkpoint` around each layer and eight names inside, as MaxText writes them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NAMES = ("decoder_layer_input", "query_proj", "key_proj", "value_proj", "context", "out_proj", "mlpwi", "mlpwo")


def layer(x: jax.Array, w: dict[str, Any], num_heads: int = 4) -> jax.Array:
    """One layer: attention and an MLP on `[batch, tokens, width]`."""
    x = checkpoint_name(x, "decoder_layer_input")
    h = norm(x)
    q, k, v = (
        checkpoint_name(h @ w[name], f"{name}_proj").reshape(*x.shape[:2], num_heads, -1)
        for name in ("query", "key", "value")
    )
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8.0)
    context = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape)
    x = x + checkpoint_name(checkpoint_name(context, "context") @ w["out"], "out_proj")
    up = checkpoint_name(norm(x) @ w["wi"], "mlpwi")
    return x + checkpoint_name(jax.nn.gelu(up) @ w["wo"], "mlpwo")


def norm(x: jax.Array) -> jax.Array:
    """Divide by the root mean square."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def decoder(policy: Any = None, *, scanned: bool = True, checkpointed: bool = True) -> Callable:
    """The loss of a decoder whose layers are checkpointed under a policy."""
    body = jax.checkpoint(layer, policy=policy, prevent_cse=not scanned) if checkpointed else layer

    def loss(params: dict[str, Any], x: jax.Array) -> jax.Array:
        if scanned:
            x, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x, params)
        else:
            for i in range(params["out"].shape[0]):
                x = body(x, jax.tree.map(lambda p, i=i: p[i], params))
        return jnp.mean(x * x)

    return loss


def specs(num_layers: int = 6, width: int = 64, hidden: int = 256, batch: int = 4, tokens: int = 64) -> tuple[Any, ...]:
    """The arguments' shapes."""
    make = lambda *shape: jax.ShapeDtypeStruct((num_layers, *shape), jnp.float32)  # noqa: E731
    square = {name: make(width, width) for name in ("query", "key", "value", "out")}
    params = {**square, "wi": make(width, hidden), "wo": make(hidden, width)}
    return params, jax.ShapeDtypeStruct((batch, tokens, width), jnp.float32)
