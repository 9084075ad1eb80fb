"""Every transformation of every construct: the numbers of the undecorated function, with recomputation in them."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, count, equations, jit, x64
from jax import export, lax
from jax.extend.core import primitives as prims
from jax.sharding import Mesh, PartitionSpec
from zoo.models import chain_args

import jaxckpt
from jaxckpt import JaxckptWarning, _compat, auto_remat
from jaxckpt.program.flops import gradient_cost
from jaxckpt.program.trace import trace

# Flags that change how JAX rematerialises, where this JAX has them; each is read when JAX is imported.
MODES = {"remat3": {"JAX_REMAT3": "1"}}
MODES["remat3, no cotangents"] = MODES["remat3"] | {"JAX_REMAT_BARRIER_NO_COTANGENTS": "1"}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JaxckptWarning)
        yield


def decorated(fun):
    return auto_remat(fun, budget="80%", verify=False)


@jax.custom_jvp
def smooth(x):
    return jnp.sin(x) * x


smooth.defjvp(lambda primals, tangents: (smooth(*primals), tangents[0] * (jnp.sin(*primals) + jnp.cos(*primals))))


@jax.custom_vjp
def clipped(x):
    return jnp.tanh(2 * x)


clipped.defvjp(lambda x: (jnp.tanh(2 * x), x), lambda x, ct: (ct * jnp.cos(x),))

TABLE = jnp.linspace(-1.0, 1.0, 8)


def while_forward(x, w):
    """How often it halves is no function of x that anything flows back through."""
    size = lax.while_loop(lambda s: s > 0.1, lambda s: s / 2, lax.stop_gradient(jnp.sum(x**2)))
    return x * size.astype(x.dtype)


def noise(x):
    kept = jax.random.bernoulli(jax.random.key(3), 0.5, x.shape)[jnp.arange(x.shape[0])]
    return kept.astype(x.dtype)


# What stands between the layers: a function of the state and the layer's weights.
CONSTRUCTS = {
    "layers": lambda x, w: x @ w,
    "scan": lambda x, w: lax.scan(lambda c, s: (jnp.tanh(c @ w) + s, jnp.sum(c)), x, jnp.stack([x, 2 * x, x]))[0],
    "cond": lambda x, w: lax.cond(jnp.sum(x) > 0, lambda x: jnp.sin(x @ w), lambda x: x * 2, x),
    "switch": lambda x, w: lax.switch(1, [jnp.sin, lambda x: jnp.cos(x @ w), jnp.exp], x),
    "while_loop": while_forward,
    "fori_loop": lambda x, w: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x),
    "map": lambda x, w: lax.map(lambda row: jnp.tanh(row @ w), x),
    "associative_scan": lambda x, w: lax.associative_scan(jnp.multiply, jnp.cos(x @ w)),
    "custom_jvp": lambda x, w: smooth(x @ w),
    "custom_vjp": lambda x, w: clipped(x @ w),
    "jit": lambda x, w: jax.jit(lambda x: jnp.sin(jax.jit(jnp.dot)(x, w)))(x),
    "checkpoint": lambda x, w: jax.checkpoint(lambda x: jnp.sin(jnp.cos(x @ w)))(x),
    "auto_remat": lambda x, w: auto_remat(lambda x: jnp.sin(jnp.cos(x @ w)), budget="1GB")(x),
    "keys and integers": lambda x, w: x * noise(x),
    "closed-over arrays": lambda x, w: x @ w + TABLE.astype(x.dtype)[None],
}


def loss_of(name):
    def loss(weights, x):
        for i, w in enumerate(weights):
            x = jnp.tanh(x @ w)
            if i in (1, 3):
                x = CONSTRUCTS[name](x, w)
        return jnp.sum(x**2)

    return loss


def scaled_by(f, ws, x):
    return lambda s: f([ws[0] * s[0], *ws[1:]], x * s[1])


def with_aux(f):
    return jax.value_and_grad(lambda ws, x: (f(ws, x), {"rows": x.shape[0], "x": x}), has_aux=True)


def mapped(f):
    return lambda ws, x: jax.vmap(f, (None, 0))(ws, jnp.stack([x, 2 * x]))


def sharded(f):
    mesh = Mesh(jax.devices()[:1], ("data",))
    rows = PartitionSpec("data")

    def local(ws, x):
        value, grads = jax.value_and_grad(f)(ws, x)
        return lax.psum(value, "data"), lax.psum(grads, "data")

    none = PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(none, rows), out_specs=(none, none), check_vma=False)


def exported(f):
    def run(ws, x):
        fun = jax.jit(jax.value_and_grad(f))
        return export.export(fun)(ws, x).call(ws, x)

    return run


def donated(f):
    def run(ws, x):
        step = jax.jit(lambda ws, x: jax.tree.map(lambda w, g: w - g, ws, jax.grad(f)(ws, x)), donate_argnums=0)
        return step(jax.tree.map(jnp.array, ws), x)

    return run


# A transformation of the loss, and whether it recomputes.
TRANSFORMS = {
    "jit": (jax.jit, False),
    "grad": (jax.grad, True),
    "value_and_grad with aux": (with_aux, True),
    "vjp": (lambda f: lambda ws, x: jax.vjp(f, ws, x)[1](jnp.ones((), x.dtype)), True),
    "jvp": (lambda f: lambda ws, x: jax.jvp(f, (ws, x), (ws, x)), False),
    "linearize": (lambda f: lambda ws, x: jax.linearize(f, ws, x)[1](ws, x), False),
    "vmap": (mapped, False),
    "vmap of grad": (lambda f: mapped(jax.grad(f)), True),
    "grad of mean of vmap": (lambda f: jax.grad(lambda ws, x: mapped(f)(ws, x).mean()), True),
    "shard_map": (sharded, True),
    "hessian": (
        lambda f: lambda ws, x: jax.hessian(scaled_by(f, ws, x))(jnp.linspace(0.5, 1.0, 2, dtype=x.dtype)),
        True,
    ),
    "reverse over reverse": (lambda f: jax.grad(lambda ws, x: sum(jnp.sum(g**2) for g in jax.grad(f)(ws, x))), True),
    "checkpoint": (lambda f: jax.grad(jax.checkpoint(f)), True),
    "named_scope": (lambda f: jax.grad(jax.named_scope("outer")(f)), True),
    "donation": (donated, None),
    "export": (exported, None),
}
FORWARD = ("jvp", "linearize")
SECOND = ("hessian", "reverse over reverse")


def check(transform, construct):
    try:
        compare(transform, construct)
    except NotImplementedError as error:
        # Before 0.12 this mode cannot map over names, ours or anybody's.
        if not (os.environ.get("JAX_REMAT3") and "CheckpointName" in str(error) and _compat.CPU_UNDOES_REMAT):
            raise


def compare(transform, construct):
    change, recomputes = TRANSFORMS[transform]
    plain = loss_of(construct)
    with x64():
        args = chain_args("float64", layers=6, rows=128, width=8)
        if construct == "custom_vjp" and transform in FORWARD:
            for f in (plain, decorated(plain)):
                with pytest.raises(TypeError, match="forward-mode"):
                    jit(change(f))(*args)
            return
        if construct == "custom_vjp" and transform in SECOND and os.environ.get("JAX_REMAT3"):
            # In this mode `jax.checkpoint` by hand is like this too: a rule inside is applied again to the second
            # derivative, where the plain program differentiates what the rule does.
            return
        compiled = (lambda f: f) if recomputes is None else jit
        assert_close(compiled(change(decorated(plain)))(*args), compiled(change(plain))(*args), 1e-9)
        if recomputes:
            ours, theirs = (recomputation(change(f), args) for f in (decorated(plain), plain))
            assert all(a > b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def recomputation(fun, args):
    """How many regions there are, and how many forward operations."""
    if os.environ.get("JAX_REMAT3"):
        # In this mode regions are barriers, or what they are elsewhere where barriers wait for nothing, and primitives
        # of a new kind that only costs are counted inside of.
        barriers = str(jax.make_jaxpr(fun)(*args)).count("optimization_barrier")
        return barriers + count(fun, *args)["checkpoint"], gradient_cost(fun, *args).flops
    found = count(fun, *args)
    return found["checkpoint"], found["dot_general"] + found["tanh"]


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_every_construct(construct):
    check("value_and_grad with aux", construct)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform(transform):
    check(transform, "scan")


@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "checkpoint"])
@pytest.mark.parametrize("num_checkpoints", [2])
def test_every_transform_of_a_loop_with_few_states(transform, num_checkpoints):
    change = TRANSFORMS[transform][0]

    def loss_of(scan):
        def loss(weights, x):
            w, shared = jnp.stack(weights), (jnp.sum(weights[0]), 0)

            def body(carry, w):
                x, (s, i) = carry
                # A carry and a result that no example of a batch has a say in, and an integer.
                return (jnp.tanh(x @ w + s), (jnp.cos(s) * 0.5, i + 1)), (jnp.sum(x), s * i)

            (x, (s, i)), (sums, shares) = scan(body, (x, shared), w)
            return jnp.sum(x**2) * s + jnp.sum(sums * shares) + i

        return loss

    ours = loss_of(lambda *args: jaxckpt.scan(*args, num_checkpoints=num_checkpoints))
    with x64():
        args = chain_args("float64", layers=7, rows=8, width=4)
        compiled = (lambda f: f) if TRANSFORMS[transform][1] is None else jit
        assert_close(compiled(change(ours))(*args), compiled(change(loss_of(lax.scan)))(*args), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("construct", CONSTRUCTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_of_every_construct(transform, construct):
    check(transform, construct)


def test_a_checkpoint_of_the_users_own_is_respected():
    own = jax.checkpoint_policies.save_only_these_names("mine")

    def loss(weights, x):
        for w in weights:
            x = jax.checkpoint(lambda x, w=w: jnp.tanh(jnp.tanh(x @ w) @ w), policy=own)(x)
        return jnp.sum(x**2)

    args = chain_args(layers=6, rows=128, width=8)
    found = equations(jax.make_jaxpr(jax.grad(decorated(loss)))(*args).jaxpr)
    policies = [eqn.params["policy"] for eqn in found if eqn.primitive is prims.remat_p]
    assert sum(policy is own for policy in policies) >= 4


@pytest.mark.slow
def test_a_checkpoint_of_the_users_own_is_inlined_where_that_is_asked_for(tmp_path):
    layer = lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w)  # noqa: E731

    def loss(weights, x):
        for w in weights:
            x = jax.checkpoint(layer)(x, w)
        x, _ = lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None), prevent_cse=False), x, jnp.stack(weights))
        x = lax.cond(jnp.sum(x) > 0, jax.checkpoint(lambda x: layer(x, weights[0])), lambda x: x, x)
        # Its own choice is for calls of it alone.
        return jnp.sum(auto_remat(jax.checkpoint(lambda x: layer(x, weights[1])), budget="1GB")(x) ** 2)

    def without(weights, x):
        for w in [*weights, *weights]:
            x = layer(x, w)
        x = lax.cond(jnp.sum(x) > 0, lambda x: layer(x, weights[0]), lambda x: x, x)
        return jnp.sum(layer(x, weights[1]) ** 2)

    with x64():
        args = chain_args("float64", layers=4, rows=512, width=8)
        wanted = jit(jax.grad(without))(*args)
        kept, inlined = (
            jaxckpt.plan(loss, *args, budget="1GB", cost="flops", keep_checkpoints=keep) for keep in (True, False)
        )
        # Both fit as they are: one with the user's recomputation, one with none at all.
        assert count(jax.grad(kept.apply(loss)), *args)["checkpoint"] == 7
        assert count(jax.grad(inlined.apply(loss)), *args)["checkpoint"] == 0
        assert kept.fingerprint != inlined.fingerprint and kept.unplanned_cost > inlined.unplanned_cost
        assert kept.unplanned_peak_bytes < inlined.unplanned_peak_bytes
        # What is recomputed within a budget is the plan's choice.
        budget = int(0.7 * inlined.unplanned_peak_bytes)
        planned = auto_remat(loss, budget=budget, cost="flops", keep_checkpoints=False)
        found = jaxckpt.plan(loss, *args, budget=budget, cost="flops", keep_checkpoints=False)
        found.save(tmp_path / "plan.json")
        again = jaxckpt.Plan.load(tmp_path / "plan.json").apply(loss)
        for fun in (planned, again):
            assert_close(jit(jax.grad(fun))(*args), wanted, 1e-10)
            assert count(jax.grad(fun), *args)["checkpoint"] > 0
        with pytest.raises(jaxckpt.PlanMismatchError):
            found.check(trace(loss, args).program)


def in_mode(mode, code):
    """What a program prints where JAX is imported under these flags."""
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    env = {**os.environ, **MODES[mode], "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("construct", CONSTRUCTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_transform_of_every_construct_in_other_modes(mode, construct):
    code = f"import test_transforms as t\nfor name in t.TRANSFORMS: t.check(name, {construct!r})\nprint('all equal')"
    assert in_mode(mode, code) == "all equal"


def recomputed_layers():
    """FLOPs of a gradient with three checkpoints, one of them around the others, and a loop."""

    def loss(w, x):
        layer = jax.checkpoint(lambda x: jnp.tanh(x @ w))
        x = jax.checkpoint(lambda x: layer(layer(x)))(x)
        return jnp.sum(lax.scan(lambda x, _: (layer(x), None), x, length=4)[0])

    return gradient_cost(jax.grad(loss), jnp.ones((8, 8)), jnp.ones((64, 8))).flops


def test_recomputation_is_counted_in_other_modes():
    wanted = recomputed_layers()
    found = int(in_mode("remat3", "import test_transforms as t; print(t.recomputed_layers())"))
    assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    "loop",
    [
        lambda step, x: jaxckpt.scan(lambda x, _: (step(x), None), x, length=9, num_checkpoints=2)[0],
        lambda step, x: jaxckpt.while_loop(
            lambda s: s[1] < 9, lambda s: (step(s[0]), s[1] + 1), (x, 0), max_steps=12, num_checkpoints=3
        )[0],
    ],
)
def test_loops_of_its_own_inside_a_planned_function(loop):
    def loss(weights, x, loop=loop):
        for w in weights:
            x = loop(lambda x, w=w: jnp.tanh(x @ w), x)
        return jnp.sum(x**2)

    def plain(weights, x):
        return loss(weights, x, lambda step, x: lax.scan(lambda x, _: (step(x), None), x, length=9)[0])

    with x64():
        args = chain_args("float64", layers=4, rows=128, width=8)
        assert_close(jit(jax.grad(decorated(loss)))(*args), jit(jax.grad(plain))(*args), 1e-9)
