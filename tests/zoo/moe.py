"""A decoder whose MLPs are mixtures of experts with top-k routing and capacities, in plain JAX."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zoo.gpt2 import cross_entropy, dense_specs, norm, norm_specs, self_attention
from zoo.handmade import PLAIN, Case, How, array, policies, run_layers

NAMES = {
    "qkv,context": ("qkv", "context", "attention_out"),
    "qkv,context,moe": ("qkv", "context", "attention_out", "expert_up", "moe_out"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's shape."""

    num_layers: int = 6
    width: int = 256
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    capacity: int = 320
    num_tokens: int = 256
    vocab: int = 4096
    batch: int = 4


SIZES = {
    "tiny": Config(num_layers=2, width=32, num_heads=2, num_experts=4, capacity=20, num_tokens=16, vocab=64, batch=2),
    "base": Config(),
}


def experts(p: Any, x: jax.Array, top_k: int, capacity: int) -> jax.Array:
    """Send each of `[tokens, width]` to its best experts, as far as they have room, and mix what they say."""
    scores = jax.nn.softmax(x @ p["router"])
    weights, chosen = jax.lax.top_k(scores, top_k)
    weights = weights / weights.sum(-1, keepdims=True)
    picked = jax.nn.one_hot(chosen, scores.shape[-1], dtype=x.dtype)  # [tokens, k, experts]
    # A token's place in its expert's queue.
    place = (jnp.cumsum(picked.reshape(-1, scores.shape[-1]), axis=0) - 1).reshape(picked.shape)
    place = (place * picked).sum(-1).astype(jnp.int32)
    slot = jax.nn.one_hot(place, capacity, dtype=x.dtype)  # [tokens, k, capacity]; a full expert's is all zeros
    combine = jnp.einsum("tk,tke,tkc->tec", weights, picked, slot)
    sent = jnp.einsum("tec,td->ecd", (combine > 0).astype(x.dtype), x)
    up = checkpoint_name(jnp.einsum("ecd,edf->ecf", sent, p["up"]), "expert_up")
    done = jnp.einsum("ecf,efd->ecd", jax.nn.gelu(up), p["down"])
    return checkpoint_name(jnp.einsum("tec,ecd->td", combine, done), "moe_out")


def make_loss(config: Config, how: How = PLAIN) -> Callable:
    """Mean cross entropy of the next token, `loss(params, tokens)`."""

    def layer(p: Any, x: jax.Array) -> jax.Array:
        x = x + self_attention(p, norm(p["ln_1"], x), config.num_heads, causal=True)
        flat = norm(p["ln_2"], x).reshape(-1, config.width)
        return x + experts(p, flat, config.top_k, config.capacity).reshape(x.shape)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = run_layers(layer, params["layers"], params["wte"][tokens[:, :-1]] + params["wpe"], how)
        return cross_entropy(norm(params["ln_f"], x) @ params["wte"].T, tokens[:, 1:])

    return loss


def specs(config: Config) -> tuple:
    """Shapes of the loss's arguments."""
    c = config
    layer = {
        "ln_1": norm_specs(c.width),
        "qkv": dense_specs(c.width, 3 * c.width),
        "proj": dense_specs(c.width, c.width),
        "ln_2": norm_specs(c.width),
        "router": array(c.width, c.num_experts),
        "up": array(c.num_experts, c.width, 2 * c.width),
        "down": array(c.num_experts, 2 * c.width, c.width),
    }
    params = {
        "wte": array(c.vocab, c.width),
        "wpe": array(c.num_tokens, c.width),
        "layers": [layer] * c.num_layers,
        "ln_f": norm_specs(c.width),
    }
    return params, array(c.batch, c.num_tokens + 1, dtype="int32")


def case(size: str, *, is_cut: bool = False) -> Case:
    """The model at one of `SIZES`, or cut to one layer of it."""
    config = replace(SIZES[size], num_layers=1) if is_cut else SIZES[size]
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), config.num_layers, NAMES),
        vocab=config.vocab,
    )
