"""GPT-2 in flax with optax AdamW, trained with and without a checkpoint plan on English text.

From the repository's root:

    python examples/gpt2.py --size toy --steps 50 --budget 60%
    jaxckpt plan examples.gpt2:loss --budget 4GB

The first trains the same model twice from the same parameters, batches and dropout keys, once as it is and once under
a plan, and prints both losses, both measured peaks and both step times. The second plans GPT-2 small at 8 x 1024 tokens
from shapes alone: no array is made, no step is run.

Here the plan is made first, so that it can be printed and compared. In a training script one line does it:

    loss = jaxckpt.auto_remat(make_loss(SIZES["small"]), budget="16GB")

The text is CPython's own: `pydoc_data.topics`, half a megabyte of its language reference, one token per byte.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import jaxckpt
from jaxckpt.units import show_bytes

# How far the two loss curves may be apart at most, relative to the loss. Both runs do the same arithmetic, but the
# compiler fuses what is recomputed in other groups, which rounds the last bit another way, and training carries it on.
# In 400 steps of the toy at three budgets the curves were at most 5e-7 apart in float32 and 4e-3 in bfloat16; changing
# the last bit of the float32 embedding moves the curve by 6e-7 too. Larger models and longer runs get some room.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A GPT-2 model's shape.

    Attributes:
        num_layers: transformer blocks.
        num_heads: attention heads.
        width: of the residual stream.
        num_tokens: context length.
        vocab: how many tokens there are; text is bytes, so 256 are used.
        batch: sequences in a step.
        num_chunks: how many parts of the batch go through the vocabulary one after the other. At 50,257 tokens the
            logits are by far the largest values, and one matmul makes them, which no plan divides.
        dropout: share of values dropped while training with a key.
        dtype: of the computation: "bfloat16", "float32" or "float64".
        param_dtype: of the parameters.
    """

    num_layers: int
    num_heads: int
    width: int
    num_tokens: int
    vocab: int
    batch: int = 8
    num_chunks: int = 1
    dropout: float = 0.1
    dtype: str = "float32"
    param_dtype: str = "float32"


SIZES = {
    "toy": Config(num_layers=2, num_heads=2, width=64, num_tokens=64, vocab=256),
    "mini": Config(num_layers=4, num_heads=4, width=128, num_tokens=128, vocab=256),
    "base": Config(num_layers=6, num_heads=6, width=384, num_tokens=512, vocab=256),
    # 124 million parameters.
    "small": Config(num_layers=12, num_heads=12, width=768, num_tokens=1024, vocab=50257, num_chunks=2),
}


def _normal(scale: float = 1.0) -> Callable:
    return nn.initializers.normal(0.02 * scale)


def _dtypes(config: Config) -> dict[str, Any]:
    return {"dtype": config.dtype, "param_dtype": config.param_dtype}


