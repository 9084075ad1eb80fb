"""What is read of a compiled program: what the compiler made again, and what it did not."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.compilation.compiled import flags, num_rematerialized
from jaxckpt.targets.chip import find_target
from jaxckpt.targets.tpu import TpuCompiler

SPECS = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((256, 64), jnp.float32)


def chain(prevent_cse):
    def layer(w, x):
        return jnp.tanh(jnp.sin(x @ w) @ w)

    def loss(w, x):
        for _ in range(4):
            x = jax.checkpoint(layer, prevent_cse=prevent_cse)(w, x)
        return jnp.mean(x**2)

    return loss


@pytest.mark.parametrize("target", [None, *(pytest.param(t, marks=pytest.mark.targets) for t in ("h100", "v5e"))])
@pytest.mark.parametrize(("prevent_cse", "there"), [(True, 8), (False, 0)])
def test_recomputation_that_the_compiler_merges_back_is_counted(target, prevent_cse, there):
    found = jaxckpt.measure(chain(prevent_cse), *SPECS, target=target)
    assert (found.num_asked, found.num_recomputed, found.num_rematerialized) == (8, there, 0)


def test_a_kept_measurement_says_what_a_new_one_says(monkeypatch):
    monkeypatch.setattr("jaxckpt.compilation.measure._WORTH_KEEPING_S", 0.0)
    first, second = (jaxckpt.measure(chain(True), *SPECS) for _ in range(2))
    assert replace(first, compile_s=0) == replace(second, compile_s=0) and second.num_recomputed == 8


def test_a_compile_in_a_process_of_its_own_is_read_alike(monkeypatch):
    here = jaxckpt.measure(chain(True), *SPECS, target="cpu")
    monkeypatch.setenv("JAXCKPT_ISOLATE", "1")
    monkeypatch.setenv("JAXCKPT_NO_CACHE", "1")
    there = jaxckpt.measure(chain(True), *SPECS, target="cpu")
    assert replace(here, compile_s=0) == replace(there, compile_s=0)


@pytest.fixture(scope="module")
def plan():
    def loss(w, x):
        for _ in range(8):
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    return jaxckpt.plan(loss, *SPECS, budget="60%", calibration=None)


def test_a_plan_has_what_its_own_compile_made_again(plan):
    assert plan.schedule is not None
    assert plan.num_recomputed == plan.num_asked > 0 and plan.num_rematerialized == 0 and plan.flags == ()
    assert "undid" not in str(plan) and "rematerialization" not in str(plan) and "at most" not in str(plan)


def test_a_report_says_what_the_compiler_did(plan):
    undone = replace(plan, num_recomputed=plan.num_asked - 1)
    assert f"of {plan.num_asked} products to be made again its program makes {plan.num_asked - 1}" in flat(undone)
    assert "rematerialization made 24 instructions again" in flat(replace(plan, num_rematerialized=24))
    assert "measured, at most" in flat(replace(plan, is_at_most=True))
    named = replace(plan, flags=("xla_disable_hlo_passes=rematerialization in XLA_FLAGS",))
    assert "xla_disable_hlo_passes=rematerialization in XLA_FLAGS" in flat(named)


def flat(plan):
    return " ".join(str(plan).split())


def test_only_names_that_xla_gives_are_counted():
    text = """
  %fusion.3.remat = f32[8] fusion(%p), kind=kLoop
  ROOT %dot.2.remat2 = f32[8] dot(%a, %b)
  %fusion.4.remat3.1 = f32[8] fusion(%fusion.3.remat)
  %remat2.24 = f32[8] add(%a, %b)
  %jit_rematted.3 = f32[8] add(%a, %b), metadata={op_name="x.remat = "}
"""
    assert num_rematerialized(text) == 3


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ()),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, ()),
        (
            {"XLA_FLAGS": "--xla_a=1 --xla_disable_hlo_passes=cse,remat", "LIBTPU_INIT_ARGS": "--xla_tpu_remat_mode=2"},
            ("xla_disable_hlo_passes=cse,remat in XLA_FLAGS", "xla_tpu_remat_mode=2 in LIBTPU_INIT_ARGS"),
        ),
    ],
)
def test_flags_that_change_what_is_recomputed_are_named(given, found):
    assert flags(given) == found


def test_bytes_of_a_tpu_are_its_allocations_where_jax_tells_them():
    sizes = {
        "argument_size_in_bytes": 10,
        "output_size_in_bytes": 4,
        "alias_size_in_bytes": 1,
        "temp_size_in_bytes": 20,
        "peak_memory_in_bytes": 34,
    }
    new, old = SimpleNamespace(**sizes, total_allocation_bytes=29), SimpleNamespace(**sizes)
    tpu = TpuCompiler()
    assert (tpu.device_bytes(new), tpu.says_at_most(new)) == (29, False)
    assert (tpu.device_bytes(old), tpu.says_at_most(old)) == (34, True)
    assert not find_target("cpu").compiler.says_at_most(old)


@pytest.mark.targets
def test_a_program_that_just_compiles_for_a_tpu_is_measured_to_fit_it():
    limit = find_target("v5e").memory_bytes
    weights = jax.ShapeDtypeStruct((24, 1024, 1024), jnp.float32)

    def loss(w, x):
        return jnp.mean(jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0] ** 2)

    def of(thousand_rows):
        x = jax.ShapeDtypeStruct((thousand_rows * 1000, 1024), jnp.float32)
        return jaxckpt.measure(loss, weights, x, target="v5e")

    def is_refused(found):
        return found.num_recomputed is None

    fits, too_many = 40, 400
    assert not is_refused(of(fits)) and is_refused(of(too_many))
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (fits, middle) if is_refused(of(middle)) else (middle, too_many)
    assert 0.98 * limit <= of(fits).device_bytes <= limit < of(too_many).device_bytes
