"""Functions that change objects: flax NNX modules are carried as state, everything else is refused by its path."""

import collections
import functools
import itertools
import random
import warnings
from dataclasses import dataclass

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, slow_but
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxckpt
from jaxckpt.program.objects import call_unchanged

nnx = pytest.importorskip("flax.nnx")

X = jax.random.normal(jax.random.key(1), (64, 8)) + 2
BUDGETS = ["70%", "1GB"]
pytestmark = pytest.mark.filterwarnings("ignore::jaxckpt.JaxckptWarning")


def remat(fun, budget="70%", **options):
    return jaxckpt.auto_remat(fun, budget=budget, verify=False, cost="flops", **options)


class Net(nnx.Module):
    """Layers, running averages, and a mask that is another one at each call."""

    def __init__(self, seed=0, depth=4):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(depth)])
        self.norm, self.drop = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.drop(self.norm(x))


def loss(net, x):
    return jnp.mean(net(x) ** 2)


def state(*objects):
    """Every array of some objects, in a fixed order."""
    return [
        jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        for a in jax.tree.leaves(nnx.state(objects))
    ]


def after_two(fun, make=Net, transform=nnx.value_and_grad):
    """What two calls return, and what they leave in the module."""
    net = make()
    found = [jax.tree.leaves(transform(fun)(net, X)) for _ in range(2)]
    return found, state(net)


# --- Modules go in and out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_jitted", slow_but([False, True], True))
@pytest.mark.parametrize("budget", BUDGETS)
def test_two_steps_leave_the_state_that_they_leave_undecorated(budget, is_jitted):
    def transform(fun):
        found = nnx.value_and_grad(fun)
        return nnx.jit(found) if is_jitted else found

    wanted = after_two(loss, transform=transform)
    assert not np.allclose(wanted[0][0][0], wanted[0][1][0])  # the second mask is another one
    assert_close(after_two(remat(loss, budget), transform=transform), wanted, 1e-4)


def test_a_call_without_a_derivative_changes_the_state_too():
    assert_close(after_two(remat(loss), transform=lambda f: f), after_two(loss, transform=lambda f: f), 1e-4)


def test_the_same_call_is_traced_once_and_its_counts_go_on():
    decorated = remat(_counting_loss)
    TRACES.clear()
    wanted = after_two(loss)
    assert_close(after_two(decorated), wanted, 1e-4)
    assert len(TRACES) == 1


TRACES = []


def _counting_loss(net, x):
    TRACES.append(None)
    return loss(net, x)


@settings(max_examples=6, deadline=None)
@given(st.permutations(["net", "tied", "other"]), st.booleans())
def test_modules_in_several_places_stay_the_same_modules(order, is_named):
    def make():
        net, other = Net(0, 1), Net(1, 1)
        return {"net": net, "tied": net, "other": other}

    def step(a, b, c, x):
        assert sum(p is q for p, q in [(a, b), (b, c), (a, c)]) == 1
        return jnp.mean(a(b(c(x))) ** 2)

    found = []
    for fun in (step, remat(step)):
        nets = make()
        a, b, c = (nets[name] for name in order)
        value = fun(a, b, c=c, x=X) if is_named else fun(a, b, c, X)
        found.append((value, state(nets["net"], nets["other"])))
        assert nets["tied"] is nets["net"]
    assert_close(found[1], found[0], 1e-4)


def test_tied_weights_have_one_gradient():
    class Tied(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(jnp.tanh(self.b(jnp.tanh(self.a(x)))))))

    assert_close(after_two(remat(loss), make=Tied), after_two(loss, make=Tied), 1e-4)


def test_other_parts_are_differentiated_as_nnx_is_told():
    def with_aux(net, x):
        return loss(net, x), net.norm.mean[...]

    wrt = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("norm")))
    transform = functools.partial(nnx.grad, argnums=wrt, has_aux=True)
    found = after_two(remat(with_aux, "95%"), transform=transform)
    assert_close(found, after_two(with_aux, transform=transform), 1e-4)
    plan = jaxckpt.plan(with_aux, Net(), X, budget="1GB", verify=False, argnums=wrt, has_aux=True)
    assert plan.parameter_bytes == 2 * 8 * 4
    assert jaxckpt.plan(loss, Net(), X, budget="1GB", verify=False).parameter_bytes == (4 * 72 + 16) * 4


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_plan_is_applied_under_value_and_grad(budget):
    net = Net()
    before = state(net)
    plan = jaxckpt.plan(loss, net, X, budget=budget, verify=False, cost="flops")
    assert_close(state(net), before, 0)
    assert_close(after_two(plan.apply(loss)), after_two(loss), 1e-4)


