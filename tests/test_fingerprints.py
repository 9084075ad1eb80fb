"""Fingerprints are of what a program is: no terminal, printing option, address or hash seed changes them."""

import functools
import os
import pty
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import jaxckpt
from jaxckpt.api import auto_remat as decorator
from jaxckpt.program.trace import trace

SPEC = jax.ShapeDtypeStruct((8, 4), jnp.float32)

_PROGRAMS = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
if os.environ.get("OPTIONS"):
    np.set_printoptions(precision=1, threshold=2, sign="+", legacy="1.13")
    jax.config.update("jax_pprint_use_color", True)
    jax.config.update("jax_explain_cache_misses", False)
    jax.config.update("jax_traceback_filtering", "off")
from jaxckpt.program.trace import trace
table = np.linspace(0, 1, 4, dtype=np.float32)
custom = jax.custom_vjp(lambda x: x * 2)
custom.defvjp(lambda x: (x, None), lambda residual, g: (g * 2,))
policy = jax.checkpoint_policies.save_only_these_names("a", "b", "c", "d")
def body(c, w):
    return jnp.tanh(c @ w) + 0.123456789, None
def dropped(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)
def called(x):
    jax.debug.print("{x}", x=x[0])
    jax.debug.callback(lambda v: None, x)
    return jax.pure_callback(lambda v: v, x, x)
