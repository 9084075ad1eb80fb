"""Chips that are not here: names, missing compilers, and, where they are installed, their word."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from types import NoneType

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import _compat
from jaxckpt.cli import main
from jaxckpt.compilation import measure, pool
from jaxckpt.compilation.measure import compiled_bytes, lowered_for
from jaxckpt.targets import chip, gpu, install, packages, registry
from jaxckpt.targets.chip import FILE, VARIABLE, find_chip, find_target, known_chips
from jaxckpt.targets.cpu import CpuCompiler
from jaxckpt.targets.gpu import Gpu
from jaxckpt.targets.topology import _devices, devices_for
from jaxckpt.targets.tpu import Tpu

X = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
WS = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 8
INSTALLED = [name for name in ("h100", "v5e") if not install.unusable(find_chip(name))]
MISSING = [name for name in ("h100", "v5e") if name not in INSTALLED]


def chain(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine where no other chip's compiler is installed."""
    monkeypatch.setattr(packages, "version", lambda name: None)


@pytest.fixture(autouse=True)
def _forget(monkeypatch, tmp_path):
    """No test sees what another one defined."""
    monkeypatch.setattr(chip, "_DEFINED", {})
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_table_holds_every_class_of_chip():
    nvidia = {"v100", "a100", "a100-40", "h100", "h200", "b200", "rtx3090", "rtx4090", "rtx5090", "l4", "l40s"}
    table = known_chips()
    assert nvidia | {"v4", "v5e", "v5p", "v6e", "tpu7x", "cpu"} <= set(table)
    for each in table.values():
        assert each.bandwidth >= each.host_bandwidth > 0
        assert each.matmul_flops.get("bfloat16", each.matmul_flops["other"]) >= each.matmul_flops["other"] > 0
        assert isinstance(each.facts, {"cuda": Gpu, "tpu": Tpu, "cpu": NoneType}[each.platform])
    assert table["a100-40"].memory_bytes < table["a100"].memory_bytes / 1.9
    assert table["h200"].facts.capability == table["h100"].facts.capability == "9.0"


def test_an_unknown_chip_offers_the_nearest_names():
    with pytest.raises(jaxckpt.TargetError, match="'h100'"):
        find_target("h10")


@pytest.mark.parametrize("name", ["h100:", "h100:0", "h100:2x4", "v5e:8", "v5e:0x4", "cpu:all"])
def test_a_topology_that_cannot_be_read_is_refused_with_ones_that_can(name):
    with pytest.raises(jaxckpt.TargetError, match=f"'{name}': .* such as '{name.split(':')[0]}:"):
        jaxckpt.plan(chain, WS, X, budget="60%", target=name, verify=False)


# What users define.


def test_a_chip_is_defined_in_one_call():
    mine = jaxckpt.define_target("slice", like="h100", memory="20GB", gpu={"num_cores": 32})
    assert mine.memory_bytes == 20 * 10**9 and mine.facts.num_cores == 32
    assert mine.bandwidth == find_chip("h100").bandwidth and mine.platform == "cuda"
    assert find_target("slice:8") == mine
    plan = jaxckpt.plan(chain, WS, X, budget="60%", target="slice", verify=False)
    assert plan.target == "slice"


def test_a_chip_is_made_from_nothing():
    rates = {"bandwidth": 1e11, "host_bandwidth": 1e10, "matmul_flops": {"other": 1e12}, "vector_flops": 1e11}
    assert jaxckpt.define_target("mine", platform="cpu", **rates).memory_bytes is None


def test_a_chip_defined_anew_is_planned_anew():
    slow = {"matmul_flops": {"other": 1e9}}
    plans = []
    for values in ({}, slow):
        jaxckpt.define_target("mine", like="cpu", **values)
        plans.append(jaxckpt.plan(chain, WS, X, budget="60%", target="mine", verify=False))
    assert plans[1].unplanned_cost > 10 * plans[0].unplanned_cost


