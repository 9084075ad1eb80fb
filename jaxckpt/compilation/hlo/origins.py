"""Which operation of the user's program a value comes from: its scope, its line and its phase.

XLA keeps one name for each instruction, and gives none to what it adds. A fusion bears the name of its root, which may
do no more than write into a stack; so the operand is looked up that makes what is written.
"""

import functools
import re
from dataclasses import dataclass

from jaxckpt.compilation.buffers import Phase
from jaxckpt.compilation.hlo.module import Index, Instruction, Module
from jaxckpt.compilation.hlo.values import Values
from jaxckpt.program.source import relative_file

_MOST_STEPS = 64
# What makes no value of its own.
_MOVES = frozenset({"bitcast", "copy", "copy-start", "copy-done", "reshape", "transpose", "get-tuple-element"})
_MEETS = frozenset({"while", "conditional", "call", "parameter"})
_FILLS = frozenset({"broadcast", "constant", "iota", "tuple"})
_RECOMPUTED, _BACKWARD, _FORWARD = "rematted_computation", "transpose(", "jvp("
_OPTIMIZER = re.compile(r"optim", re.IGNORECASE)
# Parts of name stacks that are JAX's own, and those that are transformations of what is in their parentheses.
_OWN = re.compile(
    r"while|body|cond|scan|checkpoint|remat2?|rematted_computation|closed_call|core_call|eval_jaxpr|shard_map|pjit|"
    r"custom_[jv]vp_call(?:_jaxpr)?|branch_\d+_fun|jit\(.*\)|jvp\(\)|transpose\(\)|vmap\(\)|"
    # What `jnp.einsum` puts around its products.
    r"[^/]*->[^/]*"
)
_TRANSFORMED = re.compile(r"(?:jvp|transpose|vmap|linearize|checkpoint|remat)\((.*)\)")
_LIBRARIES = re.compile(r"(?:^|/)(?:jax|jaxlib|jaxckpt|ckptsolvers)/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value comes from; fields are empty where XLA does not say.

    Attributes:
        scope: the user's name stack.
        source: `file:line`.
        phase: of the step.
    """

    scope: str = ""
    source: str = ""
    phase: Phase = "other"


class Origins:
    """The origins of a module's values."""

    def __init__(self, module: Module, values: Values):
        self._module, self._values = module, values
        self._places = {value: position for position, value in values.defined.items()}
        self._of_maker = functools.cache(self._read)
        self._derived = self._derived_from_backward()

    def of(self, instruction: Instruction, index: Index = ()) -> Origin:
        """The origin of what an instruction makes."""
        maker = self.maker(instruction, index)
        found = self._of_maker(maker.id)
        # What is inside a fusion is not in the schedule.
        known = maker if maker.id in self._module.step or instruction.opcode == "tuple" else instruction
        if found.phase == "other" and maker.opcode != "parameter" and known.id in self._derived:
            return Origin(scope=found.scope, source=found.source, phase="optimizer")
        return found

    def reading(self, value: int) -> Origin:
        """The origin of the first reader of a value that has one, for what was added for its readers."""
        found = (self._of_maker(reader.id) for reader in self._values.readers.get(value, ()) if reader.op_name)
        return next((origin for origin in found if origin.scope or origin.source), Origin())

    def maker(self, instruction: Instruction, index: Index = ()) -> Instruction:
        """The instruction whose name says what the value is; itself where nothing better is found."""
        here, best, seen = (instruction, index), instruction, set()
        while len(seen) < _MOST_STEPS:
            seen.add((here[0].id, here[1]))
            best = here[0] if is_named(here[0]) or not best.op_name else best
            found = next((n for n in self._nearer(*here) if (n[0].id, n[1]) not in seen), None)
            if found is None:
                break
            here = found
        return best

    def is_real(self, instruction: Instruction) -> bool:
        """Whether an instruction makes a value, and does not only pass on, copy or fill."""
        if instruction.opcode == "parameter":
            return instruction.computation == self._module.entry
        if instruction.opcode == "tuple" or (instruction.opcode == "custom-call" and not instruction.operands):
            return False
        while instruction.opcode == "fusion" and instruction.called:
            instruction = self._module.root(instruction.called[0])
        return instruction.opcode not in _MOVES | _MEETS | _FILLS or instruction.opcode == "tuple"

    def phases(self) -> list[Phase]:
        """`[num_steps]`, the phase of each step; what has none of its own is in that of the step before it."""
        found: list[Phase] = []
        for instruction in self._module.order:
            phase = self.of(instruction).phase if self.is_real(instruction) else "other"
            is_said = phase != "other" or (self.is_real(instruction) and instruction.op_name)
            found.append(phase if is_said or not found else found[-1])
        return found

    def _nearer(self, instruction: Instruction, index: Index) -> list[tuple[Instruction, Index]]:
        """Candidates for what makes the value of this position, the best first; none if it is this one."""
        module, opcode = self._module, instruction.opcode
        if opcode == "fusion" and instruction.called:
            root = module.root(instruction.called[0])
            return [(root, index)]
        if opcode == "tuple" and instruction.operands:
            # A table of addresses belongs to what it begins with.
            return [(module.operand(instruction, index[0] if index else 0), index[1:])]
        if opcode == "dynamic-update-slice":
            return [(module.operand(instruction, 1), ())]
        if opcode == "parameter":
            return self._given(instruction, index)
        if opcode == "while":
            return [(module.root(instruction.called[0]), index), (module.operand(instruction, 0), index)]
        if opcode in ("conditional", "call"):
            return [(module.root(called), index) for called in instruction.called]
        if opcode == "copy-start":
            return [(module.operand(instruction, 0), ())]
        if opcode == "bitcast" or (instruction.operands and not is_named(instruction)):
            source = self._values.source(instruction, index)
            return [source] if source is not None else self._operands(instruction)
        return []

    def _operands(self, instruction: Instruction) -> list[tuple[Instruction, Index]]:
        """Operands of what has no name, arrays before scalars."""
        operands = [self._module.instructions[number] for number in instruction.operands]
        operands.sort(key=lambda operand: not operand.shape.dimensions)
        return [(operand, ()) for operand in operands if operand.opcode != "constant"]

    def _given(self, parameter: Instruction, index: Index) -> list[tuple[Instruction, Index]]:
        """What a parameter stands for: in a loop what an iteration makes, or else what the loop is given."""
        fusion = self._fusions.get(parameter.computation)
        if fusion is not None:
            return [(self._module.operand(fusion, parameter.parameter_number), index)]
        caller = self._module.callers.get(parameter.computation)
        if caller is None:
            return []
        source = self._values.source(parameter, index)
        before = [source] if source is not None else []
        if caller.opcode != "while":
            return before
        return [(self._module.root(caller.called[0]), index), *before]

    @functools.cached_property
    def _fusions(self) -> dict[int, Instruction]:
        """Of each fused computation the fusion."""
        every = self._module.instructions.values()
        return {i.called[0]: i for i in every if i.opcode == "fusion" and i.called}

    def _read(self, number: int) -> Origin:
        instruction = self._module.instructions[number]
        name = instruction.op_name.split(";")[0]
        if instruction.opcode == "parameter":
            return Origin(scope=name)
        return Origin(scope=scope_of(name), source=self._source(instruction), phase=phase_of(name))

    def _source(self, instruction: Instruction) -> str:
        """The innermost line that is not in JAX or here."""
        lines = list(self._module.source(instruction))
        own = (line for line in lines if not _LIBRARIES.search(line[0].replace("\\", "/")))
        file, number = next(own, lines[0] if lines else ("", 0))
        return f"{relative_file(file)}:{number}" if file else ""

    def _derived_from_backward(self) -> set[int]:
        """Instructions that read, through others, what a backward makes."""
        found: set[int] = set()
        at = self._values.at
        for instruction in self._module.order:
            if phase_of(instruction.op_name) in ("backward", "recomputed"):
                found.add(instruction.id)
                continue
            operands = (self._module.instructions[number] for number in instruction.operands)
            makers = (self._places[at(operand, ())][0] for operand in operands)
            if any(maker in found for maker in makers):
                found.add(instruction.id)
        return found


def is_named(instruction: Instruction) -> bool:
    """Whether an instruction bears an operation's name, and not that of a call, a loop or a branch around it."""
    return bool(instruction.op_name) and not _OWN.fullmatch(instruction.op_name.rpartition("/")[2])


def phase_of(op_name: str) -> Phase:
    """The phase that a name stack tells.

    Example:
        >>> phase_of("jit(step)/transpose(jvp(layer))/checkpoint/rematted_computation/tanh")
        'recomputed'
    """
    if _RECOMPUTED in op_name:
        return "recomputed"
    if _BACKWARD in op_name:
        return "backward"
    if _FORWARD in op_name:
        return "forward"
    return "optimizer" if _OPTIMIZER.search(op_name) else "other"


def scope_of(op_name: str) -> str:
    """The user's scopes in a name stack, without JAX's own parts and the operation.

    Example:
        >>> scope_of("jit(step)/transpose(jvp(model))/while/body/layer/checkpoint/rematted_computation/tanh")
        'model/layer'
    """
    found = []
    for part in _parts(op_name)[:-1]:
        while match := _TRANSFORMED.fullmatch(part):
            part = match[1]
        if part and not _OWN.fullmatch(part):
            found.append(part)
    return "/".join(found)


def _parts(op_name: str) -> list[str]:
    """A name stack's parts; a slash in parentheses divides nothing."""
    parts, depth = [""], 0
    for letter in op_name:
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
