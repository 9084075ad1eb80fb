"""What a scheduled program takes by its shapes alone, where the compiler did not get as far as an assignment.

A last resort: it knows neither how arrays are padded nor the heap's gaps, and of what the compiler computes in place
only what loops and slices say. That is up to a tenth off on CPU, more on GPUs and TPUs.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import networkx as nx

from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.compilation.hlo import proto
from jaxckpt.compilation.hlo.assignment import Reader
from jaxckpt.compilation.hlo.module import Index, Instruction, Module
from jaxckpt.compilation.hlo.shapes import TUPLE, unpadded_bytes
from jaxckpt.compilation.hlo.values import Values, indices_of, shape_at, source_of
from jaxckpt.errors import ProgramFormatError

_IN_PLACE = "dynamic-update-slice"
# What an allocation is for, and which parameter it is or in which memory it lies.
_Kind = tuple[str, int]


def estimate_program(content: bytes, *, target: str) -> CompiledMemory:
    """Estimate the memory of a scheduled program.

    Args:
        content: a serialized `HloProto` with a schedule; its buffer assignment is not read.
        target: for which chip, for reports.

    Returns:
        Buffers without offsets; the heap is the most live bytes, and its gaps are what is not live.

    Raises:
        ProgramFormatError: something in it is not as known.
    """
    program = proto.parse(content)
    try:
        _assign(program, Module(program.module))
        found = Reader(program).memory(target, {}, False)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, ProgramFormatError):
            raise
        raise ProgramFormatError(f"XLA's description of the compiled program is not as known: {error!r}") from error
    heap = max(found.live_bytes, default=0)
    return replace(
        found,
        is_estimated=True,
        buffers=tuple(replace(buffer, offset=0) for buffer in found.buffers),
        gap_bytes=tuple(heap - live for live in found.live_bytes),
        totals=replace(found.totals, heap_bytes=heap),
    )


def _assign(program: Any, module: Module) -> None:
    """Write an assignment into a program in which nothing shares its place but what must."""
    defined = {position: i for i, position in enumerate(_defined(module))}
    values = Values(module, defined)
    places = dict(enumerate(defined))
    shapes = {value: shape_at(module.instructions[n].shape, index) for value, (n, index) in places.items()}
    program.ClearField("assignment")
    for value, (number, index) in places.items():
        buffer = program.assignment.buffers.add(id=value, size=unpadded_bytes(shapes[value]))
        buffer.defined_at.instruction = number
        buffer.defined_at.index.extend(index)
    found: dict[_Kind, Any] = {}
    root = module.root(module.entry)
    results = {values.at(root, index): index for index in indices_of(root.shape)}
    for group in _groups(module, values, places):
        size = max(unpadded_bytes(shapes[value]) for value in group)
        memory = max(shapes[value].layout.memory_space for value in group)
        kind = _kind(module, results, places, group, memory)
        if size and kind is not None:
            allocation = found.get(kind) or _allocation(program, kind, len(found))
            found[kind] = allocation
            offset = 0 if kind[0] == "parameter" else allocation.size
            for value in group:
                allocation.assigned.add(buffer=value, offset=offset, size=size)
            allocation.size = max(allocation.size, offset + size)


def _defined(module: Module) -> Iterator[tuple[int, Index]]:
    """Positions at which a value is defined: where none is passed on, and where control flow meets."""
    for instruction in module.order:
        for index in indices_of(instruction.shape):
            meets = instruction.opcode in ("while", "conditional") or _is_carried(module, instruction)
            if meets or source_of(module, instruction, index) is None:
                yield instruction.id, index


def _is_carried(module: Module, instruction: Instruction) -> bool:
    caller = module.callers.get(instruction.computation) if instruction.opcode == "parameter" else None
    return caller is not None and caller.opcode == "while"


def _groups(module: Module, values: Values, places: dict[int, tuple[int, Index]]) -> list[list[int]]:
    """Values that lie at one place."""
    graph = nx.Graph()
    graph.add_nodes_from(places)
    for group in values.merged():
        nx.add_path(graph, group)
    for value, (number, index) in places.items():
        operand = _written_into(module, module.instructions[number])
        if operand is not None and not index:
            graph.add_edge(value, values.at(operand, ()))
    return [sorted(group) for group in nx.connected_components(graph)]


def _written_into(module: Module, instruction: Instruction) -> Instruction | None:
    """The operand whose part an instruction replaces, in place."""
    if instruction.opcode == _IN_PLACE:
        return module.operand(instruction, 0)
    if instruction.opcode != "fusion":
        return None
    root = module.root(instruction.called[0])
    while root.opcode == "bitcast":
        root = module.operand(root, 0)
    if root.opcode != _IN_PLACE:
        return None
    into = module.operand(root, 0)
    while into.opcode == "bitcast":
        into = module.operand(into, 0)
    return module.operand(instruction, into.parameter_number) if into.opcode == "parameter" else None


def _kind(
    module: Module, results: dict[int, Index], places: dict[int, tuple[int, Index]], group: list[int], memory: int
) -> _Kind | None:
    """Which allocation a group is in; none for tables of addresses."""
    makers = [module.instructions[places[value][0]] for value in group]
    if all(shape_at(i.shape, places[v][1]).element_type == TUPLE for i, v in zip(makers, group, strict=True)):
        return None
    index = next((results[value] for value in group if value in results), None)
    given = next((i for i in makers if i.opcode == "parameter" and i.computation == module.entry), None)
    if given is not None:
        return "parameter", given.parameter_number
    if index is not None:
        number = module.aliased_results.get(index)
        return ("result", memory) if number is None else ("parameter", number)
    return ("constant" if any(i.opcode == "constant" for i in makers) else "heap"), memory


def _allocation(program: Any, kind: _Kind, number: int) -> Any:
    name, which = kind
    is_parameter = name == "parameter"
    return program.assignment.allocations.add(
        index=number,
        is_parameter=is_parameter,
        parameter_number=which if is_parameter else 0,
        color=0 if is_parameter else which,
        is_result=name in ("result", "parameter"),
        is_constant=name == "constant",
    )