@pytest.mark.parametrize("how", ["in the working directory", "by the variable"])
def test_chips_are_read_from_a_file(how, tmp_path, monkeypatch):
    path = tmp_path / (FILE if how == "in the working directory" else "other.toml")
    path.write_text(
        '[targets.slice]\nlike = "v5e"\nmemory = "8GiB"\n[targets.half]\nlike = "slice"\nbandwidth = 4e11\n'
    )
    if how == "by the variable":
        monkeypatch.setenv(VARIABLE, str(path))
    assert find_target("half").memory_bytes == 2**33 and find_target("half").bandwidth == 4e11
    path.write_text('[targets.slice]\nlike = "v5e"\nmemory = "9GiB"\n')
    os.utime(path, (1, 1))
    assert find_target("slice").memory_bytes == 9 * 2**30
    with pytest.raises(jaxckpt.TargetError, match="half"):
        find_target("half")


BAD_CHIPS = {
    "unknown value": ({"like": "h100", "colour": "green"}, "'colour', which is none of"),
    "unknown like": ({"like": "h10"}, "like='h10'"),
    "something missing": ({"platform": "cpu"}, "lacks 'bandwidth'"),
    "no rate": ({"like": "h100", "bandwidth": "fast"}, "bandwidth='fast' is not a positive float"),
    "negative": ({"like": "h100", "bandwidth": -1.0}, "bandwidth=-1.0"),
    "no size": ({"like": "h100", "memory": "many"}, "memory='many'"),
    "no table": ({"like": "h100", "gpu": 3}, "gpu=3 is not a table"),
    "half a table": ({"like": "cpu", "platform": "cuda", "gpu": {"num_cores": 3}}, "lacks 'description'"),
    "no compiler": ({"like": "cpu", "platform": "tpu"}, "lacks 'tpu'"),
    "another's table": ({"like": "cpu", "gpu": dataclasses.asdict(find_chip("h100").facts)}, "has 'gpu', which the"),
    "unknown platform": ({"like": "cpu", "platform": "npu"}, "platform='npu'"),
    "bad capability": ({"like": "h100", "gpu": {"capability": "90"}}, "capability='90'"),
    "no other dtype": ({"like": "cpu", "matmul_flops": {"float32": 1e12}}, '"other"'),
    "no number": ({"like": "cpu", "matmul_flops": {"other": "x"}}, "matmul_flops of other is 'x'"),
}


@pytest.mark.parametrize("name", BAD_CHIPS)
def test_a_chip_that_makes_no_sense_says_why(name):
    values, wanted = BAD_CHIPS[name]
    with pytest.raises(jaxckpt.TargetError, match=re.escape(wanted)):
        jaxckpt.define_target("mine", **values)
    assert "mine" not in known_chips()


@pytest.mark.parametrize("name", ["h100", "Mine", "mine:8", ""])
def test_a_name_that_is_taken_or_not_a_name_is_refused(name):
    with pytest.raises(jaxckpt.TargetError, match=f"'{name}'"):
        jaxckpt.define_target(name, like="h100")


