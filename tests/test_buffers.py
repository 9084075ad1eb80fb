"""A compiled program's memory: every buffer, as XLA assigned it, with its line and its phase."""

import inspect
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import no_compiles
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from live_ranges import check_sums, told

import jaxckpt
from jaxckpt.compilation import measure
from jaxckpt.compilation import program_memory as program_memory_module
from jaxckpt.compilation.buffers import GAPS, RESERVED, CompiledMemory
from jaxckpt.compilation.hlo import proto
from jaxckpt.compilation.hlo.assignment import read_program
from jaxckpt.compilation.hlo.estimate import estimate_program
from jaxckpt.compilation.program_memory import program_memory
from jaxckpt.compilation.trace_events import to_trace, trace_text
from jaxckpt.errors import CompilerError, PlanFileError, ProgramFormatError
from jaxckpt.targets import install
from jaxckpt.targets.chip import find_chip

HERE = "tests/test_buffers.py"
LAYERS, ROWS, WIDTH = 4, 256, 64
POLICIES = jax.checkpoint_policies


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


W, X = array(WIDTH, WIDTH), array(ROWS, WIDTH)
STACK = array(LAYERS, WIDTH, WIDTH)
TARGETS = [None, *(pytest.param(t, marks=pytest.mark.targets) for t in ("h100", "v5e"))]


def layer(w, x):
    with jax.named_scope("layer"):
        return jnp.tanh(jnp.sin(x @ w) @ w)


def chain(w, x):
    for _ in range(LAYERS):
        x = jax.checkpoint(layer)(w, x)
    return jnp.mean(x**2)


def scanned(w, x):
    return jnp.mean(lax.scan(lambda x, w: (jax.checkpoint(layer)(w, x), None), x, w)[0] ** 2)


def nested(w, x):
    def outer(x, w):
        return lax.scan(lambda x, _: (jnp.sin(layer(w, x)), None), x, None, length=3)[0], None

    return jnp.mean(lax.scan(outer, x, w)[0] ** 2)


def conditional(w, x):
    many = lambda w, x: jnp.sin(layer(w, x)) @ w  # noqa: E731
    return jnp.mean(lax.cond(jnp.sum(x) > 0, many, lambda w, x: x * 2, w, x) ** 2)


def searching(w, x):
    x = lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ w, x)
    return jnp.mean(layer(w, x) ** 2)


