"""A failing program is made small: operations dropped, choices and sizes brought to the simplest ones."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

from .constructs import CONSTRUCTS
from .programs import Spec
from .trying import tried


def reduced(spec: Spec, failure: dict[str, Any], minutes: float = 3.0) -> Spec:
    """The smallest program found in some minutes that fails by the same oracle, and with the same kind of error."""
    stop = time.monotonic() + 60 * minutes
    kind = _kind(failure)

    def fails(smaller: Spec) -> bool:
        return any(_kind(found) == kind for found in tried(smaller)["failures"])

    spec = copy.deepcopy(spec)
    if failure["plan"] >= 0:
        one = {**spec, "plans": [spec["plans"][failure["plan"]]]}
        spec = one if fails(one) else spec
    spec = _dropped(spec, fails, stop)
    for smaller in _simpler(spec):
        if time.monotonic() > stop:
            break
        spec = smaller(spec) if fails(smaller(spec)) else spec
    return _dropped(spec, fails, stop)


def _kind(failure: dict[str, Any]) -> tuple[str, str]:
    text = failure["text"]
    error = text.split(":")[0]
    return failure["oracle"], error if error.isidentifier() else ""


def _dropped(spec: Spec, fails: Callable[[Spec], bool], stop: float) -> Spec:
    """Drop halves of the operations, then quarters, down to single ones."""
    size = max(1, len(spec["ops"]) // 2)
    while True:
        start = 0
        while start < len(spec["ops"]) and time.monotonic() < stop:
            smaller = {**spec, "ops": spec["ops"][:start] + spec["ops"][start + size :]}
            if smaller["ops"] and fails(smaller):
                spec = smaller
            else:
                start += size
        if size == 1 or time.monotonic() > stop:
            return spec
        size = max(1, size // 2)


def _simpler(spec: Spec) -> Iterator[Callable[[Spec], Spec]]:
    """Changes to try one after the other."""
    simplest = {"transform": "none", "output": "scalar", "argnums": 0, "num_weights": 1, "rows": 8, "width": 4}
    for key, value in simplest.items():
        if spec[key] != value:
            yield lambda spec, key=key, value=value: {**spec, key: value}
    for i, (name, params, *_) in enumerate(spec["ops"]):
        for key, values in CONSTRUCTS[name].choices.items():
            if params[key] != values[0]:
                yield lambda spec, i=i, key=key, value=values[0]: _with(spec, i, key, value)
    plain = {"how": "apply", "cost": "time", "solver": "auto", "target": None, "verify": False}
    plain |= {"keep_checkpoints": True, "max_compiles": None}
    for key, value in plain.items():
        yield lambda spec, key=key, value=value: {**spec, "plans": [{**p, key: value} for p in spec["plans"]]}


def _with(spec: Spec, i: int, key: str, value: Any) -> Spec:
    ops = copy.deepcopy(spec["ops"])
    ops[i][1][key] = value
    return {**spec, "ops": ops}
