"""Bytes on the host: read of the compiler where it tells them, counted in the traced program where not."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxckpt.compilation.measure import compiled_bytes
from jaxckpt.targets.chip import find_target

LENGTH, ROWS, WIDTH = 8, 256, 64
SENT = LENGTH * ROWS * WIDTH * 4


def offloaded(layer):
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["x"], offload_src="device", offload_dst="pinned_host"
    )
    named = lambda x, w: layer(checkpoint_name(x, "x"), w)  # noqa: E731
    return jax.checkpoint(named, policy=policy, prevent_cse=False)


def loss(weights, x, wrap):
    layer = wrap(lambda x, w: jnp.tanh(x @ w))
    return jnp.sum(lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0] ** 2)


def specs():
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((LENGTH, WIDTH, WIDTH), (ROWS, WIDTH))]


def test_host_bytes_are_counted_where_the_compiler_does_not():
    kept = lambda layer: jax.checkpoint(layer, prevent_cse=False)  # noqa: E731
    there, sent = (
        compiled_bytes(jax.value_and_grad(functools.partial(loss, wrap=wrap)), specs(), None)
        for wrap in (kept, offloaded)
    )
    assert (there.host_bytes, there.is_host_predicted) == (0, False)
    assert (sent.host_bytes, sent.is_host_predicted) == (SENT, True)
    assert sent.device_bytes == there.device_bytes - SENT and sent.temp_bytes == there.temp_bytes - SENT
    assert "on the host (predicted)" in str(sent) and "host" not in str(there)


def test_what_a_tpu_sends_is_in_tiles_on_the_host_too():
    compiler = find_target("v5e").compiler
    sizes = [compiler.sent_bytes(jax.core.ShapedArray(s, jnp.float32)) for s in ((64, 196, 384), (8192, 512), (5,))]
    # 196 rows of tokens are 200 there: as the compiler for a v5e counts the carries of a vision transformer.
    assert sizes == [64 * 200 * 384 * 4, 8192 * 512 * 4, 20]


@pytest.mark.parametrize("total", [None, 144 * 2**20])
def test_the_peak_of_a_tpu_is_without_what_is_on_the_host(total):
    sizes = {"argument": 72, "output": 72, "alias": 0, "temp": 16, "host_temp": 256, "host_argument": 8}
    stats = SimpleNamespace(
        peak_memory_in_bytes=(144 + 17 + 264) * 2**20,
        **{f"{name}_size_in_bytes": size * 2**20 for name, size in sizes.items()},
        **({} if total is None else {"total_allocation_bytes": total}),
    )
    compiler = find_target("v5e").compiler
    assert compiler.host_bytes(stats) == 264 * 2**20
    assert compiler.device_bytes(stats) == (total or 161 * 2**20)
