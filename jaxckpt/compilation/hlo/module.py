"""A scheduled module as plain records: instructions by number, computations, the flattened schedule, source lines."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxckpt.errors import ProgramFormatError

# Whose computations run within the caller's schedule, in the order in which they stand there.
_CALLS = ("call", "conditional", "async-start")
Index = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction.

    Attributes:
        id: its number, of which a module has each once.
        name: as XLA prints it.
        opcode: as XLA prints it.
        shape: XLA's description of its shape.
        operands: numbers of instructions.
        called: numbers of computations: of a while its body and its condition, of a conditional its branches.
        computation: number of the one that it is in.
        tuple_index: of a get-tuple-element.
        parameter_number: of a parameter.
        op_name: name stack of the operation that it comes from, JAX's transformations included.
        frame: number of its stack frame, 0 for none.
        line: `(file, line)` where XLA has no stack frames, else None.
        aliases: of outputs that are an operand's own buffer: `(output index, operand, index in it)`.
        target: of a custom call.
    """

    id: int
    name: str
    opcode: str
    shape: Any
    operands: tuple[int, ...]
    called: tuple[int, ...]
    computation: int
    tuple_index: int
    parameter_number: int
    op_name: str
    frame: int
    line: tuple[str, int] | None
    aliases: tuple[tuple[Index, int, Index], ...]
    target: str


class Module:
    """A scheduled module.

    Attributes:
        instructions: by number.
        roots: of each computation the number of its root.
        parameters: of each computation its parameters, by their numbers.
        callers: of each computation whose instructions are in the schedule, who calls it.
        order: `[num_steps]`, the flattened schedule: a computation that runs within another stands before its caller,
            a while's condition before its body.
        step: of each instruction in `order` its place there.
        spans: of each computation in `order` its first step and the first one after it.
        contexts: of each computation that runs asynchronously the one that was started.
        entry: number of the entry computation.
    """

    def __init__(self, proto: Any):
        self._proto = proto
        self.entry: int = proto.entry
        self.instructions: dict[int, Instruction] = {}
        self.roots: dict[int, int] = {}
        self.parameters: dict[int, dict[int, int]] = {}
        for computation in proto.computations:
            self._read(computation)
        self._sequences = {entry.key: tuple(entry.value.instructions) for entry in proto.schedule.sequences}
        self.order: list[Instruction] = []
        self.step: dict[int, int] = {}
        self.spans: dict[int, tuple[int, int]] = {}
        self.callers: dict[int, Instruction] = {}
        self.contexts: dict[int, int] = {}
        if self.entry not in self._sequences:
            raise ProgramFormatError("the compiled program has no schedule of its entry computation")
        self._flatten(self.entry, None)

    def root(self, computation: int) -> Instruction:
        """The root of a computation."""
        return self.instructions[self.roots[computation]]

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """One of an instruction's operands."""
        return self.instructions[instruction.operands[number]]

    def is_root(self, instruction: Instruction) -> bool:
        """Whether it is the root of its computation."""
        return self.roots[instruction.computation] == instruction.id

    def source(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """File and line of the operation, then those of its callers."""
        if not instruction.frame:
            if instruction.line is not None:
                yield instruction.line
            return
        frames, number = self._proto.frames, instruction.frame
        # Numbers begin at 1, and a frame's caller stands before it.
        while number:
            frame = frames.frames[number - 1]
            location = frames.locations[frame.location - 1]
            yield frames.files[location.file - 1], location.line
            number = frame.parent if frame.parent < number else 0

    @functools.cached_property
    def aliased_parameters(self) -> frozenset[tuple[int, Index]]:
        """Those of the entry's parameters whose buffers results take over: `(parameter, index)`."""
        return frozenset((e.parameter, tuple(e.parameter_index)) for e in self._proto.aliases.entries)

    @functools.cached_property
    def aliased_results(self) -> dict[Index, int]:
        """Of each result that takes over a parameter's buffer, by its index, that parameter."""
        return {tuple(e.output_index): e.parameter for e in self._proto.aliases.entries}

    def _read(self, computation: Any) -> None:
        self.roots[computation.id] = computation.root
        parameters = self.parameters[computation.id] = {}
        for proto in computation.instructions:
            found = _instruction(proto, computation.id)
            if found.opcode == "parameter":
                parameters[found.parameter_number] = found.id
            self.instructions[found.id] = found

    def _flatten(self, computation: int, context: int | None) -> None:
        if computation in self.spans or computation not in self._sequences:
            return
        if context is not None:
            self.contexts[computation] = context
        start = len(self.order)
        for number in self._sequences[computation]:
            instruction = self.instructions[number]
            for called in self._within(instruction):
                self.callers.setdefault(called, instruction)
                self._flatten(called, called if instruction.opcode == "async-start" else context)
            self.step[number] = len(self.order)
            self.order.append(instruction)
        self.spans[computation] = (start, len(self.order))

    def _within(self, instruction: Instruction) -> tuple[int, ...]:
        if instruction.opcode == "while":
            return instruction.called[::-1]
        return instruction.called if instruction.opcode in _CALLS else ()


def _instruction(proto: Any, computation: int) -> Instruction:
    meta = proto.metadata
    return Instruction(
        id=proto.id,
        name=proto.name,
        opcode=proto.opcode,
        shape=proto.shape,
        operands=tuple(proto.operands),
        called=tuple(proto.called),
        computation=computation,
        tuple_index=proto.tuple_index,
        parameter_number=proto.parameter_number,
        op_name=meta.op_name,
        frame=meta.frame,
        line=(meta.source_file, meta.source_line) if meta.source_file else None,
        aliases=tuple((tuple(a.output_index), a.operand, tuple(a.operand_index)) for a in proto.aliasing),
        target=proto.custom_call_target,
    )
