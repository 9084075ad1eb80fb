"""Chips: what they hold, how fast they compute and move bytes, and how users add their own.

The table is chips.toml beside this file; a user's file has the same form. No JAX in here.
"""

import difflib
import functools
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from jaxckpt.errors import BudgetError, TargetError
from jaxckpt.targets.compiler import Compiler
from jaxckpt.targets.registry import OWN, compiler_named, own_compiler
from jaxckpt.units import parse_bytes

FILE = "jaxckpt.toml"
VARIABLE = "JAXCKPT_TARGETS"
_LAYOUT = re.compile(r"[1-9]\d*(x[1-9]\d*)+")
_NUMBER = re.compile(r"[1-9]\d*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A chip and the compiler that speaks for it; all of it for one device.

    Attributes:
        name: as users write it.
        platform: JAX's platform name.
        memory_bytes: device memory, None where it is the host's.
        bandwidth: bytes per second to and from that memory.
        host_bandwidth: bytes per second between it and the host's memory, each way.
        matmul_flops: FLOP per second of the matrix units by dtype; "other" is every other dtype.
        vector_flops: FLOP per second of everything else.
        devices_per_chip: how many JAX devices its compiler makes of a chip.
        facts: what its platform's compiler asks beside these, a record that the compiler names; None if nothing.
        compiler_name: of rules other than the platform's own, in calls and files `compiler`.
        origin: where it was defined.
    """

    name: str
    platform: str
    memory_bytes: int | None
    bandwidth: float
    host_bandwidth: float
    matmul_flops: dict[str, float]
    vector_flops: float
    devices_per_chip: int = 1
    facts: Any = None
    compiler_name: str = ""
    origin: str = "jaxckpt"

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def compiler(self) -> Compiler:
        """The rules of its compiler.

        Raises:
            TargetError: its name is not registered.
        """
        return compiler_named(self.compiler_name or self.platform)

    @property
    def platform_compiler(self) -> Compiler:
        """The platform's own compiler, which says what has to be installed and what is asked of a chip."""
        return OWN[self.platform]

    @property
    def kind(self) -> str:
        """What JAX calls such a device."""
        return self.platform_compiler.device_kind(self.facts)

    @property
    def layouts(self) -> tuple[str, ...]:
        """Some names with a topology that its compiler has."""
        return tuple(f"{self.name}:{topology}" for topology in self.platform_compiler.topologies(self.facts))


_DEFINED: dict[str, Target] = {}


def define_target(name: str, **values: Any) -> Target:
    """Add a chip that jaxckpt does not know, or a variant of one that it does.

    Args:
        name: what `target=` will call it.
        **values: `like`, a known chip to start from, and what differs: `memory` (bytes, or "40GB"), `bandwidth`,
            `host_bandwidth`, `vector_flops` (per second), `matmul_flops` (by dtype, "other" for the rest), `platform`,
            what the platform's compiler asks beside these (a table under the name of the compiler's `part`, such as
            `gpu`), `devices_per_chip`, `compiler` (a name given to `register_compiler` before). Without `like` all of
            them that have no default are needed. The same names stand in a file of targets.

    Returns:
        The chip.

    Raises:
        TargetError: a name that jaxckpt itself uses, or a value that is missing, unknown or of the wrong kind.

    Example:
        >>> define_target("h100-slice", like="h100", memory="20GB", bandwidth=8e11).memory_bytes
        20000000000
    """
    found = _target(name, values, known_chips(), "define_target")
    compiler_named(found.compiler_name or found.platform)  # refuses one that is not known
    _DEFINED[name] = found
    return found


def known_chips() -> dict[str, Target]:
    """Every chip by name: jaxckpt's own, the file's, those defined in this process."""
    return {**_file_targets(*_file()), **_DEFINED}


def find_chip(name: object) -> Target:
    """Return a chip by name, with or without a topology.

    Raises:
        TargetError: an unknown name, with the nearest ones, or a topology that cannot be read.
    """
    chips = known_chips()
    chip, colon, layout = name.partition(":") if isinstance(name, str) else ("", "", "")
    chip = chip.lower()
    if chip not in chips:
        same = sorted(n for n, c in chips.items() if chip and chip in (c.platform, c.platform_compiler.backend))
        near = same or difflib.get_close_matches(chip, chips, 3, 0.3) or sorted(chips)
        raise TargetError(
            f"target={name!r} is not known; did you mean {' or '.join(map(repr, near))}? `jaxckpt targets` lists all, "
            "and jaxckpt.define_target adds one"
        )
    found = chips[chip]
    has_layouts = found.platform_compiler.has_layouts
    if colon and not (_LAYOUT if has_layouts else _NUMBER).fullmatch(layout):
        what = "the layout of its chips" if has_layouts else "the number of devices"
        raise TargetError(
            f"target={name!r}: what follows the colon is {what}, such as {' or '.join(map(repr, found.layouts))}"
        )
    return found


def topology_of(name: str | None) -> str | None:
    """What follows the colon of a target's name, None where nothing does."""
    return (name or "").partition(":")[2] or None


def _file() -> tuple[str, float]:
    """The user's file and when it was changed; empty where there is none.

    Raises:
        TargetError: the variable names a file that is not there.
    """
    named = os.environ.get(VARIABLE, "")
    path = Path(named or FILE)
    try:
        return str(path), path.stat().st_mtime
    except OSError as error:
        if named:
            raise TargetError(f"{VARIABLE}={named!r} cannot be read: {error}") from error
        return "", 0.0


@functools.lru_cache(maxsize=8)
def _file_targets(path: str, changed: float) -> dict[str, Target]:
    del changed  # the file is read again once it is
    if not path:
        return _own_targets()
    return _read(Path(path).read_text(), path, _own_targets())


@functools.cache
def _own_targets() -> dict[str, Target]:
    return _read(resources.files("jaxckpt.targets").joinpath("chips.toml").read_text(), "jaxckpt", {})


def _read(text: str, origin: str, base: dict[str, Target]) -> dict[str, Target]:
    try:
        tables = tomllib.loads(text).get("targets", {})
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"{origin} is not a TOML file: {error}") from error
    found = dict(base)
    for name, values in tables.items():
        if not isinstance(values, Mapping):
            raise TargetError(f"{origin}: [targets.{name}] should be a table of values, not {values!r}")
        found[name] = _target(name, values, found, origin)
    return found


