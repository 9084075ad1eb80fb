"""Every model of the zoo traces, plans, and has under a plan the gradients that it has without."""

import functools

import jax
import pytest
from helpers import assert_close, jit
from zoo.catalogue import CATALOGUE, DEEP
from zoo.handmade import arrays, round_divisor

import jaxckpt
from jaxckpt.program.flops import gradient_cost

ALL = CATALOGUE | DEEP


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"):
        yield


# One of each framework and of each kind of loop is quick enough for every run.
QUICK = {"vit", "lstm", "ode", "tanh-64"}


def named(quick: set[str]) -> list:
    """The models of base size; those that are not quick are slow tests."""
    names = [n for n in ALL if ALL[n].size == "base"]
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(params=named(QUICK | {"llama", "moe", "unet", "resnet50"}))
def name(request) -> str:
    pytest.importorskip("flax")
    if request.param == "ode":
        pytest.importorskip("equinox")
    return request.param


def flops(fun, *specs):
    return gradient_cost(jax.value_and_grad(fun), *specs).flops


@pytest.mark.parametrize("name", named(QUICK))
def test_a_plan_gives_the_same_gradients(name):
    pytest.importorskip("equinox" if name == "ode" else "flax")
    case = ALL[name].case("tiny")
    plan = jaxckpt.plan(case.fun, *case.specs, max_cost=1.5, cost="flops", verify=False)
    assert plan.predicted_peak_bytes <= plan.unplanned_peak_bytes
    args = arrays(case.specs, case.vocab)
    got = jit(jax.value_and_grad(plan.apply(case.fun)))(*args)
    assert_close(got, jit(jax.value_and_grad(case.fun))(*args), 1e-4)


def test_every_policy_recomputes(name):
    case = ALL[name].case("tiny")
    plain = flops(case.fun, *case.specs)
    extra = {policy: flops(fun, *case.specs) / plain - 1 for policy, fun in case.policies.items()}
    assert all(0 < share < 2 for share in extra.values()), extra
    assert "full" in extra and any(p.endswith("+dots") for p in extra)


@functools.cache
def value_of(name, policy):
    case = CATALOGUE[name].case("tiny")
    return jit(case.policies[policy] if policy else case.fun)(*arrays(case.specs, case.vocab))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-scan"])
@pytest.mark.parametrize("policy", ["layer", "sqrt"])
def test_grouped_layers_are_the_same_layers(name, policy):
    pytest.importorskip("flax")
    policy = policy.replace("layer", "body") if name.endswith("scan") else policy
    assert_close(value_of(name, policy), value_of(name, None), 1e-5)


@pytest.mark.slow
def test_a_cut_model_is_a_smaller_program(name):
    cut, case = ALL[name].case(is_cut=True), ALL[name].case()
    assert 0 < flops(cut.fun, *cut.specs) < flops(case.fun, *case.specs)


@pytest.mark.parametrize(("n", "divisor"), [(12, 3), (16, 4), (512, 16), (7, 1), (2, 1)])
def test_the_square_root_is_a_divisor(n, divisor):
    assert round_divisor(n) in {divisor, n // divisor}
