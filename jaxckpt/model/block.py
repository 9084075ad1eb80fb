"""One distinct block: differentiated once, its options with their bytes and times.

A block becomes one jaxpr of its inputs and its outputs' cotangents. What does not depend on a cotangent is forward;
what the rest reads of it are the residuals; a save set's recomputation is what leads to them from what is there,
exactly what JAX is left with after its own dead-code elimination.
"""

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from jaxckpt.memory.across import Across, held_across
from jaxckpt.memory.fusion import Copy
from jaxckpt.memory.peak import peak_bytes
from jaxckpt.model.joint import Joint, LocalBlock
from jaxckpt.model.option import LEFT_NAME, LEFT_TO_JAX, Option, Save, SavedValues, Work, on_device
from jaxckpt.model.time import Timer, count_flops
from jaxckpt.program import primitives
from jaxckpt.program.flops import equation_cost
from jaxckpt.program.ir import Equation, can_be_saved, elements, is_differentiable
from jaxckpt.targets.chip import Target
from jaxckpt.targets.rules import FusionRules


class Model:
    """Bytes and times of one distinct block under any save set, over its joint program."""

    def __init__(self, local: LocalBlock, joint: Joint, timer: Timer, target: Target):
        self.local, self.joint, self.target = local, joint, target
        self._leading: dict[tuple[frozenset[int], frozenset[int]], list[Equation]] = {}
        self.rules = target.compiler.rules(joint.avals, [*joint.forward, *joint.backward])
        self.size = _sizes(local, joint, target).__getitem__
        kept = [joint.value[v] for v in local.outputs if v in joint.value]
        self.time = dict(zip(map(id, joint.forward), timer(joint.forward, joint.avals, kept), strict=True))
        self.flops = {id(eqn): equation_cost(eqn, joint.avals).flops for eqn in joint.forward}
        self.is_in_flops = timer is count_flops
        # -1 stands for an output that turned out to be a constant: nothing makes it.
        self.outputs = [joint.value.get(v, -1) for v in local.outputs]
        # The rest of the forward only the backward reads, so that it runs once without a plan too.
        self.plain = set(map(id, self.needed(self.outputs, frozenset())))
        moves = target.compiler.mixes_passes and not local.is_body
        self.drops_tiny = target.compiler.stacks_tiny_badly and local.is_body
        self.early, self.late = (self._early(), self._late()) if moves else ([], [])
        # Several of the block's values may be one value of the joint program; the first stands for it.
        self.named: dict[int, int] = {}
        for position, v in enumerate(local.values):
            if v in joint.value:
                self.named.setdefault(joint.value[v], position)
        inputs = {joint.value[v] for v in local.span.inputs}
        can_save = lambda v: self.size(v) and can_be_saved(joint.avals[v])  # noqa: E731
        self.savable = {v: self.size(v) for v in self.named if v not in inputs and can_save(v)}

    def left_to_jax(self) -> tuple[Option, frozenset[int]]:
        """The option that leaves the block to JAX, and what JAX then holds."""
        if self.local.is_last:
            return self._at_once(), frozenset()
        across = self._across()
        held = frozenset(v for v in across.values if self.size(v))
        # What is fused is made from what is held wherever it is read.
        fused = self.needed({v for eqn in self._backward_alone for v in eqn.reads}, held)
        late = set(map(id, self.late))
        backward = [*(e for e in fused if id(e) not in late), *self._backward_alone]
        indices = sum(map(self.rules.index_bytes, backward))
        peak = indices + self._backward_peak(backward, held, self._mixing_rules, across.copies)
        option = self._option(LEFT_NAME, LEFT_TO_JAX, held)
        scratch = self._scratch_bytes()
        copied = sum(copy.bytes(self.size) for copy in across.copies)
        inputs = (self.joint.value[v] for v in self.local.span.inputs)
        option = replace(
            option,
            saved=on_device(option.saved_bytes - scratch + indices + copied),
            recompute=Work(),
            forward=self._forward_left_to_jax(),
            # What runs early is over long before.
            forward_peak_bytes=max(option.forward_peak_bytes, across.forward_peak_bytes)
            + scratch
            - sum(map(self.rules.scratch_bytes, self.early)),
            backward_peak_bytes=peak,
            last_forward_peak_bytes=self._last_forward_peak(),
            unread_inputs=tuple(i for i, v in enumerate(inputs) if v not in across.read),
            stacked_peak_bytes=peak if self.local.is_whole_body else None,
        )
        return option, held

    def _at_once(self) -> Option:
        """The option that leaves the block to JAX where only its inputs' cotangents outlive its forward."""
        waiting = sum(map(self.size, set(self.joint.waiting)))
        results = {self.joint.value[v] for v in self.local.results if v in self.joint.value}
        own = {v for v in self.outputs if v >= 0} - results
        needed = self.needed({*self.joint.residuals, *own, *results}, frozenset())
        peak = peak_bytes(
            [*needed, *self.joint.backward],
            self.size,
            held=self.joint.cotangents,
            kept={*self.joint.waiting, *own},
            external={*self.joint.gradients, *results} - set(self.joint.waiting),
            rules=self.rules,
        )
        return Option(
            name=LEFT_NAME,
            save=LEFT_TO_JAX,
            saved=on_device(waiting),
            recompute=Work(),
            forward=self._forward_left_to_jax(),
            forward_peak_bytes=peak,
            backward_peak_bytes=waiting,
            unread_inputs=tuple(range(len(self.local.span.inputs))),
        )

    def _last_forward_peak(self) -> int:
        """The forward's peak where the cotangents are there already, which are counted elsewhere."""
        if not self.rules.is_breadth_first or self.local.is_body:
            return 0
        needed = self.needed(self.joint.residuals, frozenset())
        peak = self._backward_peak([*needed, *self.joint.backward], frozenset())
        return max(0, peak - sum(map(self.size, self.joint.cotangents)))

    def _scratch_bytes(self) -> int:
        return sum(map(self.rules.scratch_bytes, self.joint.backward))

    def _across(self) -> Across:
        """What is held without a checkpoint: the forward's buffers that the backward reads, fused or not."""
        late = set(map(id, self.late))
        return held_across(
            [*(eqn for eqn in self.joint.forward if id(eqn) not in late), *self.early],
            self._backward_alone,
            self.size,
            results=[v for v in self.outputs if v >= 0],
            cotangents=self.joint.cotangents,
            kept=[*self.joint.waiting, *self.joint.gradients],
            external=[self.joint.value[v] for v in self.local.results if v in self.joint.value],
            # In a loop's body forward and backward are loops of their own, each with its own copies.
            rules=FusionRules() if self.local.is_body else self._mixing_rules,
        )

    @property
    def _mixing_rules(self) -> FusionRules:
        """What the compiler does where no checkpoint separates forward and backward."""
        return replace(self.rules, scratch_bytes=lambda eqn: 0)

    @functools.cached_property
    def _backward_alone(self) -> list[Equation]:
        """What runs after the forward where no checkpoint separates the two."""
        early = set(map(id, self.early))
        return [*(eqn for eqn in self.joint.backward if id(eqn) not in early), *self.late]

    def _early(self) -> list[Equation]:
        """What of the backward depends on no activation: next to the forward, a compiler may run it first."""
        local, joint = self.local, self.joint
        crossing, results = set(local.crossing), set(local.results)
        there = {joint.value[v] for v in local.span.inputs if v not in crossing}
        cotangents = zip(local.active_outputs, joint.cotangents, strict=True)
        there.update(ct for v, ct in cotangents if v in results)
        _following(joint.forward, there)
        return _following(joint.backward, there)

    def _late(self) -> list[Equation]:
        """What leads to nothing but results of the program: a compiler may put it off until after the backward."""
        results = {self.joint.value.get(v) for v in self.local.results}
        needed = self.needed({*self.joint.residuals, *(v for v in self.outputs if v not in results)}, frozenset())
        kept = set(map(id, needed))
        return [eqn for eqn in self.joint.forward if id(eqn) not in kept]

    def residual_bytes(self) -> int:
        """What a loop stacks of the block, once per iteration; what is the same in each is made once, outside."""
        same = {self.joint.value[v] for v in self.local.invariant}
        _following(self.joint.forward, same)
        # Without a checkpoint there are no names, and what only renames a value is that value.
        origin = primitives.renamed(self.joint.forward)
        held = {origin.get(v, v): v for v in self.joint.residuals if v not in same}
        return sum(map(self.size, held.values()))

    def option(self, name: str, saved: frozenset[int]) -> Option:
        """The option that saves this set."""
        option = self._option(name, SavedValues(tuple(sorted(self.named[v] for v in saved))), saved)
        if not self.local.is_whole_body:
            return option
        peak = self._backward_peak(self.backward_equations(saved), saved, is_stacked=True)
        return replace(option, stacked_peak_bytes=peak)

    def _option(self, name: str, save: Save, saved: frozenset[int]) -> Option:
        own = [v for v in self.outputs if v in saved]
        again = self.needed(self.joint.residuals, saved)
        late = [*again, *self.joint.backward]
        read = {v for eqn in late for v in eqn.reads}
        inputs = (self.joint.value[v] for v in self.local.span.inputs)
        rounding = self._rounding(saved)
        return Option(
            name=name,
            save=save,
            # What an operation needs may be made long before it runs.
            saved=on_device(sum(self.size(v) for v in saved if v not in own) + self._scratch_bytes()),
            recompute=Work(
                self._again(again, self.time) + (rounding if self.is_in_flops else 0),
                self._again(again, self.flops) + rounding,
            ),
            forward=self.forward(saved),
            forward_peak_bytes=self._forward_peak(saved),
            backward_peak_bytes=self._backward_peak(late, saved),
            saved_outputs=tuple(self.outputs.index(v) for v in own),
            unread_inputs=tuple(i for i, v in enumerate(inputs) if v not in read),
        )

    def forward(self, saved: frozenset[int] = frozenset()) -> tuple[Work, ...]:
        """Work to make what is saved and the first j outputs, `[num_outputs + 1]`."""
        needed = (self.needed({*saved, *self.outputs[:j]}, frozenset()) for j in range(len(self.outputs) + 1))
        return tuple(map(self._work, needed))

    def forward_peak_bytes(self) -> int:
        """Most bytes alive at once in the forward where nothing is saved."""
        return self._forward_peak(frozenset())

    def forward_equations(self, kept: Collection[int]) -> list[Equation]:
        """What makes these values from the block's inputs."""
        return self.needed(kept, frozenset())

    def backward_equations(self, saved: frozenset[int]) -> list[Equation]:
        """The backward, behind what it makes again from the block's inputs and what is saved."""
        return [*self.needed(self.joint.residuals, saved), *self.joint.backward]

    def _work(self, equations: Iterable[Equation]) -> Work:
        numbers = list(map(id, equations))
        return Work(sum(map(self.time.__getitem__, numbers)), sum(map(self.flops.__getitem__, numbers)))

    def _again(self, equations: Sequence[Equation], time: dict[int, int]) -> int:
        return sum(time[id(eqn)] for eqn in equations if id(eqn) in self.plain)

    def _rounding(self, saved: frozenset[int]) -> int:
        """FLOPs of the rounding that JAX puts on what is saved, against compilers that would keep more digits."""
        return sum(elements(self.joint.avals[v]) for v in saved if is_differentiable(self.joint.avals[v]))

    def _forward_left_to_jax(self) -> tuple[Work, ...]:
        """Fused or not, JAX makes what the backward reads."""
        prefixes = (self.outputs[:j] for j in range(len(self.outputs) + 1))
        needed = (self.needed({*self.joint.residuals, *outputs}, frozenset()) for outputs in prefixes)
        return tuple(self._work(eqn for eqn in run if id(eqn) in self.plain) for run in needed)

    def _forward_peak(self, saved: frozenset[int]) -> int:
        external = {self.joint.value[v] for v in self.local.results if v in self.joint.value}
        kept = {*self.outputs, *saved} - external - {-1}
        needed = self.needed({*kept, *external}, frozenset())
        return peak_bytes(needed, self.size, kept=kept, external=external, rules=self.rules)

    def _backward_peak(
        self,
        equations: Sequence[Equation],
        saved: frozenset[int],
        rules: FusionRules | None = None,
        copies: Collection[Copy] = (),
        *,
        is_stacked: bool = False,
    ) -> int:
        waiting = set(self.joint.waiting)
        return peak_bytes(
            equations,
            self.size,
            held={*self.joint.cotangents, *(() if is_stacked else saved)},
            stacked=sorted(saved) if is_stacked else (),
            copies=copies,
            kept=waiting,
            external=set(self.joint.gradients) - waiting,
            rules=rules or self.rules,
        )

    def needed(self, targets: Collection[int], there: frozenset[int]) -> list[Equation]:
        """The forward equations that lead to the targets from the inputs and what is there."""
        key = frozenset(targets), there
        if key not in self._leading:
            self._leading[key] = self._find_needed(*key)
        return self._leading[key]

    def _find_needed(self, targets: frozenset[int], there: frozenset[int]) -> list[Equation]:
        needed = set(targets - there)
        found = []
        for eqn in reversed(self.joint.forward):
            if not needed.isdisjoint(eqn.outputs):
                found.append(eqn)
                needed.update(v for v in eqn.reads if v not in there)
        return found[::-1]


def _sizes(local: LocalBlock, joint: Joint, target: Target) -> list[int]:
    """Bytes of the joint program's values; of those that cross cuts the whole program decides."""
    known = local.layouts
    ends = [(joint.value[v], v) for v in (*local.span.inputs, *local.outputs) if v in joint.value]
    cotangents = list(zip(joint.cotangents, local.active_outputs, strict=True))
    features = {u: known.features[v] for u, v in (*ends, *cotangents) if v in known.features}
    layouts = target.compiler.layouts(joint.avals, [*joint.forward, *joint.backward], features=features)
    sizes = list(map(layouts.held_bytes, range(len(joint.avals))))
    for u, v in ends:
        sizes[u] = known.held_bytes(v)
    for u, v in cotangents:
        sizes[u] = known.full_bytes[v]
    return sizes


def _following(equations: Sequence[Equation], there: set[int]) -> list[Equation]:
    """The equations that need nothing but what is there; what they make is there then."""
    found = []
    for eqn in equations:
        if there.issuperset(eqn.reads):
            there.update(eqn.outputs)
            found.append(eqn)
    return found
