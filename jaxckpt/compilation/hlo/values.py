"""Which value stands where: XLA lists the values that it defines, the rest passes them on.

A position is an instruction and a place in its shape. Where XLA lists no value that is defined at a position, one of an
operand, of a caller or of a called computation is there, according to the opcode.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import networkx as nx

from jaxckpt.compilation.hlo.module import Index, Instruction, Module
from jaxckpt.compilation.hlo.shapes import TUPLE
from jaxckpt.errors import ProgramFormatError

_PASSES = frozenset({"bitcast", "opt-barrier", "domain", "add-dependency", "all-reduce-done", "async-update"})
# Results of these hold operands in their first element and what is on its way in the second.
_STARTS = frozenset({"all-gather-start", "collective-permute-start"})
_DONES = frozenset({"async-done", "all-gather-done", "collective-permute-done"})
Position = tuple[int, Index]


class Values:
    """The values of a module, where they stand and who reads them.

    Attributes:
        defined: of each position at which one is defined the value's number.
        positions: of each value all positions at which it stands.
        readers: of each value the instructions that read it.
    """

    def __init__(self, module: Module, defined: Mapping[Position, int]):
        self._module = module
        self.defined = defined
        self._found: dict[Position, int] = {}
        self.positions: dict[int, list[Position]] = defaultdict(list)
        self.readers: dict[int, list[Instruction]] = defaultdict(list)
        indices = {instruction.id: tuple(indices_of(instruction.shape)) for instruction in module.order}
        for instruction in module.order:
            for index in indices[instruction.id]:
                self.positions[self.at(instruction, index)].append((instruction.id, index))
            for number in dict.fromkeys(instruction.operands):
                for index in indices[number]:
                    if _reads(instruction, index):
                        self.readers[self.at(module.instructions[number], index)].append(instruction)

    def at(self, instruction: Instruction, index: Index) -> int:
        """The value at a position.

        Raises:
            ProgramFormatError: none is defined there, and it is not known what the opcode passes on.
        """
        passed: list[Position] = []
        here = instruction, index
        while True:
            position = here[0].id, here[1]
            value = self.defined.get(position)
            value = self._found.get(position) if value is None else value
            if value is not None:
                break
            passed.append(position)
            source = self.source(*here)
            if source is None or len(passed) > len(self._module.instructions):
                raise ProgramFormatError(
                    f"XLA lists no value for {here[0].opcode} {here[0].name} at {list(here[1])}, and it is not known "
                    "which one it passes on"
                )
            here = source
        self._found.update(dict.fromkeys(passed, value))
        return value

    def source(self, instruction: Instruction, index: Index) -> tuple[Instruction, Index] | None:
        """Where the value comes from that an instruction passes on; None if that is not known."""
        return source_of(self._module, instruction, index)

    def merged(self) -> list[list[int]]:
        """Values that must lie at one place, where control flow meets.

        They are what a loop is given, what its iterations make of it and what it returns, and what the branches of a
        conditional return.
        """
        graph = nx.Graph()
        for (number, index), value in self.defined.items():
            instruction = self._module.instructions[number]
            if number in self._module.step:
                graph.add_edges_from((value, self.at(*position)) for position in self._joined(instruction, index))
        return [sorted(group) for group in nx.connected_components(graph)]

    def _joined(self, instruction: Instruction, index: Index) -> Iterator[tuple[Instruction, Index]]:
        """What comes together in a value that is defined where control flow meets."""
        module = self._module
        caller = module.callers.get(instruction.computation) if instruction.opcode == "parameter" else instruction
        if caller is None:
            return
        if caller.opcode == "while":
            yield module.operand(caller, 0), index
            yield module.root(caller.called[0]), index
        elif instruction.opcode == "conditional":
            yield from ((module.root(branch), index) for branch in instruction.called)


def source_of(module: Module, instruction: Instruction, index: Index) -> tuple[Instruction, Index] | None:
    """Where the value comes from that an instruction passes on at an index; None if it is not known to pass one on."""
    opcode = instruction.opcode
    operand = lambda number: module.operand(instruction, number)  # noqa: E731
    for output, number, inner in instruction.aliases:
        if index[: len(output)] == output:
            return operand(number), (*inner, *index[len(output) :])
    if opcode == "get-tuple-element":
        return operand(0), (instruction.tuple_index, *index)
    if opcode in _PASSES or opcode == "while" or (opcode == "copy" and index):
        return operand(0), index
    if opcode in _DONES:
        return operand(0), (1, *index)
    if opcode == "copy-done":
        return operand(0), (0, *index)
    if opcode in ("call", "conditional"):
        return module.root(instruction.called[0]), index
    if opcode == "parameter":
        return _argument(module, instruction, index)
    if not index:
        return None
    first, rest = index[0], index[1:]
    if opcode == "tuple":
        return operand(first), rest
    if opcode == "async-start" and first == 1:
        return module.root(instruction.called[0]), rest
    if opcode == "async-start" and first == 0 and rest:
        return operand(rest[0]), rest[1:]
    if (opcode == "copy-start" and first == 1) or (opcode in ("send", "recv-done") and first == 0):
        return operand(0), rest if opcode != "recv-done" else index
    if opcode in _STARTS and first == 0:
        return (operand(0), rest) if len(instruction.operands) == 1 else (operand(rest[0]), rest[1:])
    return None


def _argument(module: Module, parameter: Instruction, index: Index) -> tuple[Instruction, Index] | None:
    """Where the value of a parameter comes from, which is the same at each call."""
    caller = module.callers.get(parameter.computation)
    if caller is None:
        return None
    if caller.opcode == "conditional":
        number = 1 + caller.called.index(parameter.computation)
    else:
        number = 0 if caller.opcode == "while" else parameter.parameter_number
    return module.operand(caller, number), index


def indices_of(shape: Any, index: Index = ()) -> Iterator[Index]:
    """All places in a shape, its own first."""
    yield index
    if shape.element_type == TUPLE:
        for i, part in enumerate(shape.tuple_shapes):
            yield from indices_of(part, (*index, i))


def shape_at(shape: Any, index: Index) -> Any:
    """The shape at a place."""
    for i in index:
        shape = shape.tuple_shapes[i]
    return shape


def _reads(instruction: Instruction, index: Index) -> bool:
    """Whether an instruction reads what stands at this place of an operand, and does not only pass it on."""
    if instruction.opcode in ("get-tuple-element", "copy"):
        return not index
    return instruction.opcode not in ("tuple", "domain")
