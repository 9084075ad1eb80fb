"""A compile in a process of its own, which may crash or be killed without taking the caller with it."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.export
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jaxckpt import _compat
from jaxckpt.compilation.compiled import Compiled, read
from jaxckpt.compilation.files import write_text
from jaxckpt.errors import CompilerError
from jaxckpt.targets.chip import Target, find_chip, topology_of
from jaxckpt.targets.registry import register_compiler
from jaxckpt.targets.topology import devices_for

# Set to anything, compiles for a named target run here.
SWITCH = "JAXCKPT_ISOLATE"
_COMMAND = (sys.executable, "-m", "jaxckpt.compilation.process")
_SIZES = tuple(f"{name}_size_in_bytes" for name in ("argument", "output", "alias", "temp", "generated_code"))
# Not every JAX has these.
_MORE_SIZES = (
    "peak_memory_in_bytes",
    "total_allocation_bytes",
    *(f"host_{name}_size_in_bytes" for name in ("argument", "output", "alias", "temp")),
)


class FailedError(Exception):
    """What a compiler in another process raised."""


def sizes_later(
    fun: Callable, specs: Sequence[Any], donate_argnums: int | Sequence[int], target: str, options: Any
) -> Callable[[], Compiled]:
    """Export a function; what is returned compiles it in another process, and may be called in any thread.

    Args:
        fun: what to compile.
        specs: its arguments, placed.
        donate_argnums: as in `jax.jit`.
        target: as users write it.
        options: the compiler's.

    Returns:
        A function to what is read of the compiled program. It raises `CompilerError`, with how, where the process ended
        without an answer, and `FailedError` with the compiler's own error.
    """
    chip = find_chip(target)
    given = {donate_argnums} if isinstance(donate_argnums, int) else set(donate_argnums)
    owners = [i for i, spec in enumerate(specs) for _ in jax.tree.leaves(spec)]
    leaves, tree = jax.tree.flatten(list(specs))
    flat = lambda *leaves: jax.tree.leaves(fun(*jax.tree.unflatten(tree, leaves)))  # noqa: E731
    exported = jax.export.export(jax.jit(flat), platforms=(chip.platform,))(*leaves)
    asked = {
        "program": _compat.without_gradient(exported),
        "donated": [i for i, owner in enumerate(owners) if owner in given],
        "chip": chip,
        "compiler": _importable(chip),
        "topology": topology_of(target) if chip.platform_compiler.has_layouts else str(exported.nr_devices),
        "options": options,
        "places": [_described(leaf.sharding) for leaf in leaves],
    }

    def sizes() -> Compiled:
        found = _answer(asked, target)
        if "error" in found:
            raise FailedError(found["error"])
        stats = SimpleNamespace(**found.pop("stats"))
        return Compiled(stats=stats, **found)

    return sizes


def _importable(chip: Target) -> Any:
    """The compiler of a chip, None if another process knows it anyway.

    Raises:
        CompilerError: its class is in no module that another process can import.
    """
    if not chip.compiler_name:
        return None
    try:
        pickle.dumps(chip.compiler)
        is_importable = type(chip.compiler).__module__ != "__main__"
    except (pickle.PicklingError, AttributeError, TypeError):
        is_importable = False
    if not is_importable:
        raise CompilerError(
            f"compiler={chip.compiler_name!r} cannot be sent to another process; define its class at the top of a "
            f"module that can be imported, or compile in this process, without {SWITCH}"
        )
    return chip.compiler


def _answer(asked: dict[str, Any], target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="jaxckpt") as folder:
        question, answer = Path(folder, "question"), Path(folder, "answer")
        question.write_bytes(pickle.dumps(asked))
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [*_COMMAND, str(question), str(answer)], env=env, capture_output=True, text=True, check=False
        )
        if not answer.exists():
            raise CompilerError(f"the compiler for target={target!r} {_ending(done)}")
        return json.loads(answer.read_text())


def _ending(done: subprocess.CompletedProcess) -> str:
    if done.returncode >= 0:
        return f"ended with status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:300]}"
    name = signal.Signals(-done.returncode).name
    hint = "; where the host ran out of memory, a smaller program or a larger host helps" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _described(sharding: Any) -> tuple | None:
    """A sharding without its devices, which another process has too; None on one device."""
    if sharding.num_devices == 1:
        return None
    mesh = sharding.mesh
    return mesh.axis_sizes, mesh.axis_names, mesh.axis_types, sharding.spec, sharding.memory_kind


def _placed(described: tuple | None, devices: Sequence[Any]) -> Any:
    if described is None:
        return SingleDeviceSharding(devices[0])
    sizes, names, kinds, spec, memory_kind = described
    mesh = Mesh(np.array(devices).reshape(sizes), names, axis_types=kinds)
    return NamedSharding(mesh, spec, memory_kind=memory_kind)


def main(question: str, answer: str) -> None:
    """Compile what the question says and write the answer, whole or not at all."""
    asked = pickle.loads(Path(question).read_bytes())
    exported = asked["program"]
    if asked["compiler"] is not None:
        register_compiler(asked["chip"].compiler_name, asked["compiler"])
    devices = devices_for(asked["chip"], asked["topology"])[: exported.nr_devices]
    places = [_placed(place, devices) for place in asked["places"]]
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in zip(exported.in_avals, places, strict=True)]
    traced = jax.jit(exported.call, donate_argnums=asked["donated"]).trace(*specs)
    lowered = traced.lower(lowering_platforms=(asked["chip"].platform,))
    try:
        compiled = read(lowered.compile(compiler_options=asked["options"]))
        assert compiled.stats is not None
        names = [*_SIZES, *(name for name in _MORE_SIZES if hasattr(compiled.stats, name))]
        stats = {name: getattr(compiled.stats, name) for name in names}
        found: dict[str, Any] = {f.name: getattr(compiled, f.name) for f in fields(compiled)} | {"stats": stats}
    except Exception as error:  # every backend raises its own kind
        found = {"error": str(error) or type(error).__name__}
    write_text(answer, json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
