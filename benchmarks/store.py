"""Results by key in a file that several processes append to, so that a benchmark goes on where it stopped."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from jaxckpt import _compat
from jaxckpt.compilation import measure
from jaxckpt.compilation.measure import Measurement, compiled_bytes

OUT = Path(__file__).parent / "out"
_ROOT = Path(__file__).parents[1]
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")


class Store:
    """A dictionary in a file of JSON lines; what is there is never made again.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = dict(self._lines())

    def _lines(self) -> Iterator[tuple[str, Any]]:
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the process was stopped while it wrote
                    continue
                yield entry["key"], entry["value"]

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of a key, made and kept if it is not there."""
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        if digest not in self._known:
            self._known[digest] = made = make()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": digest, "value": made}) + "\n")
        return self._known[digest]


@functools.cache
def code_digest() -> str:
    """What changes with the planner: rows found by another planner are found again."""
    files = sorted([*(_ROOT / "jaxckpt").rglob("*.py"), *(_ROOT / "solvers" / "ckptsolvers").rglob("*.py")])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def measured(store: Store, fun: Callable, specs: Any, target: str | None, **options: Any) -> Measurement:
    """As `compiled_bytes`, but a program that was compiled before is not compiled again."""
    jaxpr = _ADDRESS.sub("", str(jax.make_jaxpr(fun)(*specs)))
    key = ("bytes", jaxpr, target or jax.default_backend(), _compat.JAX_VERSION, _compat.JAXLIB_VERSION, options)
    return Measurement(**store.get(key, lambda: asdict(compiled_bytes(fun, specs, target, **options))))


@contextmanager
def remembering(store: Store) -> Iterator[None]:
    """Planners inside measure through the store."""
    before = measure.compiled_bytes
    measure.compiled_bytes = functools.partial(measured, store)
    try:
        yield
    finally:
        measure.compiled_bytes = before