def sending(w, x):
    """As one offloads by hand: names wait on the host."""
    policy = POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["kept"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def body(x, w):
        x = jax.ad_checkpoint.checkpoint_name(x, "kept")
        return layer(w, x), None

    return jnp.mean(lax.scan(jax.checkpoint(body, policy=policy), x, w)[0] ** 2)


def step_of(loss):
    """A whole step with momentum, both of which are given away."""

    def step(w, m, x):
        value, grad = jax.value_and_grad(loss)(w, x)
        with jax.named_scope("optimizer"):
            m = 0.9 * m + grad
            w = w - 0.1 * m
        return w, m, value

    return step


PROGRAMS = {
    "chain": (jax.value_and_grad(chain), (W, X), ()),
    "nested loops": (jax.value_and_grad(nested), (STACK, X), ()),
    "conditional step": (step_of(conditional), (W, W, X), (0, 1)),
    "unbounded loop": (searching, (W, X), ()),
    "scanned step": (step_of(scanned), (STACK, STACK, X), (0, 1)),
    "sent to the host": (jax.value_and_grad(sending), (array(LAYERS, 512, 512), array(1024, 512)), ()),
}


def skip_without(target):
    if target is not None and install.unusable(find_chip(target)):
        pytest.skip("its compiler is not installed")


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A scanned step with everything given away, read once."""
    fun, specs, donated = PROGRAMS["scanned step"]
    return told(tmp_path_factory.mktemp("step"), fun, specs, None, donated)


@pytest.fixture
def memory(step) -> CompiledMemory:
    return step.memory


# What XLA says itself.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n != "scanned step"])
def test_schedule_ranges_and_sums_are_xlas_own(name, target, tmp_path):
    skip_without(target)
    fun, specs, donated = PROGRAMS[name]
    found = told(tmp_path, fun, specs, target, donated)
    found.check()
    if name == "sent to the host" and target is not None:
        waiting = [b for b in found.memory.buffers if b.place == "host"]
        assert found.memory.totals.host_bytes >= LAYERS * 1024 * 512 * 4 and waiting


def test_a_step_that_gives_its_arguments_away_adds_up(step):
    step.check()
    totals = step.memory.totals
    assert totals.argument_bytes == 4 * (2 * LAYERS * WIDTH**2 + ROWS * WIDTH)
    roles = {b.role for b in step.memory.buffers}
    assert roles >= {"argument", "result", "constant", "temporary"}
    given_away = [b for b in step.memory.buffers if b.role == "argument" and b.shared_with]
    assert len(given_away) == 2 and all(b.held_until < step.memory.num_steps - 1 for b in given_away)


@pytest.mark.parametrize(
    "target", ["cpu:8", *(pytest.param(t, marks=pytest.mark.targets) for t in ("h100:8", "v5e:2x4"))]
)
def test_a_sharded_program_is_that_of_one_device(target, tmp_path):
    skip_without(None if target.startswith("cpu") else target)
    mesh = jaxckpt.mesh(target, {"data": 8})
    at = lambda spec, parts: spec.update(sharding=NamedSharding(mesh, parts))  # noqa: E731
    specs = at(array(256, 256), P("data")), at(array(4096, 256), P("data"))
    found = told(tmp_path, jax.value_and_grad(chain), specs, target)
    found.check()
    assert found.memory.totals.argument_bytes == (256 * 256 + 4096 * 256) * 4 // 8


@pytest.mark.parametrize("target", TARGETS)
def test_a_plans_program_is_the_one_that_was_measured(target):
    skip_without(target)

    def deep(w, x):
        for _ in range(8):
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    specs = array(128, 128), array(2**15, 128)
    plan = jaxckpt.plan(deep, *specs, budget="75%", target=target, calibration=None, max_compiles=3)
    planned = jaxckpt.read_memory(deep, *specs, plan=plan)
    check_sums(planned)
    counted = planned.totals.constant_bytes if target != "v5e" else 0
    assert planned.totals.device_bytes - counted == planned.reported["device_bytes"] == plan.measured_peak_bytes
    assert planned.target == plan.target and "recomputed" in {b.phase for b in planned.buffers}


def test_the_plans_own_function_is_asked_for():
    plan = jaxckpt.plan(chain, W, X, budget="1GB", verify=False, calibration=None)
    with pytest.raises(jaxckpt.PlanMismatchError):
        jaxckpt.read_memory(chain, W, array(ROWS + 1, WIDTH), plan=plan)


def test_a_whole_step_gives_its_arguments_away(memory):
    fun, specs, donated = PROGRAMS["scanned step"]
    found = jaxckpt.read_memory(fun, *specs[:2], x=specs[2], donate_argnums=donated)
    assert found.totals == memory.totals and found.live_bytes == memory.live_bytes
    assert found.reported["alias_bytes"] == 2 * 4 * STACK.size
    with pytest.raises(jaxckpt.OptionError, match="whole step"):
        jaxckpt.read_memory(fun, *specs, donate_argnums=0, differentiate=True)


# Names.


def test_buffers_know_their_line_their_scope_and_their_phase(memory):
    heap = [b for b in memory.buffers if b.in_heap and b.size_bytes > 64]
    assert heap and all(b.source.startswith(f"{HERE}:") for b in heap if b.source)
    lines = {f"{HERE}:{line}" for line in _lines(layer)}
    assert all(b.source in lines for b in heap if b.scope == "layer")
    assert {"forward", "backward", "recomputed"} <= {b.phase for b in heap}
    assert {b.scope for b in heap if b.phase == "recomputed"} == {"layer"}
    results = {b.phase for b in memory.buffers if b.role == "result" and b.size_bytes == STACK.size * 4}
    assert results == {"optimizer"}
    # Iterations are stacked from zeros on, and bear the name of what is stacked.
    stacked = next(b for b in memory.peak if b.shape == f"f32[{LAYERS},{ROWS},{WIDTH}]")
    assert stacked.scope == "layer" and stacked.phase == "forward" and stacked.opcode == "fusion"


def test_phases_of_the_schedule_come_in_order(memory):
    firsts = [memory.phases.index(phase) for phase in ("forward", "backward", "recomputed", "optimizer")]
    assert firsts == sorted(firsts) and memory.phases[-1] == "optimizer"
    assert memory.phases.index("recomputed") < len(memory.phases) - 1 - memory.phases[::-1].index("backward")


def test_what_a_user_reads_of_gradients_is_the_optimizers(tmp_path):
    def clipped(w, x):
        grad = jax.grad(chain)(w, x)
        return w - 0.1 * grad / jnp.sqrt(jnp.sum(grad**2))

    found = told(tmp_path, clipped, (W, X)).memory
    assert {b.phase for b in found.buffers if b.role == "result"} == {"optimizer"}


def _lines(fun):
    source, start = inspect.getsourcelines(fun)
    return range(start, start + len(source))


# What is asked of it.


def test_live_buffers_at_a_step_add_up_to_its_bytes(memory):
    peak = memory.peak
    assert memory.live_bytes[memory.peak_step] == max(memory.live_bytes)
    assert peak == memory.at(memory.peak_step) and list(peak) == sorted(peak, key=lambda b: -b.size_bytes)
    for step in range(memory.num_steps):
        assert sum(b.size_bytes for b in memory.at(step) if b.in_heap) == memory.live_bytes[step]
    with pytest.raises(IndexError, match=f"step {memory.num_steps} is none"):
        memory.at(memory.num_steps)


def test_bands_end_with_what_is_no_buffer(memory):
    bands = memory.bands("phase")
    assert [b.label for b in bands[-2:]] == [RESERVED, GAPS] and [b.kind for b in bands[-2:]] == ["reserved", "gap"]
    assert bands[-1].size_bytes == memory.gap_bytes
    at_peak = [b.size_bytes[memory.peak_step] for b in bands[:-2] if b.label != "unattributed"]
    assert at_peak == sorted(at_peak, reverse=True)
    labels = {band.label for band in memory.bands("source")}
    assert {"arguments", "constants"} < labels and "w" not in labels
    own = memory.bands(lambda buffer: "large" if buffer.size_bytes > 1000 else "small")
    assert {b.label for b in own} == {"large", "small", RESERVED, GAPS}


def test_a_record_is_read_back(memory):
    text = json.dumps(memory.to_json())
    assert CompiledMemory.from_json(json.loads(text)) == memory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "else"}, "is not a record"),
        ({"schema": 99}, "schema 99"),
        ({"target": 1}, "target"),
        ({"live_bytes": []}, "one phase and two sizes"),
        ({"steps": ["a"], "phases": ["sideways"]}, r"phases\[0\]"),
    ],
)
def test_a_record_of_another_kind_is_refused(memory, change, said):
    with pytest.raises(PlanFileError, match=said):
        CompiledMemory.from_json(memory.to_json() | change)


def test_a_record_that_does_not_add_up_is_refused(memory):
    data = memory.to_json()
    data["gap_bytes"][3] += 1
    with pytest.raises(PlanFileError, match="step 3"):
        CompiledMemory.from_json(data)
    data = memory.to_json()
    data["buffers"][2]["held_until"] = memory.num_steps
    with pytest.raises(PlanFileError, match=r"buffers\[2\]"):
        CompiledMemory.from_json(data)


def test_a_trace_shows_every_buffer_once(memory):
    trace = to_trace(memory)
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] > 1]
    assert sorted(e["name"] for e in slices) == sorted(b.name for b in memory.buffers)
    rows = {}
    for event in sorted(slices, key=lambda e: e["ts"]):
        assert rows.get(event["tid"], 0) <= event["ts"]
        rows[event["tid"]] = event["ts"] + event["dur"]
    counters = [e for e in trace["traceEvents"] if e["ph"] == "C" and e["ts"] <= memory.peak_step]
    latest = {e["name"]: e["args"]["bytes"] for e in counters}
    assert sum(latest.values()) == memory.totals.device_bytes
    phases = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 1]
    assert sum(e["dur"] for e in phases) == memory.num_steps
    assert json.loads(trace_text(memory)) == trace
    assert to_trace(memory, most_rows=2)["otherData"]["buffers left out"] > 0


# The compile.


def test_nothing_is_left_behind_and_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("jaxckpt.compilation.measure._WORTH_KEEPING_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = []
    with measure.through(lambda name, compile_: names.append(name) or compile_()):
        first, second = (program_memory(jnp.tanh, [X], None) for _ in range(2))
    assert first == second and len(names) == 2 and list(tmp_path.iterdir()) == []
    measured = measure.compiled_bytes(jnp.tanh, [X], None)
    assert first.reported["device_bytes"] == measured.device_bytes == first.totals.device_bytes


def test_a_door_that_compiles_nothing_leaves_nothing_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = measure.compiled_bytes(jnp.tanh, [X], None)
    with measure.through(lambda name, compile_: found), pytest.raises(CompilerError, match="no description"):
        program_memory(jnp.tanh, [X], None)
    with no_compiles(), pytest.raises(pytest.fail.Exception, match="compiled"):
        program_memory(jnp.tanh, [X], None)
    assert list(tmp_path.iterdir()) == []


def test_a_compile_in_a_process_of_its_own_is_read_too(monkeypatch):
    here = program_memory(jnp.tanh, [X], "cpu")
    monkeypatch.setenv("JAXCKPT_ISOLATE", "1")
    there = program_memory(jnp.tanh, [X], "cpu")
    assert there.totals == here.totals and there.live_bytes == here.live_bytes


# What is not understood.


def _changed(content, change):
    program = proto.parse(content)
    change(program)
    return program.SerializeToString()


def _unknown_opcode(program):
    for computation in program.module.computations:
        for instruction in computation.instructions:
            if instruction.opcode == "get-tuple-element":
                instruction.opcode = "get-something"


def _moved(program):
    heap = max((a for a in program.assignment.allocations if not a.is_parameter), key=lambda a: len(a.assigned))
    for each in heap.assigned:
        each.offset = 0


def _beyond(program):
    for allocation in program.assignment.allocations:
        allocation.size = 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_unknown_opcode, "get-something"),
        (_moved, "lie at one place"),
        (_beyond, "beyond its allocation"),
        (lambda program: program.ClearField("assignment"), "no buffer assignment"),
        (lambda program: program.ClearField("module"), "no computations"),
        (lambda program: program.module.ClearField("schedule"), "no schedule"),
        (lambda program: program.module.frames.ClearField("locations"), "not as known"),
    ],
)
def test_another_format_is_said_and_not_guessed(step, change, said):
    with pytest.raises(ProgramFormatError, match=said):
        read_program(_changed(step.content, change), target="cpu", reported={})


@pytest.mark.parametrize("content", [b"\xff\xff\xff", b"", b"not a program"])
def test_what_is_no_program_is_refused(content):
    with pytest.raises(ProgramFormatError):
        read_program(content, target="cpu", reported={})


def test_an_estimate_is_labelled_and_near(step):
    estimate = estimate_program(step.content, target="cpu")
    exact = step.memory
    assert estimate.is_estimated and not exact.is_estimated
    # It does not know which results are written over an operand.
    live = max(exact.live_bytes)
    assert live <= estimate.heap_bytes < 1.1 * live and max(estimate.live_bytes) == estimate.heap_bytes
    assert estimate.totals.argument_bytes == exact.totals.argument_bytes
    largest = {b.name for b in estimate.peak if b.in_heap and b.size_bytes > 0.1 * estimate.heap_bytes}
    assert largest == {b.name for b in exact.peak if b.in_heap and b.size_bytes > 0.1 * exact.heap_bytes}


@pytest.mark.targets
def test_a_program_that_is_refused_is_read_all_the_same(monkeypatch):
    skip_without("v5e")
    size = find_chip("v5e").memory_bytes
    specs = array(512, 512), array(2**23, 512)
    memory = program_memory(jax.value_and_grad(chain), specs, "v5e")
    check_sums(memory)
    assert memory.totals.device_bytes > size and not memory.is_estimated
    # Where it is refused before it is assigned, its schedule is all that there is.
    monkeypatch.setattr(program_memory_module, "_FINAL", "*nothing")
    estimate = program_memory(jax.value_and_grad(chain), specs, "v5e")
    assert estimate.is_estimated and 0.99 < estimate.heap_bytes / max(memory.live_bytes) < 1.01


def test_files_of_other_programs_are_not_mixed_up(monkeypatch):
    read = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*read(self, pattern), *read(self, pattern)])
    with pytest.raises(ProgramFormatError, match="2 programs"):
        program_memory(jnp.tanh, [X], None)
