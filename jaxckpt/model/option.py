"""Ways to keep a block for its backward: what each saves, where, and what it takes in bytes and work."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import ckptsolvers


class Place(enum.Enum):
    """A place of memory in which saved values wait for their backward."""

    DEVICE = "device"
    HOST = "host"


# By name: no value is saved anywhere.
NOTHING_SAVED: Mapping[str, Place] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Work:
    """What running something costs.

    Attributes:
        time: in the unit of the plan's cost: modelled picoseconds, or FLOPs where those are minimised.
        flops: floating-point operations.
    """

    time: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        """One after the other."""
        return Work(self.time + other.time, self.flops + other.flops)

    def __rmul__(self, times: int) -> "Work":
        """So many times."""
        return Work(times * self.time, times * self.flops)


@dataclass(frozen=True, slots=True)
class Save:
    """What a kept block saves for its backward. Each kind of block has a record of its own.

    Attributes:
        kind: the name of the kind of block that runs it and that reads and writes it in plan files.
    """

    kind: ClassVar[str]

    @property
    def named_values(self) -> tuple[int, ...]:
        """The values that are saved by name."""
        return ()

    @property
    def host_values(self) -> tuple[int, ...]:
        """Those of them that wait on the host."""
        return ()

    @property
    def is_on_host(self) -> bool:
        """Whether something that it saves waits on the host."""
        return bool(self.host_values)

    @property
    def is_by_name(self) -> bool:
        """Whether names say all that is saved."""
        return False

    @property
    def is_left_to_jax(self) -> bool:
        """Whether JAX decides what is saved."""
        return False

    def placed(self, values: Sequence[int]) -> "Save":
        """The same at one of the block's places in a program.

        Args:
            values: `[num_values]`, the program's value for each position in the block's own numbering.
        """
        del values
        return self


@dataclass(frozen=True, slots=True)
class LeftToJax(Save):
    """The block runs without a checkpoint, and JAX saves whatever its backward reads."""

    kind: ClassVar[str] = "jax"

    @property
    def is_left_to_jax(self) -> bool:
        """Whether JAX decides what is saved."""
        return True


LEFT_TO_JAX = LeftToJax()
# What options that leave a block to JAX are called.
LEFT_NAME = "everything"
# More than any budget: what a block needs that must not run without being kept.
NO_ROOM = 2**50


@dataclass(frozen=True, slots=True)
class SavedValues(Save):
    """The block runs inside a checkpoint that saves these values by name.

    Attributes:
        values: the program's, or, before it is placed, positions in the block's own numbering.
        host: likewise, those that wait on the host; inputs of the block among them are read from there too.
    """

    kind: ClassVar[str] = "plain"
    values: tuple[int, ...]
    host: tuple[int, ...] = ()

    @property
    def named_values(self) -> tuple[int, ...]:
        """The values that are saved by name."""
        return (*self.values, *self.host)

    @property
    def host_values(self) -> tuple[int, ...]:
        """Those that wait on the host."""
        return self.host

    @property
    def is_by_name(self) -> bool:
        """Whether names say all that is saved."""
        return True

    def placed(self, values: Sequence[int]) -> "SavedValues":
        """The same at one of the block's places in a program."""
        return SavedValues(tuple(values[i] for i in self.values), tuple(values[i] for i in self.host))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to keep a block for its backward.

    Attributes:
        name: for reports, and for solvers that pick options of one name.
        save: what is saved.
        saved: bytes held from the block's forward to its backward, its outputs not among them, by place of memory.
        recompute: of what the backward needs, from the block's inputs and what was saved.
        forward: `[num_outputs + 1]`, to make what is saved and the first j outputs, in the order of their readers.
        forward_peak_bytes: most bytes alive at once in the forward, beyond what was alive before it.
        backward_peak_bytes: the same in the backward, with what was saved and the cotangents of inputs and outputs.
        idle: time, in the unit of the plan's cost, that it waits for the link to the host.
        saved_outputs: positions, among the block's outputs, of those its own backward reads.
        unread_inputs: positions, among the block's inputs, of those its backward and what it recomputes do not read.
        last_forward_peak_bytes: `forward_peak_bytes` where the block is the last before its backward; 0 if no more.
        transient_bytes: where the block is planned inside, as loops and conditionals are, most bytes alive in the
            backward beyond what is saved, were nothing of that freed; None for other blocks.
        stacked_peak_bytes: of a loop's whole body, `backward_peak_bytes` where what was saved is read from stacks that
            are counted elsewhere; None for other blocks.
    """

    name: str
    save: Save
    saved: Mapping[Place, int]
    recompute: Work
    forward: tuple[Work, ...]
    forward_peak_bytes: int
    backward_peak_bytes: int
    idle: int = 0
    saved_outputs: tuple[int, ...] = ()
    unread_inputs: tuple[int, ...] = ()
    last_forward_peak_bytes: int = 0
    transient_bytes: int | None = None
    stacked_peak_bytes: int | None = None

    @property
    def saved_bytes(self) -> int:
        """Bytes saved on the device."""
        return self.saved.get(Place.DEVICE, 0)

    @property
    def host_bytes(self) -> int:
        """Bytes saved on the host."""
        return self.saved.get(Place.HOST, 0)

    @property
    def is_left_to_jax(self) -> bool:
        """Whether the block is left to JAX."""
        return self.save.is_left_to_jax

    def for_solver(self, unread_inputs: tuple[int, ...]) -> ckptsolvers.Option:
        """The option in the solver's problem.

        Args:
            unread_inputs: as the problem numbers them: positions among those inputs that cross a cut.
        """
        return ckptsolvers.Option(
            name=self.name,
            saved_bytes=self.saved_bytes,
            host_bytes=self.host_bytes,
            recompute_time=self.recompute.time + self.idle,
            forward_times=tuple(work.time for work in self.forward),
            forward_peak_bytes=self.forward_peak_bytes,
            backward_peak_bytes=self.backward_peak_bytes,
            saved_outputs=self.saved_outputs,
            unread_inputs=unread_inputs,
            last_forward_peak_bytes=self.last_forward_peak_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAnalysis:
    """What is known of a distinct block, in numbers of its own.

    Attributes:
        forward: `[num_outputs + 1]`, to make the first j outputs where nothing is saved.
        forward_peak_bytes: most bytes alive at once then, outputs included.
        options: the ways to keep it; the last one leaves it to JAX.
        unplanned_cost: forward and backward without recomputation, in the unit of the plan's cost.
        residual_bytes: what a loop stacks of the block in each iteration when it is left to JAX, whether a compiler
            outside of a loop would need it or not.
    """

    forward: tuple[Work, ...]
    forward_peak_bytes: int
    options: tuple[Option, ...]
    unplanned_cost: int
    residual_bytes: int

    @property
    def is_planned_inside(self) -> bool:
        """Whether its options are plans of what is inside it."""
        return any(option.transient_bytes is not None for option in self.options)


def dominates(a: Option, b: Option, spare_bytes: int = 0, spare_time: int = 0) -> bool:
    """Whether an option is as good as another one in everything, or worse by no more than this."""
    return (
        set(a.saved_outputs) <= set(b.saved_outputs)
        and all(size <= b.saved.get(place, 0) + spare_bytes for place, size in a.saved.items())
        and a.forward_peak_bytes <= b.forward_peak_bytes + spare_bytes
        and a.backward_peak_bytes <= b.backward_peak_bytes + spare_bytes
        and a.recompute.time + a.idle <= b.recompute.time + b.idle + spare_time
        and all(x.time <= y.time + spare_time for x, y in zip(a.forward, b.forward, strict=True))
    )


def kept_only(analysis: BlockAnalysis) -> BlockAnalysis:
    """The block as one that no region covers: left to JAX where it stands, and never run without being kept."""
    return replace(analysis, forward_peak_bytes=NO_ROOM, options=analysis.options[-1:])


def on_device(size_bytes: int) -> dict[Place, int]:
    """Bytes that are all on the device."""
    return {Place.DEVICE: size_bytes}