def test_new_variables_and_plain_fields_appear_as_under_remat():
    class Sowing(Net):
        def __call__(self, x):
            y = super().__call__(x)
            self.calls += 1
            self.sow(nnx.Intermediate, "seen", jnp.mean(y))
            return y

    found = []
    for fun in (nnx.remat(loss), remat(loss)):
        net = Sowing()
        nnx.value_and_grad(lambda net, x, fun=fun: fun(net, x))(net, X)
        found.append((net.calls, state(net), jax.tree.leaves(nnx.state(net, nnx.Intermediate))))
    assert_close(found[1], found[0], 1e-4)
    assert found[1][0] == 1
    assert found[1][2]


def test_state_that_is_not_mapped_stays_so_under_vmap():
    def masked(net, x):
        return jnp.mean(net.drop(net.layers[0](x)))

    found = []
    for fun in (masked, remat(masked)):
        net = Net()
        values = nnx.vmap(fun, in_axes=(None, 0))(net, X[:, None])
        found.append((values, state(net)))
    assert_close(found[1], found[0], 1e-4)

    def placed(x):
        return x * 2, jnp.arange(3.0)

    mapped = lambda fun: jax.vmap(fun, out_axes=(0, None))(X)  # noqa: E731
    assert_close(mapped(remat(placed, "1GB")), mapped(placed), 0)


def test_a_function_may_return_modules():
    def fun(net, x):
        return loss(net, x), net, nnx.Linear(8, 8, rngs=nnx.Rngs(3))

    net = Net()
    _, same, new = remat(fun)(net, X)
    assert same is net
    assert new(X).shape == X.shape


# --- What a function closes over ------------------------------------------------------------------------------------


class Trainer:
    def __init__(self):
        self.nets = {"main": Net()}

    def loss(self, scale, x):
        return loss(self.nets["main"], scale * x)


def over_cell(net):
    return lambda scale, x: loss(net, scale * x)


def over_function(net):
    inner = over_cell(net)
    return lambda scale, x: inner(scale, x)


def over_default(net):
    return lambda scale, x, net=net: loss(net, scale * x)


def over_partial(net):
    return functools.partial(lambda net, scale, x: loss(net, scale * x), net)


def over_self(net):
    trainer = Trainer()
    trainer.nets["main"] = net
    return trainer.loss


def over_module(net):
    net.loss_of = None
    return functools.partial(lambda call, scale, x: jnp.mean(call(scale * x) ** 2), net.__call__)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("make", [over_cell, over_function, over_default, over_partial, over_self, over_module])
def test_modules_that_are_closed_over_are_carried_too(make, budget):
    found = []
    for decorate in (lambda f: f, lambda f: remat(f, budget)):
        net = Net()
        fun = decorate(make(net))
        values = [fun(1.5, X) for _ in range(2)]
        net.layers[0].kernel[...] *= 0  # a later call reads what is there then
        found.append((values, fun(1.5, X), state(net)))
    assert_close(found[1], found[0], 1e-4)


def test_a_module_from_outside_of_a_transformation_is_not_changed_inside():
    net = Net()
    before = state(net)
    for fun in (remat(lambda scale: loss(net, scale * X)), lambda scale: remat(loss)(net, scale * X)):
        with pytest.raises(jaxckpt.UnsupportedProgramError, match="outside of a transformation"):
            jax.grad(fun)(1.5)
    assert_close(state(net), before, 0)
    net.eval()  # now it is read only
    wanted = jax.grad(lambda scale: loss(net, scale * X))(1.5)
    assert_close(jax.grad(lambda scale: remat(loss)(net, scale * X))(1.5), wanted, 1e-4)
    assert_close(state(net), before, 0)


# --- Whole steps ----------------------------------------------------------------------------------------------------


def make_step(fun):
    def step(net, optimizer, x):
        value, gradients = nnx.value_and_grad(fun)(net, x)
        optimizer.update(net, gradients)
        return value

    return step


def trained(step, net, optimizer, num=2):
    values = [step(net, optimizer, X) for _ in range(num)]
    return values, state(net, optimizer)


def make_training():
    net = Net()
    return net, nnx.Optimizer(net, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)


