"""Constructs of programs from elsewhere: values and gradients are those of the undecorated function."""

import os
import pickle
import subprocess
import sys
import warnings

import cloudpickle
import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg as sparse
import numpy as np
import pytest
from helpers import assert_close, count, slow_but, x64
from jax import export, lax
from jax.experimental import checkify
from jax.extend.core import Primitive

import jaxckpt
from jaxckpt import JaxckptWarning, OptionError, auto_remat, plan
from jaxckpt.program.trace import trace


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JaxckptWarning)
        yield


def decorated(fun, budget="80%", **options):
    return auto_remat(fun, budget=budget, verify=False, **options)


def chain(w, x, n=6):
    for _ in range(n):
        x = jnp.tanh(x @ w)
    return x


def loss(w, x):
    return jnp.sum(chain(w, x) ** 2)


W = 0.3 * jax.random.normal(jax.random.key(0), (16, 16))
X = jax.random.normal(jax.random.key(1), (256, 16))


def check(fun, *args, change=jax.grad, budget="80%", tolerance=1e-4, is_planned=True):
    """The decorated function under a transformation gives what the plain one gives, and recomputes."""
    ours = change(decorated(fun, budget))
    assert_close(ours(*args), change(fun)(*args), tolerance)
    assert not is_planned or count(ours, *args)["checkpoint"]


CONSTANTS = {
    "jnp": lambda: jnp.float32(0.1),
    "zeros": lambda: jnp.zeros(()),
    "numpy": lambda: np.float32(0.1),
    "integer": lambda: jnp.int32(3),
    "array": lambda: np.arange(3.0, dtype=np.float32),
    "inner jit": lambda: jax.jit(lambda: (jnp.float32(2), np.ones(2, np.float32)))(),
    "nothing": lambda: None,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_among_results(name):
    def with_constant(w, x):
        return loss(w, x), {"constant": CONSTANTS[name](), "again": x[0]}

    for change in (lambda f: jax.grad(f, has_aux=True), lambda f: jax.jit(jax.grad(f, has_aux=True))):
        check(with_constant, W, X, change=change)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("length", slow_but([0, 1, 2, 3, 5], 0, 1, 3))
def test_loops_of_every_length(length, verify):
    def looped(w, x):
        step = lambda c, _: (jnp.tanh(c @ w), jnp.sum(c))  # noqa: E731
        x, sums = lax.scan(step, chain(w, x), None, length=length)
        x = lax.fori_loop(0, length, lambda i, c: jnp.sin(c) * c, x)
        rows = lax.map(lambda r: jnp.sin(r) * r.sum(), x[:length])
        return jnp.sum(x**2) + jnp.sum(sums) + jnp.sum(rows)

    ours = auto_remat(looped, budget="95%", verify=verify)
    assert_close(jax.grad(ours)(W, X), jax.grad(looped)(W, X), 1e-4)


def test_static_arguments_by_name_or_by_place():
    def repeated(w, x, n, *, scale=1):
        return scale * jnp.sum(chain(w, x, n) ** 2)

    wanted = jax.grad(repeated)(W, X, 6)
    for options in ({"static_argnames": "n"}, {"static_argnums": 2}, {"static_argnums": -1}):
        ours = jax.grad(decorated(repeated, **options))
        assert_close(ours(W, X, 6), wanted, 1e-5)
        assert_close(ours(W, X, n=6), wanted, 1e-5)
    both = decorated(repeated, static_argnames=("scale", "n"))
    assert_close(jax.grad(both)(W, X, 6, scale=2), 2 * wanted, 1e-5)
    for wrong in ({"static_argnames": "m"}, {"static_argnums": 7}):
        with pytest.raises(OptionError, match="is no argument"):
            decorated(repeated, **wrong)


def test_without_jit_it_runs_operation_by_operation():
    with jax.disable_jit():
        seen = []

        def watched(w, x):
            seen.append(isinstance(jax.lax.stop_gradient(x), jax.Array))
            return loss(w, x)

        assert_close(jax.grad(decorated(watched))(W, X), jax.grad(loss)(W, X), 1e-5)
        assert_close(jax.jit(jax.value_and_grad(decorated(loss)))(W, X), jax.value_and_grad(loss)(W, X), 1e-5)
    assert seen == [True]


@pytest.mark.parametrize("change", [lambda f: f, jax.grad, lambda f: jax.jit(jax.value_and_grad(f))])
def test_an_operation_that_makes_a_nan_is_named(change):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"\(nan\) encountered in log"):
        change(decorated(lambda w, x: jnp.sum(jnp.log(chain(w, x) - 5))))(W, X)