def _target(name: Any, values: Mapping[str, Any], chips: Mapping[str, Target], origin: str) -> Target:
    """Check and convert the values of one chip."""
    where = f"{origin}: target {name!r}"
    if not isinstance(name, str) or not name or name != name.lower() or ":" in name:
        raise TargetError(f"{where}: a name is lower case and has no colon, which a topology follows")
    if origin != "jaxckpt" and name in _own_targets():
        raise TargetError(f'{where} is one of jaxckpt\'s own; call yours something else and write like="{name}"')
    given = dict(values)
    start: dict[str, Any] = {}
    if "like" in given:
        like = given.pop("like")
        if like not in chips:
            raise TargetError(f"{where}: like={like!r} is not known; write one of {', '.join(chips)}")
        start = {f.name: getattr(chips[like], f.name) for f in fields(Target)}
    if "memory" in given:
        given["memory_bytes"] = _size(where, given.pop("memory"))
    if "compiler" in given:
        given["compiler_name"] = given.pop("compiler")
    parts = {part: kind for part, kind in _parts().items() if part in given}
    for part, kind in parts.items():
        given["facts"] = _part(f"{where}, {part}", kind, given.pop(part), start.get("facts"))
    merged = {"memory_bytes": None, **start, **given, "name": name, "origin": origin}
    _check(where, Target, merged)
    merged["facts"] = _checked_facts(where, merged, parts)
    return Target(**{**merged, "matmul_flops": _rates(where, merged["matmul_flops"])})


def _parts() -> dict[str, type[Any]]:
    """The records that platforms' compilers ask for, by what users write them under."""
    return {compiler.part: compiler.facts for compiler in OWN.values() if compiler.facts is not None}


def _part(where: str, kind: type, given: Any, start: Any) -> Any:
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TargetError(f"{where}={given!r} is not a table of {', '.join(f.name for f in fields(kind))}")
    known = {f.name: getattr(start, f.name) for f in fields(kind)} if isinstance(start, kind) else {}
    merged = {**known, **given}
    _check(where, kind, merged)
    return kind(**merged)


# What users write where a field has another name.
_WRITTEN = {"memory_bytes": "memory", "compiler_name": "compiler"}


