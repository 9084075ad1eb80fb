"""Saved values on the host: the same gradients, the bytes that were planned, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ckptsolvers import Keep, Schedule
from ckptsolvers.schedule import region
from helpers import assert_close, jit, x64
from jax import lax
from jax.sharding import SingleDeviceSharding

import jaxckpt
from jaxckpt import apply
from jaxckpt.api import auto_remat as decorator
from jaxckpt.api.differentiated import see_differentiated
from jaxckpt.cli import main
from jaxckpt.compilation.host import host_bytes
from jaxckpt.errors import BudgetError, JaxckptWarning, OptionError, PlanFileError
from jaxckpt.model.cut import spans_at
from jaxckpt.model.option import Place, SavedValues
from jaxckpt.program.ir import is_on_host
from jaxckpt.targets.cpu import CpuCompiler
from jaxckpt.targets.sharding import trace_placed

LENGTH, ROWS, WIDTH = 12, 192, 16
ROOM = "64MB"


def loss(params, x):
    def layer(x, p):
        y = x + jnp.tanh(jnp.sin(x @ p["up"])) @ p["down"]
        return y, jnp.mean(y**2)

    x, norms = lax.scan(layer, x, params)
    return jnp.sum(x**2) + jnp.sum(norms)


def conditional(params, x):
    return lax.cond(jnp.sum(x) > 0, loss, lambda params, x: jnp.sum(x @ params["up"][0]), params, x)


def args(dtype="float64"):
    random = np.random.default_rng(0)
    array = lambda *s: (random.normal(size=s) / s[-1]).astype(dtype)  # noqa: E731
    return {"up": array(LENGTH, WIDTH, 4 * WIDTH), "down": array(LENGTH, 4 * WIDTH, WIDTH)}, array(ROWS, WIDTH)


@functools.cache
def sending(dtype="float64"):
    """A plan that sends values to the host, and the least peak without."""
    with x64():
        least = jaxckpt.plan(loss, *args(dtype), budget=1, on_infeasible="least", calibration=None)
        plan = jaxckpt.plan(
            loss, *args(dtype), budget=least.peak_bytes - 1, host_budget=ROOM, calibration=None, max_compiles=6
        )
    return plan, least


def sent_values(fun, *given):
    """Values that the traced derivative puts into the host's memory, those of loops' bodies too."""
    found, jaxprs = 0, [jax.make_jaxpr(jax.grad(fun))(*given).jaxpr]
    while jaxprs:
        jaxpr = jaxprs.pop()
        found += sum(eqn.primitive.name == "device_put" and is_on_host(eqn.outvars[0].aval) for eqn in jaxpr.eqns)
        jaxprs += [j for eqn in jaxpr.eqns for j in jax.extend.core.jaxprs_in_params(eqn.params)]
    return found


@pytest.mark.filterwarnings("ignore:nothing fits")
def test_with_the_host_a_loop_takes_less_than_it_takes_without():
    plan, least = sending()
    assert plan.is_on_host and plan.peak_bytes < least.peak_bytes
    assert plan.measured_host_bytes is None and plan.host_bytes == plan.link_bytes > 0
    with x64():
        planned = plan.apply(loss)
        assert host_bytes(jax.make_jaxpr(jax.grad(planned))(*args())) == plan.host_bytes
        assert sent_values(planned, *args()) > 0
        assert_close(jit(jax.value_and_grad(planned))(*args()), jit(jax.value_and_grad(loss))(*args()), 1e-12)
    report = str(plan)
    assert "host budget" in report and "on the host" in report and "each way" in report
    assert {group.place for group in plan.saved} == {"device", "host"}


@pytest.mark.filterwarnings("ignore:nothing fits")
def test_a_plan_with_values_on_the_host_is_saved_and_read(tmp_path):
    plan, _ = sending()
    path = tmp_path / "plan.json"
    plan.save(path)
    assert jaxckpt.Plan.load(path) == plan
    assert plan.to_json()["host_budget_bytes"] == 64_000_000
    (kept,) = (save for save in plan.block_saves[0].parts[0].body.saved)
    assert isinstance(kept, SavedValues) and kept.host_values
    wrong = dataclasses.replace(kept, host=(*kept.host, kept.host[0]))
    part = plan.block_saves[0].parts[0]
    part = dataclasses.replace(part, body=dataclasses.replace(part.body, saved=(wrong,)))
    broken = dataclasses.replace(plan.block_saves[0], parts=(part, *plan.block_saves[0].parts[1:]))
    broken = dataclasses.replace(plan, block_saves=(broken, *plan.block_saves[1:]))
    with x64(), pytest.raises(PlanFileError, match=r"saved\[0\]\.host\[\d\] is \d+"):
        broken.apply(loss)(*args())


TRANSFORMS = {
    "gradient": lambda f: jax.grad(f),
    "of several examples": lambda f: lambda p, x: jax.vmap(jax.grad(f), (None, 0))(p, jnp.stack([x, 2 * x])),
    "a mean over examples": lambda f: jax.grad(lambda p, x: jnp.mean(jax.vmap(f, (None, 0))(p, jnp.stack([x, 2 * x])))),
    "forward": lambda f: lambda p, x: jax.jvp(lambda x: f(p, x), (x,), (x,)),
    "forward over reverse": lambda f: lambda p, x: jax.jvp(jax.grad(lambda x: f(p, x)), (x,), (x,))[1],
    "reverse over reverse": lambda f: jax.grad(lambda p, x: jnp.sum(jax.grad(f, 1)(p, x) ** 2)),
}


@pytest.mark.filterwarnings("ignore:a decorated function is differentiated inside vmap", "ignore:what a plan sends")
@pytest.mark.filterwarnings("ignore:nothing fits")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform(transform, tmp_path):
    of = TRANSFORMS[transform]
    _, least = sending()
    with x64():
        decorated = jaxckpt.auto_remat(
            loss, budget=least.peak_bytes, host_budget=ROOM, cache_dir=tmp_path, max_compiles=2, on_infeasible="least"
        )
        wanted, got = (jit(of(f))(*args()) for f in (loss, decorated))
        assert_close(got, wanted, 1e-10)
        planned = sending()[0].apply(loss)
        assert_close(jit(of(planned))(*args()), wanted, 1e-10)


@pytest.mark.filterwarnings("ignore:nothing fits")
def test_what_is_sent_stays_where_jax_cannot_transpose_it():
    apply._warn_on_device.cache_clear()
    with x64(), pytest.warns(JaxckptWarning, match="stays on the device"):
        jax.grad(lambda p, x: jnp.sum(jax.grad(sending()[0].apply(loss), 1)(p, x) ** 2))(*args())


def step(params, x, momentum):
    value, grads = jax.value_and_grad(loss)(params, x)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum, value


def test_steps_with_donation():
    params, x = args("float32")
    momentum = jax.tree.map(jnp.zeros_like, params)
    wanted = jit(step)(params, x, momentum)
    budget = int(0.5 * jaxckpt.measure(step, params, x, momentum, differentiate=False).device_bytes)
    fresh = lambda: jax.tree.map(jnp.array, (params, x, momentum))  # noqa: E731
    limits = {"budget": budget, "host_budget": ROOM, "max_compiles": 6}
    fitted = jaxckpt.fit(step, *fresh(), donate_argnums=(0, 2), **limits)
    assert fitted.measurement.host_bytes and fitted.measurement.device_bytes <= budget
    assert_close(fitted.step(*fresh()), wanted, 1e-5)
    jitted = jaxckpt.jit(step, donate_argnums=(0, 2), **limits)
    assert_close(jitted(*fresh()), wanted, 1e-5)
    assert any(plan.is_on_host for plan in jitted.plans) and "on the host" in jitted.report()


def test_arguments_that_live_on_the_host_count_and_stay_there():
    see_differentiated()
    params, x = args("float32")
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    held = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=host), params)
    made = jaxckpt.search.step.Step(step, (params, x, held), jaxckpt.search.step.StepOptions(host_budget=10**6))
    size = sum(p.nbytes for p in jax.tree.leaves(params))
    assert made.host_state_bytes == size and made.host_room == 10**6 - size


def test_without_a_host_budget_nothing_is_sent_and_one_that_nothing_reaches_is_no_error():
    params, x = args("float32")
    plain = jaxckpt.plan(loss, params, x, budget="60%", verify=False, calibration=None)
    assert not plain.is_on_host and plain.host_budget_bytes is None and plain.host_bytes == 0
    assert "host" not in str(plain)
    little = jaxckpt.plan(loss, params, x, budget="60%", host_budget=0, verify=False, calibration=None)
    assert (little.schedule, little.block_saves) == (plain.schedule, plain.block_saves)
    roomy = jaxckpt.plan(loss, params, x, budget="60%", host_budget="1TB", verify=False, calibration=None)
    assert roomy.host_bytes <= 10**12 and roomy.recompute_cost <= plain.recompute_cost


def test_the_host_budget_is_kept_at_every_size():
    params, x = args("float32")
    each = ROWS * WIDTH * 4
    for room in (each, 5 * each, 40 * each):
        found = jaxckpt.frontier(loss, params, x, host_budget=room, num_points=6)
        assert all(point.host_bytes <= room for point in found.points)
        assert any(point.host_bytes for point in found.points) == (room > each)
    assert "on the host" in str(found) and any(point["host_bytes"] for point in found.to_json()["points"])


def test_unknown_memory_and_shares_are_refused_by_name():
    class Bare(CpuCompiler):
        host_memory = ""

    jaxckpt.register_compiler("bare", Bare())
    jaxckpt.define_target("bare-cpu", like="cpu", compiler="bare")
    with pytest.raises(BudgetError, match=r"host_budget='1GB': the compiler for target='bare-cpu'"):
        jaxckpt.plan(loss, *args("float32"), budget="50%", host_budget="1GB", target="bare-cpu")
    for wrong in ("50%", 0.5, -1, "many"):
        with pytest.raises(BudgetError, match="host_budget"):
            jaxckpt.plan(loss, *args("float32"), budget="50%", host_budget=wrong)
        with pytest.raises(BudgetError, match="host_budget"):
            jaxckpt.jit(step, budget="50%", host_budget=wrong)


@pytest.mark.filterwarnings("ignore:nothing fits")
def test_options_of_the_compiler_that_a_plan_needs():
    plan, least = sending()
    flag = "xla_gpu_enable_host_memory_offloading"
    assert jaxckpt.compiler_options(plan) == jaxckpt.compiler_options() == jaxckpt.compiler_options(least)
    assert jaxckpt.compiler_options(dataclasses.replace(plan, target="h100"))[flag] is True
    assert flag not in jaxckpt.compiler_options(dataclasses.replace(least, target="h100"))
    assert flag not in jaxckpt.compiler_options(dataclasses.replace(plan, target="v5e:2x2"))
    decorator._warn_without_options.cache_clear()
    with pytest.warns(JaxckptWarning, match=f"XLA_FLAGS=--{flag}=true"):
        decorator._warn_without_options("gpu")


def test_places_are_those_of_the_policy():
    policy = apply._policy((("a", Place.DEVICE), ("b", Place.HOST)))
    named = functools.partial(jax.checkpoint, policy=policy)

    @named
    def fun(x):
        return jnp.sin(jax.ad_checkpoint.checkpoint_name(jnp.sin(x), "b"))

    assert "f32<host>" in str(jax.make_jaxpr(jax.grad(fun))(1.0))


def test_the_command_line(capsys):
    call = ["examples.mlp_revolve:loss", "--budget", "90%", "--no-verify", "--host-budget", "1GB", "--json"]
    if main(["plan", *call]) == 0:
        assert '"host_budget_bytes": 1000000000' in capsys.readouterr().out
    assert main(["plan", *call[:-2], "50%"]) == 2
    assert "host_budget='50%' is a share" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["frontier", "fit"])
def test_other_commands_take_it(command, capsys):
    budget = [] if command == "frontier" else ["--budget", "90%"]
    assert main([command, "examples.mlp_revolve:loss", *budget, "--host-budget", "50%"]) == 2
    assert "host_budget='50%' is a share" in capsys.readouterr().err


def test_names_of_the_function_go_nowhere():
    with pytest.raises(OptionError, match="sends nothing to the host"):
        jaxckpt.plan(loss, *args("float32"), budget="50%", solver="names", host_budget="1GB")


def test_a_kept_plan_is_of_its_host_budget(tmp_path):
    options = {"budget": "60%", "verify": False, "calibration": None, "cache_dir": tmp_path}
    given = args("float32")
    for room in (None, 10**9, 2 * 10**9):
        assert jaxckpt.plan(loss, *given, host_budget=room, **options).host_budget_bytes == room
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert jaxckpt.plan(loss, *given, **options).host_budget_bytes is None


@pytest.mark.parametrize("num_sent", [1, 2])
def test_equal_regions_send_their_own_inputs(num_sent):
    def chain(ws, x):
        for w in ws:
            x = jnp.tanh(jnp.sin(x) @ w)
        return jnp.sum(x)

    with x64():
        ws, x = [jnp.full((WIDTH, WIDTH), 0.1 * i) for i in (1, 2)], jnp.linspace(0, 1, WIDTH)
        traced = trace_placed(chain, (ws, x))
        program = traced.program
        starts = [k for k, eqn in enumerate(program.equations) if eqn.primitive.name == "sin"]
        ends = [starts[1], len(program.equations) - 1, len(program.equations)]
        spans = spans_at(program, [tuple(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)])
        schedule = Schedule((region((Keep(0, 0),)), region((Keep(1, 0),)), Keep(2, 0)))
        saved = [SavedValues(())] * 3
        sent = [program.inputs[i] for i in (1, 0)][:num_sent]
        fun = apply.Application().planned(program, spans, schedule, saved, "test", host=sent)
        given = [*ws, x]
        named = [e for e in jax.make_jaxpr(fun)(*given).eqns if e.primitive.name in ("remat2", "checkpoint", "remat")]
        assert len({id(e.params["jaxpr"]) for e in named[:2]}) == 3 - num_sent
        planned = lambda ws, x: fun(*ws, x)[0]  # noqa: E731
        assert sent_values(planned, ws, x) == num_sent
        assert_close(jit(jax.grad(planned, (0, 1)))(ws, x), jax.grad(chain, (0, 1))(ws, x), 1e-12)
        apply._warn_on_device.cache_clear()
        with apply.ON_DEVICE(True), pytest.warns(JaxckptWarning, match="stays on the device"):
            num_left = sent_values(planned, ws, x)
        assert num_left == 0
