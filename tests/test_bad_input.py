"""Bad input: one sentence that names it and says what to do."""

import jax
import jax.numpy as jnp
import pytest
from helpers import no_compiles
from zoo.models import chain_args, chain_loss

import jaxckpt
from jaxckpt import BudgetError, InfeasibleBudgetError, NotDifferentiableError, TargetError, UnsupportedProgramError

ARGS = chain_args(layers=4)
FLOAT = jax.ShapeDtypeStruct((4, 4), jnp.float32)
INT = jax.ShapeDtypeStruct((4, 4), jnp.int32)

BAD_BUDGETS = [
    "8 gigs",
    "8",
    "",
    "GB",
    "-1GB",
    "1e9",
    "0%",
    "-5%",
    "60",
    0.6,
    1.0,
    -1,
    0,
    True,
    False,
    b"8GB",
    [8],
    (1,),
]


@pytest.mark.parametrize("budget", BAD_BUDGETS, ids=repr)
def test_a_budget_that_cannot_be_read_is_refused_with_what_is(budget):
    for call in (
        lambda: jaxckpt.plan(chain_loss, *ARGS, budget=budget),
        lambda: jaxckpt.auto_remat(budget=budget)(chain_loss),
    ):
        with pytest.raises(BudgetError) as error:
            call()
        text = str(error.value)
        assert '"8GB"' in text and '"80%"' in text
        assert repr(budget) in text or str(budget) in text


def test_a_float_is_refused_with_a_hint():
    with pytest.raises(BudgetError, match='"60%"'):
        jaxckpt.plan(chain_loss, *ARGS, budget=0.6)


def test_a_budget_may_be_written_in_every_documented_way():
    from jaxckpt.units import parse_budget

    sizes = {"8GB": 8 * 10**9, "8GiB": 2**33, "8 gb": 8 * 10**9, "1.5MiB": 3 * 2**19, "512B": 512, 1000: 1000}
    assert {budget: parse_budget(budget).size_bytes for budget in sizes} == sizes
    assert parse_budget("12.5%").resolve(1000) == 125


@pytest.mark.parametrize("verify", [True, False])
def test_an_infeasible_budget_says_what_is_feasible_and_what_forces_it(verify):
    with pytest.raises(InfeasibleBudgetError) as caught:
        jaxckpt.plan(chain_loss, *ARGS, budget="100KB", verify=verify)
    error = caught.value
    assert error.budget_bytes == 100_000 and error.measured is verify
    assert error.budget_bytes < error.expected_least_bytes < error.unplanned_peak_bytes
    assert error.least_peak_bytes == (error.expected_least_bytes if verify else None)
    assert (error.num_compiles > 1) is verify
    said = f"{error.least_peak_bytes:,} bytes) (measured" if verify else "is about"
    for part in ("100,000", said, "models.py:"):
        assert part in str(error)
    assert any("float32[256,32]" in what and "models.py:" in line for what, _, line in error.forced_by)


def test_the_error_of_a_budget_below_what_no_plan_changes_names_the_least():
    with pytest.raises(InfeasibleBudgetError, match="which no plan changes") as caught:
        jaxckpt.plan(chain_loss, *ARGS, budget=1000)
    error = caught.value
    assert error.least_peak_bytes == error.expected_least_bytes and 0 < error.num_compiles <= 8
    assert error.forced_by[0][1] < error.expected_least_bytes
    least = jaxckpt.plan(chain_loss, *ARGS, budget=error.least_peak_bytes)
    assert least.measured_peak_bytes == error.least_peak_bytes


def test_a_predicted_plan_is_refused_without_a_compile():
    with no_compiles(), pytest.raises(InfeasibleBudgetError, match="which no plan changes") as caught:
        jaxckpt.plan(chain_loss, *ARGS, budget=1000, verify=False)
    error = caught.value
    assert error.least_peak_bytes is None and error.num_compiles == 0 and not error.measured


def test_neither_or_both_limits_are_refused():
    for limits in ({}, {"budget": "1GB", "max_cost": 1.1}):
        with pytest.raises(BudgetError, match="exactly one"):
            jaxckpt.plan(chain_loss, *ARGS, **limits)


@pytest.mark.parametrize("max_cost", [0.9, -1, float("nan"), float("inf"), "1.1", True])
def test_a_max_cost_that_makes_no_sense_is_refused(max_cost):
    with pytest.raises(BudgetError, match=r"1\.1 allows 10 %"):
        jaxckpt.plan(chain_loss, *ARGS, max_cost=max_cost)


@pytest.mark.parametrize("reserve", ["2 gigs", -1, 0.5, True])
def test_a_reserve_that_cannot_be_read_is_refused(reserve):
    with pytest.raises(BudgetError, match="reserve="):
        jaxckpt.plan(chain_loss, *ARGS, budget="1GB", reserve=reserve)


def test_a_reserve_that_leaves_nothing_is_refused():
    with pytest.raises(BudgetError, match="reserve="):
        jaxckpt.plan(chain_loss, *ARGS, budget="1MB", reserve="1MB", verify=False)


