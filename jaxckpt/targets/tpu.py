"""XLA's compiler for TPU: what it rounds, what its tiles pad, and what it runs before the gradient of logits.

TPUs multiply float32 matrices in bfloat16 unless told otherwise, so what products alone read is written rounded. Their
memory comes in tiles of 8 x 128 elements. Compilers lay matrices out so that little is padded, but an image has its
features last: 64 of them take the room of 128.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from jaxckpt.program import primitives
from jaxckpt.program.control_flow import is_planned_inside
from jaxckpt.program.ir import Equation, size_bytes
from jaxckpt.targets import packages
from jaxckpt.targets.compiler import Chip, Compiler
from jaxckpt.targets.describe import described_devices
from jaxckpt.targets.rules import FusionRules, Layouts, added_scatters

_LANES, _SUBLANES = 128, 8
_DEFAULT_PRECISIONS = (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT, lax.Precision.DEFAULT))
# Their operands and results of one rank are laid out alike.
_KEEPS_LAYOUT = primitives.FUSIBLE | primitives.IMAGES
# A product makes logits if its result has this many times the elements of what it reads: between the widening product
# of an MLP (4) and the logits of GPT-2 (65).
_MANY_TIMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tpu:
    """What a TPU's compiler is asked for.

    Attributes:
        compiler: the chip's name in topologies, such as "v5e" in "v5e:2x4".
        topology: one that every version of the compiler has.
        kind: JAX's `device_kind`.
    """

    compiler: str
    topology: str
    kind: str


class TpuCompiler(Compiler):
    """XLA's compiler for TPU."""

    # Its scheduled programs write most values into their stacks where they are made, and read them there; not timed.
    stacking_passes = 1
    heads_wait_for_loops = True
    wants_identical_layers = True
    # Seen in `total_allocation_bytes`, which are the allocations to the byte with them.
    counts_thread_local = True
    host_memory = "pinned_host"
    facts = Tpu
    part = "tpu"
    nearest = "v5e"
    has_layouts = True

    def rules(self, avals: Sequence[Any], equations: Sequence[Equation] = ()) -> FusionRules:
        """Return what it fuses, copies and adds.

        Like a GPU's it makes what is costly again for each of its readers. A product reads operands that are fused into
        it too: of a softmax between two products only its operand is ever a buffer, and of a gelu too.
        """
        del avals
        return FusionRules(matmuls_fuse_operands=True, repeats_expensive=True, scatters=added_scatters(equations))

    def layouts(
        self,
        avals: Sequence[Any],
        equations: Sequence[Equation],
        *,
        features: Mapping[int, int] | None = None,
        read_by_derivatives: bool = False,
    ) -> Layouts:
        """Find what values take: images with their features padded, operands of products rounded."""
        sizes = [size_bytes(aval) for aval in avals]
        found = _features(avals, equations, dict(features or {}))
        for v, dim in found.items():
            if num := avals[v].shape[dim]:
                sizes[v] = sizes[v] // num * (math.ceil(num / _LANES) * _LANES)
        return Layouts(sizes, _narrow(avals, equations, read_by_derivatives), found)

    def heads(self, avals: Sequence[Any], equations: Sequence[Equation]) -> Callable[[Equation], bool]:
        """Return which products make logits.

        The cotangent of logits is fused into the products that read it, but at the end of a region it is a buffer, as
        large as they are. What makes them is the last product and those like it, and what it reads is tiny beside its
        result.
        """

        def shapes(eqn: Equation) -> list[Any]:
            return [avals[x].shape for x in (*eqn.reads, *eqn.outputs)]

        last = next((eqn for eqn in reversed(equations) if primitives.is_matmul(eqn) or is_planned_inside(eqn)), None)
        if last is None or is_planned_inside(last):
            return lambda eqn: False
        # Parameters under another shape are there anyway.
        made = {v for eqn in equations if eqn.reads and eqn.primitive not in primitives.RESHAPES for v in eqn.outputs}
        read = sum(math.prod(avals[v].shape) for v in made.intersection(last.reads))
        if math.prod(avals[last.outputs[0]].shape) < _MANY_TIMES * read:
            return lambda eqn: False
        return lambda eqn: eqn.primitive is last.primitive and shapes(eqn) == shapes(last)

    def device_bytes(self, stats: Any) -> int:
        """Device bytes: the allocations, or where JAX does not tell them, the larger of two bounds.

        Temporaries are not the heap here: gaps between buffers are counted twice in them, which is 0.6 % of GPT-2's and
        up to 17 % of small programs' bytes. A program whose arguments, results and temporaries are 15.99 GiB and whose
        allocations are 15.73 compiles for a chip of 15.75.
        """
        if total := getattr(stats, "total_allocation_bytes", 0):
            return total
        # That peak has what is on the host in it.
        peak = getattr(stats, "peak_memory_in_bytes", 0) - self.host_bytes(stats)
        return max(super().device_bytes(stats), peak)

    def sent_bytes(self, aval: Any) -> int:
        """Bytes of a value on the host, which is in tiles there too, and never rounded to bfloat16."""
        if len(aval.shape) < 2 or not math.prod(aval.shape):
            return size_bytes(aval)
        *_, rows, lanes = aval.shape
        tiled = math.ceil(rows / _SUBLANES) * _SUBLANES * math.ceil(lanes / _LANES) * _LANES
        return size_bytes(aval) // (rows * lanes) * tiled

    def says_at_most(self, stats: Any) -> bool:
        """Where JAX does not tell the allocations, the bytes are a bound."""
        return not getattr(stats, "total_allocation_bytes", 0)

    def devices(self, target: Chip, topology: str | None) -> tuple[Any, ...]:
        """Described devices of a layout, or the first one of a layout that every version has."""
        tpu: Tpu = target.facts
        with _shared_libtpu():
            name = f"{tpu.compiler}:{topology or tpu.topology}"
            found = described_devices(platform="tpu", topology_name=name)
        return found if topology else found[:1]

    def requirements(self, target: Chip) -> list[str]:
        """The libtpu that this JAX was released with; it says itself where it does not fit."""
        del target
        return [_libtpu()]

    def installed(self) -> str | None:
        """The version of libtpu."""
        return packages.version("libtpu") if packages.is_importable("libtpu") else None

    def device_kind(self, facts: Tpu) -> str:
        """As its record says."""
        return facts.kind

    def topologies(self, facts: Tpu) -> tuple[str, ...]:
        """Some layouts, in as many dimensions as the chip's have."""
        return ("2x2x1", "2x2x2", "2x2x4") if facts.topology.count("x") == 2 else ("2x2", "2x4", "4x4")


