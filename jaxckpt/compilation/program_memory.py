"""Where a compiled program's bytes go: one more compile, in which XLA writes down what it assigned.

The compile by which a plan is measured stays as it is. This one has the same options but for those that name a folder
to write to, and gives the same program; the folder is removed again whatever happens.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.compilation.hlo.assignment import read_program
from jaxckpt.compilation.measure import Measurement, lowered_for
from jaxckpt.errors import CompilerError, ProgramFormatError
from jaxckpt.targets.chip import find_target

_FINAL = "*after_optimizations.hlo.pb"


def program_memory(
    fun: Callable,
    specs: Sequence[Any],
    target: str | None,
    donate_argnums: int | Sequence[int] = (),
    closed_over: Sequence[Any] = (),
    jit_options: Mapping[str, Any] = MappingProxyType({}),
) -> CompiledMemory:
    """Compile a function for a target and read every buffer of it.

    Args:
        fun: as for `compilation.measure.compiled_bytes`, like what follows.
        specs: its positional arguments.
        target: a chip's name; None is the default backend.
        donate_argnums: as in `jax.jit`.
        closed_over: arrays that `fun` takes before the others. Very large ones are arguments of what is compiled.
        jit_options: other keywords of `jax.jit`, a plan's compiler options among them.

    Raises:
        CompilerError: the target's compiler is not here, failed, or refused the program as too large.
        ProgramFormatError: the compiler's description of the program is not as known.
    """
    with tempfile.TemporaryDirectory(prefix="jaxckpt") as folder:
        dump_options = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
        found = lowered_for(fun, specs, target, donate_argnums, closed_over, jit_options, dump_options)()
        return read_program(
            _final(Path(folder), found),
            target=found.target,
            reported=_numbers(found),
            counts_thread_local=find_target(target).compiler.counts_thread_local,
        )


def _final(folder: Path, found: Measurement) -> bytes:
    """The description of the program as it was compiled."""
    files = list(folder.glob(_FINAL))
    if not files:
        raise CompilerError(
            f"the compiler for target={found.target!r} wrote no description of the program: either it refused it, "
            f"which takes {found.device_bytes:,} bytes, or nothing was compiled"
        )
    if len(files) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise ProgramFormatError(f"the compiler wrote {len(files)} programs where one was compiled: {names}")
    return files[0].read_bytes()


def _numbers(found: Measurement) -> dict[str, int]:
    """What the compiler says of its bytes."""
    return {name: value for name, value in asdict(found).items() if name.endswith("_bytes")}
