"""Plans on disk: they come back as they were, or are refused by name."""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import mutations
import networkx as nx
import pytest
from ckptsolvers import Schedule
from helpers import assert_close, count, jit
from zoo.models import chain_args, chain_loss

import jaxckpt
from jaxckpt import Plan, PlanFileError, PlanMismatchError
from jaxckpt.compilation import files
from jaxckpt.kinds.base import save_from_json
from jaxckpt.kinds.scan_run import LoopPlan
from jaxckpt.model.option import SavedValues
from jaxckpt.program.source import relative_source
from jaxckpt.result.plan import digest_schedule

ARGS = chain_args(layers=6)


@pytest.fixture(scope="module")
def plan():
    return jaxckpt.plan(chain_loss, *ARGS, budget="75%", verify=False)


def scan_loss(ws, x):
    return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0] ** 2)


SCANNED = jnp.ones((12, 32, 32)) / 32, jnp.ones((1024, 32))


@pytest.fixture(scope="module")
def scanned():
    return jaxckpt.plan(scan_loss, *SCANNED, budget="60%", verify=False, calibration=None)


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
    assert data["format"] == "jaxckpt plan" and data["schema"] == 8
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


@pytest.mark.parametrize(
    ("schema", "advice"), [(99, "schema 99.*upgrade"), (4, "schema 4.*plan again"), ("x", "'x'.*plan again")]
)
def test_another_schema_is_refused_with_what_to_do(path, schema, advice):
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": schema}))
    with pytest.raises(PlanFileError, match=advice):
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


def test_every_violation_is_named_by_its_path(scanned):
    data = scanned.to_json()
    k = next(k for k, save in enumerate(data["block_saves"]) if isinstance(save, dict))
    data["block_saves"][k]["parts"][0]["lengths"].append("3")
    data["budget_bytes"], data["strange"] = True, 1
    with pytest.raises(PlanFileError) as error:
        Plan.from_json(data)
    for path in (f"block_saves[{k}].parts[0].lengths[1]: ", "budget_bytes: ", "strange: "):
        assert path in str(error.value)


def test_one_digit_is_refused_by_the_digest(path):
    text = path.read_text()
    path.write_text(text.replace('"num_compiles": 0', '"num_compiles": 1'))
    with pytest.raises(PlanFileError, match=r"plan\.json.*digest"):
        Plan.load(path)


def test_a_schedule_that_was_not_measured_is_refused(plan):
    data = plan.to_json()
    data["schedule"] = [[k, 0] for k in range(len(data["blocks"]))]
    with pytest.raises(PlanFileError, match="schedule_digest"):
        Plan.from_json(mutations.signed(data))


def first_loop(plan):
    return next(save for save in plan.block_saves if isinstance(save, LoopPlan))


def with_loop(plan, **changes):
    """The plan with another first part of its loop."""
    loop = first_loop(plan)
    parts = (dataclasses.replace(loop.parts[0], **changes), *loop.parts[1:])
    saves = tuple(LoopPlan(parts=parts) if save is loop else save for save in plan.block_saves)
    return dataclasses.replace(plan, block_saves=saves)


def body(plan, **changes):
    return {"body": dataclasses.replace(first_loop(plan).parts[0].body, **changes)}


