"""Full and read-only disks, real ones: what is planned is right, nothing is half-written, and the next run is right."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and namespaces are Linux's")

CODE = """
import json, logging, os, resource, signal, subprocess, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import jaxckpt

kind, disk = sys.argv[1], Path(sys.argv[2])
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def mount(*options):
    subprocess.run(["mount", *options, str(disk)], check=True)

def spoil():
    if kind == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    elif kind == "read-only":
        mount("-o", "remount,ro", "-t", "tmpfs")
    else:
        with open(disk / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

def mend():
    if kind == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    elif kind == "read-only":
        mount("-o", "remount,rw", "-t", "tmpfs")
    else:
        (disk / "filler").unlink()

def loss(w, x):
    for _ in range(6):
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)

w, x = np.eye(8, dtype=np.float32), np.ones((256, 8), np.float32)
cache = disk / "plans"
os.environ["XDG_CACHE_HOME"] = str(disk)

def once():
    fun = jaxckpt.auto_remat(loss, budget="80%", cache_dir=cache)
    value = jax.grad(fun)(w, x)
    np.testing.assert_allclose(value, jax.grad(loss)(w, x), 1e-5)
    return jaxckpt.plan(loss, w, x, budget="80%", cache_dir=cache)

def files():
    found = (p for p in sorted(disk.rglob("*")) if p.is_file() and p.name != "filler")
    return {str(p.relative_to(disk)): p.read_bytes() for p in found}

if kind != "limited":
    mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")
saved = disk / "plan.json"
saved.write_text("old")
spoil()
before = files()
first = once()
try:
    first.save(saved)
    error = None
except OSError as raised:
    error = raised.errno
assert files() == before, sorted(files())
mend()
jax.clear_caches()
second = once()
kept = [name for name in files() if name.endswith(".json") and name != "plan.json"]
for path in cache.glob("*.json"):
    assert jaxckpt.Plan.load(path).to_json() == second.to_json()
records = [path for path in disk.rglob("*.json") if "calibration" in str(path)]
for path in records:
    jaxckpt.Calibration.load(path)
second.save(saved)
assert jaxckpt.Plan.load(saved).to_json() == second.to_json()
assert not [name for name in files() if name.endswith(".part")]
print(json.dumps([error, first.measured_peak_bytes, second.measured_peak_bytes, sorted(kept), len(records)]))
"""
ERRORS = {"limited": "EFBIG", "full": "ENOSPC", "read-only": "EROFS"}


def has_namespaces(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "read-only")]


@pytest.mark.parametrize("kind", ["limited", *SLOW])
def test_a_disk_that_takes_nothing_spoils_nothing(kind, tmp_path):
    if kind != "limited" and not has_namespaces(tmp_path):
        pytest.skip("a disk of one's own takes a mount namespace")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    namespace = [] if kind == "limited" else ["unshare", "-rm"]
    command = [*namespace, sys.executable, "-c", CODE, kind, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    error, first, second, kept, num_records = json.loads(done.stdout.splitlines()[-1])
    assert errno.errorcode[error] == ERRORS[kind]
    assert first == second
    # The next run writes plans, measurements and the record.
    assert num_records and len(kept) > num_records, kept
