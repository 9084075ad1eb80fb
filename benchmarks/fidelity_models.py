"""The models whose predictions are held against the compiler, by name: shapes that compile within seconds."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "solvers"), str(_ROOT / "tests")]

import jax
import jax.numpy as jnp
from jax import lax
from zoo import models
from zoo.catalogue import CATALOGUE, DEEP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is planned.

    Attributes:
        fun: the loss; its first argument is differentiated.
        specs: shapes of its arguments.
        has_aux: as in `jax.grad`.
    """

    fun: Callable
    specs: tuple
    has_aux: bool = False


def load(name: str) -> Model:
    """A model by its name; ImportError where its framework is not installed."""
    return MODELS[name]()


def _zoo(name: str, size: str | None = None) -> Callable[[], Model]:
    def make() -> Model:
        case = (CATALOGUE | DEEP)[name].case(size)
        return Model(fun=case.fun, specs=case.specs)

    return make


def _small(name: str, make: Callable[..., tuple], **sizes: int) -> Callable[[], Model]:
    model = models.MODELS[name]
    return lambda: Model(fun=model.fun, specs=jax.eval_shape(lambda: make("float32", **sizes)), has_aux=model.has_aux)


def _spec(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


_IMAGES, _LABELS = _spec(2048, 64), _spec(2048, dtype="int32")


def _gpt2_text() -> Model:
    gpt2 = importlib.import_module("examples.gpt2")
    config = gpt2.SIZES["mini"]
    return Model(fun=gpt2.make_loss(config), specs=gpt2.specs(config, 32, dropout=True))


def _revolve() -> Model:
    example = importlib.import_module("examples.mlp_revolve")
    return Model(fun=example.loss, specs=example.specs(32))


def _linen() -> Model:
    example = importlib.import_module("examples.flax_linen")
    variables = jax.eval_shape(lambda: example.Net().init(jax.random.key(0), jnp.zeros((1, 64)), False))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Model(
        fun=example.loss,
        specs=(variables["params"], variables["batch_stats"], _IMAGES, _LABELS, key),
        has_aux=True,
    )


def _equinox() -> Model:
    example, eqx = importlib.import_module("examples.equinox_vmap"), importlib.import_module("equinox")
    made = eqx.filter_eval_shape(example.Net, jax.random.key(0))
    arrays, static = eqx.partition(made, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return Model(fun=lambda a, *batch: example.loss(eqx.combine(a, static), *batch), specs=(arrays, _IMAGES, _LABELS))


def _haiku() -> Model:
    example = importlib.import_module("examples.haiku_pure")
    trainer, key = example.Trainer(lambda fun: fun), jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: trainer.net.init(key, jnp.zeros((1, 64))), key)
    return Model(fun=trainer.plain_loss, specs=(params, key, _IMAGES, _LABELS))


def _branches() -> Model:
    """Layers scanned in one of two branches, after which come layers as they are."""

    def scanned(w: Any, x: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w) + x, None), x, w)[0]

    def loss(w: Any, x: Any, flag: Any) -> Any:
        x = lax.cond(flag, scanned, lambda w, x: jnp.sin(x @ w[0]), w, x)
        for i in range(8):
            x = jnp.tanh(x @ w[i])
        return jnp.sum(x**2)

    return Model(fun=loss, specs=(_spec(16, 128, 128), _spec(8192, 128), _spec(dtype="bool")))


def _nested_loops() -> Model:
    """A scan of scans, as of layers in groups."""

    def inner(x: Any, w: Any) -> Any:
        return x + jnp.tanh(x @ w), None

    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(lax.scan(lambda x, w: (lax.scan(inner, x, w)[0], None), x, w)[0] ** 2)

    return Model(fun=loss, specs=(_spec(8, 8, 128, 128), _spec(4096, 128)))


def _physics() -> Model:
    """A network that is differentiated twice in its input inside the loss."""

    def net(w: Any, x: Any) -> Any:
        for layer in w[:-1]:
            x = jnp.tanh(layer @ x)
        return jnp.sum(w[-1] @ x)

    def loss(w: Any, points: Any) -> Any:
        def residual(x: Any) -> Any:
            return jnp.trace(jax.hessian(lambda x: net(w, x))(x)) - jnp.sum(x)

        return jnp.mean(jax.vmap(residual)(points) ** 2)

    return Model(fun=loss, specs=([_spec(64, 2), *[_spec(64, 64)] * 5, _spec(1, 64)], _spec(1024, 2)))


def _graph() -> Model:
    """Messages along edges, summed at nodes."""

    def loss(w: Any, nodes: Any, senders: Any, receivers: Any) -> Any:
        for up, down in w:
            messages = jax.nn.gelu(jnp.concatenate([nodes[senders], nodes[receivers]], -1) @ up)
            nodes = nodes + jax.ops.segment_sum(messages, receivers, nodes.shape[0]) @ down
        return jnp.mean(nodes**2)

    edges = _spec(8192, dtype="int32")
    return Model(fun=loss, specs=([(_spec(128, 128), _spec(128, 64))] * 6, _spec(1024, 64), edges, edges))


MODELS: dict[str, Callable[[], Model]] = {
    **{name: _zoo(name) for name in ("gpt2-scan", "llama-scan", "unet", "lstm", "ode", "tanh-64", "llama-64-scan")},
    **{name: _zoo(name) for name in ("gpt2", "llama", "vit", "resnet50", "seq2seq", "moe", "diffusion")},
    "chain": _small("chain", models.chain_args, layers=32, rows=8192, width=64),
    "residual": _small("residual", models.residual_args, layers=16, rows=4096, width=64),
    "skips": _small("unet", models.unet_args, levels=8, rows=8192, width=64),
    "convolutions": _small("conv", models.conv_args, layers=12, batch=16, size=32, channels=16),
    "dropout": _small("dropout", models.dropout_args, layers=12, rows=4096, width=64),
    "gpt2-text": _gpt2_text,
    "revolve": _revolve,
    "linen": _linen,
    "equinox": _equinox,
    "haiku": _haiku,
    "branches": _branches,
    "nested-loops": _nested_loops,
    "physics": _physics,
    "graph": _graph,
}
