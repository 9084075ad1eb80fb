"""Random numbers that a block draws: the keys that they are drawn with, and keys that wait.

Random numbers depend on keys and shapes alone, so a compiler may draw those of the whole program before anything else,
and hold them until they are read. A key that depends on what was computed before makes it wait.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.program import primitives
from jaxckpt.program.ir import Equation

# A key is no larger; what else leads to a draw, such as the parameters of a distribution, is no key.
_MAX_KEY_SIZE = 16


def read_by_draws(equations: Sequence[Equation]) -> set[int]:
    """The values that random numbers depend on which these equations draw."""
    needed: set[int] = set()
    for eqn in reversed(equations):
        if eqn.primitive in primitives.DRAWS or not needed.isdisjoint(eqn.outputs):
            needed.update(eqn.reads)
    return needed


def waiting_keys(env: Mapping[int, Any], needed: set[int], inputs: Sequence[int], before: Sequence[int]) -> dict:
    """Keys that a block draws random numbers with, made to depend on what was computed before it.

    Args:
        env: the program's values, by number.
        needed: what the draws depend on.
        inputs: what the block reads.
        before: of these what was computed, in order.

    Returns:
        The same keys, by number; none where there is no key or nothing to wait for.
    """
    keys = [v for v in inputs if v in needed and _is_key(env[v])]
    done = [v for v in before if v not in needed and jnp.issubdtype(env[v].dtype, jnp.floating) and env[v].size]
    if not keys or not done:
        return {}
    last = env[done[-1]]
    first = lax.slice(last, (0,) * last.ndim, (1,) * last.ndim).reshape(())
    return {v: _waiting(env[v], lax.stop_gradient(first)) for v in keys}


def _is_key(value: Any) -> bool:
    dtype = value.dtype
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) or (
        jnp.issubdtype(dtype, jnp.unsignedinteger) and value.size <= _MAX_KEY_SIZE
    )


def _waiting(key: Any, number: Any) -> Any:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return _with_dependence(key, number)
    return jax.random.wrap_key_data(_with_dependence(jax.random.key_data(key), number), impl=jax.random.key_impl(key))


@jax.custom_batching.custom_vmap
def _with_dependence(words: jax.Array, number: jax.Array) -> jax.Array:
    """The same words, which depend on a number: none is more than infinity, and XLA does not know that.

    An `optimization_barrier` would say it, but XLA for CPU removes those before it puts the program in order.
    """
    return words ^ (number.astype(jnp.float32) > jnp.inf).astype(words.dtype)


@_with_dependence.def_vmap
def _batched(axis_size: int, is_batched: list[bool], words: jax.Array, number: jax.Array) -> tuple[jax.Array, bool]:
    # One key of all examples stays one: random numbers are drawn as without the dependence.
    del axis_size
    return _with_dependence(words, number[0] if is_batched[1] else number), is_batched[0]
