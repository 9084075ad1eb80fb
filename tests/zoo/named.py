"""Models with `jax.checkpoint` around each layer and names inside, as MaxText and Levanter write them."""

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
    # Nothing needs the result to go back: the name does nothing.
    return x + checkpoint_name(jax.nn.gelu(up) @ w["wo"], "mlpwo")


def norm(x: jax.Array) -> jax.Array:
    """Divide by the root mean square."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def decoder(policy: Any = None, *, scanned: bool = True, layer: Callable = layer) -> Callable:
    """The loss of a decoder whose layers are checkpointed under a policy."""
    body = jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)

    def loss(params: dict[str, Any], x: jax.Array) -> jax.Array:
        if scanned:
            x, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x, params)
        else:
            for i in range(jax.tree.leaves(params)[0].shape[0]):
                x = body(x, jax.tree.map(lambda p, i=i: p[i], params))
        return jnp.mean(x * x)

    return loss


def specs(num_layers: int = 6, width: int = 32, hidden: int = 128, batch: int = 2, tokens: int = 32) -> tuple[Any, ...]:
    """The arguments' shapes."""
    make = lambda *shape: jax.ShapeDtypeStruct((num_layers, *shape), jnp.float32)  # noqa: E731
    square = {name: make(width, width) for name in ("query", "key", "value", "out")}
    params = {**square, "wi": make(width, hidden), "wo": make(hidden, width)}
    return params, jax.ShapeDtypeStruct((batch, tokens, width), jnp.float32)


def many_layer(x: jax.Array, w: dict[str, Any]) -> jax.Array:
    """A layer with a named product for each of its weights, of different widths, some of which feed the next one."""
    h = x
    for i, name in enumerate(sorted(w)):
        up = jnp.tanh(checkpoint_name(h @ w[name], name))
        x = x + up @ w[name].T
        h = x if i % 3 == 2 else h + up[..., : h.shape[-1]]
    return x


def many_specs(num_names: int = 20, num_layers: int = 4, width: int = 16) -> tuple[Any, ...]:
    """Arguments of a decoder of such layers."""
    params = {
        f"name{i:02d}": jax.ShapeDtypeStruct((num_layers, width, width * (1 + i * 7 % 5)), jnp.float32)
        for i in range(num_names)
    }
    return params, jax.ShapeDtypeStruct((4, 16, width), jnp.float32)
