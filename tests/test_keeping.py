"""Compiles that are kept: the same sizes come back, and what changes a compile is compiled again."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.compilation import cache, measure
from jaxckpt.compilation.measure import contextlib, show_progress

X = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def loss(x):
    return jnp.sum(jnp.tanh(x @ x) ** 2)


@pytest.fixture
def compiles(monkeypatch):
    """Every compile counts as a long one, and is counted."""
    found = []
    monkeypatch.setattr(measure, "_WORTH_KEEPING_S", 0.0)
    with measure.through(lambda name, compile_: found.append(name) or compile_()):
        yield found


def test_a_measurement_is_read_back(compiles):
    first, second = jaxckpt.measure(loss, X), jaxckpt.measure(loss, X)
    assert first == second and len(compiles) == 1


def test_another_program_target_or_compiler_is_compiled_anew(compiles, monkeypatch):
    jaxckpt.measure(loss, X)
    jaxckpt.measure(lambda x: loss(2 * x), X)
    jaxckpt.define_target("mine", like="cpu", bandwidth=1e9)
    assert jaxckpt.measure(loss, X, target="mine").target == "mine"
    assert len(compiles) == 3
    monkeypatch.setattr(measure, "_versions", lambda chip: ("another",))
    jaxckpt.measure(loss, X)
    assert len(compiles) == 4


def test_nothing_is_kept_where_that_is_not_wanted_or_possible(compiles, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.SWITCH, "1")
    jaxckpt.measure(loss, X)
    monkeypatch.delenv(cache.SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    jaxckpt.measure(loss, X)
    jaxckpt.measure(loss, X)
    assert len(compiles) == 3


def test_a_damaged_file_is_compiled_anew(compiles):
    first = jaxckpt.measure(loss, X)
    (kept,) = (cache.folder() / "measured").iterdir()
    for text in ("{", "[]"):
        kept.write_text(text)
        assert jaxckpt.measure(loss, X).device_bytes == first.device_bytes
    assert len(compiles) == 3


def test_progress_is_shown_around_each_compile(compiles):
    shown = []
    with show_progress(lambda text: shown.append(text) or contextlib.nullcontext()):
        jaxckpt.measure(loss, X)
    jaxckpt.measure(lambda x: loss(x) + 1.0, X)
    assert shown == ["compiling for cpu"]
