"""Programs on several devices: bytes are those of each, and what is missing is named."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt
from jaxckpt.targets import install
from jaxckpt.targets.chip import find_chip
from jaxckpt.targets.sharding import local_bytes, num_shards

BATCH, WIDTH, LAYERS = 8192, 128, 8
ROWS, WHOLE = P("data", None), P()


def chain(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def specs(mesh, cut=ROWS, batch=BATCH, width=WIDTH, weights=WHOLE):
    on = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
    return [on((width, width), weights)] * LAYERS, on((batch, width), cut)


@functools.cache
def eight():
    return jaxckpt.mesh("cpu:8", {"data": 8})


def test_bytes_are_those_of_each_device():
    whole = jaxckpt.measure(chain, *specs(jaxckpt.mesh("cpu:8", [1, 8], ["data", "other"])), target="cpu:8")
    found = jaxckpt.measure(chain, *specs(eight()), target="cpu:8")
    weights, x = 4 * WIDTH * WIDTH * LAYERS, 4 * BATCH * WIDTH
    assert whole.argument_bytes == weights + x and found.argument_bytes == weights + x // 8
    assert found.target == "cpu:8" and found.temp_bytes < whole.temp_bytes / 4
    assert found.output_bytes == whole.output_bytes


def test_weights_cut_like_the_batch_take_less():
    found = jaxckpt.measure(chain, *specs(eight(), weights=ROWS), target="cpu:8")
    assert found.argument_bytes == (4 * WIDTH * WIDTH * LAYERS + 4 * BATCH * WIDTH) // 8


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_plan_is_measured_within_the_budget_of_each_device(axis_type):
    mesh = jaxckpt.mesh("cpu:8", [8], ["data"], axis_types=[axis_type])
    plan = jaxckpt.plan(chain, *specs(mesh), budget="75%", target="cpu:8")
    assert plan.target == "cpu:8" and plan.schedule is not None
    assert plan.measured_peak_bytes <= plan.budget_bytes < plan.unplanned_peak_bytes
    # The model's bytes are those of one device too.
    assert 0.5 < plan.predicted_peak_bytes / plan.measured_peak_bytes < 2


def test_a_plan_made_from_sharded_specs_applies_to_the_function():
    args = specs(eight())
    plan = jaxckpt.plan(chain, *args, budget="75%", target="cpu:8", verify=False)
    ws, x = [jnp.eye(WIDTH)] * LAYERS, jnp.ones((BATCH, WIDTH))
    value = jax.value_and_grad(plan.apply(chain))(ws, x)[0]
    np.testing.assert_allclose(value, chain(ws, x), rtol=1e-6)


def test_other_shardings_are_planned_anew():
    plans = [
        jaxckpt.plan(chain, *specs(eight(), cut), budget="75%", target="cpu:8", verify=False) for cut in (ROWS, WHOLE)
    ]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert plans[0].unplanned_peak_bytes < plans[1].unplanned_peak_bytes / 3


def make_step(loss):
    def step(ws, momentum, x):
        grads = jax.grad(loss)(ws, x)
        momentum = [0.9 * m + g for m, g in zip(momentum, grads, strict=True)]
        return [w - 0.1 * m for w, m in zip(ws, momentum, strict=True)], momentum

    return step


def test_a_step_is_fitted_on_each_device_with_its_state_given_back():
    ws, x = specs(eight(), weights=ROWS)
    step = make_step(jaxckpt.auto_remat(chain))
    kept = jaxckpt.fit(step, ws, ws, x, budget="100%", target="cpu:8")
    fitted = jaxckpt.fit(step, ws, ws, x, budget="75%", target="cpu:8", donate_argnums=(0, 1))
    assert fitted.measurement.device_bytes <= 0.75 * fitted.unplanned.device_bytes
    assert fitted.unplanned.alias_bytes == 2 * 4 * WIDTH * WIDTH * LAYERS // 8 and not kept.unplanned.alias_bytes
    assert fitted.plans[0].recompute_flops > 0


@pytest.mark.parametrize("where", ["around the gradient", "around the loss"])
def test_a_step_with_shard_map_is_fitted(where):
    mesh = eight()
    ws, x = specs(mesh)
    loss = jaxckpt.auto_remat(chain)
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=(WHOLE, ROWS))

    def whole(ws, x):
        return mapped(lambda ws, x: jax.lax.pmean(loss(ws, x), "data"), out_specs=WHOLE)(ws, x)

    def local(ws, x):
        return jax.tree.map(lambda g: jax.lax.pmean(g, "data"), jax.grad(loss)(ws, x))

    def step(ws, x):
        return jax.grad(whole)(ws, x) if where == "around the loss" else mapped(local, out_specs=WHOLE)(ws, x)

    fitted = jaxckpt.fit(step, ws, x, budget="75%", target="cpu:8")
    assert fitted.measurement.device_bytes <= 0.75 * fitted.unplanned.device_bytes
    assert fitted.plans[0].recompute_flops > 0
    assert 0.3 < fitted.plans[0].unplanned_peak_bytes / fitted.unplanned.device_bytes < 3


def test_abstract_meshes_get_the_targets_devices():
    abstract = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert jaxckpt.measure(chain, *specs(abstract), target="cpu:8").argument_bytes < 8 * 2**20


def test_devices_that_are_here_need_no_target():
    code = (
        "import jax, jaxckpt, test_shardings as t\n"
        "args = t.specs(jaxckpt.mesh(None, {'data': 8}))\n"
        "found = jaxckpt.measure(t.chain, *args)\n"
        "plan = jaxckpt.plan(t.chain, *args, budget='75%')\n"
        "print(found.target, found.device_bytes == plan.unplanned_peak_bytes > plan.measured_peak_bytes)"
    )
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["cpu:8", "True"]


# What cannot be compiled.


def test_a_spec_without_a_sharding_among_others_is_named():
    ws, x = specs(eight())
    bare = {"deep": [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS}
    fun = lambda tree, x: chain(tree["deep"], x)  # noqa: E731
    for call in (
        lambda: jaxckpt.measure(fun, bare, x, target="cpu:8"),
        lambda: jaxckpt.plan(fun, bare, x, budget="75%", target="cpu:8", verify=False),
    ):
        with pytest.raises(
            jaxckpt.ShardingError, match=r"args\[0\]\['deep'\]\[0\]: float32\[128,128\] has no sharding"
        ):
            call()
    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    with pytest.raises(jaxckpt.ShardingError, match=r"args\[2\].* has no sharding"):
        jaxckpt.fit(make_step(jaxckpt.auto_remat(chain)), ws, ws, x, budget="75%", target="cpu:8")


def test_what_is_small_or_closed_over_lies_on_every_device():
    ws, x = specs(eight())
    shift, key = jnp.ones((1, WIDTH)), jax.random.key(0)

    def fun(ws, x, scale, key):
        return chain(ws, x + shift) * scale + jax.random.uniform(key)

    found = jaxckpt.measure(fun, ws, x, 2.0, key, target="cpu:8")
    assert found.device_bytes > jaxckpt.measure(chain, ws, x, target="cpu:8").argument_bytes


def test_closed_over_arrays_are_constants_on_several_devices_too(monkeypatch):
    ws, x = specs(eight())
    shift = jnp.sin(jnp.arange(x.size * 1.0)).reshape(x.shape)
    shifted = lambda ws, x: chain(ws, x + shift)  # noqa: E731
    found = jaxckpt.measure(shifted, ws, x, target="cpu:8")
    assert found.argument_bytes == jaxckpt.measure(chain, ws, x, target="cpu:8").argument_bytes
    monkeypatch.setattr("jaxckpt.compilation.measure._MOST_CONSTANT_BYTES", 0)
    assert jaxckpt.measure(shifted, ws, x, target="cpu:8").argument_bytes == found.argument_bytes
    plan = jaxckpt.plan(shifted, ws, x, budget="100%", target="cpu:8", verify=False)
    assert plan.constant_bytes == shift.nbytes


def test_devices_that_are_not_the_targets_are_refused():
    for target in ("cpu:4", "h100:8", "v5e:2x4"):
        if target != "cpu:4" and install.unusable(find_chip(target)):
            continue
        with pytest.raises(jaxckpt.ShardingError, match=rf"8 devices of cpu, and target='{target}'.*jaxckpt\.mesh"):
            jaxckpt.measure(chain, *specs(eight()), target=target)


def test_a_mesh_that_is_not_of_all_devices_is_refused():
    with pytest.raises(jaxckpt.ShardingError, match="4 x 4 is 16 devices, and target='cpu:8' has 8"):
        jaxckpt.mesh("cpu:8", {"data": 4, "model": 4})
    with pytest.raises(jaxckpt.ShardingError, match="not of one length"):
        jaxckpt.mesh("cpu:8", [4, 2], ["data"])


def test_sizes_of_one_device_round_up():
    aval, mesh = jax.ShapeDtypeStruct((16, 8), jnp.float32), jaxckpt.mesh("cpu:8", {"data": 4, "model": 2})
    for spec, parts in ((P(), 1), (P("data"), 4), (P("data", "model"), 8), (P(("data", "model")), 8)):
        assert num_shards(aval, NamedSharding(mesh, spec)) == parts
        assert local_bytes(aval, NamedSharding(mesh, spec)) == 512 // parts


# With the compilers.


@pytest.mark.targets
@pytest.mark.parametrize(("target", "share"), [("h100:8", 0.92), ("v5e:2x4", 0.75)])
def test_a_sharded_step_is_fitted_for_chips_that_are_not_here(target, share):
    if install.unusable(find_chip(target)):
        pytest.skip("its compiler is not installed")
    # Several GPUs get a scheduler that hides communication and holds more for it, hence the higher budget.
    mesh = jaxckpt.mesh(target, {"data": 8})
    ws, x = specs(mesh, batch=131072, width=512, weights=ROWS)
    step = make_step(jaxckpt.auto_remat(chain))
    fitted = jaxckpt.fit(step, ws, ws, x, budget=f"{share:.0%}", target=target, donate_argnums=(0, 1))
    assert fitted.measurement.device_bytes <= share * fitted.unplanned.device_bytes
    assert fitted.measurement.target == target and fitted.plans[0].recompute_flops > 0
    state = 2 * LAYERS * 4 * 512 * 512 // 8
    assert fitted.unplanned.alias_bytes == state
    assert fitted.unplanned.argument_bytes == state + 4 * 131072 * 512 // 8
