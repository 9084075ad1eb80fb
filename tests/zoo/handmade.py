"""What an expert writes by hand: the recomputation policies that plans are compared with.

A model is a function of `How` its layers run, and the same model with another `How` is a hand-written policy: one
`jax.checkpoint` per layer with one of JAX's policies or with names as MaxText's, groups of layers (square root), the
body of a scan, a scan of checkpointed scans.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax

Wrap = Callable[[Callable], Callable]
_POLICIES = jax.checkpoint_policies


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model at one size, with its policies.

    Attributes:
        fun: the loss, as it is without any checkpoint; its first argument is differentiated.
        specs: shapes of its arguments.
        policies: the same loss under each hand-written policy.
        vocab: integer arguments are drawn below this.
    """

    fun: Callable
    specs: tuple
    policies: dict[str, Callable]
    vocab: int = 2


def _as_it_is(layer: Callable) -> Callable:
    return layer


@dataclass(frozen=True, kw_only=True)
class How:
    """How a model runs its layers.

    Attributes:
        wrap: put around each layer, or around the body of the scan over them.
        group: layers in an outer checkpoint; 0 is none.
    """

    wrap: Wrap = _as_it_is
    group: int = 0


PLAIN = How()


def policies(
    make: Callable[[How], Callable], num_layers: int, names: dict[str, tuple[str, ...]], *, scanned: bool = False
) -> dict[str, Callable]:
    """Every hand-written policy of a model.

    Args:
        make: builds the loss for a `How`.
        num_layers: how many layers or iterations there are.
        names: sets of `checkpoint_name`s worth saving in each layer, by what to call them.
        scanned: whether the layers are the iterations of a scan, where CSE cannot merge recomputation back.
    """
    checkpoint = partial(jax.checkpoint, prevent_cse=not scanned)
    layer = "body" if scanned else "layer"
    made = {"full": jax.checkpoint(make(PLAIN))}
    for suffix, policy in (
        ("", None),
        ("+dots", _POLICIES.dots_saveable),
        ("+dots_no_batch", _POLICIES.dots_with_no_batch_dims_saveable),
        *((f"+{what}", _POLICIES.save_only_these_names(*which)) for what, which in names.items()),
    ):
        made[layer + suffix] = make(How(wrap=partial(checkpoint, policy=policy)))
    if num_layers > 1:
        made["sqrt"] = make(How(wrap=checkpoint, group=round_divisor(num_layers)))
    return made


def round_divisor(n: int) -> int:
    """The divisor of `n` nearest its square root."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(math.log(d / math.sqrt(n))))


def run_layers(layer: Callable[[Any, Any], Any], params: Sequence[Any], x: Any, how: How) -> Any:
    """Apply `x = layer(p, x)` for each layer's parameters, unrolled."""
    wrapped = how.wrap(layer)

    def run(some: Sequence[Any], x: Any) -> Any:
        for p in some:
            x = wrapped(p, x)
        return x

    if not how.group:
        return run(params, x)
    for start in range(0, len(params), how.group):
        x = jax.checkpoint(run)(params[start : start + how.group], x)
    return x


def scan_layers(layer: Callable[[Any, Any], Any], params: Any, x: Any, how: How) -> Any:
    """Apply `x = layer(p, x)` for parameters (or inputs) stacked along their first axis, by `lax.scan`."""
    wrapped = how.wrap(layer)

    def run(x: Any, some: Any) -> tuple[Any, None]:
        return lax.scan(lambda x, p: (wrapped(p, x), None), x, some)

    if not how.group:
        return run(x, params)[0]
    nested = jax.tree.map(lambda p: p.reshape(-1, how.group, *p.shape[1:]), params)
    return lax.scan(jax.checkpoint(run, prevent_cse=False), x, nested)[0]


def stacked(num_layers: int, layer: Any) -> Any:
    """Specs of `num_layers` layers' parameters along a new first axis."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((num_layers, *s.shape), s.dtype), layer)


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    """A spec."""
    return jax.ShapeDtypeStruct(shape, dtype)


def arrays(specs: Any, vocab: int, seed: int = 0) -> Any:
    """Arrays of these shapes: small normal numbers, and integers below `vocab`."""
    random = np.random.default_rng(seed)

    def make(spec: Any) -> np.ndarray:
        if np.issubdtype(spec.dtype, np.integer):
            return random.integers(0, vocab, spec.shape, spec.dtype)
        fan_in = math.prod(spec.shape[-4:-1]) if len(spec.shape) > 1 else 1
        return random.standard_normal(spec.shape, np.float32).astype(spec.dtype) / fan_in**0.5

    return jax.tree.map(make, specs)


def decoder_case(config: Any, make_loss: Callable, specs: Callable, names: Any, *, is_cut: bool) -> Case:
    """A decoder of equal layers, scanned or not as its sizes say, or cut to one layer of it."""
    config = replace(config, num_layers=1) if is_cut else config
    return Case(
        fun=make_loss(config),
        specs=specs(config),
        policies=policies(lambda how: make_loss(config, how), config.num_layers, names, scanned=config.scanned),
        vocab=config.vocab,
    )