class Attention(nn.Module):
    """Causal self-attention, written out."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Mix `[batch, num_tokens, width]` along the tokens."""
        cfg = self.config
        batch, tokens, width = x.shape
        qkv = nn.Dense(3 * width, name="qkv", kernel_init=_normal(), **_dtypes(cfg))(x)
        q, k, v = jnp.split(qkv.reshape(batch, tokens, 3 * cfg.num_heads, width // cfg.num_heads), 3, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // cfg.num_heads) ** -0.5
        causal = jnp.arange(tokens)[:, None] >= jnp.arange(tokens)[None, :]
        # Softmax sums a thousand terms: in float32 at least.
        scores = jnp.where(causal[None, None], scores.astype(jnp.promote_types(cfg.dtype, jnp.float32)), -1e9)
        weights = jax.nn.softmax(scores, axis=-1).astype(cfg.dtype)
        weights = nn.Dropout(cfg.dropout)(weights, deterministic=not is_training)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width)
        init = _normal((2 * cfg.num_layers) ** -0.5)
        return nn.Dense(width, name="proj", kernel_init=init, **_dtypes(cfg))(mixed)


class Mlp(nn.Module):
    """Two layers with a gelu between."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform `[batch, num_tokens, width]` token by token."""
        cfg = self.config
        x = nn.Dense(4 * cfg.width, name="up", kernel_init=_normal(), **_dtypes(cfg))(x)
        init = _normal((2 * cfg.num_layers) ** -0.5)
        return nn.Dense(cfg.width, name="down", kernel_init=init, **_dtypes(cfg))(jax.nn.gelu(x))


class Layer(nn.Module):
    """A pre-norm transformer block."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Add attention and MLP to `[batch, num_tokens, width]`."""
        cfg = self.config
        drop = nn.Dropout(cfg.dropout, deterministic=not is_training)
        normed = nn.LayerNorm(name="ln_1", **_dtypes(cfg))(x)
        x = x + drop(Attention(cfg, name="attn")(normed, is_training))
        normed = nn.LayerNorm(name="ln_2", **_dtypes(cfg))(x)
        return x + drop(Mlp(cfg, name="mlp")(normed))


class GPT2(nn.Module):
    """Tokens to the mean cross entropy of the next ones, with learned positions and one table for both ends."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, next_tokens: jax.Array, is_training: bool) -> jax.Array:
        """Score int32 `[batch, num_tokens]` against the same shifted by one."""
        cfg = self.config
        embed = nn.Embed(cfg.vocab, cfg.width, name="wte", embedding_init=_normal(), **_dtypes(cfg))
        places = nn.Embed(cfg.num_tokens, cfg.width, name="wpe", embedding_init=_normal(), **_dtypes(cfg))
        x = embed(tokens) + places(jnp.arange(tokens.shape[1]))[None]
        x = nn.Dropout(cfg.dropout)(x, deterministic=not is_training)
        for i in range(cfg.num_layers):
            x = Layer(cfg, name=f"h{i}")(x, is_training)
        x = nn.LayerNorm(name="ln_f", **_dtypes(cfg))(x)
        parts = zip(jnp.split(x, cfg.num_chunks), jnp.split(next_tokens, cfg.num_chunks), strict=True)
        return jnp.stack([self._loss(embed.attend(part), labels) for part, labels in parts]).mean()

    def _loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.promote_types(self.config.dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_loss(config: Config) -> Callable[..., jax.Array]:
    """Return `loss(params, batch, key=None)`: mean cross entropy of the next token; dropout where a key is given.

    Args:
        config: the model's shape; `batch` is int32 `[config.batch, config.num_tokens + 1]`.
    """
    model = GPT2(config)

    def loss(params: Any, batch: jax.Array, key: jax.Array | None = None) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        value = model.apply({"params": params}, batch[:, :-1], batch[:, 1:], key is not None, rngs=rngs)
        assert isinstance(value, jax.Array)
        return value

    return loss


def init(config: Config, key: jax.Array) -> Any:
    """Make parameters."""
    tokens = jnp.zeros((config.num_chunks, config.num_tokens), jnp.int32)
    return GPT2(config).init(key, tokens, tokens, False)["params"]


def specs(config: Config, batch: int | None = None, *, dropout: bool = False) -> tuple[Any, ...]:
    """Shapes of `make_loss(config)`'s arguments, from no array at all.

    Args:
        config: the model's shape.
        batch: sequences; `config.batch` by default.
        dropout: with a key as the third argument.
    """
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(lambda key: init(config, key), key)
    tokens = jax.ShapeDtypeStruct((batch or config.batch, config.num_tokens + 1), jnp.int32)
    return (params, tokens, key) if dropout else (params, tokens)


def loss(params: Any, batch: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """GPT-2 small's loss, for `jaxckpt plan examples.gpt2:loss`."""
    return make_loss(SIZES["small"])(params, batch, key)


def example_args() -> tuple[Any, ...]:
    """GPT-2 small at 8 x 1024 tokens."""
    return specs(SIZES["small"])


def batches(config: Config, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield random windows of the text, int32 `[batch, num_tokens + 1]`, the same ones for the same seed."""
    from pydoc_data.topics import topics

    text = np.frombuffer("\n".join(topics.values()).encode(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - config.num_tokens - 1, config.batch)
        yield text[starts[:, None] + np.arange(config.num_tokens + 1)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What training with one loss function gave.

    Attributes:
        losses: `[num_steps]`.
        step_s: `[num_steps]`, wall time of each step.
        whole_step_bytes: device bytes of the compiled step, parameters and optimizer state among them.
    """

    losses: tuple[float, ...]
    step_s: tuple[float, ...]
    whole_step_bytes: int


def train(
    config: Config,
    losses: dict[str, Callable],
    num_steps: int,
    *,
    seed: int = 0,
    compiler_options: dict[str, Any] | None = None,
) -> dict[str, Run]:
    """Train one copy of the model per loss function on the same batches and keys, the copies' steps interleaved.

    Args:
        config: the model's shape.
        losses: functions `(params, batch, key)` by name.
        num_steps: steps of each.
        seed: of the parameters, the batches and the dropout.
        compiler_options: beyond those that recomputation needs.
    """
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, max(num_steps, 11)), weight_decay=0.1)
    params_key, dropout_key = jax.random.split(jax.random.key(seed))

    def step(fun: Callable, params: Any, state: Any, batch: jax.Array, key: jax.Array) -> Any:
        value, grads = jax.value_and_grad(fun)(params, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    options = jaxckpt.compiler_options() | (compiler_options or {})
    data = batches(config, seed)
    batch = next(data)
    params = jax.jit(init, static_argnums=0)(config, params_key)
    compiled, carried = {}, {}
    for name, fun in losses.items():
        copy = jax.tree.map(jnp.copy, params)
        carried[name] = (copy, optimizer.init(copy))
        jitted = jax.jit(lambda *args, fun=fun: step(fun, *args), donate_argnums=(0, 1))
        compiled[name] = jitted.lower(*carried[name], batch, dropout_key).compile(options)
    values: dict[str, list[float]] = {name: [] for name in losses}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for i in range(num_steps):
        key = jax.random.fold_in(dropout_key, i)
        # Each goes first every other time, so that a busy machine slows all of them alike.
        for name in list(losses)[:: 1 if i % 2 else -1]:
            started = time.perf_counter()
            *carried[name], value = jax.block_until_ready(compiled[name](*carried[name], batch, key))
            times[name].append(time.perf_counter() - started)
            values[name].append(float(value))
        batch = next(data)
    return {
        name: Run(losses=tuple(values[name]), step_s=tuple(times[name]), whole_step_bytes=_device_bytes(compiled[name]))
        for name in losses
    }


def _device_bytes(compiled: Any) -> int:
    stats = compiled.memory_analysis()
    outside = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return outside + stats.temp_size_in_bytes


def largest_difference(run: Run, other: Run) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(a) for a, b in zip(run.losses, other.losses, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Train with and without a plan and print the comparison."""
    args = _parser().parse_args(argv)
    changes = {k: v for k in ("batch", "vocab", "dropout", "dtype") if (v := getattr(args, k)) is not None}
    config = dataclasses.replace(SIZES[args.size], **changes)
    fun = make_loss(config)
    try:
        plan = jaxckpt.plan(fun, *specs(config, dropout=True), budget=args.budget, solver=args.solver)
    except jaxckpt.JaxckptError as error:
        print(error, file=sys.stderr)
        return 1
    print(plan, end="\n\n")
    runs = train(config, {"no plan": fun, "plan": plan.apply(fun)}, args.steps, seed=args.seed)
    plain, planned = runs["no plan"], runs["plan"]
    print(f"{'step':>6}{'loss, no plan':>16}{'loss, plan':>16}")
    for i in sorted({*range(0, args.steps, max(1, args.steps // 10)), args.steps - 1}):
        print(f"{i:>6}{plain.losses[i]:>16.6f}{planned.losses[i]:>16.6f}")
    difference, tolerance = largest_difference(plain, planned), TOLERANCE[config.dtype]
    print(f"largest relative difference {difference:.1e}, tolerance {tolerance:.0e} for {config.dtype}")
    for name, run, peak in (
        ("no plan", plain, plan.unplanned_peak_bytes),
        ("plan", planned, plan.measured_peak_bytes or plan.predicted_peak_bytes),
    ):
        print(f"{name}: value and gradient {show_bytes(peak)} measured, what the budget is for")
        print(f"    whole step {show_bytes(run.whole_step_bytes)} measured, optimizer state included")
        print(f"    median step {1e3 * statistics.median(run.step_s):.1f} ms of {args.steps}, interleaved")
    return 0 if difference <= tolerance else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train GPT-2 with and without a checkpoint plan.")
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--budget", default="60%", help='such as "4GB", "4GiB" or "60%%" of the unplanned peak')
    parser.add_argument("--solver", default="auto", help="auto, chain, chen or revolve")
    parser.add_argument("--batch", type=int, help="sequences in a step")
    parser.add_argument("--vocab", type=int, help="50257 for GPT-2's; text is bytes either way")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
