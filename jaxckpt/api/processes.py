"""One plan for all processes: the first one plans, the others take its plan and check that it is for their program.

Processes that compile different programs wait for each other in the first collective for ever. Plans are exchanged
through the coordinator's key-value store, which takes no collective and may be used while a function is traced.
"""

import inspect
import json
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax

from jaxckpt import _compat
from jaxckpt.errors import InfeasibleBudgetError, JaxckptError, PlanMismatchError

Made = TypeVar("Made")
# Planning takes a dozen compiles of the whole program.
_WAIT_S = 3600

_ERROR_FIELDS = tuple(inspect.signature(InfeasibleBudgetError).parameters)[1:]
# Functions whose turns are counted each on its own.
_MOST_LABELS = 4096


class _Turns:
    """How often each function's plans were asked for, the same in all processes.

    Beyond so many functions the one that was not asked for longest is forgotten, and whoever is new begins after all
    that were forgotten: no turn is given twice.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self.clear()

    def take(self, label: str) -> int:
        """The next turn of a function."""
        with self._lock:
            turn = self._next.pop(label, self._first)
            self._next[label] = turn + 1
            if len(self._next) > self._most:
                self._first = max(self._first, self._next.pop(next(iter(self._next))))
            return turn

    def clear(self) -> None:
        """Begin anew."""
        self._next: dict[str, int] = {}
        self._first = 0


_SEEN = _Turns(_MOST_LABELS)


@dataclass(frozen=True, kw_only=True)
class Exchange(Generic[Made]):
    """How what process 0 makes gets to the others.

    Attributes:
        label: the function's name; what is made for one function is exchanged in the order it is asked for.
        write: it as plain data.
        read: it from there; raises `PlanMismatchError` where it is for another program than this process's.
    """

    label: str
    write: Callable[[Made], dict[str, Any]]
    read: Callable[[dict[str, Any]], Made]


def agreed(exchange: Exchange[Made], make: Callable[[], Made]) -> Made:
    """Make plans, or take those that process 0 made for the same call.

    Args:
        exchange: how they get from one process to another.
        make: plans.

    Returns:
        The same plans in all processes.

    Raises:
        PlanMismatchError: process 0 planned another program.
        InfeasibleBudgetError: process 0 found no plan that fits.
    """
    client = _compat.distributed_client()
    if client is None or jax.process_count() == 1:
        return make()
    label = exchange.label
    key = f"jaxckpt/plans/{label}/{_SEEN.take(label)}"
    if jax.process_index() != 0:
        return _taken(client, key, exchange)
    try:
        found = make()
    except Exception as error:
        _publish(client, key, {"error": _described(error)})
        raise
    _publish(client, key, {"plan": exchange.write(found)})
    return found


def _publish(client: Any, key: str, data: dict[str, Any]) -> None:
    client.key_value_set_bytes(key, zlib.compress(json.dumps(data).encode()))


def _taken(client: Any, key: str, exchange: Exchange[Made]) -> Made:
    label = exchange.label
    try:
        data = client.blocking_key_value_get_bytes(key, _WAIT_S * 1000)
    except Exception as error:  # the runtime's own kind
        raise JaxckptError(
            f"process 0 made no plan for {label} that this process, {jax.process_index()}, could take ({error}). "
            "Do all processes run the same program?"
        ) from error
    found = json.loads(zlib.decompress(data))
    if "error" in found:
        _raise(found["error"])
    try:
        return exchange.read(found["plan"])
    except PlanMismatchError as error:
        raise PlanMismatchError(
            f"process {jax.process_index()} differentiates another program than process 0 in {label}, and would wait "
            f"for it for ever: {error}"
        ) from error


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, InfeasibleBudgetError):
        return {"message": str(error), **{name: getattr(error, name) for name in _ERROR_FIELDS}}
    return {"message": f"{type(error).__name__}: {error}"}


def _raise(described: dict[str, Any]) -> None:
    message = described.pop("message")
    if described:
        described["forced_by"] = tuple(map(tuple, described["forced_by"]))
        raise InfeasibleBudgetError(message, **described)
    raise JaxckptError(f"process 0 could not plan: {message}")
