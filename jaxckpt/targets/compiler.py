"""The rules of a compiler, each with a default; `cpu`, `gpu` and `tpu` override those in which XLA's backends differ.

Seen in XLA's scheduled programs, in buffer assignments and in timed runs. Only what was seen is a rule, and each
constant stands with its rule and says what it was fitted on.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from jaxckpt import _compat
from jaxckpt.errors import TargetError
from jaxckpt.program.ir import Equation, size_bytes
from jaxckpt.targets.rules import FusionRules, Layouts, added_scatters

# What the compiler says when a program needs more than the chip has: itself a measurement.
_REFUSED = re.compile(r"total memory required[^(]*\(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", re.IGNORECASE)
_SCALE = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Chip(Protocol):
    """What a compiler reads of the chip that it compiles for; see `targets.chip.Target`."""

    @property
    def name(self) -> str:
        """As users write it."""
        ...

    @property
    def platform(self) -> str:
        """JAX's name for it."""
        ...

    @property
    def memory_bytes(self) -> int | None:
        """Device memory, None where it is the host's."""
        ...

    @property
    def bandwidth(self) -> float:
        """Bytes per second to and from that memory."""
        ...

    @property
    def facts(self) -> Any:
        """What its platform's compiler asks beside memory and rates, None if nothing."""
        ...