@functools.cache
def _libtpu() -> str:
    """The requirement of libtpu, as JAX's own metadata says."""
    for line in metadata.requires("jax") or ():
        if match := re.match(r"(libtpu\s*==\s*[\d.*]+)\s*;.*extra == .tpu.", line):
            return match[1]
    return "libtpu"


def _features(avals: Sequence[Any], equations: Sequence[Equation], found: dict[int, int]) -> dict[int, int]:
    """The dimension of features of images: those of convolutions, and what has their shape before and after them."""
    for eqn in equations:
        if eqn.primitive is prims.conv_general_dilated_p:
            dims, image = eqn.params["dimension_numbers"], eqn.inputs[0]
            if isinstance(image, int):
                found.setdefault(image, dims.lhs_spec[1])
            found.setdefault(eqn.outputs[0], dims.out_spec[1])
    if not found:
        return found

    def spread(sources: Sequence[int], to: Sequence[int]) -> None:
        for v in to:
            shape = avals[v].shape
            for u in sources:
                dim, like = found.get(u), avals[u].shape
                if dim is None or v in found or len(shape) < 4:
                    continue
                is_last = dim == len(like) - 1 and shape[-1] == like[-1]
                if is_last or (len(shape) == len(like) and shape[dim] == like[dim]):
                    found[v] = len(shape) - 1 if is_last else dim

    for _ in range(2):
        for eqn in equations:
            if eqn.primitive in _KEEPS_LAYOUT:
                spread(eqn.reads, eqn.outputs)
        for eqn in reversed(equations):
            if eqn.primitive in _KEEPS_LAYOUT:
                spread(eqn.outputs, eqn.reads)
    return found


def _narrow(avals: Sequence[Any], equations: Sequence[Equation], read_by_derivatives: bool) -> frozenset[int]:
    """Float32 values that products of the default precision alone read; changes of shape on the way do not matter."""
    wide: set[int] = set()
    for eqn in reversed(equations):
        if read_by_derivatives and eqn.primitive in primitives.EXPENSIVE:
            wide.update(eqn.outputs)
        if primitives.is_matmul(eqn) and eqn.params.get("precision") in _DEFAULT_PRECISIONS:
            continue
        if eqn.primitive in primitives.RESHAPES and wide.isdisjoint(eqn.outputs):
            continue
        wide.update(eqn.reads)
    read = {v for eqn in equations for v in eqn.reads}
    return frozenset(v for v in read - wide if getattr(avals[v], "dtype", None) == jnp.float32)


@contextlib.contextmanager
def _shared_libtpu() -> Iterator[None]:
    """Let several processes have libtpu: its lock guards chips, and a compiler uses none."""
    name = "ALLOW_MULTIPLE_LIBTPU_LOAD"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
