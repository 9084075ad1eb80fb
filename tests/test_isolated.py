"""Compiles in a process of their own: the same sizes, and a plan that survives the compiler."""

import importlib
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.compilation import process
from jaxckpt.targets import chip, install, registry
from jaxckpt.targets.chip import find_chip
from jaxckpt.targets.cpu import CpuCompiler

X = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
WS = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 8


@pytest.fixture(autouse=True)
def _isolate(monkeypatch):
    monkeypatch.setenv(process.SWITCH, "1")
    monkeypatch.setenv("JAXCKPT_NO_CACHE", "1")


def loss(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def step(ws, x):
    return [w - 0.1 * g for w, g in zip(ws, jax.grad(jaxckpt.auto_remat(loss))(ws, x), strict=True)]


ENDINGS = {
    "killed": ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL.*memory"),
    "crashed": ("import os; os.abort()", "was ended by SIGABRT"),
    "failed": ("raise SystemExit('no luck')", "ended with status 1: no luck"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_compiler_that_takes_its_process_down_leaves_a_predicted_plan(name, monkeypatch):
    code, wanted = ENDINGS[name]
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", code))
    with pytest.raises(jaxckpt.CompilerError, match=f"'cpu' {wanted}"):
        jaxckpt.measure(loss, WS, X, target="cpu")
    with pytest.warns(jaxckpt.JaxckptWarning, match=f"{wanted}.*predicted, not measured"):
        plan = jaxckpt.plan(lambda ws, x: 2.0 * loss(ws, x), WS, X, budget="70%", target="cpu")
    assert plan.measured_peak_bytes is None and plan.schedule is not None


def test_sizes_are_those_of_a_compile_in_this_process(monkeypatch):
    mesh = jaxckpt.mesh("cpu:8", {"data": 8})
    rows, whole = (jax.NamedSharding(mesh, jax.P(*cut)) for cut in (("data",), ()))
    args = [w.update(sharding=whole) for w in WS], X.update(sharding=rows)
    found = jaxckpt.fit(step, *args, budget="100%", target="cpu:8", donate_argnums=0).measurement
    monkeypatch.delenv(process.SWITCH)
    wanted = jaxckpt.fit(step, *args, budget="100%", target="cpu:8", donate_argnums=0).measurement
    for part in ("argument", "output", "alias", "temp", "device"):
        assert getattr(found, f"{part}_bytes") == getattr(wanted, f"{part}_bytes")
    assert found.alias_bytes > 0


COMPILERS = """
from jaxckpt.targets.cpu import CpuCompiler

class Elsewhere(CpuCompiler):
    def devices(self, target, topology):
        print("devices of", target.name, self.word, file=open(self.path, "a"))
        return super().devices(target, topology)
"""


def test_another_process_knows_the_compiler_of_a_chip(monkeypatch, tmp_path):
    (tmp_path / "own_compilers.py").write_text(COMPILERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(chip, "_DEFINED", {})
    compiler = importlib.import_module("own_compilers").Elsewhere()
    compiler.path, compiler.word = str(tmp_path / "log"), "there"
    jaxckpt.register_compiler("elsewhere", compiler)
    jaxckpt.define_target("toy", like="cpu", compiler="elsewhere")
    found = jaxckpt.measure(loss, WS, X, target="toy")
    assert found.device_bytes == jaxckpt.measure(loss, WS, X, target="cpu").device_bytes
    assert (tmp_path / "log").read_text() == "devices of toy there\n" * 2, "once here and once there"


def test_a_compiler_that_cannot_be_sent_is_refused(monkeypatch):
    class Local(CpuCompiler):
        """In no module."""

    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(chip, "_DEFINED", {})
    jaxckpt.register_compiler("local", Local())
    jaxckpt.define_target("toy", like="cpu", compiler="local")
    with pytest.raises(jaxckpt.CompilerError, match="'local' cannot be sent to another process"):
        jaxckpt.measure(loss, WS, X, target="toy")


@pytest.mark.targets
@pytest.mark.parametrize("name", ["h100", "v5e"])
def test_a_described_chip_is_compiled_for_in_a_process_of_its_own(name, monkeypatch):
    if install.unusable(find_chip(name)):
        pytest.skip("its compiler is not installed")
    fun = lambda x: jnp.sum(jnp.tanh(x) ** 2)  # noqa: E731
    found = jaxckpt.measure(fun, X, target=name)
    monkeypatch.delenv(process.SWITCH)
    assert found.device_bytes == jaxckpt.measure(fun, X, target=name).device_bytes


@pytest.mark.targets
def test_a_refusal_comes_back_as_one():
    if install.unusable(find_chip("v5e")):
        pytest.skip("its compiler is not installed")
    x = jax.ShapeDtypeStruct((2**18, 1024), jnp.float32)
    found = jaxckpt.measure(lambda x: jnp.tanh(x @ x.T)[0, 0], x, target="v5e", differentiate=False)
    assert found.temp_bytes > find_chip("v5e").memory_bytes
