"""The flat program: what is traced, what it keeps of the user's code, and that its fingerprint means what it says."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, jit
from zoo.models import MODELS

from jaxckpt.program.interpret import run
from jaxckpt.program.ir import size_bytes
from jaxckpt.program.trace import trace

SPEC = jax.ShapeDtypeStruct((3, 4), jnp.float32)


@pytest.mark.parametrize("name", MODELS)
def test_running_a_program_is_running_its_function(name):
    model = MODELS[name]
    args = model.args()

    def flat(*args):
        traced = trace(model.fun, args)
        return jax.tree.unflatten(traced.out_tree, run(traced.program, *traced.consts, *jax.tree.leaves(args)))

    assert_close(jit(flat)(*args), jit(model.fun)(*args), 1e-6)


def test_leaves_that_are_no_arrays_are_static():
    def fun(layer, x, *, scale, name):
        assert name == "head" and layer["use_bias"] is True
        return layer["activation"](x @ layer["w"]) * scale

    layer = {"activation": jnp.tanh, "w": jnp.ones((4, 2)), "use_bias": True}
    traced = trace(fun, (layer, SPEC), {"scale": np.float32(2), "name": "head"})
    assert traced.arg_names == ("args[0]['w']", "args[1]", "scale")
    assert len(traced.program.inputs) == 3


def test_a_flag_may_decide_what_a_function_does():
    traced = trace(lambda x, train: jnp.tanh(x) if train else x, (SPEC, True))
    assert [e.primitive.name for e in traced.program.equations] == ["tanh"]


def test_closed_over_arrays_and_tracers_are_inputs():
    table = jnp.arange(12.0).reshape(3, 4)
    seen = []

    def outer(scale):
        traced = trace(lambda x: x * table * scale, (SPEC,))
        seen.append(traced)
        return run(traced.program, *traced.consts, jnp.ones((3, 4)))[0]

    assert_close(jax.jit(outer)(2.0), 2 * table, 1e-6)
    (traced,) = seen
    assert any(isinstance(c, jax.core.Tracer) for c in traced.consts)
    assert len(traced.program.inputs) == len(traced.consts) + 1


def test_nested_jits_are_inlined_and_keep_scopes_and_lines():
    @jax.jit
    def inner(x):
        with jax.named_scope("inner"):
            return jnp.tanh(x)  # the line

    def fun(x):
        with jax.named_scope("outer"):
            return jax.jit(inner)(x) + jax.nn.relu(x)

    program = trace(fun, (SPEC,)).program
    assert not {"jit", "pjit"} & {e.primitive.name for e in program.equations}
    (tanh,) = [e for e in program.equations if e.primitive.name == "tanh"]
    assert tanh.scope.startswith("outer") and tanh.scope.endswith("inner")
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# the line" in text)
    assert tanh.source.startswith(f"tests/test_trace.py:{line}") and "inner" in tanh.source


def test_scopes_and_lines_survive_in_what_a_program_runs():
    def fun(x):
        with jax.named_scope("attention"):
            return jnp.tanh(x)

    program = trace(fun, (SPEC,)).program
    again = trace(partial(run, program), (SPEC,)).program
    (tanh,) = again.equations
    assert "attention" in tanh.scope
    assert tanh.source == program.equations[0].source


def test_what_no_output_needs_is_left_out():
    def fun(x):
        jnp.exp(x)
        return jnp.tanh(x)

    assert [e.primitive.name for e in trace(fun, (SPEC,)).program.equations] == ["tanh"]


def test_an_error_of_the_function_is_raised_as_it_is():
    class OwnError(Exception):
        pass

    def fun(x):
        raise OwnError("mine")

    with pytest.raises(OwnError, match=r"^mine") as caught:
        trace(fun, (SPEC,))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", MODELS)
def test_two_traces_have_one_fingerprint(name):
    model = MODELS[name]
    first, second = (trace(model.fun, model.specs()).program for _ in range(2))
    assert first.fingerprint() == second.fingerprint()


def _loss(x, table, power=2.0):
    return jnp.sum(jax.nn.gelu(x @ table) ** power)


def _variants():
    x, table = np.ones((3, 4), np.float32), np.arange(20, dtype=np.float32).reshape(4, 5)
    yield "shape", partial(_loss, table=table), (np.ones((6, 4), np.float32),)
    yield "dtype", partial(_loss, table=table.astype(np.float16)), (x.astype(np.float16),)
    yield "literal", partial(_loss, table=table, power=3.0), (x,)
    yield "weak type", lambda x, y: x * y, (x, 2.0)
    yield "strong type", lambda x, y: x * y, (x, np.float32(2))
    loop = lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0]  # noqa: E731
    yield "body of a scan", partial(loop, jnp.sin), (x,)
    yield "another body", partial(loop, jnp.cos), (x,)
    yield "result left out", lambda x: (jnp.sin(x), x)[:1], (x,)
    yield "result not left out", lambda x: (jnp.sin(x), x), (x,)


def test_a_fingerprint_tells_programs_apart():
    x, table = np.ones((3, 4), np.float32), np.arange(20, dtype=np.float32).reshape(4, 5)
    prints = {"base": trace(partial(_loss, table=table), (x,)).program.fingerprint()}
    prints |= {name: trace(fun, args).program.fingerprint() for name, fun, args in _variants()}
    assert len(set(prints.values())) == len(prints), prints


def test_a_constant_inside_a_loop_is_part_of_the_fingerprint():
    def fun(step):
        table = np.arange(4, dtype=np.float32) * np.float32(step)
        return lambda x: jax.lax.scan(lambda c, _: (c * table[None], None), x, None, length=3)[0]

    one, two = (trace(fun(step), (SPEC,)) for step in (1, 2))
    # A constant is either an input, whose value is no part of a plan, or in the text.
    assert one.consts or one.program.fingerprint() != two.program.fingerprint()


_IN_A_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import jax
from zoo.models import MODELS
from jaxckpt.program.trace import trace
custom = jax.custom_jvp(lambda x: x)
custom.defjvp(lambda p, t: (p[0], t[0]))
for model in MODELS.values():
    print(trace(lambda *args: jax.tree.map(custom, model.fun(*args)), model.specs()).program.fingerprint())
"""


def run_python(code: str, seed: int, **environment: str) -> str:
    """Run code in a process of its own under a hash seed."""
    env = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fingerprint_is_the_same_in_every_process():
    code = _IN_A_PROCESS.format(tests=str(Path(__file__).parent))
    assert run_python(code, 1) == run_python(code, 2)


def test_sizes_are_python_integers_of_any_size():
    aval = jax.ShapeDtypeStruct((2**20, 2**20, 4), jnp.bfloat16)
    assert size_bytes(aval) == 2**43
    assert size_bytes(jax.eval_shape(jax.random.key, 0)) == 8