def test_a_nan_of_the_backward_is_named():
    wrong = lambda w, x: jnp.sum(jnp.sqrt(jnp.abs(chain(w, 0 * x))))  # noqa: E731
    with jax.debug_nans(True):
        decorated(wrong)(W, X)
        with pytest.raises(FloatingPointError, match="nan"):
            jax.grad(decorated(wrong))(W, X)


CHECKS = {
    "mine": (lambda w, x: checked(w, x), checkify.user_checks),
    "nan": (lambda w, x: jnp.sum(jnp.log(chain(w, x) - 5)), checkify.float_checks),
    "index": (lambda w, x: jnp.sum(chain(w, x)[jnp.array([999])]), checkify.index_checks),
}


def checked(w, x):
    y = chain(w, x)
    checkify.check(jnp.all(y < 0.5), "too big: {y}", y=jnp.max(y))
    return jnp.sum(chain(w, y) ** 2)


@pytest.mark.parametrize("name", CHECKS)
def test_checks(name):
    fun, errors = CHECKS[name]
    changes = [lambda f: f, jax.jit] if name != "mine" else [lambda f: f, jax.grad, lambda f: jax.jit(jax.grad(f))]
    for change in changes:
        wanted, found = (checkify.checkify(change(f), errors=errors)(W, X)[0].get() for f in (fun, decorated(fun)))
        assert wanted is not None and found is not None
        assert found.split("(`")[0] == wanted.split("(`")[0]


def test_a_checked_program_is_planned_and_measured():
    found = plan(checked, W, jnp.tile(X, (16, 1)), budget="80%", calibration=None)
    assert found.measured_peak_bytes <= found.budget_bytes

    def outside(f):
        both = lambda w, x: checkify.checkify(f)(w, x)[::-1]  # noqa: E731
        return lambda w, x: jax.grad(both, has_aux=True)(w, x)[0]

    check(checked, W, X, change=outside)


def test_symbolic_shapes_run_without_a_plan():
    (batch,) = export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((batch, 16), jnp.float32)
    exported = export.export(jax.jit(jax.grad(decorated(loss, "1GB"))))(W, spec)
    assert_close(exported.call(W, X), jax.grad(loss)(W, X), 1e-4)


def test_pickles():
    scale = 2.0
    ours = decorated(lambda w, x: scale * loss(w, x))
    wanted = jax.grad(lambda w, x: scale * loss(w, x))(W, X)
    jax.grad(ours)(W, X)  # what it remembers stays here
    sent = pickle.loads(cloudpickle.dumps(ours))
    assert_close(jax.grad(sent)(W, X), wanted, 1e-5)
    whole = pickle.loads(cloudpickle.dumps(jax.jit(jax.value_and_grad(ours))))
    assert_close(whole(W, X)[1], wanted, 1e-5)


def fourier(w, x):
    for _ in range(6):
        x = jnp.tanh(jnp.fft.ifft(jnp.fft.fft(x @ w, axis=0) * jnp.exp(1j * x), axis=0).real)
    return jnp.mean(x**2)


def rotated(w, x):
    z = x * (1 + 0.5j)
    for _ in range(6):
        z = jnp.sin(z @ w.astype(z.dtype)) / (1 + jnp.abs(z) ** 2)
    return jnp.mean(jnp.abs(z) ** 2)


@pytest.mark.parametrize("fun", slow_but([fourier, rotated], fourier))
def test_complex_values_are_not_saved_by_name(fun):
    for budget in ("90%", "80%", "70%"):
        with jax.numpy_dtype_promotion("standard"):
            check(fun, W, X, budget=budget)


