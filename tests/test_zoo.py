"""Every model of the zoo traces, plans, and has under a plan the gradients that it has without."""

import functools

import jax
import pytest
from helpers import assert_close, jit
from zoo.catalogue import CATALOGUE, DEEP, Entry
from zoo.handmade import arrays, round_divisor

import jaxckpt
from jaxckpt import costs

ALL = CATALOGUE | DEEP


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(params=[n for n in ALL if ALL[n].size == "base"])
def entry(request) -> Entry:
    pytest.importorskip("flax")
    if request.param == "ode":
        pytest.importorskip("equinox")
    return ALL[request.param]


def flops(fun, *specs):
    return costs.gradient_cost(jax.value_and_grad(fun), *specs).flops


def test_a_plan_gives_the_same_gradients(entry):
    case = entry.case("tiny")
    plan = jaxckpt.plan(case.fun, *case.specs, max_cost=1.5, cost="flops", verify=False)
    assert plan.predicted_peak_bytes <= plan.unplanned_peak_bytes
    args = arrays(case.specs, case.vocab)
    got = jit(jax.value_and_grad(plan.apply(case.fun)))(*args)
    assert_close(got, jit(jax.value_and_grad(case.fun))(*args), 1e-4)


def test_every_policy_is_the_same_loss_and_recomputes(entry):
    case = entry.case("tiny")
    plain = flops(case.fun, *case.specs)
    for name, policy in case.policies.items():
        assert jax.eval_shape(policy, *case.specs) == jax.eval_shape(case.fun, *case.specs), name
        assert flops(policy, *case.specs) > plain, name


@functools.cache
def value_of(name, policy):
    case = CATALOGUE[name].case("tiny")
    return jit(case.policies[policy] if policy else case.fun)(*arrays(case.specs, case.vocab))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-scan", "vit"])
@pytest.mark.parametrize("policy", ["layer", "sqrt"])
def test_grouped_layers_are_the_same_layers(name, policy):
    pytest.importorskip("flax")
    policy = policy.replace("layer", "body") if name.endswith("scan") else policy
    assert_close(value_of(name, policy), value_of(name, None), 1e-5)


def test_a_cut_model_is_a_smaller_program(entry):
    cut, case = entry.case(is_cut=True), entry.case()
    assert 0 < flops(cut.fun, *cut.specs) < flops(case.fun, *case.specs)


@pytest.mark.parametrize(("n", "divisor"), [(12, 3), (16, 4), (512, 16), (7, 1), (2, 1)])
def test_the_square_root_is_a_divisor(n, divisor):
    assert round_divisor(n) in {divisor, n // divisor}
