"""A Llama-style model of 1.3 billion parameters, its whole AdamW step fitted into eight chips that need not be here.

    python examples/llama_fsdp.py --target v5e:2x4
    python examples/llama_fsdp.py --target h100:8 --budget 40GiB
    python examples/llama_fsdp.py --target v5e              # on one chip: what does not fit, and why

Layers are scanned, and trained on 32 sequences of 2048 tokens. Parameters, AdamW's moments and the batch are cut over
all devices, as "fully sharded data parallel" has it: every matrix lives in eight parts and is gathered where it is
used. State is float32, the computation bfloat16, attention is written out.

The chip's own compiler is asked (`jaxckpt targets --install v5e`); no array is made and no step is run. All bytes are
those of each device.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no chip is needed, and looking for one takes time

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import jaxckpt
from jaxckpt.targets.chip import find_target
from jaxckpt.units import show_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A model's shape.

    Attributes:
        num_layers: decoder layers, scanned.
        width: of the residual stream.
        hidden: of the gated MLP.
        num_heads: attention heads.
        num_kv_heads: heads that keys and values are shared from.
        num_tokens: of a sequence.
        vocab: how many tokens there are.
        batch: sequences in a step, over all devices.
    """

    num_layers: int
    width: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    vocab: int
    batch: int


SIZES = {
    "toy": Config(num_layers=4, width=32, hidden=64, num_heads=2, num_kv_heads=1, num_tokens=64, vocab=128, batch=16),
    # 1,345 million parameters.
    "1.3b": Config(
        num_layers=24, width=2048, hidden=5504, num_heads=16, num_kv_heads=16, num_tokens=2048, vocab=32000, batch=32
    ),
}
_OPTIMIZER = optax.adamw(3e-4, b2=0.95, weight_decay=0.1)


def _norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)
    return (wide * scale[None, None]).astype(x.dtype)


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions for `[batch, num_tokens, num_heads, size]`."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[None, :, None, None] * rates[None, None, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def make_loss(config: Config, rows: Any = None) -> Callable[[Any, jax.Array], jax.Array]:
    """Return `loss(params, tokens)`, the mean cross entropy of the next token; tokens are `[batch, num_tokens + 1]`.

    Args:
        config: the model's shape.
        rows: the sharding of activations, by sequences; None on one device.
    """
    size = config.width // config.num_heads

    def held(x: jax.Array) -> jax.Array:
        return x if rows is None else jax.lax.with_sharding_constraint(x, rows)

    def attention(p: Any, x: jax.Array) -> jax.Array:
        batch, tokens, _ = x.shape
        heads = lambda name, n: (x @ p[name].astype(x.dtype)).reshape(batch, tokens, n, size)  # noqa: E731
        q, k = _rotate(heads("q", config.num_heads)), _rotate(heads("k", config.num_kv_heads))
        groups = config.num_heads // config.num_kv_heads
        k, v = (jnp.repeat(y, groups, axis=2) for y in (k, heads("v", config.num_kv_heads)))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * size**-0.5
        causal = jnp.arange(tokens)[:, None] >= jnp.arange(tokens)[None, :]
        weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -1e9)).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return mixed @ p["o"].astype(x.dtype)

    def mlp(p: Any, x: jax.Array) -> jax.Array:
        gate, up = (x @ p[name].astype(x.dtype) for name in ("gate", "up"))
        return (jax.nn.silu(gate) * up) @ p["down"].astype(x.dtype)

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        x = held(x + attention(p, _norm(p["norm_1"], x)))
        return held(x + mlp(p, _norm(p["norm_2"], x))), None

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = held(params["embed"].astype(jnp.bfloat16)[tokens[:, :-1]])
        x, _ = jax.lax.scan(layer, x, params["layers"])
        logits = (_norm(params["norm"], x) @ params["head"].astype(x.dtype)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


def make_step(loss: Callable) -> Callable:
    """A training step `(params, state, tokens) -> (params, state, loss)`."""

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = _OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def shapes(config: Config) -> Any:
    """Shapes of the parameters, layers stacked."""
    c, kv = config, config.width * config.num_kv_heads // config.num_heads
    layer = {
        **{"norm_1": (c.width,), "norm_2": (c.width,), "q": (c.width, c.width), "k": (c.width, kv)},
        **{"v": (c.width, kv), "o": (c.width, c.width), "gate": (c.width, c.hidden), "up": (c.width, c.hidden)},
        "down": (c.hidden, c.width),
    }
    return {
        "embed": (c.vocab, c.width),
        "layers": {name: (c.num_layers, *shape) for name, shape in layer.items()},
        "norm": (c.width,),
        "head": (c.width, c.vocab),
    }


def specs(config: Config, mesh: Mesh | None = None) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """The step's arguments: parameters, AdamW's state and tokens, all cut over the devices of a mesh, if there is one.

    Every matrix is cut along its last axis; AdamW's step counter has no sharding and lies on every device.
    """

    def place(x: Any, *cut: str | None) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None or not x.shape else NamedSharding(mesh, PartitionSpec(*cut))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def last_axis(x: Any) -> jax.ShapeDtypeStruct:
        return place(x, *(None,) * (len(x.shape) - 1), "data")

    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes(config), is_leaf=is_shape)
    tokens = jax.ShapeDtypeStruct((config.batch, config.num_tokens + 1), jnp.int32)
    state = jax.eval_shape(_OPTIMIZER.init, params)
    return jax.tree.map(last_axis, params), jax.tree.map(last_axis, state), place(tokens, "data")


def main(argv: list[str] | None = None) -> int:
    """Fit the step and print what was measured; 1 where nothing fits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="v5e:2x4", help='such as "v5e:2x4", "h100:8" or "cpu:8"')
    parser.add_argument("--budget", help="bytes on each device; all of the chip's memory by default")
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--batch", type=int, help="sequences on all devices together")
    args = parser.parse_args(argv)
    changes = {k: v for k, v in (("num_layers", args.layers), ("batch", args.batch)) if v is not None}
    config = dataclasses.replace(SIZES[args.size], **changes)
    started = time.perf_counter()
    try:
        budget = args.budget or find_target(args.target).memory_bytes
        if budget is None:
            parser.error(f"{args.target} has no memory of its own; give --budget")
        _, _, layout = args.target.partition(":")
        num_devices = math.prod(map(int, layout.split("x"))) if layout else 1
        mesh = jaxckpt.mesh(args.target, {"data": num_devices}) if num_devices > 1 else None
        rows = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
        step = make_step(jaxckpt.auto_remat(make_loss(config, rows)))
        arguments = specs(config, mesh)
        print(f"{sum(x.size for x in jax.tree.leaves(arguments[0])):,} parameters on {args.target}", flush=True)
        fitted = jaxckpt.fit(step, *arguments, budget=budget, target=args.target, donate_argnums=(0, 1))
    except jaxckpt.JaxckptError as error:
        print(error, file=sys.stderr)
        return 1
    found, plan = fitted.measurement, fitted.plans[0]
    print(f"without a plan {show_bytes(fitted.unplanned.device_bytes)}, measured" if fitted.unplanned else "")
    print(f"with the plan  {show_bytes(found.device_bytes)}, measured on each device: {found.argument_bytes:,} of")
    print(f"arguments, of which {found.alias_bytes:,} are donated, and {found.temp_bytes:,} of temporaries")
    print(f"{fitted.num_compiles} compiles, {time.perf_counter() - started:.0f} s")
    print(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
