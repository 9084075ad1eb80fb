"""The cache under faults: what is bad, foreign or special is skipped, and nothing that is killed is half-written."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from zoo.models import chain_args, chain_loss

import jaxckpt
from jaxckpt import Calibration, Plan
from jaxckpt.api import auto_remat as decorator
from jaxckpt.compilation import cache, files, measure
from jaxckpt.compilation.files import keep_text, with_digest

ARGS = chain_args(layers=6, rows=64, width=16)


def planned(folder):
    """Plan as in a fresh process, and check the gradient."""
    decorator._PLANS.clear()
    fun = jaxckpt.auto_remat(chain_loss, budget="85%", verify=False, cache_dir=folder)
    return str(jax.make_jaxpr(jax.grad(fun))(*ARGS))


def kept(folder):
    return [path for path in folder.iterdir() if path.suffix == ".json"]


def outside_link(path, tmp_path):
    os.replace(path, tmp_path / "outside.json")
    path.symlink_to(tmp_path / "outside.json")


def pipe(path, tmp_path):
    path.unlink()
    os.mkfifo(path)


def a_socket(path, tmp_path):
    path.unlink()
    # A socket's path may have a hundred characters only.
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


def device(path, tmp_path):
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path, tmp_path):
    path.unlink()
    path.mkdir()


def garbage(path, tmp_path):
    path.write_bytes(b"[" * 10**6)


BAD = [outside_link, pipe, a_socket, device, folder, garbage]


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_file_in_the_cache_is_skipped_with_a_warning(tmp_path, caplog, spoil):
    home = tmp_path / "cache"
    before = planned(home)
    (path,) = kept(home)
    spoil(path, tmp_path)
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        after = planned(home)
    assert "made again" in caplog.text and str(path) in caplog.text
    assert count_of(after) == count_of(before)
    assert not list(home.glob("*.part"))
    if spoil is outside_link:
        assert Plan.load(path) == Plan.load(tmp_path / "outside.json") and not path.is_symlink()


def count_of(text):
    return text.count("remat"), text.count("tanh"), text.count("dot_general")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")
def test_another_users_file_is_skipped(tmp_path, caplog, monkeypatch):
    planned(tmp_path)
    monkeypatch.setattr(files.os, "geteuid", lambda: 12345)
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        planned(tmp_path)
    assert "belongs to another user" in caplog.text


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_record_and_a_bad_measurement_are_skipped(tmp_path, caplog, monkeypatch, spoil):
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(measure, "_WORTH_KEEPING_S", 0.0)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    first = jaxckpt.measure(lambda x: jnp.sum(x @ x), x)
    record = Calibration(target="cpu", jaxlib_version="1", family="f")
    keep_text(home / "jaxckpt" / "calibration" / "x.json", record.to_text())
    (measured,) = kept(home / "jaxckpt" / "measured")
    spoil(measured, tmp_path)
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        assert jaxckpt.measure(lambda x: jnp.sum(x @ x), x).device_bytes == first.device_bytes
    assert "made again" in caplog.text
    spoil(home / "jaxckpt" / "calibration" / "x.json", tmp_path)
    with pytest.raises(jaxckpt.PlanFileError):
        Calibration.load_kept(home / "jaxckpt" / "calibration" / "x.json", home / "jaxckpt")


def test_a_measurement_of_other_types_is_skipped(caplog, monkeypatch):
    monkeypatch.setattr(measure, "_WORTH_KEEPING_S", 0.0)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    first = jaxckpt.measure(lambda x: jnp.sum(x @ x), x)
    (path,) = kept(cache.folder() / "measured")
    path.write_text(json.dumps(with_digest({**json.loads(path.read_text()), "temp_bytes": "many", "digest": ""})))
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        assert jaxckpt.measure(lambda x: jnp.sum(x @ x), x).device_bytes == first.device_bytes
    assert "temp_bytes: " in caplog.text


def test_a_folder_that_cannot_be_read_or_written_is_no_error(tmp_path, monkeypatch, caplog):
    real = os.open

    def denied(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(30, "Read-only file system", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(files.os, "open", denied)
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        planned(tmp_path)
    assert "could not be kept" in caplog.text and not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_cleared_away(tmp_path):
    for name, age in {"old.json.0.part": 2 * files._STALE_S, "new.json.0.part": 0}.items():
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    keep_text(tmp_path / "x.json", "{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.json.0.part", "x.json"]


PLAN = """
import sys, jax
from zoo.models import chain_args, chain_loss
import jaxckpt
for i in range(6, 60):
    args = chain_args(layers=i, rows=64, width=16)
    fun = jaxckpt.auto_remat(chain_loss, budget="85%", cache_dir=sys.argv[1])
    jax.make_jaxpr(jax.grad(fun))(*args)
    jaxckpt.plan(chain_loss, *args, budget="85%").save(sys.argv[2])
    print("planned", flush=True)
"""


@pytest.mark.parametrize("num", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_while_planning_nothing_is_half_written(tmp_path, num):
    home, output = tmp_path / "cache", tmp_path / "plan.json"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, ["tests", *sys.path])), "XDG_CACHE_HOME": str(home)}
    for i in range(num):
        with subprocess.Popen(
            [sys.executable, "-c", PLAN, str(home / "plans"), str(output)], env=env, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(1.5 * i / num)
            process.send_signal(signal.SIGKILL)
    plans = [*(home / "plans").glob("*.json"), *output.parent.glob("plan.json")]
    assert plans and all(Plan.load(path) for path in plans)
    for path in (home / "jaxckpt" / "calibration").glob("*.json"):
        Calibration.load(path)
    planned(home / "plans")
    assert (home / "plans").exists()
