"""Results by key in a file that several processes append to, so that a benchmark goes on where it stopped."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxckpt.compilation.measure import Measurement, through

OUT = Path(__file__).parent / "out"
_ROOT = Path(__file__).parents[1]


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


@contextmanager
def remembering(store: Store) -> Iterator[None]:
    """What is compiled inside is kept in the store, by program, target and versions, and is not compiled again."""

    def door(name: str, compile_: Callable[[], Measurement]) -> Measurement:
        return Measurement(**store.get(("bytes", name), lambda: asdict(compile_())))

    with through(door):
        yield