@pytest.mark.parametrize("option", [{"cost": "money"}, {"solver": "fastest"}])
def test_a_decorator_refuses_an_unknown_choice_at_once(option):
    with pytest.raises(jaxckpt.errors.OptionError, match=next(iter(option))):
        jaxckpt.auto_remat(chain_loss, budget="1GB", **option)


def test_a_reserve_beside_a_limit_on_cost_is_refused():
    with pytest.raises(BudgetError, match="max_cost"):
        jaxckpt.plan(chain_loss, *ARGS, max_cost=1.1, reserve="1MB")


def test_a_refusal_says_what_the_reserve_left():
    with pytest.raises(InfeasibleBudgetError, match=r"of which reserve=.* leaves") as caught:
        jaxckpt.plan(chain_loss, *ARGS, budget=100_000, reserve=99_999, verify=False)
    assert caught.value.budget_bytes == 1
    enough = -(-caught.value.expected_least_bytes * 11 // 10) + 99_999
    assert jaxckpt.plan(chain_loss, *ARGS, budget=enough, reserve=99_999, verify=False).peak_bytes < enough


def test_a_program_of_nothing_is_planned_as_it_is():
    assert jaxckpt.plan(lambda x: x * 2, jnp.zeros((0,)), budget="80%", verify=False).schedule is None
    assert "0 B" in str(jaxckpt.frontier(lambda x: x * 2, jnp.zeros((0,)), num_points=2))


def test_a_function_that_fails_raises_its_own_error():
    class OwnError(Exception):
        pass

    def fun(x):
        raise OwnError("mine")

    for call in (
        lambda: jaxckpt.plan(fun, FLOAT, budget="1GB"),
        lambda: jaxckpt.measure(fun, FLOAT),
        lambda: jaxckpt.auto_remat(fun, budget="1GB")(jnp.ones(3)),
    ):
        with pytest.raises(OwnError, match="mine"):
            call()
    with pytest.raises(TypeError, match=r"dot_general|matmul"):
        jaxckpt.plan(lambda x: x @ jnp.ones((3, 3)), FLOAT, budget="1GB")


NOT_DIFFERENTIABLE = {
    "an integer argument": (lambda x: x.sum(), (INT,), {}, r"int32\[4,4\]"),
    "no array argument": (lambda f: jnp.ones(3).sum(), ("relu",), {}, "no arrays"),
    "an integer result": (lambda x: x.argmax(), (FLOAT,), {}, r"returns int32\[\]"),
    "a boolean result": (lambda x: (x > 0).all(), (FLOAT,), {}, r"returns bool\[\]"),
    "no result": (lambda x: None, (FLOAT,), {}, "nothing"),
    "argnums out of range": (lambda x: x.sum(), (FLOAT,), {"argnums": 3}, "argnums=3"),
    "argnums at an integer": (lambda x, i: x[i[0, 0]].sum(), (FLOAT, INT), {"argnums": 1}, "argnums=1"),
}


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_nothing_to_differentiate_is_said_plainly(name):
    fun, args, options, wanted = NOT_DIFFERENTIABLE[name]
    with pytest.raises(NotDifferentiableError, match=wanted):
        jaxckpt.plan(fun, *args, budget="1GB", **options)


def test_a_result_that_no_tangent_reaches_is_planned_without_a_checkpoint():
    plan = jaxckpt.plan(lambda x: jax.lax.stop_gradient(x).sum(), FLOAT, budget="1GB")
    assert plan.schedule is None


def test_unknown_names_are_refused_with_what_is_known():
    with pytest.raises(ValueError, match="auto, chain, chen, revolve"):
        jaxckpt.plan(chain_loss, *ARGS, budget="1GB", solver="fastest")
    with pytest.raises(ValueError, match='cost="flops"'):
        jaxckpt.plan(chain_loss, *ARGS, budget="1GB", cost="money")
    with pytest.raises(TargetError, match="'h100'"):
        jaxckpt.plan(chain_loss, *ARGS, budget="1GB", target="h10")
    with pytest.raises(TargetError, match="'v5e:2x4'"):
        jaxckpt.plan(chain_loss, *ARGS, budget="1GB", target="v5e:8")


def test_a_mutable_reference_is_refused_with_its_line():
    count = jax.new_ref(jnp.zeros(()))

    def fun(w):
        count[...] += 1.0
        return jnp.sum(jnp.sin(w))

    for call in (
        lambda: jaxckpt.plan(fun, FLOAT, budget="1GB"),
        lambda: jax.grad(jaxckpt.auto_remat(fun, budget="1GB"))(jnp.ones(3)),
    ):
        with pytest.raises(UnsupportedProgramError, match=r"test_bad_input\.py"):
            call()


def test_errors_are_jaxckpt_errors():
    for error in (BudgetError, InfeasibleBudgetError, NotDifferentiableError, TargetError, UnsupportedProgramError):
        assert issubclass(error, jaxckpt.JaxckptError)