class Compiler:
    """How a target's compiler behaves: the defaults are one that does nothing of its own accord.

    Subclass the compiler of the platform, override a rule and name it with `register_compiler`.

    Attributes:
        version: part of the key of plans and measurements that are kept on disk. Change it when a method of yours
            changes; other attributes are in the key already.
        stacking_passes: what a loop keeps for its backward is moved into stacks and out of them; the time of that is
            the time of moving its bytes, this many times.
        mixes_passes: where no checkpoint separates forward and backward, whether it runs backward operations early
            and forward ones late as they become ready, instead of minding the memory.
        stacks_tiny_badly: whether, in a loop, it holds far more for tiny values that are stacked than for those that
            are recomputed.
        copies_slices: whether the parts of a divided loop read copies of their slices of the stacked inputs, which
            are there from the forward on.
        heads_wait_for_loops: whether it starts a loop as soon as it can, and the gradient of the weights that make
            logits after it, so that logits are alive in the backward of the loops before them.
        wants_identical_layers: whether it builds identical layers that are treated identically with less memory, so
            that plans are worth having in which all layers that the program repeats keep the same.
        usable_share: of a chip's memory, what JAX lets programs use unless told otherwise.
        compile_options: options of the compiler that jaxckpt measures with, None for its own defaults.
        host_memory: JAX's name of the memory of the host in which values may wait for their backward; empty where it
            has none.
        counts_host: whether its memory analysis tells bytes on the host from those on the device.
        counts_thread_local: whether what belongs to single threads, such as a reduction's operands, takes room on the
            device.
        least_offload_bytes: values below this size are not sent to the host.
        offload_options: options of the compiler that a program needs which sends values to the host, None for none.
        facts: the record of what it asks of a chip beside memory and rates, None if nothing.
        part: what `define_target` and files of targets call that record.
        backend: what `jax.default_backend` calls the platform, where that is another name.
        nearest: the chip that stands for a device of the platform that is none of the known chips.
        draws_early: whether it draws the random numbers of the whole program before anything else, and holds them until
            they are read, so that plans make keys wait.
        has_layouts: whether what follows the colon of a target's name is a layout of its chips, such as "2x4", and not
            a number of devices.
    """

    version: str = ""
    stacking_passes: float = 1
    mixes_passes: bool = False
    stacks_tiny_badly: bool = False
    copies_slices: bool = False
    heads_wait_for_loops: bool = False
    wants_identical_layers: bool = False
    usable_share: float = 1.0
    compile_options: dict[str, Any] | None = None
    host_memory: str = ""
    counts_host: bool = True
    counts_thread_local: bool = False
    least_offload_bytes: int = 2**20
    offload_options: dict[str, Any] | None = None
    facts: type[Any] | None = None
    part: str = ""
    backend: str = ""
    nearest: str = "cpu"
    draws_early: bool = False
    has_layouts: bool = False

    def __repr__(self) -> str:
        """What it is and its attributes, for keys of what is kept on disk."""
        kind = type(self)
        values = {name: getattr(self, name) for name in Compiler.__annotations__} | vars(self)
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"{kind.__module__}.{kind.__qualname__}({shown})"

    def rules(self, avals: Sequence[Any], equations: Sequence[Equation] = ()) -> FusionRules:
        """Return what it fuses, copies and adds.

        A scatter into zeros that is only added to something else scatters into that, wherever it runs.

        Args:
            avals: `[num_values]`, shapes and dtypes.
            equations: in order; those that the scatters of the rules are among.
        """
        del avals
        return FusionRules(scatters=added_scatters(equations))

    def layouts(
        self,
        avals: Sequence[Any],
        equations: Sequence[Equation],
        *,
        features: Mapping[int, int] | None = None,
        read_by_derivatives: bool = False,
    ) -> Layouts:
        """Find what values take; by default what their dtypes say.

        Args:
            avals: `[num_values]`, shapes and dtypes.
            equations: all that make and read the values.
            features: what is known of images already.
            read_by_derivatives: the derivatives are not among the equations, and read what exponentials and the like
                make.
        """
        del equations, features, read_by_derivatives
        return Layouts([size_bytes(aval) for aval in avals])

    def outside_regions(self, avals: Sequence[Any]) -> Callable[[Equation], bool]:
        """Return which operations it runs with less memory where no region covers them; by default none.

        Args:
            avals: `[num_values]`, shapes and dtypes.
        """
        del avals
        return _never

    def heads(self, avals: Sequence[Any], equations: Sequence[Equation]) -> Callable[[Equation], bool]:
        """Return which products make logits, if it needs less memory where no region covers those; by default none.

        Args:
            avals: `[num_values]`, shapes and dtypes.
            equations: the whole program, in order.
        """
        del avals, equations
        return _never

    def device_bytes(self, stats: Any) -> int:
        """Device bytes of a compiled program; by default arguments and results, shared ones once, and temporaries.

        Args:
            stats: what `memory_analysis` says.
        """
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return stats.argument_size_in_bytes + results + stats.temp_size_in_bytes

    def host_bytes(self, stats: Any) -> int:
        """Bytes on the host: arguments and results that live there, shared ones once, and what waits there.

        Args:
            stats: what `memory_analysis` says.
        """
        size = lambda name: getattr(stats, f"host_{name}_size_in_bytes", 0)  # noqa: E731
        return size("argument") + size("output") - size("alias") + size("temp")

    def sent_bytes(self, aval: Any) -> int:
        """Bytes of a value on the host; by default what its dtype says.

        Args:
            aval: its shape and dtype.
        """
        return size_bytes(aval)

    def says_at_most(self, stats: Any) -> bool:
        """Whether `device_bytes` may be more than the program takes; by default it is what the program takes.

        Args:
            stats: what `memory_analysis` says.
        """
        del stats
        return False

    def refused_bytes(self, error: Exception) -> int | None:
        """Bytes that it said a program needs when it refused it; None where the error says something else.

        A TPU's compiler says "HLO temporaries" and means arguments and results too: so say its own buffers of five
        programs that it refused, with and without arguments given away.
        """
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            return None
        sizes = [float(a or c) * _SCALE[(b or d).upper()] for a, b, c, d in _REFUSED.findall(text)]
        return int(max(sizes)) if sizes else None

    def devices(self, target: Chip, topology: str | None) -> tuple[Any, ...]:
        """The devices that it compiles for, real or described; by default those of the platform that are here.

        Args:
            target: the chip.
            topology: what follows the colon of a target's name, checked already; None is one device.

        Raises:
            TargetError: there are not so many.
        """
        number, here = int(topology or 1), jax.local_devices(backend=target.platform)
        if len(here) < number:
            raise TargetError(f"target='{target.name}:{topology}' is {number} devices, and {len(here)} are here")
        return tuple(here[:number])

    def requirements(self, target: Chip) -> list[str]:
        """What pip has to install to compile for a chip, at this JAX's own version; by default nothing."""
        del target
        return []

    def installed(self) -> str | None:
        """Its version that is installed, None if there is none; by default it comes with JAX."""
        return _compat.JAXLIB_VERSION

    def problem(self, target: Chip) -> str:
        """Why it cannot compile for a chip here, as far as versions tell; empty where it can.

        The text goes on from "the compiler for that target", and ends with what to install.
        """
        del target
        return "" if self.installed() is not None else "is not installed; install it"

    def wrong_facts(self, facts: Any) -> str:
        """What is wrong with a record of facts beyond the types of its values; empty where nothing is."""
        del facts
        return ""

    def device_kind(self, facts: Any) -> str:
        """What JAX calls a device of a chip with these facts; empty where that does not tell chips apart."""
        del facts
        return ""

    def topologies(self, facts: Any) -> tuple[str, ...]:
        """Some topologies that exist for a chip with these facts, as written after the colon of a target's name."""
        del facts
        return ("8",)


def _never(eqn: Equation) -> bool:
    del eqn
    return False
