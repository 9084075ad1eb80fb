"""When each value is live in the flattened schedule, as XLA's own `HloLiveRange` counts it."""

import itertools
from collections.abc import Callable, Iterable, Mapping

from jaxckpt.compilation.hlo.module import Instruction, Module
from jaxckpt.compilation.hlo.values import Position, Values

Range = tuple[int, int]


def ranges(module: Module, values: Values) -> dict[int, Range]:
    """The first and the last step of each value that is defined in the schedule; the end of the program is a step too.

    A value lives from its definition to its last reader; at the root of a computation to that computation's end. What
    a while is given is read when its body begins: what the loop makes of it takes its place.
    """
    found: dict[int, Range] = {}
    for position, value in values.defined.items():
        if position[0] in module.step:
            found[value] = _range(module, values, position, value)
    return found


def last_reads(module: Module, values: Values) -> Mapping[int, int]:
    """The step of the last reader of each value that is read."""
    return {v: max(map(_reading(module), readers)) for v, readers in values.readers.items() if readers}


def _range(module: Module, values: Values, position: Position, value: int) -> Range:
    instruction = module.instructions[position[0]]
    is_parameter = instruction.opcode == "parameter"
    start = module.spans[instruction.computation][0] if is_parameter else module.step[instruction.id]
    context = module.contexts.get(instruction.computation)
    if context is not None and module.is_root(instruction):
        # The result of what runs asynchronously is there from its start on.
        start = module.spans[context][1]
    end = start if context is None else module.spans[context][1]
    is_given_away = (instruction.parameter_number, position[1]) in module.aliased_parameters
    if is_parameter and instruction.computation == module.entry and not is_given_away:
        return start, len(module.order)
    reads = map(_reading(module), values.readers.get(value, ()))
    passes = (_passing(module, module.instructions[number]) for number, _ in values.positions.get(value, ()))
    return start, max(end, *reads, *passes, start)


def _passing(module: Module, instruction: Instruction) -> int:
    if module.is_root(instruction):
        return module.spans[instruction.computation][1]
    return module.step[instruction.id]


def _reading(module: Module) -> Callable[[Instruction], int]:
    def step(reader: Instruction) -> int:
        if reader.opcode == "while" and reader.called[0] in module.spans:
            return module.step[module.parameters[reader.called[0]][0]]
        return module.step[reader.id]

    return step


def without_overlaps(found: dict[int, Range], same_place: Iterable[Iterable[int]]) -> None:
    """Cut the ranges of values that lie at one place where one takes over from another.

    Args:
        found: ranges by value; changed.
        same_place: values that lie at one place, for each place.
    """
    for values in same_place:
        live = sorted((value for value in values if value in found), key=lambda value: (found[value], value))
        for earlier, later in itertools.pairwise(live):
            (start, end), (begin, stop) = found[earlier], found[later]
            if end >= begin:
                found[earlier], found[later] = (start, begin), (begin, max(end, stop))
