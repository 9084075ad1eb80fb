"""The largest batch of GPT-2 medium that one TPU v5e trains, with plans and without.

    python benchmarks/largest_batch.py [--target v5e] [--budget 15.75GiB] [--layers 24] [--json FILE]

The whole AdamW step is compiled by the chip's own compiler: 1024 tokens, float32 state, bfloat16 computation, attention
written out, layers scanned, parameters and optimizer state donated. The batch found must fit, the next one must not,
and it must be at least 2.5 times the largest that fits without a plan.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no chip is needed, and looking for one takes time

import jax
import jax.numpy as jnp
import optax

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import jaxckpt
from jaxckpt.compilation.measure import compiled_bytes
from jaxckpt.units import parse_bytes, show_bytes

_MOST_TIMES = 2.5
_OPTIMIZER = optax.adamw(3e-4, weight_decay=0.1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A GPT-2 model's shape; the default is the medium one."""

    num_layers: int = 24
    width: int = 1024
    num_heads: int = 16
    num_tokens: int = 1024
    vocab: int = 50257


def shapes(config: Config) -> Any:
    """Shapes of the parameters, layers stacked."""
    n, w = config.num_layers, config.width
    norm = lambda *lead: {"scale": (*lead, w), "bias": (*lead, w)}  # noqa: E731
    dense = lambda rows, cols: {"kernel": (n, rows, cols), "bias": (n, cols)}  # noqa: E731
    layer = {"ln_1": norm(n), "qkv": dense(w, 3 * w), "proj": dense(w, w)}
    layer |= {"ln_2": norm(n), "up": dense(w, 4 * w), "down": dense(4 * w, w)}
    return {"wte": (config.vocab, w), "wpe": (config.num_tokens, w), "layers": layer, "ln_f": norm()}


def norm(p: Any, x: jax.Array) -> jax.Array:
    """Layer norm in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)
    return (wide * p["scale"] + p["bias"]).astype(x.dtype)


def dense(p: Any, x: jax.Array) -> jax.Array:
    """A matmul in the dtype of its input."""
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def make_step(config: Config) -> Any:
    """A training step `(params, state, tokens) -> (params, state, loss)`."""
    size = config.width // config.num_heads

    def attention(p: Any, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = dense(p["qkv"], x).reshape(batch, tokens, 3, config.num_heads, size)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * size**-0.5
        causal = jnp.arange(tokens)[:, None] >= jnp.arange(tokens)[None, :]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(x.dtype)
        return dense(p["proj"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width))

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        x = x + attention(p, norm(p["ln_1"], x))
        return x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["ln_2"], x)))), None

    @jaxckpt.auto_remat
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        table = params["wte"].astype(jnp.bfloat16)
        x = table[tokens[:, :-1]] + params["wpe"].astype(jnp.bfloat16)
        x, _ = jax.lax.scan(layer, x, params["layers"])
        logits = (norm(params["ln_f"], x) @ table.T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = _OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def make_args(config: Config, batch: int) -> tuple[Any, ...]:
    """Shapes of the step's arguments at a batch."""
    spec = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = jax.tree.map(spec, shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    tokens = jax.ShapeDtypeStruct((batch, config.num_tokens + 1), jnp.int32)
    return params, jax.eval_shape(_OPTIMIZER.init, params), tokens


def largest_unplanned(config: Config, target: str, budget: int, most: int) -> tuple[int, dict[int, int]]:
    """The largest batch that fits without a plan, and what was measured, each batch by itself."""
    step, measured = make_step(config), {}

    def size(batch: int) -> int:
        found = compiled_bytes(step, make_args(config, batch), target, (0, 1))
        measured[batch] = found.device_bytes
        print(f"without a plan, batch {batch}: {show_bytes(found.device_bytes)}", file=sys.stderr, flush=True)
        return measured[batch]

    fits, over = 0, most
    while over - fits > 1:
        batch = (fits + over) // 2
        fits, over = (batch, over) if size(batch) <= budget else (fits, batch)
    return fits, measured


def main() -> int:
    """Find both batches and return 1 if the planned one falls short."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="v5e")
    parser.add_argument("--budget", default="15.75GiB")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config, budget = Config(num_layers=options.layers), parse_bytes(options.budget, "budget")
    started = time.perf_counter()
    found = jaxckpt.largest_batch(
        make_step(config), lambda b: make_args(config, b), budget=budget, target=options.target, donate_argnums=(0, 1)
    )
    took = time.perf_counter() - started
    plan = found.plans[0]
    row = {
        "config": asdict(config),
        "target": options.target,
        "budget_bytes": budget,
        "batch": found.batch,
        "measured_bytes": found.measurement.device_bytes,
        "next_bytes": found.next_bytes,
        "num_compiles": found.num_compiles,
        "recompute_share": plan.recompute_cost / plan.unplanned_cost,
        "took_s": took,
    }
    print(json.dumps(row), flush=True)
    assert found.batch is not None and found.next_bytes is not None
    plain, measured = largest_unplanned(config, options.target, budget, found.batch)
    row |= {"unplanned_batch": plain, "unplanned_measured": measured}
    print(f"batch {found.batch} takes {show_bytes(found.measurement.device_bytes)} of {show_bytes(budget)}, and")
    print(f"batch {found.batch + 1} {show_bytes(found.next_bytes)} under its least plan; without a plan {plain} fits")
    print(f"{found.num_compiles} compiles, {took:.0f} s; {plan.recompute_cost / plan.unplanned_cost:.1%} more work")
    if options.json:
        options.json.write_text(json.dumps(row, indent=1))
    held = found.measurement.device_bytes <= budget < found.next_bytes
    return 0 if held and found.batch >= _MOST_TIMES * plain else 1


if __name__ == "__main__":
    sys.exit(main())