@pytest.mark.parametrize(("budget", "donated"), [("97%", ()), ("1GB", (0, 1))])
def test_a_fitted_step_trains_as_under_nnx_jit(budget, donated):
    wanted = trained(nnx.jit(make_step(loss)), *make_training())
    net, optimizer = make_training()
    fitted = jaxckpt.fit(make_step(jaxckpt.auto_remat(loss)), net, optimizer, X, budget=budget, donate_argnums=donated)
    assert_close(trained(fitted.step, net, optimizer), wanted, 1e-3)
    with pytest.raises(jaxckpt.PlanMismatchError, match="planned for"):
        fitted.step(net, optimizer, X[:32])


def test_a_fitted_step_that_closes_over_its_modules_trains_them():
    net, optimizer = make_training()
    wanted = trained(nnx.jit(make_step(loss)), *make_training())
    step = functools.partial(make_step(jaxckpt.auto_remat(loss)), net, optimizer)
    fitted = jaxckpt.fit(step, X, budget="1GB")
    values = [fitted.step(X) for _ in range(2)]
    assert_close((values, state(net, optimizer)), wanted, 1e-3)


# --- Everything else is refused -------------------------------------------------------------------------------------


class Owner:
    __slots__ = ("__dict__", "slot")

    def __init__(self):
        self.history, self.calls, self.options, self.inner = [0, 1], 0, {"deep": [{}]}, None
        self.seen, self.rng, self.noise, self.slot = {1}, random.Random(0), np.random.default_rng(0), 0

    def append(self, x):
        self.history.append(jnp.mean(x))

    def count(self, x):
        self.calls += 1

    def deep(self, x):
        self.options["deep"][0]["x"] = x

    def drop(self, x):
        del self.options["deep"]

    def add(self, x):
        self.seen.add(2)

    def draw(self, x):
        self.rng.random()

    def noisy(self, x):
        self.noise.normal()

    def slotted(self, x):
        self.slot = 1

    def new(self, x):
        self.last = x

    def call(self, change, x):
        getattr(self, change)(x)
        return jnp.mean(jnp.tanh(x))


PATHS = {
    "append": "self.history[2] while it is traced and leaves a tracer",
    "count": "self.calls while",
    "deep": "self.options['deep'][0]['x'] while it is traced and leaves a tracer",
    "drop": "self.options['deep'] while",
    "add": "self.seen while",
    "draw": "self.rng while",
    "noisy": "self.noise while",
    "slotted": "self.slot while",
    "new": "self.last while it is traced and leaves a tracer",
}


@pytest.mark.parametrize("how", ["decorate", "argument", "static", "plan", "apply", "fit", "held"])
@pytest.mark.parametrize("change", PATHS)
def test_an_object_that_changes_is_refused_by_its_path(change, how):
    owner = Owner()
    call = functools.partial(owner.call, change)
    if how == "held":  # in a field of another object
        holder = Owner()
        holder.inner = owner
        call, path = functools.partial(lambda self, x: self.inner.call(change, x), holder), PATHS[change]
        path = path.replace("self.", "partial.args[0].inner.", 1)
    else:
        path = PATHS[change]
    calls = {
        "argument": lambda: remat(Owner.call, "1GB")(owner, change, X),
        "static": lambda: remat(Owner.call, "1GB", static_argnums=(0, 1))(owner, change, X),
        "plan": lambda: jaxckpt.plan(call, X, budget="1GB", verify=False),
        "apply": lambda: jaxckpt.plan(lambda x: jnp.mean(jnp.tanh(x)), X, budget="1GB", verify=False).apply(call)(X),
        "fit": lambda: jaxckpt.fit(lambda x: jax.grad(jaxckpt.auto_remat(call))(x), X, budget="1GB"),
    }
    with pytest.raises(jaxckpt.UnsupportedProgramError) as caught:
        calls.get(how, lambda: remat(call, "1GB")(X))()
    assert path in str(caught.value)


def test_closure_cells_and_arguments_are_watched():
    calls, seen = 0, []

    def counts(x):
        nonlocal calls
        calls += 1
        return jnp.sum(x)

    def keeps(x):
        seen.append(x)
        return jnp.sum(x)

    def pops(batch):
        return jnp.sum(batch.pop("x"))

    def sets(batch):
        batch["x"] = batch["x"] * 2
        return jnp.sum(batch["x"])

    def marks(x):
        marks.called = True
        return jnp.sum(x)

    for fun, arg, path in [
        (counts, X, "closure cell 'calls' of counts while"),
        (keeps, X, "closure cell 'seen' of keeps[0] while it is traced and leaves a tracer"),
        (pops, {"x": X}, "batch['x'] while"),
        (sets, {"x": X}, "batch['x'] while it is traced and leaves a tracer"),
        (marks, X, "marks.called while"),
        (jax.jit(keeps), X * 2, "closure cell 'seen' of keeps"),
    ]:
        with pytest.raises(jaxckpt.UnsupportedProgramError) as caught:
            remat(fun, "1GB")(arg)
        assert path in str(caught.value)