LINEAR = {
    "products": lambda x: jnp.cumsum(2 * x @ W, 0) @ W.T,
    "loop": lambda x: lax.scan(lambda c, _: (c @ W, None), x, None, length=5)[0],
    "tree": lambda x: {"a": x @ W, "b": 2 * x},
    "fft": lambda x: jnp.fft.irfft(jnp.fft.rfft(x @ W)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_functions_are_transposed(name):
    fun = LINEAR[name]
    cotangent = jax.tree.map(jnp.sin, fun(X))
    for under in (lambda f: f, jax.jit):
        change = lambda f, under=under: lambda ct: under(jax.linear_transpose(f, X))(ct)  # noqa: E731
        assert_close(change(decorated(fun))(cotangent), change(fun)(cotangent), 1e-5)


@pytest.mark.parametrize("solver", slow_but(["cg", "gmres", "bicgstab"], "cg"))
def test_solvers_of_linear_systems(solver):
    a, b = 4 * jnp.eye(16) + W @ W.T, X[0]
    solve = getattr(sparse, solver)

    def around(f):
        return jax.jit(jax.grad(lambda a, b: jnp.sum(solve(lambda v: f(a, v), b)[0] ** 2), argnums=(0, 1)))

    check(lambda a, v: a @ v, a, b, change=around, budget="1GB", tolerance=1e-3, is_planned=False)
    inside = lambda a, b: jnp.sum(jnp.tanh(solve(lambda v: a @ v, jnp.tanh(a @ b))[0]) ** 2)  # noqa: E731
    check(inside, a, b, budget="1GB", tolerance=1e-3, is_planned=False)


def test_primitives_of_libraries_are_left_where_they_are():
    tag = Primitive("tag_of_a_library")
    tag.def_impl(lambda x: x)
    tag.def_abstract_eval(lambda x: x)

    def tagged(x):
        tag.bind(x)  # nobody reads what it makes
        jnp.sin(x)
        return jnp.sum(jax.jit(lambda x: (tag.bind(x), x * 2)[1])(x))

    found = [eqn.primitive.name for eqn in trace(tagged, (X,)).program.equations]
    assert found.count("tag_of_a_library") == 2 and "sin" not in found


DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int4", "int8"]


@pytest.mark.parametrize("name", DTYPES)
def test_narrow_dtypes(name):
    dtype = jnp.dtype(name)

    def rounded(w, x, table):
        for _ in range(6):
            x = jnp.tanh((x @ w + x @ table.astype(x.dtype)).astype(dtype if name[0] != "i" else x.dtype))
            x = x.astype(w.dtype)
        return jnp.mean(x**2)

    # Compiled in other parts, sums round otherwise, and each layer rounds once more.
    check(rounded, W, X, (W / 8).astype(dtype), tolerance=0.2 if name[0] != "i" else 1e-3)


def dropped(w, x, key):
    for _ in range(6):
        key, own = jax.random.split(key)
        x = jnp.tanh(x @ w) * jax.random.bernoulli(own, 0.9, x.shape).astype(x.dtype)
    keys = jax.random.split(key, 4)
    x, _ = lax.scan(lambda c, k: (jnp.tanh(c @ w) * jax.random.uniform(k, c.shape, c.dtype), None), x, keys)
    return jnp.mean(x**2), (keys, key)


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [jax.random.key, pytest.param(jax.random.PRNGKey, marks=pytest.mark.slow)])
def test_keys(make, wide):
    with x64() if wide else warnings.catch_warnings():
        args = (W.astype("float64"), X.astype("float64")) if wide else (W, X)
        change = lambda f: jax.grad(f, has_aux=True)  # noqa: E731
        ours, (keys, key) = change(decorated(dropped))(*args, make(3))
        theirs, (same_keys, same) = change(dropped)(*args, make(3))
        assert_close(ours, theirs, 1e-4)
        assert jnp.array_equal(keys, same_keys) and jnp.array_equal(key, same)


def synchronised(op):
    def fun(w, x):
        for _ in range(6):
            x = op(jnp.tanh(x @ w), w)
        return jnp.mean(x**2)

    return fun


COLLECTIVES = {
    "pmean": lambda x, w: x - lax.pmean(x.mean(0, keepdims=True), "d"),
    "all_gather": lambda x, w: x + lax.all_gather(x[:, :8], "d", axis=1, tiled=True),
    "psum_scatter": lambda x, w: x + jnp.tile(lax.psum_scatter(x, "d", tiled=True), (2, 1)),
    "all_to_all": lambda x, w: x + lax.all_to_all(x, "d", 0, 0, tiled=True),
    "ppermute": lambda x, w: x + lax.ppermute(x, "d", [(0, 1), (1, 0)]),
    "axis_index": lambda x, w: x * (1 + lax.axis_index("d").astype(x.dtype)),
    "scan": lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c @ w) - lax.psum(c, "d"), None), x, None, length=3)[0],
    "cond": lambda x, w: lax.cond(lax.psum(x.sum(), "d") > 0, lambda x: x @ w - lax.pmean(x, "d"), lambda x: 2 * x, x),
}


