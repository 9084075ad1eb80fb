"""A hundred random programs, quickly: `make fuzz` runs thousands of larger ones past every oracle."""

import json

import jax
import pytest
from fuzz import oracles, reducing, trying
from fuzz.constructs import CONSTRUCTS
from fuzz.counting import RULES
from fuzz.programs import build, digits, draw
from fuzz.trying import tried

SEEDS, PER_TEST = range(100), 10
# The rest is for `make test-fuzz`.
QUICK_STARTS = (10,)
# A plan that is predicted compiles nothing but the two functions that are compared.
QUICK = {
    "how": "apply",
    "cost": "time",
    "solver": "auto",
    "verify": False,
    "keep_checkpoints": True,
    "max_compiles": None,
}
ONE = ["dense", {"w": 0, "by": "tanh"}, 0, 0]


@pytest.fixture(autouse=True)
def _doubles():
    """In all threads, those that callbacks run in among them."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def quick(seed):
    """A short program with one budget."""
    spec = draw(seed, least=2, most=5)
    targets = ("h100", "v5e", None, None)
    plan = {**QUICK, "budget": ("middle", "least", "high")[seed % 3], "target": targets[seed % 4]}
    plan["how"] = "auto_remat" if spec["transform"] == "vmap of grad" or seed % 5 == 0 else "file"
    return {**spec, "plans": [plan]}


def small(*ops, **others):
    """A program of a few operations, as failures are printed."""
    plan = {**QUICK, "budget": "least", "target": None}
    spec = {"seed": 0, "rows": 32, "width": 4, "num_weights": 2, "transform": "none", "output": "scalar", "argnums": 0}
    return {**spec, "ops": [*ops], "plans": [plan], **others}


@pytest.mark.parametrize(
    "start", [n if n in QUICK_STARTS else pytest.param(n, marks=pytest.mark.slow) for n in SEEDS[::PER_TEST]]
)
def test_random_programs(start):
    rows = [tried(quick(seed), ("undecorated", "judge")) for seed in range(start, start + PER_TEST)]
    assert [row for row in rows if row["failures"]] == []
    assert sum(row["oracles"]["undecorated"] for row in rows) == PER_TEST


def test_a_hundred_seeds_have_every_construct():
    drawn = {name for seed in SEEDS for name, *_ in quick(seed)["ops"]}
    assert drawn == set(CONSTRUCTS)


def test_a_program_is_plain_data_and_its_seed_says_all():
    spec = draw(11)
    assert json.loads(json.dumps(spec)) == json.loads(json.dumps(draw(11))) and draw(12) != spec
    assert 5 <= len(spec["ops"]) <= 60 and len(spec["plans"]) == 3


def test_every_construct_is_finite_under_every_transformation():
    for name, construct in CONSTRUCTS.items():
        params = {key: values[-1] for key, values in construct.choices.items()}
        for transform in ("none", "grad of vmap"):
            if transform != "none" and construct.no_vmap:
                continue
            case = build(small(ONE, [name, params, 0, 1], transform=transform))
            assert jax.eval_shape(case.fun, *case.args).shape == ()


@pytest.mark.slow
def test_a_failure_is_made_small(monkeypatch):
    """An oracle that minds sorting after a product finds just that in a larger program."""

    def dislikes(truth, run):
        names = [name for name, *_ in truth.spec["ops"]]
        return "sorted" if "sorting" in names and "dense" in names[: names.index("sorting")] else None

    monkeypatch.setattr(oracles, "undecorated", dislikes)
    others = [["elementwise", {"by": "sin"}, 0, 0], ["layout", {"by": "flip"}, 0, 0]]
    spec = small(["dense", {"w": 1, "by": "sin"}, 0, 0], *others, ["sorting", {}, 0, 0], rows=32)
    row = tried(spec, ("undecorated",))
    (failure,) = row["failures"]
    monkeypatch.setattr(reducing, "tried", lambda spec: trying.tried(spec, ("undecorated",)))
    found = reducing.reduced(spec, failure)
    assert found["ops"] == [ONE, ["sorting", {}, 0, 0]] and found["rows"] == 8
    assert failure == {"oracle": "undecorated", "text": "sorted", "plan": 0}


def test_oracles_see_what_is_wrong():
    spec = small(ONE, ["elementwise", {"by": "sin"}, 0, 0])
    truth = oracles.Truth(spec)
    twice = lambda *args: 2 * truth.case.fun(*args)  # noqa: E731
    assert "off by" in (oracles.undecorated(truth, oracles.compiled(truth.case, twice)) or "")
    assert "off by" in (oracles.eager(truth, twice) or "")
    assert "along a direction" in (oracles.forward(truth, twice) or "")
    assert oracles.forward(truth, truth.case.fun) is None and oracles.eager(truth, truth.case.fun) is None
    got = oracles.called(truth.case, oracles.compiled(truth.case, truth.case.fun))[0]
    assert oracles.difference(got, truth.by_hand, 1e-12) is None


def test_low_precisions_are_compared_coarsely_and_all_others_are_not():
    assert build(small(ONE)).tolerance == 1e-8
    assert digits(small(["bfloat", {"w": 0}, 0, 0])) < 2
    assert len(set(RULES)) == len(RULES)


def test_an_applied_plan_with_a_binomial_loop_has_a_derivative_in_forward_mode():
    """Found by seeds 1 and 8."""
    loop = ["long_scan", {"w": 0, "length": 12, "body": "plain", "reverse": False, "inner": 1}, 0, 0]
    assert (
        tried(small(loop, plans=[{**QUICK, "cost": "flops", "budget": "least", "target": None}]), ("forward",))[
            "failures"
        ]
        == []
    )