def _check(where: str, kind: type, values: Mapping[str, Any]) -> None:
    """Refuse names that are not there, values that are missing, and numbers that are none or not positive."""
    known = {f.name: f for f in fields(kind)}
    written = {**_WRITTEN, "facts": ", ".join(_parts())}
    shown = ", ".join(written.get(name, name) for name in known if name not in ("name", "origin"))
    for name in values:
        if name not in known:
            raise TargetError(f"{where} has {name!r}, which is none of {shown}")
    for name, f in known.items():
        if name not in values and f.default is MISSING:
            raise TargetError(f"{where} lacks {name!r}; give it, or start from a known chip with `like`")
        value = values.get(name, f.default)
        if f.type in (int, float):
            allowed = int if f.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, allowed) or not value > 0:
                raise TargetError(f"{where}: {name}={value!r} is not a positive {f.type.__name__}")
        elif f.type is str and not isinstance(value, str):
            raise TargetError(f"{where}: {_WRITTEN.get(name, name)}={value!r} is not text")


def _checked_facts(where: str, values: Mapping[str, Any], parts: Iterable[str]) -> Any:
    """The facts that the platform's compiler asks for; `parts` are the names under which some were given."""
    platform = values["platform"]
    if platform not in OWN:
        raise TargetError(f"{where}: platform={platform!r} is none of {', '.join(OWN)}")
    name = values.get("compiler_name") or platform
    if name in OWN and name != platform:
        raise TargetError(f"{where}: compiler={name!r} compiles for no platform but its own, not for {platform!r}")
    own, facts = OWN[platform], values.get("facts")
    for part in parts:
        if part != own.part:
            raise TargetError(f"{where} has {part!r}, which the compiler for platform={platform!r} does not ask for")
    if own.facts is None:
        return None
    if not isinstance(facts, own.facts):
        raise TargetError(f"{where} lacks {own.part!r}, which its compiler needs; start from a known chip with `like`")
    if values["memory_bytes"] is None:
        raise TargetError(f"{where} lacks 'memory'")
    if wrong := own.wrong_facts(facts):
        raise TargetError(f"{where}, {own.part}: {wrong}")
    return facts


def _rates(where: str, given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping) or "other" not in given:
        raise TargetError(f'{where}: matmul_flops={given!r} is not a table of dtypes with "other" among them')
    for dtype, rate in given.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
            raise TargetError(f"{where}: matmul_flops of {dtype} is {rate!r}, which is not a positive number")
    return dict(given)


def _size(where: str, given: Any) -> int:
    try:
        return parse_bytes(given, "memory")
    except BudgetError as error:
        raise TargetError(f"{where}: {error}") from error


def find_target(name: str | None) -> Target:
    """Return a target by name, or the one that the default backend is, or comes nearest to.

    Raises:
        TargetError: an unknown name, with the nearest ones.
    """
    if name is not None:
        return find_chip(name)
    kind, platform = jax.local_devices()[0].device_kind, jax.default_backend()
    here = (chip for chip in known_chips().values() if chip.kind and chip.kind == kind)
    return next(here, None) or find_chip(own_compiler(platform).nearest)


def device_label(target: str | None, num_devices: int = 1) -> str:
    """What to call the devices that something is for: the target as users write it, or the default backend."""
    return target or jax.default_backend() + (f":{num_devices}" if num_devices > 1 else "")


def labelled_target(label: str) -> str | None:
    """The target that a label names; None where it is the default backend's."""
    return None if label.partition(":")[0] == device_label(None) else label


def device_budget(target: str | None) -> int:
    """What `budget="device"` is: the bytes that one device lets programs use, less a twentieth.

    The reserve is for what no compiled program counts: the next batch, the code, gaps between buffers.

    Raises:
        BudgetError: nobody knows, as of a CPU, which has the host's memory.
    """
    chip = find_target(target)
    usable = None
    if is_here(target):
        usable = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if usable is None and chip.memory_bytes is not None:
        usable = int(chip.compiler.usable_share * chip.memory_bytes)
    if usable is None:
        raise BudgetError(
            f'budget="device" needs a device with memory of its own, and {device_label(target)} uses the host\'s; '
            'give bytes, such as "16GB"'
        )
    return usable - usable // 20


def is_here(target: str | None) -> bool:
    """Whether programs for a target can run on JAX's default devices."""
    if target is None:
        return True
    chip, device = find_target(target), jax.devices()[0]
    return device.device_kind == chip.kind if chip.kind else device.platform == chip.platform
