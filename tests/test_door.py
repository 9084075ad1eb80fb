"""The one door that every compile passes, whoever asks for it: what tests guard it with sees all of them."""

import os
import threading

import jax
import jax.numpy as jnp
import pytest
from helpers import analysed, no_compiles
from zoo.models import chain_args, chain_loss

import jaxckpt
from jaxckpt.compilation import measure, process

ARGS = chain_args(layers=9, rows=512, width=16)
STATE = jax.ShapeDtypeStruct((32,), jnp.float32)


def measured():
    jaxckpt.measure(chain_loss, *ARGS)


def measured_side_by_side():
    found = analysed(chain_loss, *ARGS)
    found.measure_all(found.candidates[:3])


def planned():
    jaxckpt.plan(chain_loss, *ARGS, budget="70%")


def profiled():
    jaxckpt.plan(chain_loss, *ARGS, budget="70%", verify=False, profile=True)


def held():
    loop = lambda x: jaxckpt.while_loop(lambda x: jnp.sum(x) < 9, jnp.sin, x, max_steps=30, budget="8GB")  # noqa: E731
    jax.eval_shape(loop, STATE)


def step(w, x):
    return w - 0.1 * jax.grad(jaxckpt.auto_remat(lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))))(w, x)


def fitted():
    w = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    jaxckpt.fit(step, w, jax.ShapeDtypeStruct((64, 16), jnp.float32), budget="80%")


def jitted():
    jaxckpt.jit(step, budget="80%")(jnp.ones((16, 16)), jnp.ones((64, 16)))


def fitted_to_a_batch():
    w = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    jaxckpt.largest_batch(step, lambda n: (w, jax.ShapeDtypeStruct((n, 16), jnp.float32)), budget="1MB")


def traded_off():
    jaxckpt.frontier(chain_loss, *ARGS, verify=True)


def differentiated():
    jax.eval_shape(jax.grad(jaxckpt.auto_remat(lambda *args: 2.0 * chain_loss(*args), budget="70%")), *ARGS)


PATHS = (
    measured,
    measured_side_by_side,
    planned,
    profiled,
    held,
    fitted,
    jitted,
    fitted_to_a_batch,
    traded_off,
    differentiated,
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_a_compile_is_seen_on_every_path(path):
    with no_compiles(), pytest.raises(pytest.fail.Exception, match="compiled"):
        path()


def test_a_compile_in_a_process_of_its_own_is_seen(monkeypatch):
    monkeypatch.setenv(process.SWITCH, "1")
    monkeypatch.setattr(process, "_COMMAND", ("false",))
    with no_compiles(), pytest.raises(pytest.fail.Exception, match="compiled"):
        jaxckpt.measure(chain_loss, *ARGS, target="cpu")


def test_compiles_in_threads_are_seen(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    threads = []
    with measure.through(lambda name, compile_: threads.append(threading.get_ident()) or compile_()):
        measured_side_by_side()
    assert len(threads) == 3 and threading.get_ident() not in threads


def test_an_answer_takes_the_place_of_a_compile():
    known = {}
    with measure.through(lambda name, compile_: known.setdefault(name, compile_())):
        first = jaxckpt.measure(chain_loss, *ARGS)
    with measure.through(lambda name, compile_: known[name]):
        assert jaxckpt.measure(chain_loss, *ARGS) == first