def test_an_object_beside_a_module_is_refused_too_and_the_module_stays_as_it_was():
    class Logging(Net):
        def __init__(self):
            super().__init__()
            self.log = Owner()

        def __call__(self, x):
            y = super().__call__(x)
            self.log.count(x)
            return y

    net = Logging()
    before = state(net)
    with pytest.raises(jaxckpt.UnsupportedProgramError, match=r"log\.calls"):
        remat(loss)(net, X)
    assert_close(state(net), before, 0)


# --- What may change ------------------------------------------------------------------------------------------------


class Cached:
    @functools.cached_property
    def table(self):
        return np.arange(8, dtype=np.float32)

    @functools.lru_cache  # noqa: B019
    def scale(self, n):
        return 1.0 / n

    def loss(self, x):
        self.same = self.__dict__.get("same", 3)
        local = collections.Counter("abc")
        local["a"] += 1
        return jnp.mean(x[0] * self.table) * self.scale(local["a"])


def test_caches_and_fields_set_to_what_they_were_are_no_changes():
    cached = Cached()
    cached.same = 3
    assert_close(remat(cached.loss, "1GB")(X), Cached.loss(cached, X), 1e-5)


def test_frameworks_with_pure_functions_are_left_alone():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False)(jnp.tanh(linen.Dense(8)(x)))

    model = Linen()
    variables = model.init(jax.random.key(0), X)

    def linen_loss(variables, x):
        y, new = model.apply(variables, x, mutable=["batch_stats"])
        return jnp.mean(y**2), new

    wanted = jax.value_and_grad(linen_loss, has_aux=True)(variables, X)
    assert_close(jax.value_and_grad(remat(linen_loss, "1GB"), has_aux=True)(variables, X), wanted, 1e-2)

    norm, carried = eqx.nn.make_with_state(eqx.nn.BatchNorm)(8, axis_name="batch", mode="batch")

    def norm_loss(norm, carried, x):
        y, new = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, carried)
        return jnp.mean(y**3), new

    wanted = eqx.filter_value_and_grad(norm_loss, has_aux=True)(norm, carried, X)
    found = eqx.filter_value_and_grad(remat(norm_loss), has_aux=True)(norm, carried, X)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(wanted), 1e-4)


def test_wrappers_of_libraries_keep_counts_of_their_own():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    mapped = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=spec, out_specs=spec)
    fun = lambda x: jnp.sum(mapped(x))  # noqa: E731
    assert_close(jax.grad(remat(fun, "1GB"))(X), jax.grad(fun)(X), 1e-5)


def test_haiku_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hk = pytest.importorskip("haiku")

    def forward(x):
        count = hk.get_state("count", (), x.dtype, init=jnp.zeros)
        hk.set_state("count", count + 1)
        return jnp.mean(jnp.tanh(hk.Linear(8)(x)) ** 2) * count

    model = hk.transform_with_state(forward)
    params, carried = model.init(jax.random.key(0), X)

    def hk_loss(params, carried, x):
        return model.apply(params, carried, None, x)

    wanted = jax.value_and_grad(hk_loss, has_aux=True)(params, carried, X)
    assert_close(jax.value_and_grad(remat(hk_loss, "1GB"), has_aux=True)(params, carried, X), wanted, 1e-4)


@dataclass
class Node:
    next: object = None
    size: int = 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.data())
def test_any_one_change_in_a_graph_of_objects_is_found(size, data):
    nodes = [Node(size=i) for i in range(size)]
    for node in nodes:
        node.next = [nodes[data.draw(st.integers(0, size - 1))], {"self": node}]
    for a, b in itertools.pairwise(nodes):
        a.next.append(b)  # all are within reach, in circles
    changed = nodes[data.draw(st.integers(0, size - 1))]

    def fun(root, does):
        if does:
            changed.size += 1
        return 0

    assert call_unchanged(fun, (nodes[0], False), {}) == 0
    with pytest.raises(jaxckpt.UnsupportedProgramError, match="size"):
        call_unchanged(fun, (nodes[0], True), {})
