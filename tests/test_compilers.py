"""Compilers with rules of their own: how they are named, refused, and what one rule changes."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import analysed

import jaxckpt
from jaxckpt.compilation import measure
from jaxckpt.targets import chip, registry
from jaxckpt.targets.compiler import Compiler
from jaxckpt.targets.cpu import CpuCompiler

X = jax.ShapeDtypeStruct((256, 64), jnp.float32)
WS = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)


class SlowStacks(CpuCompiler):
    """The CPU's, but stacking takes long."""

    stacking_passes = 100


class TwiceTheBytes(CpuCompiler):
    """The CPU's, but every byte counts twice."""

    def device_bytes(self, stats):
        """Twice what there is."""
        return 2 * super().device_bytes(stats)


@pytest.fixture(autouse=True)
def _forget(monkeypatch, tmp_path):
    """No test sees what another one defined."""
    monkeypatch.setattr(chip, "_DEFINED", {})
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.delenv(chip.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def scanned(ws, x):
    return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0] ** 2)


def predicted(target):
    return jaxckpt.plan(scanned, WS, X, budget="100%", target=target, verify=False)


def toy(compiler, name="toy"):
    jaxckpt.register_compiler(name, compiler)
    return jaxckpt.define_target(name, like="cpu", compiler=name)


def test_every_chip_has_the_compiler_of_its_platform():
    assert all(c.compiler is registry.OWN[c.platform] for c in chip.known_chips().values())


@pytest.mark.parametrize("name", ["cpu", "cuda", "tpu", "", 3])
def test_names_that_are_taken_or_none_are_refused(name):
    with pytest.raises(jaxckpt.TargetError, match=f"register_compiler: {name!r} is"):
        jaxckpt.register_compiler(name, CpuCompiler())


def test_what_is_no_compiler_is_refused():
    with pytest.raises(jaxckpt.TargetError, match="'toy' should be a Compiler"):
        jaxckpt.register_compiler("toy", CpuCompiler)


def test_an_unknown_compiler_is_named():
    with pytest.raises(jaxckpt.TargetError, match="compiler='toy' is not known, only cpu, cuda, tpu;"):
        jaxckpt.define_target("toy", like="cpu", compiler="toy")
    with pytest.raises(jaxckpt.TargetError, match="compiler=3 is not text"):
        jaxckpt.define_target("toy", like="cpu", compiler=3)


def test_a_platforms_compiler_compiles_for_no_other():
    with pytest.raises(jaxckpt.TargetError, match="compiler='tpu' compiles for no platform but its own, not for 'cpu'"):
        jaxckpt.define_target("toy", like="cpu", compiler="tpu")
    assert jaxckpt.define_target("toy", like="cpu", compiler="cpu").compiler is registry.OWN["cpu"]


def test_a_file_may_name_a_compiler_that_is_registered_later(tmp_path):
    (tmp_path / chip.FILE).write_text('[targets.toy]\nlike = "cpu"\ncompiler = "slow"\n')
    assert chip.find_chip("cpu").compiler is registry.OWN["cpu"]
    with pytest.raises(jaxckpt.TargetError, match="compiler='slow'"):
        predicted("toy")
    jaxckpt.register_compiler("slow", SlowStacks())
    assert chip.find_chip("toy").compiler.stacking_passes == 100


def test_a_variant_of_a_chip_has_its_compiler():
    toy(SlowStacks())
    assert isinstance(jaxckpt.define_target("half", like="toy", bandwidth=1e9).compiler, SlowStacks)


def test_one_rule_of_its_own_changes_what_is_predicted_and_leaves_the_rest():
    toy(SlowStacks())
    plain, slow = (analysed(scanned, WS, X, target=target) for target in ("cpu", "toy"))
    assert slow.blocks.unplanned_extra == pytest.approx(100 / 7 * plain.blocks.unplanned_extra)
    assert slow.unplanned.judgement.peak_bytes == plain.unplanned.judgement.peak_bytes
    assert slow.forward_flops == plain.forward_flops


def test_a_rule_of_its_own_is_planned_and_measured_here():
    toy(SlowStacks())
    plan = jaxckpt.plan(scanned, WS, X, budget="60%", target="toy")
    assert plan.measured_peak_bytes == jaxckpt.measure(plan.apply(scanned), WS, X, target="cpu").device_bytes


def test_it_may_count_bytes_its_own_way(monkeypatch):
    monkeypatch.setattr(measure, "_WORTH_KEEPING_S", 0)
    found = []
    for compiler in (CpuCompiler(), TwiceTheBytes()):
        toy(compiler)
        found.append(jaxckpt.measure(scanned, WS, X, target="toy").device_bytes)
    assert found[1] == 2 * found[0], "what is kept on disk is another compiler's"


def test_a_compiler_registered_anew_is_planned_anew(tmp_path):
    directory = tmp_path / "plans"
    loss = lambda: jaxckpt.auto_remat(scanned, budget="70%", target="toy", verify=False, cache_dir=directory)  # noqa: E731
    for passes, expected in ((7, 1), (100, 2), (7, 2)):
        compiler = SlowStacks()
        compiler.stacking_passes = passes
        toy(compiler)
        jax.make_jaxpr(jax.grad(loss()))(WS, X)
        assert len(list(directory.glob("*.json"))) == expected
    assert predicted("toy").unplanned_cost == predicted("cpu").unplanned_cost


def test_a_compiler_is_shown_without_an_address():
    assert repr(SlowStacks()) == repr(SlowStacks()) != repr(CpuCompiler())
    assert "SlowStacks" in repr(SlowStacks()) and "stacking_passes=100" in repr(SlowStacks())
    assert repr(chip.find_chip("cpu")) != repr(toy(SlowStacks()))


def test_the_defaults_do_nothing():
    class Plain(Compiler):
        """Nothing of its own."""

    compiler = Plain()
    assert compiler.rules([]).copies is registry.OWN["cuda"].rules([]).copies
    assert not compiler.heads([], [])(None) and not compiler.outside_regions([])(None)
    target = toy(compiler)
    assert compiler.devices(target, None) == tuple(jax.local_devices()[:1])
    with pytest.raises(jaxckpt.TargetError, match="'toy:4096' is 4096 devices"):
        jaxckpt.mesh("toy:4096", {"data": 4096})


def test_no_other_module_compares_a_platform():
    package = Path(jaxckpt.__file__).parent
    others = [p for p in package.rglob("*.py") if p.parent.name != "targets" and p.name != "_compat.py"]
    assert len(others) > 50
    for path in others:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = ast.unparse(node)
                assert not re.search(r"\.platform\b|default_backend", compared), f"{path.name}: {compared}"