@pytest.mark.parametrize("name", slow_but(COLLECTIVES, "all_gather", "psum_scatter", "scan"))
def test_collectives_under_vmap(name):
    def inside(f):
        return lambda w, x: jax.vmap(jax.grad(f), (None, 0), axis_name="d")(w, x)

    def outside(f):
        return jax.grad(lambda w, x: jnp.mean(jax.vmap(f, (None, 0), axis_name="d")(w, x)))

    for change in (inside, outside):
        check(synchronised(COLLECTIVES[name]), W, X.reshape(2, 128, 16), change=change, tolerance=1e-3)


MESHES = """
import sys, warnings
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from helpers import assert_close, count
from test_constructs import COLLECTIVES, W, X, chain, decorated, loss, synchronised
import jaxckpt
warnings.simplefilter("ignore")
jax.config.update("jax_numpy_rank_promotion", "raise")
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

def mapped(f, how):
    def gradient(w, x):
        return lax.pmean(jax.grad(f)(w, x), "d")
    if how == "pmap":
        return lambda w, x: jax.pmap(gradient, axis_name="d", in_axes=(None, 0))(w, x.reshape(2, -1, 16))
    specs = dict(mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    return jax.jit(jax.shard_map(gradient, check_vma=how == "vma", **specs))

for name, how in (("pmean", "vma"), ("all_gather", "shard_map"), ("scan", "vma"), ("ppermute", "pmap")):
    fun = synchronised(COLLECTIVES[name])
    assert_close(mapped(decorated(fun), how)(W, X), mapped(fun, how)(W, X), 1e-3)
    assert count(mapped(decorated(fun), how), W, X)["checkpoint"], (name, how)

def resharded(w, x):
    for _ in range(6):
        x = jax.sharding.reshard(jnp.tanh(x @ w), P("d", None))
    step = lambda c, _: (jax.sharding.reshard(jnp.tanh(c @ w), P("d", None)), None)
    return jnp.mean(lax.scan(step, x, None, length=9)[0] ** 2)

explicit = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(explicit):
    w = jax.device_put(W, NamedSharding(explicit, P(None, None)))
    x = jax.device_put(X, NamedSharding(explicit, P("d", None)))
    for verify in (False, True):
        ours = jaxckpt.auto_remat(resharded, budget="90%", verify=verify)
        got, wanted = jax.grad(ours)(w, x), jax.grad(resharded)(w, x)
        assert_close(got, wanted, 1e-4)
        assert got.sharding == wanted.sharding
print("fine")
"""


@pytest.mark.slow
def test_collectives_and_explicit_meshes_on_two_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", MESHES], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("fine\n"), done.stderr[-3000:]


def test_what_cannot_be_lowered_is_predicted_with_a_warning():
    kernel = Primitive("kernel_for_another_chip")
    kernel.def_abstract_eval(lambda x: x)
    apart = jax.custom_vjp(lambda x: kernel.bind(x))
    apart.defvjp(lambda x: (kernel.bind(x), x), lambda x, ct: (ct * x,))
    with pytest.warns(JaxckptWarning, match="cannot be lowered"):
        found = plan(lambda w, x: loss(w, apart(chain(w, x))), W, X, budget="80%", calibration=None)
    assert found.measured_peak_bytes is None
    assert jaxckpt.Plan.from_json(found.to_json()).fingerprint == found.fingerprint