@pytest.mark.parametrize("text", ["[targets", "[targets]\nmine = 3", '[targets.mine]\nlike = "h10"'])
def test_a_file_that_cannot_be_read_is_named(text, tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(jaxckpt.TargetError, match=r"mine\.toml"):
        find_target("h100")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing.toml"))
    with pytest.raises(jaxckpt.TargetError, match=r"JAXCKPT_TARGETS.*nothing\.toml"):
        find_target("h100")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Npu:
    """What the compiler of a platform that jaxckpt does not have asks of a chip."""

    kind: str


class NpuCompiler(CpuCompiler):
    facts, part, nearest = Npu, "npu", "npu1"

    def requirements(self, target):
        return [f"npu-compiler[{target.facts.kind}]"]

    def installed(self):
        return packages.version("npu-compiler")

    def device_kind(self, facts):
        return facts.kind


def test_a_platform_is_a_compiler_and_its_chips(monkeypatch):
    monkeypatch.setitem(registry.OWN, "npu", NpuCompiler())
    with pytest.raises(jaxckpt.TargetError, match="lacks 'npu'"):
        jaxckpt.define_target("npu1", like="cpu", platform="npu", memory="8GB")
    mine = jaxckpt.define_target("npu1", like="cpu", platform="npu", memory="8GB", npu={"kind": "one"})
    assert mine.facts == Npu(kind="one") and mine.kind == "one"
    found = install.describe(mine)
    assert not found["usable"] and "not installed" in found["problem"] and "npu-compiler[one]" in found["install"]
    monkeypatch.setattr(jax, "default_backend", lambda: "npu")
    assert find_target(None) == mine


# Compilers that are missing, wrong, or fail.


@pytest.mark.parametrize("chip", ["h100", "v5e"])
def test_a_missing_compiler_names_what_installs_it(chip, no_compiler):
    _devices.cache_clear()
    command = re.escape(install.shown_command(find_chip(chip)))
    with pytest.raises(jaxckpt.CompilerError, match=f"not installed.*{command}"):
        jaxckpt.measure(chain, WS, X, target=chip)


@pytest.mark.parametrize("chip", ["h100", "v5e"])
def test_without_its_compiler_a_plan_is_predicted_and_says_so(chip, no_compiler):
    _devices.cache_clear()
    with pytest.warns(jaxckpt.JaxckptWarning, match=r"not installed.*pip install.*predicted, not measured"):
        plan = jaxckpt.plan(chain, WS, X, budget="60%", target=chip)
    assert plan.measured_peak_bytes is None and not plan.is_unplanned_measured and plan.num_compiles == 0
    assert plan.predicted_peak_bytes <= plan.budget_bytes and plan.schedule is not None
    assert "Nothing was compiled: sizes are predicted" in str(plan)


def test_a_decorated_function_keeps_no_prediction_that_a_compiler_was_missing_for(no_compiler, tmp_path):
    _devices.cache_clear()
    loss = jaxckpt.auto_remat(chain, budget="60%", target="v5e", cache_dir=tmp_path / "plans")
    with pytest.warns(jaxckpt.JaxckptWarning, match="predicted, not measured"):
        jax.make_jaxpr(jax.grad(loss))(WS, X)
    assert not list((tmp_path / "plans").glob("*.json"))


WRONG = {
    "another version": ({"plugin": "0.0.1", "pjrt": "0.0.1"}, "does not match jaxlib"),
    "one of the two": ({"plugin": _compat.JAXLIB_VERSION}, "half installed"),
    "one of them old": ({"plugin": _compat.JAXLIB_VERSION, "pjrt": "0.0.1"}, "does not match jaxlib"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_plugin_that_is_not_this_jaxs_is_refused_with_the_right_one(name, monkeypatch):
    versions, wanted = WRONG[name]
    found = {f"jax-cuda13-{part}": version for part, version in versions.items()}
    monkeypatch.setattr(packages, "version", found.get)
    _devices.cache_clear()
    with pytest.raises(jaxckpt.CompilerError, match=f"{wanted}.*=={re.escape(_compat.JAXLIB_VERSION)}"):
        jaxckpt.measure(chain, WS, X, target="h100")


def test_a_chip_that_cuda_13_has_dropped_asks_for_cuda_12(monkeypatch):
    right = dict.fromkeys(("jax-cuda13-plugin", "jax-cuda13-pjrt"), _compat.JAXLIB_VERSION)
    monkeypatch.setattr(packages, "version", right.get)
    monkeypatch.setattr(gpu, "_has_assembler", lambda: False)
    assert "lacks CUDA's assembler" in install.unusable(find_chip("a100"))
    monkeypatch.setattr(gpu, "_has_assembler", lambda: True)
    assert not install.unusable(find_chip("a100"))
    assert re.search(r"capability 7\.0 is gone.*jax-cuda12-plugin==", install.unusable(find_chip("v100")))


def test_a_plan_survives_a_compile_that_fails():
    measured = []

    def fails_late(name, compile_):
        if measured:
            raise jaxckpt.CompilerError("the compiler for target='cpu' failed: INTERNAL: out of luck")
        measured.append(compile_())
        return measured[0]

    fun = lambda ws, x: chain(ws, x) + 1.0  # noqa: E731  # a program that nothing else has measured
    with measure.through(fails_late), pytest.warns(jaxckpt.JaxckptWarning, match="out of luck.*predicted"):
        plan = jaxckpt.plan(fun, WS, X, budget="60%")
    assert measured and plan.measured_peak_bytes is None and plan.schedule is not None


def test_a_compiler_that_crashes_is_a_typed_error(monkeypatch):
    def crash(*args, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: during instruction selection")

    monkeypatch.setattr(jax.stages.Lowered, "compile", crash)
    with pytest.raises(jaxckpt.CompilerError, match="'cpu' failed: INTERNAL: during instruction selection"):
        jaxckpt.measure(chain, WS, X)


def test_a_refusal_says_how_much_was_needed():
    text = "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (26.06G) exceeds available HBM (15.75G)"
    assert find_chip("v5e").compiler.refused_bytes(RuntimeError(text)) == int(26.06 * 2**30)
    assert find_chip("v5e").compiler.refused_bytes(RuntimeError("INTERNAL: something else (26.06G)")) is None


def test_a_refused_step_gives_donated_buffers_back(monkeypatch):
    def refuse(*args, **options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (2.00G) exceeds"
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    step = lambda ws, x: ([w * 2.0 for w in ws], jnp.sum(x))  # noqa: E731
    kept, given = (compiled_bytes(step, (WS, X), None, donated) for donated in ((), 0))
    state = 8 * 256 * 256 * 4
    assert (kept.alias_bytes, given.alias_bytes) == (0, state)
    assert given.temp_bytes - kept.temp_bytes == state
    assert kept.device_bytes == given.device_bytes == 2**31
    assert kept.temp_bytes == 2**31 - (2 * state + 4096 * 256 * 4 + 4)


# Several at a time.


def test_programs_compile_side_by_side_in_order(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    alive, most = set(), []

    def watched(name, compile_):
        alive.add(threading.get_ident())
        most.append(len(alive))
        time.sleep(0.2)
        try:
            return compile_()
        finally:
            alive.discard(threading.get_ident())

    sizes = (256, 512, 1024, 2048)
    specs = [[WS, jax.ShapeDtypeStruct((n, 256), jnp.float32)] for n in sizes]
    with measure.through(watched):
        found = pool.side_by_side(lowered_for(chain, each, None) for each in specs)
    assert [f.argument_bytes for f in found] == [8 * 256 * 256 * 4 + n * 256 * 4 for n in sizes]
    assert max(most) == 3


def test_a_failure_among_several_is_the_typed_error(monkeypatch):
    def crash(*args, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: out of luck")

    monkeypatch.setattr(jax.stages.Lowered, "compile", crash)
    with pytest.raises(jaxckpt.CompilerError, match="out of luck"):
        pool.side_by_side(lowered_for(chain, [WS, X], None) for _ in range(2))


# On the command line.


def test_targets_are_listed_with_what_their_compilers_need(capsys, no_compiler):
    jaxckpt.define_target("mine", like="h100", memory="40GiB")
    assert main(["targets"]) == 0
    out, err = capsys.readouterr()
    assert not err
    for part in (
        "40.00 GiB",
        "15.75 GiB",
        "define_target",
        "jaxckpt targets --install",
        "pip install --no-deps jax-cuda",
    ):
        assert part in out
    assert main(["targets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["h100"]["usable"] is False and "libtpu" in rows["v5e"]["install"]
    assert rows["cpu"]["usable"] is True and rows["cpu"]["install"] == ""
    assert rows["mine"]["memory_bytes"] == 40 * 2**30


def test_an_install_is_for_this_interpreter_and_this_jax(capsys):
    assert main(["targets", "--install", "h100", "--dry-run"]) == 0
    command = capsys.readouterr().out.split()
    assert command[:5] == [sys.executable, "-m", "pip", "install", "--no-deps"]
    version = _compat.JAXLIB_VERSION
    number = 12 if _compat.CPU_UNDOES_REMAT else 13
    assert command[5:7] == [f"jax-cuda{number}-plugin=={version}", f"jax-cuda{number}-pjrt=={version}"]
    assert command[7].strip("'").startswith("nvidia-cuda-nvcc")
    assert main(["targets", "--install", "v6e:2x2", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"][-1].startswith("libtpu==0.0.")


def test_an_install_runs_pip_and_reports_its_failure(capsys, monkeypatch, no_compiler):
    ran = []
    done = lambda command, check: ran.append(command) or subprocess.CompletedProcess(command, len(ran) - 1)  # noqa: E731
    monkeypatch.setattr(subprocess, "run", done)
    monkeypatch.setattr(install, "find_spec", lambda name: name == "pip" or None)
    assert main(["targets", "--install", "v5e"]) == 0
    assert main(["targets", "--install", "v5e"]) == 1
    assert ran == [install.command(find_chip("v5e"))] * 2
    assert main(["targets", "--install", "cpu"]) == 0
    assert len(ran) == 2 and "nothing" in capsys.readouterr().err


def test_an_install_of_nothing_known_is_refused(capsys):
    assert main(["targets", "--install", "h10"]) == 2
    assert "'h100'" in capsys.readouterr().err
    assert main(["targets", "--dry-run"]) == 2


def test_no_device_is_looked_for_where_a_chip_is_named(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "before")
    monkeypatch.delenv("JAX_PLATFORMS")
    assert main(["measure", "nothing:loss"]) == 2 and "JAX_PLATFORMS" not in os.environ
    assert main(["measure", "nothing:loss", "--target", "h100"]) == 2 and os.environ["JAX_PLATFORMS"] == "cpu"


# With the compilers.


@pytest.mark.targets
@pytest.mark.parametrize("chip", ["h100", "v5e"])
def test_a_plan_for_a_chip_that_is_not_here_fits_by_its_own_compiler(chip):
    if chip in MISSING:
        pytest.skip("its compiler is not installed")
    # Small enough to compile quickly, too large for a TPU to keep out of its HBM.
    x, ws = jax.ShapeDtypeStruct((131072, 256), jnp.float32), [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 6
    plan = jaxckpt.plan(chain, ws, x, budget="70%", target=chip)
    assert plan.target == chip
    assert plan.measured_peak_bytes is not None
    assert plan.measured_peak_bytes <= 0.7 * plan.unplanned_peak_bytes
    assert plan.recompute_flops > 0


@pytest.mark.targets
@pytest.mark.parametrize("chip", [c.name for c in known_chips().values() if c.platform != "cpu"])
def test_every_chip_of_the_table_is_one_its_compiler_knows(chip):
    if install.unusable(find_chip(chip)):
        pytest.skip("its compiler is not installed")
    found = devices_for(find_chip(chip), None)
    assert len(found) == 1 and found[0].device_kind == find_chip(chip).kind
    if isinstance(facts := find_chip(chip).facts, Tpu):
        assert len(devices_for(find_chip(chip), facts.topology)) == 4 * find_chip(chip).devices_per_chip


@pytest.mark.targets
@pytest.mark.parametrize("chip", ["v100", "rtx3090", "rtx5090"])
def test_oldest_and_newest_gpus_compile(chip):
    if install.unusable(find_chip(chip)):
        pytest.skip("its compiler is not installed")
    found = jaxckpt.measure(chain, WS, X, target=chip)
    assert found.device_bytes > found.argument_bytes


@pytest.mark.targets
def test_a_program_that_a_tpu_refuses_is_measured_by_its_refusal():
    if "v5e" in MISSING:
        pytest.skip("its compiler is not installed")
    x = jax.ShapeDtypeStruct((2**17, 1024), jnp.float32)
    fun = lambda x: jnp.tanh(x @ x.T)[0, 0]  # noqa: E731
    found = jaxckpt.measure(fun, x, target="v5e", differentiate=False)
    assert found.temp_bytes > find_chip("v5e").memory_bytes and found.argument_bytes == 2**29
    # What it refused was assigned to the byte; the refusal says hundredths of GiB.
    exact = jaxckpt.read_memory(fun, x, target="v5e", differentiate=False).totals.device_bytes
    assert abs(found.device_bytes - exact) < 0.01 * 2**30


@pytest.mark.targets
@pytest.mark.parametrize("name", ["v5e:3x5", "v5e:99x99"])
def test_a_topology_that_does_not_exist_offers_ones_that_do(name):
    if "v5e" in MISSING:
        pytest.skip("its compiler is not installed")
    with pytest.raises(jaxckpt.TargetError, match=r"no topology .* v5e:2x4"):
        jaxckpt.measure(chain, WS, X, target=name)


@pytest.mark.targets
def test_a_gpu_is_compiled_for_after_jax_found_no_driver():
    if "h100" in MISSING:
        pytest.skip("its compiler is not installed")
    code = (
        "import jax, jax.numpy as jnp, jaxckpt\n"
        "jnp.ones(3).block_until_ready()\n"
        "x = jax.ShapeDtypeStruct((64, 64), jnp.float32)\n"
        "print(jaxckpt.measure(lambda x: jnp.sum(jnp.tanh(x)), x, target='h100').target)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split()[-1] == "h100"
