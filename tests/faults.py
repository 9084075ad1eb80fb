"""Fifteen faults that people make with `jax.checkpoint`, each in a model of six layers or more."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import jaxckpt

LAYERS, ROWS, WIDTH = 6, 64, 8
POLICIES = jax.checkpoint_policies
Case = tuple[Callable, tuple[Any, ...]]


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def listed(layers: int = LAYERS) -> tuple[Any, Any]:
    return [array(WIDTH, WIDTH)] * layers, array(ROWS, WIDTH)


def stacked(layers: int = LAYERS) -> tuple[Any, Any]:
    return array(layers, WIDTH, WIDTH), array(ROWS, WIDTH)


def layer(x, w):
    h = checkpoint_name(jnp.tanh(x @ w), "hidden")
    return x + checkpoint_name(jnp.sin(h) @ w.T, "out")


def chain(ws, x, one: Callable = layer):
    for w in ws:
        x = one(x, w)
    return jnp.sum(x**2)


def looped(ws, x, body: Callable):
    return jnp.sum(jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0] ** 2)


def whole_function() -> Case:
    return jax.checkpoint(chain), listed()


def flat_policy() -> Case:
    return jax.checkpoint(chain, policy=POLICIES.save_only_these_names("hidden")), listed()


def simple(x, w):
    return jnp.tanh(x @ w)


def last_layer() -> Case:
    def loss(ws, x):
        for w in ws[:-1]:
            x = simple(x, w)
        return jnp.sum(jax.checkpoint(simple)(x, ws[-1]) ** 2)

    return loss, listed()


def name_on_no_residual() -> Case:
    policy = POLICIES.save_only_these_names("out")
    return functools.partial(chain, one=jax.checkpoint(layer, policy=policy)), listed()


def cse_outside_loop() -> Case:
    return functools.partial(chain, one=jax.checkpoint(layer, prevent_cse=False)), listed()


def cse_in_loop() -> Case:
    return functools.partial(looped, body=jax.checkpoint(layer)), stacked()


@jax.custom_vjp
def product(x, w):
    """A Pallas kernel, as flash attention is one."""
    kernel = lambda x_ref, w_ref, o_ref: o_ref.__setitem__(..., x_ref[...] @ w_ref[...])  # noqa: E731
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True, name="my_product")(x, w)


product.defvjp(lambda x, w: (product(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def missed_kernel() -> Case:
    def one(x, w):
        return x + jnp.tanh(product(jnp.tanh(x @ w), w))

    return functools.partial(chain, one=jax.checkpoint(one, policy=POLICIES.dots_saveable)), listed()


def loop_from_outside() -> Case:
    def loss(ws, x):
        for w in (ws[0], ws[1]):
            x = layer(x, w)

        @jax.checkpoint
        def loop(x):
            return jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]

        return jnp.sum(layer(loop(x), ws[2]) ** 2)

    return loss, stacked(8)


def names_nowhere() -> Case:
    policy = POLICIES.save_only_these_names("hiden")
    return functools.partial(chain, one=jax.checkpoint(layer, policy=policy)), listed()


def names_outside() -> Case:
    policy = POLICIES.save_only_these_names("stream")
    one = jax.checkpoint(layer, policy=policy)
    return functools.partial(chain, one=lambda x, w: checkpoint_name(one(x, w), "stream")), listed()


def mesh_of_four() -> Any:
    return jaxckpt.mesh("cpu:4", {"data": 4})


def whole_shard_map() -> Case:
    mesh = mesh_of_four()
    rows, none = P("data"), P()

    def loss(ws, x):
        @jax.checkpoint
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(none, rows), out_specs=none)
        def inside(ws, x):
            for w in ws:
                x = layer(x, w)
            return jax.lax.psum(jnp.sum(x**2), "data")

        return inside(ws, x)

    return loss, placed(mesh, none, rows, listed())


def saved_gathers() -> Case:
    mesh = mesh_of_four()
    rows, none = P("data"), P()

    def loss(ws, x):
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=none)
        def inside(ws, x):
            for w in ws:
                x = layer(x, jax.lax.all_gather(w, "data", tiled=True))
            return jax.lax.psum(jnp.sum(x**2), "data")

        return inside(ws, x)

    return loss, placed(mesh, rows, rows, ([array(32, 32)] * LAYERS, array(ROWS, 32)))


def placed(mesh: Any, ws: Any, x: Any, specs: Any) -> Any:
    put = lambda spec, where: spec.update(sharding=jax.sharding.NamedSharding(mesh, where))  # noqa: E731
    return [put(w, ws) for w in specs[0]], put(specs[1], x)


def nested() -> Case:
    inner = jax.checkpoint(simple)
    one = jax.checkpoint(lambda x, w: x + simple(inner(x, w), w))

    def loss(ws, head, x):
        for w in ws:
            x = one(x, w)
        return jnp.sum(jax.nn.softmax(x @ head) ** 2)

    ws, x = listed()
    return loss, (ws, array(WIDTH, 4 * WIDTH), x)


@jax.custom_vjp
def masked(x, mask):
    return jnp.where(mask, jnp.tanh(x), 0.0)


masked.defvjp(
    lambda x, mask: (masked(x, mask), (x, mask)),
    lambda saved, g: (jnp.where(saved[1], g * (1 - jnp.tanh(saved[0]) ** 2), 0.0), None),
)


def constant_in_loop() -> Case:
    def loss(ws, x, mask):
        def body(x, w):
            return jax.lax.cond(x[0, 0] > 0, lambda: x + masked(x @ w, mask > 0), lambda: x), None

        return jnp.sum(jax.lax.scan(body, x, ws)[0] ** 2)

    return loss, (*stacked(), array(ROWS, WIDTH))


def three_at_once() -> Case:
    """A step: a name nowhere and barriers in a loop, and two checkpoints of which the inner one is for nothing."""
    policy = POLICIES.save_only_these_names("hiden")
    body = jax.checkpoint(layer, policy=policy)
    inner = jax.checkpoint(simple)
    outer = jax.checkpoint(lambda x, w: x + simple(inner(x, w), w))

    def loss(params, x):
        x = jax.lax.scan(lambda x, w: (body(x, w), None), x, params["loop"])[0]
        return chain(params["list"], x, outer)

    def step(params, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    ws, x = listed()
    return step, ({"loop": stacked()[0], "list": ws}, x)


# What is planted: by name, what makes it and the kind that must be found.
FAULTS: dict[str, tuple[Callable[[], Case], str]] = {
    "whole function": (whole_function, "whole-function"),
    "last layer": (last_layer, "last-layer"),
    "name on a non-residual": (name_on_no_residual, "names-no-residual"),
    "flat policy": (flat_policy, "flat-policy"),
    "prevent_cse=False outside a loop": (cse_outside_loop, "cse-outside-loop"),
    "policy misses a kernel": (missed_kernel, "kernel-recomputed"),
    "scan from outside": (loop_from_outside, "loop-from-outside"),
    "names never occur": (names_nowhere, "names-nowhere"),
    "prevent_cse in a loop": (cse_in_loop, "cse-in-loop"),
    "whole shard_map": (whole_shard_map, "whole-shard-map"),
    "names outside": (names_outside, "names-outside"),
    "nested": (nested, "nested"),
    "constant saved by iterations": (constant_in_loop, "constant-saved-by-iterations"),
    "saved gathers": (saved_gathers, "gathers-saved"),
}