x, w = jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
P = jax.sharding.PartitionSpec
programs = [
    (lambda x, w: jax.lax.scan(body, x, w)[0], x, w),
    (lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, lambda x: x * 1e-9, x), x),
    (lambda x: jax.lax.scan(lambda c, i: (c * table[:4] * i, None), x, jnp.arange(3))[0], x),
    (lambda x: jax.nn.gelu(jax.nn.relu(custom(x))), x),
    (jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)), policy=policy), x),
    (dropped, jax.eval_shape(jax.random.key, 0), x),
    (called, x),
    (jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=P("d"), out_specs=P()), x),
    (lambda x: jnp.sort(x)[jnp.array([1, 2])].at[0].set(1.0) ** 2.5, x),
]
found = [trace(fun, args).program.fingerprint() for fun, *args in programs]
open(sys.argv[1], "w").write("\\n".join(found))
"""


def fingerprints(path: Path, *, is_terminal: bool = False, **environment: str) -> list[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", _PROGRAMS, str(path)]
    parent, child = pty.openpty() if is_terminal else (None, subprocess.PIPE)
    done = subprocess.run(command, env=env, stdin=None, stdout=child, stderr=child, timeout=120, check=False)
    if parent is not None:
        os.close(parent)
        os.close(child)
    assert done.returncode == 0, (done.stderr or b"").decode()
    return path.read_text().split()


def test_neither_terminals_nor_options_nor_seeds_change_a_fingerprint(tmp_path):
    here = fingerprints(tmp_path / "pipe", PYTHONHASHSEED="1")
    assert len(set(here)) == len(here) == 9
    colours = {"TERM": "xterm-256color", "FORCE_COLOR": "1", "COLORTERM": "truecolor", "COLUMNS": "20"}
    assert fingerprints(tmp_path / "terminal", is_terminal=True, PYTHONHASHSEED="2", **colours) == here
    assert fingerprints(tmp_path / "options", OPTIONS="1", PYTHONHASHSEED="3", NO_COLOR="1") == here


def test_a_notebook_kernel_changes_no_fingerprint(tmp_path):
    client = pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    here = fingerprints(tmp_path / "pipe", PYTHONHASHSEED="1")
    manager = client.KernelManager()
    manager.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(tmp_path)}
    manager.start_kernel(env={**os.environ, **environment})
    try:
        kernel = manager.client()
        kernel.start_channels()
        kernel.wait_for_ready(timeout=120)
        # In cells, as in a notebook.
        first, last = _PROGRAMS.split("found = ")
        for cell in ("import sys; sys.argv[1:] = [" + repr(str(tmp_path / "kernel")) + "]", first, "found = " + last):
            reply = kernel.execute_interactive(cell, timeout=120, output_hook=lambda message: None)
            assert reply["content"]["status"] == "ok", reply["content"]
        kernel.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)
    assert (tmp_path / "kernel").read_text().split() == here


def fingerprint(fun, *args):
    return trace(fun, args or (SPEC,)).program.fingerprint()


@settings(max_examples=60, deadline=None)
@given(st.floats(width=32), st.floats(width=32), st.booleans())
def test_literals_are_told_apart_by_their_bits(a, b, is_in_a_loop):
    def fun(value):
        if is_in_a_loop:
            return lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x * np.float32(value), x)
        return lambda x: x * np.float32(value)

    same = np.float32(a).tobytes() == np.float32(b).tobytes() or (np.isnan(a) and np.isnan(b))
    assert (fingerprint(fun(a)) == fingerprint(fun(b))) == same


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from("abcd"), min_size=1), st.sets(st.sampled_from("abcd"), min_size=1))
def test_policies_are_told_apart_by_the_names_they_save(names, others):
    def fun(names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return jax.checkpoint(lambda x: jnp.sin(checkpoint_name(jnp.sin(x), "a")), policy=policy)

    assert (fingerprint(fun(names)) == fingerprint(fun(others))) == (names == others)


def test_a_callback_counts_by_its_code_and_not_by_what_it_remembers():
    seen = []

    def log(v):
        seen.append(v)

    def fun(callback):
        def called(x):
            jax.debug.callback(callback, x)
            return jnp.sin(x)

        return called

    first = fingerprint(fun(log))
    seen.append(1)
    assert fingerprint(fun(log)) == first != fingerprint(fun(lambda v: print(v)))
    assert not trace(fun(log), (SPEC,)).program.description.is_exact


def test_functions_that_call_themselves_are_described():
    def halve(v):
        return v if v.size < 2 else halve(v[: v.size // 2])

    double = jax.custom_vjp(lambda x: x)
    double.defvjp(lambda x: (x, None), lambda residual, g: (halve(g),))
    assert fingerprint(double) == fingerprint(double)


def test_derivatives_do_not_decide_what_a_forward_pass_is():
    assert trace(lambda x: jax.nn.relu(jax.nn.silu(x)), (SPEC,)).program.description.is_exact
    assert trace(functools.partial(jax.lax.map, jnp.sin), (SPEC,)).program.description.is_exact


def test_a_mesh_counts_by_its_axes():
    def fun(name):
        mesh = jax.make_mesh((1,), (name,), axis_types=(jax.sharding.AxisType.Auto,))
        spec = PartitionSpec(name)
        return lambda x: jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))

    assert fingerprint(fun("a")) == fingerprint(fun("a")) != fingerprint(fun("b"))
    assert not trace(fun("a"), (SPEC,)).program.description.is_exact


class Opaque:
    """A parameter that nobody can describe."""

    def __init__(self, factor):
        self.factor = factor


primitive = jax.extend.core.Primitive("opaque")
primitive.def_impl(lambda x, *, held: x * held.factor)
primitive.def_abstract_eval(lambda x, *, held: x)
jax.interpreters.mlir.register_lowering(
    primitive, jax.interpreters.mlir.lower_fun(lambda x, *, held: x * held.factor, multiple_results=False)
)
jax.interpreters.ad.primitive_jvps[primitive] = lambda primals, tangents, *, held: (
    primitive.bind(*primals, held=held),
    primitive.bind(*tangents, held=held),
)
jax.interpreters.ad.primitive_transposes[primitive] = lambda g, x, *, held: (primitive.bind(g, held=held),)


def test_what_cannot_be_described_shares_no_plan(tmp_path, monkeypatch):
    planned, make = [], decorator.plan_program
    monkeypatch.setattr(decorator, "plan_program", lambda *args: planned.append(1) or make(*args))

    def loss(factor):
        held = Opaque(factor)
        return lambda x: jnp.sum(jnp.tanh(primitive.bind(x, held=held)) ** 2)

    x = np.ones((8, 4), np.float32)
    for factor in (2.0, 3.0):
        fun = jaxckpt.auto_remat(loss(factor), budget="1GB", verify=False, cache_dir=tmp_path)
        for _ in range(2):
            assert float(fun(x)) == pytest.approx(float(loss(factor)(x)))
            np.testing.assert_allclose(jax.grad(fun)(x), jax.grad(loss(factor))(x), 1e-5)
    assert len(planned) == 2 and not list(tmp_path.glob("*.json"))
    assert fingerprint(loss(2.0)) == fingerprint(loss(3.0))
