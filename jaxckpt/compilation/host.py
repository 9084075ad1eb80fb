"""What a traced program keeps in the host's memory.

Compilers for chips with memory of their own say it themselves. That for CPU has but one memory and leaves no trace of
the host in its programs, so there it is counted in the program that JAX traced.
"""

from typing import Any

import jax.extend.core as jex

from jaxckpt.program.ir import is_on_host, size_bytes


def host_bytes(closed: Any) -> int:
    """Bytes that a program makes in the host's memory: what waits there for a backward, each value once.

    Args:
        closed: the program, a closed jaxpr.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> send = lambda x: jax.device_put(2 * x, jax.memory.Space.Host)
        >>> host_bytes(jax.make_jaxpr(send)(jnp.ones(8, jnp.float32)))
        32
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    return _inside(jaxpr) + sum(size_bytes(aval) for aval in _made_results(jaxpr))


def _made_results(jaxpr: Any) -> list[Any]:
    """Shapes of the results that the program makes on the host."""
    given = {*map(id, jaxpr.invars), *map(id, jaxpr.constvars)}
    results = {id(v): v.aval for v in jaxpr.outvars if hasattr(v, "aval") and id(v) not in given}
    return [aval for aval in results.values() if is_on_host(aval)]


def _inside(jaxpr: Any) -> int:
    """Bytes that it makes on the host and that are none of its results; a loop's stacks are results of the loop."""
    results = set(map(id, jaxpr.outvars))
    total = 0
    for eqn in jaxpr.eqns:
        total += sum(size_bytes(v.aval) for v in eqn.outvars if id(v) not in results and is_on_host(v.aval))
        # Of branches one runs; what an iteration makes for itself is gone when the next one runs.
        total += max(map(_inside, jex.jaxprs_in_params(eqn.params)), default=0)
    return total
