"""Programs of very many equal or unlike operations: cut as short ones are, planned, and equal to the plain function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import analysed, assert_close, jit

import jaxckpt
from jaxckpt.kinds.base import is_alone
from jaxckpt.memory.peak import peak_bytes
from jaxckpt.model.cut import _heavy, cut_program
from jaxckpt.program import dataflow
from jaxckpt.program.ir import size_bytes
from jaxckpt.program.trace import trace

F32 = jnp.float32


def specs(*shapes):
    return [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]


def layers(weights, x):
    for w1, w2 in weights:
        x = x + jnp.tanh(x @ w1) @ w2
    return jnp.sum(x)


def layer_args(num, width=8, batch=16):
    return [tuple(specs((width, 4 * width), (4 * width, width))) for _ in range(num)], *specs((batch, width))


def recurrence(w, xs):
    h = jnp.zeros_like(xs[0])
    for x in xs:
        h = jnp.tanh(h @ w + x)
    return jnp.sum(h * h)


def recurrence_args(num, width=4, batch=64):
    return *specs((width, width)), specs((batch, width)) * num


def stacked(weights, x):
    for i in range(weights.shape[0]):
        x = jnp.tanh(x @ weights[i])
    return jnp.sum(x)


def unlike(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


def unlike_args(num, batch=16):
    widths = np.random.default_rng(0).integers(4, 24, num // 2 + 1).tolist()
    return specs(*itertools.pairwise(widths)), *specs((batch, widths[0]))


def cut(fun, args):
    """The program, its cut, and for each costly equation its source and primitive."""
    program = trace(fun, args).program
    graph = dataflow.build_graph(program)
    active = dataflow.active_values(program, set(program.inputs), {x for x in program.outputs if isinstance(x, int)})
    spans = cut_program(program, graph, active, is_alone=is_alone)
    costly = _heavy(program, graph, range(len(program.equations)), active, 130)
    return program, spans, costly


@pytest.mark.parametrize("num", [150, 250])
def test_so_many_layers_and_four_times_as_many_are_cut_alike(num):
    (few, _, costly), (many, spans, all_costly) = cut(layers, layer_args(num)), cut(layers, layer_args(4 * num))
    per_layer = (len(many.equations) - len(few.equations)) // (3 * num)
    assert 2 * num <= len(costly) and [p for p in all_costly if p < (num - 1) * per_layer] == [
        p for p in costly if p < (num - 1) * per_layer
    ]
    assert len(all_costly) - len(costly) == 3 * num * (len(costly) // num)
    assert 120 <= len(spans) <= 130
    assert max(len(span.equations) for span in spans) <= 5 * len(many.equations) / len(spans)


def test_small_layers_beside_a_giant_product_are_cut():
    def fun(weights, head, x):
        return layers(weights, x) + jnp.sum(jnp.tanh(jnp.tanh(head @ head) @ head))

    weights, x = layer_args(300)
    _, spans, costly = cut(fun, (weights, *specs((1024, 1024)), x))
    assert len(costly) >= 300 and len(spans) >= 100


@pytest.mark.parametrize(
    ("fun", "args"),
    [
        pytest.param(recurrence, recurrence_args(500), marks=pytest.mark.slow, id="recurrence"),
        pytest.param(stacked, specs((520, 8, 8), (64, 8)), marks=pytest.mark.slow, id="stacked"),
        pytest.param(unlike, unlike_args(2000), marks=pytest.mark.slow, id="unlike"),
    ],
)
def test_there_is_something_to_choose_from(fun, args):
    found = analysed(fun, *args)
    assert found.blocks is not None and 100 <= found.blocks.problem.num_blocks <= 135
    peaks = [c.judgement.peak_bytes for c in found.candidates]
    assert len(peaks) > 5 and min(peaks) < found.unplanned.judgement.peak_bytes / 3


def test_what_layers_read_of_one_array_is_not_held_as_often_as_they_read_it():
    layers, width, batch = 40, 8, 16
    program = trace(stacked, specs((layers, width, width), (batch, width))).program
    joint = trace(jax.grad(stacked), specs((layers, width, width), (batch, width))).program
    whole = size_bytes(program.avals[program.inputs[0]])
    sizes = [size_bytes(aval) for aval in joint.avals]
    results = [x for x in joint.outputs if isinstance(x, int)]
    peak = peak_bytes(joint.equations, sizes.__getitem__, kept=results)
    # Each layer's gradient, its state and its derivative, and the sum of the gradients.
    assert peak < 2 * whole + 4 * layers * width * batch * 4


def test_without_candidates_what_is_saved_is_not_nothing():
    found = analysed(lambda x: jnp.sum(jnp.tanh(x)), *specs((8, 8)))
    plan = jaxckpt.plan(lambda x: jnp.sum(jnp.tanh(x)), *specs((8, 8)), budget="1GB", verify=False)
    assert plan.unplanned_peak_bytes > found.fixed_bytes


@pytest.mark.slow
def test_a_recurrence_of_500_steps_is_planned_verified_and_equal():
    args = recurrence_args(500)
    plan = jaxckpt.plan(recurrence, *args, budget="80%")
    assert plan.measured_peak_bytes is not None and plan.peak_bytes <= 0.8 * plan.unplanned_peak_bytes
    assert plan.recompute_flops > 0
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) / 2), args)
    got = jit(jax.value_and_grad(plan.apply(recurrence)))(*values)
    assert_close(got, jit(jax.value_and_grad(recurrence))(*values), 1e-5)
