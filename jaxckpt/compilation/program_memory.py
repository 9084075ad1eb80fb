"""Where a compiled program's bytes go: one more compile, in which XLA writes down what it assigned.

The compile by which a plan is measured stays as it is. This one has the same options but for those that name a folder
to write to, and gives the same program; the folder is removed again whatever happens.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.compilation.hlo.assignment import read_program
from jaxckpt.compilation.hlo.estimate import estimate_program
from jaxckpt.compilation.measure import Measurement, lowered_for
from jaxckpt.errors import CompilerError, ProgramFormatError
from jaxckpt.targets.chip import find_target

_FINAL = "*after_optimizations.hlo.pb"
# What a TPU's compiler writes before it assigns.
_SCHEDULED = "*before_buffer_assignment.hlo.pb"


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

    Returns:
        The buffers as XLA assigned them, also of a program that a TPU's compiler then refuses as too large. Where it
        gets no further than a schedule they are estimated from shapes, and `is_estimated` says so.

    Raises:
        CompilerError: the target's compiler is not here, failed, or refused the program without a word of it.
        ProgramFormatError: the compiler's description of the program is not as known.
    """
    with tempfile.TemporaryDirectory(prefix="jaxckpt") as folder:
        dump_options = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
        found = lowered_for(fun, specs, target, donate_argnums, closed_over, jit_options, dump_options)()
        final, scheduled = (_only(Path(folder), pattern) for pattern in (_FINAL, _SCHEDULED))
        if final is not None:
            compiler = find_target(target).compiler
            numbers, threads = _numbers(found), compiler.counts_thread_local
            return read_program(final, target=found.target, reported=numbers, counts_thread_local=threads)
        if scheduled is not None:
            return replace(estimate_program(scheduled, target=found.target), reported=_numbers(found))
        raise CompilerError(
            f"the compiler for target={found.target!r} wrote no description of the program: it refused it, which "
            f"takes {found.device_bytes:,} bytes, or compiled nothing"
        )


def _only(folder: Path, pattern: str) -> bytes | None:
    """The one file of a kind, None where there is none."""
    files = sorted(folder.glob(pattern))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ProgramFormatError(f"the compiler wrote {len(files)} programs where one was compiled: {names}")
    return files[0].read_bytes() if files else None


def _numbers(found: Measurement) -> dict[str, int]:
    """What the compiler says of its bytes."""
    return {name: value for name, value in asdict(found).items() if name.endswith("_bytes")}