WRONG = {
    "a loop is longer": (lambda p: with_loop(p, lengths=(13,)), r"parts: lengths make 13 .* 12"),
    "a loop is shorter": (lambda p: with_loop(p, lengths=(2, 3)), r"parts: lengths make 6 .* 12"),
    "more states than iterations": (lambda p: with_loop(p, lengths=(12,), num_states=13), r"\.parts\[0\]\.num_states"),
    "a body lacks an equation": (
        lambda p: with_loop(p, **body(p, blocks=((0,),) * len(first_loop(p).parts[0].body.blocks))),
        r"block_saves\[\d+\]\.parts\[0\]\.blocks: no block has equation",
    ),
    "blocks change places": (lambda p: dataclasses.replace(p, blocks=p.blocks[::-1]), r"blocks\[0\].* reads what"),
    "a position is none": (lambda p: dataclasses.replace(p, blocks=((99,), *p.blocks[1:])), r"blocks\[0\]\[0\] is 99"),
    "a block saves what it does not make": (
        lambda p: dataclasses.replace(p, block_saves=(*p.block_saves[:-1], SavedValues((0,)))),
        r"block_saves\[\d+\]\[0\] is 0",
    ),
    "no loop is planned as one": (
        lambda p: dataclasses.replace(p, block_saves=(*p.block_saves[:-1], first_loop(p))),
        "is the plan of a loop",
    ),
    "the schedule is short": (
        lambda p: dataclasses.replace(p, schedule=Schedule(p.schedule.nodes[:-1])),
        "schedule covers",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_the_program_cannot_mean_is_refused_before_anything_runs(scanned, what):
    # As if every digest had been made right.
    change, wanted = WRONG[what]
    with pytest.raises(PlanFileError, match=wanted):
        change(scanned).apply(scan_loss)(*SCANNED)


def test_a_file_that_cannot_be_written_leaves_nothing(plan, tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text("old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("jaxckpt.compilation.files.os.replace", fail)
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
    other = dataclasses.replace(plan, jax_version="0.1.0", fingerprint="0" * 32)
    with pytest.raises(PlanMismatchError, match=r"0\.1\.0"):
        other.apply(chain_loss)(*ARGS)


def test_the_tree_of_regions_is_a_graph(plan):
    graph = plan.to_networkx()
    assert nx.is_arborescence(graph)
    kinds = [kind for _, kind in graph.nodes(data="kind")]
    assert kinds.count("recompute") == plan.schedule.num_regions
    assert kinds.count("keep") == len(plan.blocks)


def test_an_applied_plan_recomputes(plan):
    planned, plain = (count(jax.grad(f), *ARGS) for f in (plan.apply(chain_loss), chain_loss))
    assert planned["tanh"] > plain["tanh"] or planned["dot_general"] > plain["dot_general"]


# Files of any bytes.


def branched_loss(w, x):
    y = jax.lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ w), lambda x: jnp.sin(x @ w) @ w, x)
    y = jax.lax.scan(lambda y, _: (jnp.tanh(jnp.sin(y @ w) @ w), None), y, length=6)[0]
    return jnp.mean(jnp.cos(y @ w) ** 2)


BRANCHED = jnp.eye(16) * 0.9, jnp.ones((256, 16))


@pytest.fixture(scope="module")
def originals(plan, scanned):
    """Plans of chains, loops and conditionals, as files, with what the planned functions are."""
    branched = jaxckpt.plan(branched_loss, *BRANCHED, budget="60%", calibration=None)
    cases = (plan, chain_loss, ARGS), (scanned, scan_loss, SCANNED), (branched, branched_loss, BRANCHED)
    return [(p.to_text().encode(), fun, args, applied(p, fun, args)) for p, fun, args in cases]


def applied(plan, fun, args):
    return files_free(str(jax.make_jaxpr(jax.grad(plan.apply(fun)))(*args)))


def files_free(text):
    """A jaxpr's text without addresses."""
    return re.sub(r"0x[0-9a-f]+", "", text)


@pytest.mark.parametrize("num", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_mutated_plan_is_refused_or_the_same_program(originals, tmp_path, num):
    rng, path = random.Random(1914), tmp_path / "plan.json"
    before, refused, slowest = peak_bytes(), 0, 0.0
    for i in range(num):
        content, fun, args, wanted = rng.choice(originals)
        path.write_bytes(mutations.damaged(content, rng, mutations.meaning_damaged))
        started = time.perf_counter()
        try:
            plan = Plan.load(path)
        except PlanFileError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        finally:
            slowest = max(slowest, time.perf_counter() - started)
        try:
            got = applied(plan, fun, args)
        except (PlanFileError, PlanMismatchError):
            refused += 1
            continue
        assert got == wanted, f"mutation {i} is applied as another program"
    print(f"{num} mutated plans: {refused} refused, {num - refused} the same program, slowest {slowest:.3f} s")
    assert slowest < 1 and peak_bytes() - before < 100 * 2**20 and num / 2 < refused < num


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


HOSTILE = {
    "lists in lists": b"[" * files.MAX_BYTES,
    "lists in lists, closed": b"[" * 40_000 + b"]" * 40_000,
    "objects in objects": b'{"a":' * 90_000,
    "many values": b"[" + b"0," * (files.MAX_BYTES // 2 - 2) + b"0]",
    "many lists": b"[" + b"[]," * 49_000 + b"0]",
    "a long number": b"1" * files.MAX_BYTES,
    "long numbers": b"[" + b"1" * 4000 + (b"," + b"1" * 4000) * 900 + b"]",
    "an endless text": b'"' + b'\\"' * (files.MAX_BYTES // 2 - 2),
    "wide text": b'["' + b"a" * (files.MAX_BYTES - 100) + "\N{SNOWMAN}\U0001f600".encode() + b'"]',
    "too large": b" " * (files.MAX_BYTES + 1),
    "UTF-16": '{"format": "jaxckpt plan"}'.encode("utf-16"),
    "zeros": bytes(10_000),
    "no finite number": b'{"format": "jaxckpt plan", "schema": 1e999}',
    "no number": b'{"format": "jaxckpt plan", "schema": NaN}',
    "a name twice": b'{"format": "jaxckpt plan", "schema": 8, "schema": 8}',
    "nothing": b"",
}
# In a process of its own: the least that was ever free cannot be measured in this one.
LOAD = """
import resource, sys, time
import jax, jaxckpt
from jaxckpt import Calibration, Plan, PlanFileError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in sys.argv[1:]:
    for kind in (Plan, Calibration):
        started = time.perf_counter()
        try:
            kind.load(path)
            print(path, "is taken")
        except PlanFileError as error:
            assert path in str(error)
        took, more = time.perf_counter() - started, (peak() - before) / 1024
        print(f"{path}: {took:.3f} s, {more:.0f} MiB", file=sys.stderr)
        if took > 1 or more > 100:
            print(f"{path}: {took:.3f} s, {more:.0f} MiB")
"""


def violating(plan):
    """Files of a right digest with as many violations as there is room for."""
    data, num = plan.to_json(), 90_000
    for name, value in {
        "blocks": [["x"] * num],
        "schedule": [3] * num,
        "block_saves": [3] * num,
        "lines": [0] * num,
        "saved": [{}] * num,
    }.items():
        yield json.dumps(mutations.signed({**data, name: value})).encode()
    yield json.dumps(mutations.signed({**data, "block_saves": [{"kind": "scan"}] * (num // 2)})).encode()
    deep = [[0, 0]]
    for _ in range(120):
        deep = [{"recompute": deep}]
    yield json.dumps(mutations.signed({**data, "schedule": deep})).encode()
    loops = {"kind": "scan", "parts": []}
    for _ in range(60):
        loops = {
            "kind": "scan",
            "parts": [{"lengths": [1], "num_states": None, "blocks": [[0]], "schedule": [[0, 0]], "saved": [loops]}],
        }
    yield json.dumps(mutations.signed({**data, "block_saves": [loops]})).encode()


def test_whatever_its_bytes_a_file_is_refused_within_a_second_and_100_mib(plan, tmp_path):
    contents = [*HOSTILE.values(), *violating(plan)]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.json").write_bytes(content)
    paths = [str(tmp_path / f"{i}.json") for i in range(len(contents))]
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=True)
    assert not done.stdout, done.stdout


# Files that are no files.


@pytest.fixture(params=["pipe", "socket", "device", "folder"])
def special(request, tmp_path):
    path = tmp_path / "special.json"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path):
            server.bind(path.name)
        yield path
        return
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    yield path


def test_what_is_no_regular_file_is_neither_read_nor_written(plan, special):
    with pytest.raises(PlanFileError, match="not a regular file"):
        Plan.load(special)
    with pytest.raises(PlanFileError, match="not a regular file"):
        plan.save(special)
    assert not [p for p in special.parent.iterdir() if p != special]


def test_a_link_to_a_file_stays_one(plan, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "plan.json")
    plan.save(tmp_path / "link.json")
    (tmp_path / "real" / "plan.json").chmod(0o600)
    plan.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and Plan.load(tmp_path / "real" / "plan.json") == plan
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["plan.json"]
    assert (tmp_path / "real" / "plan.json").stat().st_mode & 0o777 == 0o600


def test_a_plan_without_a_folder_says_so(plan, tmp_path):
    with pytest.raises(PlanFileError, match=r"no folder .*missing"):
        plan.save(tmp_path / "missing" / "plan.json")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
def test_a_full_disk_leaves_the_old_file(plan, path, monkeypatch):
    real, before = os.open, path.read_text()
    monkeypatch.setattr(files.os, "open", lambda p, *args: real("/dev/full" if ".part" in str(p) else p, os.O_WRONLY))
    with pytest.raises(OSError, match="No space left"):
        plan.save(path)
    assert path.read_text() == before


def test_sources_are_those_of_the_project(plan):
    assert {group.source.split(":")[0] for group in plan.saved} == {"tests/zoo/models.py"}
    assert str(files.__file__).split("jaxckpt/compilation")[0] not in plan.to_text()


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("home/me/model/src/net.py", "src/net.py"),
        ("home/me/model/.venv/lib/python3.11/site-packages/flax/nnx/nn.py", "flax/nnx/nn.py"),
        ("elsewhere/script.py", "script.py"),
    ],
)
def test_a_source_is_the_same_on_every_machine(tmp_path, file, wanted):
    (tmp_path / "home/me/model").mkdir(parents=True)
    (tmp_path / "home/me/model/pyproject.toml").write_text("")
    assert relative_source(f"{tmp_path / file}:4:9 (loss)") == f"{wanted}:4:9 (loss)"
    assert relative_source("") == ""


def redigested(data):
    """As if the digest of the schedule had been made right too."""
    try:
        schedule = None if data["schedule"] is None else Schedule.from_json(data["schedule"])
        saves = [save_from_json(save) for save in data["block_saves"]]
    except (ValueError, TypeError, LookupError):
        return data
    digest = digest_schedule(
        data["fingerprint"], data["keeps_checkpoints"], schedule, data["blocks"], saves, data["draws_wait"]
    )
    return mutations.signed({**data, "schedule_digest": digest})


@pytest.mark.parametrize("num", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_a_plan_that_somebody_changed_is_refused_or_a_plan_of_the_same_function(originals, num):
    rng, taken = random.Random(1962), 0
    for i in range(num):
        content, fun, args, _ = rng.choice(originals)
        try:
            changed = Plan.from_json(redigested(mutations.meaning_damaged(json.loads(content), rng)))
            planned = changed.apply(fun)
            jax.eval_shape(planned, *args)
        except (PlanFileError, PlanMismatchError):
            continue
        taken += 1
        if i % 10 == 0:
            wanted, got = (jax.grad(f)(*args) for f in (fun, planned))
            jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), got, wanted)
        else:
            jax.eval_shape(jax.grad(planned), *args)
    assert 0 < taken < num
