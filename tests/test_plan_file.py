"""Plans on disk: they come back as they were, or are refused by name."""

import json

import jax
import jax.numpy as jnp
import networkx as nx
import pytest
from helpers import assert_close, count, jit
from zoo.models import chain_args, chain_loss

import jaxckpt
from jaxckpt import Plan, PlanFileError, PlanMismatchError

ARGS = chain_args(layers=6)


@pytest.fixture(scope="module")
def plan():
    return jaxckpt.plan(chain_loss, *ARGS, budget="75%", verify=False)


@pytest.fixture
def path(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_plan_comes_back_as_it_was(plan, path):
    assert Plan.load(path) == plan
    assert Plan.load(str(path)).to_json() == plan.to_json()
    wanted, got = (jit(jax.grad(p.apply(chain_loss)))(*ARGS) for p in (plan, Plan.load(path)))
    assert_close(got, wanted, 0)


def test_a_plan_that_changes_nothing_comes_back_too(tmp_path):
    plan = jaxckpt.plan(chain_loss, *ARGS, budget="1GB", verify=False)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.schedule is None and count(plan.apply(chain_loss), *ARGS)["checkpoint"] == 0
    with pytest.raises(jaxckpt.PlanMismatchError):
        plan.apply(chain_loss)(ARGS[0], ARGS[1][:8])


def test_json_has_the_attributes_names(plan, path):
    data = json.loads(path.read_text())
    assert data["format"] == "jaxckpt plan" and data["schema"] == 4
    wanted = (
        "budget_bytes unplanned_peak_bytes predicted_peak_bytes measured_peak_bytes least_peak_bytes forward_flops "
        "recompute_flops saved schedule solver target fingerprint"
    )
    assert set(wanted.split()) <= set(data)
    assert data["recompute_flops"] == plan.recompute_flops


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(path, keep):
    text = path.read_text()
    path.write_text(text[: int(keep * len(text)) if isinstance(keep, float) else keep])
    with pytest.raises(PlanFileError, match=str(path)):
        Plan.load(path)


@pytest.mark.parametrize(
    "content", [b"hello", b"[]", b"{}", b"\xff\xfe\x00", b'{"format": "other", "schema": 1}', b"null"]
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(PlanFileError, match="not a jaxckpt plan"):
        Plan.load(tmp_path / "x.json")


def test_a_newer_schema_is_refused_with_what_to_do(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(PlanFileError, match=r"schema 99.*upgrade"):
        Plan.load(path)


DAMAGE = {
    "a field is gone": lambda d: d.pop("blocks"),
    "schedule is a number": lambda d: d.update(schedule=3),
    "schedule is short": lambda d: d["schedule"].pop(),
    "schedule is empty": lambda d: d.update(schedule=[]),
    "a region is empty": lambda d: d["schedule"].append({"recompute": []}),
    "blocks are short": lambda d: d["blocks"].pop(),
    "blocks are text": lambda d: d.update(blocks="abc"),
    "saves are gone": lambda d: d.update(block_saves=[]),
    "saved has a strange field": lambda d: d.update(saved=[{"what": 1}]),
    "lines are a number": lambda d: d.update(lines=3),
    "bytes are text": lambda d: d.update(budget_bytes="much"),
    "flops are null": lambda d: d.update(recompute_flops=None),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_plan_is_refused(plan, what):
    data = plan.to_json()
    DAMAGE[what](data)
    with pytest.raises(PlanFileError, match="damaged"):
        Plan.from_json(data)


def test_positions_outside_the_program_are_refused_when_applied(plan):
    data = plan.to_json()
    data["blocks"][0][0] = 10**6
    with pytest.raises(jaxckpt.JaxckptError):
        jax.eval_shape(Plan.from_json(data).apply(chain_loss), *ARGS)


def test_a_file_that_cannot_be_written_leaves_nothing(plan, tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text("old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("jaxckpt.compilation.cache.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plan.save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


def other(weights, x):
    return chain_loss(weights, jnp.sin(x))


def test_a_plan_for_another_function_is_refused_with_what_changed(plan):
    with pytest.raises(PlanMismatchError, match="sin"):
        plan.apply(other)(*ARGS)


@pytest.mark.parametrize("change", [{"rows": 128}, {"width": 16}, {"layers": 7}])
def test_a_plan_for_other_shapes_is_refused_with_what_changed(plan, change):
    with pytest.raises(PlanMismatchError, match=r"float32\[|lines"):
        jax.grad(plan.apply(chain_loss))(*chain_args(**{"layers": 6, **change}))


def test_a_plan_made_under_another_jax_says_so(plan):
    data = {**plan.to_json(), "jax_version": "0.1.0", "fingerprint": "0" * 32}
    with pytest.raises(PlanMismatchError, match=r"0\.1\.0"):
        Plan.from_json(data).apply(chain_loss)(*ARGS)


def test_the_tree_of_regions_is_a_graph(plan):
    graph = plan.to_networkx()
    assert nx.is_arborescence(graph)
    kinds = [kind for _, kind in graph.nodes(data="kind")]
    assert kinds.count("recompute") == plan.schedule.num_regions
    assert kinds.count("keep") == len(plan.blocks)


def test_an_applied_plan_recomputes(plan):
    planned, plain = (count(jax.grad(f), *ARGS) for f in (plan.apply(chain_loss), chain_loss))
    assert planned["tanh"] > plain["tanh"] or planned["dot_general"] > plain["dot_general"]
