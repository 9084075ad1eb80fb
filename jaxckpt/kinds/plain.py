"""Plain blocks: their options are sets of values to save by name.

Source: the sets are minimum cuts between what is there and what the backward reads, as in Cai et al.'s partitioner of
PyTorch's AOTAutograd, taken at every exchange rate between bytes and time; see `ckptsolvers.mincut`.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from ckptsolvers.mincut import Operation
from ckptsolvers.mincut import save_sets as minimum_cuts
from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag

from jaxckpt.compilation.records import TAG, Index, Record
from jaxckpt.kinds.base import Analyser, KeptBlock
from jaxckpt.model.block import Model
from jaxckpt.model.joint import LocalBlock, differentiate
from jaxckpt.model.option import BlockAnalysis, Option, Place, SavedValues, dominates, kept_only
from jaxckpt.program.interpret import evaluate
from jaxckpt.program.ir import Equation

# Beside a value so many times its size another one is tiny; this share of a block's work is next to nothing.
_TINY, _FOR_NOTHING = 64, 0.001
# An operation is costly that takes this share of a block's work; minimum cuts for sets between those of the hull.
# On a scanned Llama of 64 layers with the bytes of a body under `dots_with_no_batch_dims_saveable`, those sets and the
# ones of costly operations alone make it 2.9 % more work instead of 11.2 %.
_COSTLY, _MAX_BETWEEN = 0.01, 256
# Options that differ by less than these parts of a block's largest value and of its work are identical.
_SAME_BYTES, _SAME_TIME = 64, 2000


class PlacesRecord(Record):
    """What a plain block saves at each place of memory, in a file."""

    device: list[Index]
    host: Annotated[list[Index], Field(min_length=1)]


_ALL_DEVICE, _PLACES = f"{TAG}values>", f"{TAG}places>"
_VALUES = Annotated[
    Annotated[list[Index], Tag(_ALL_DEVICE)] | Annotated[PlacesRecord, Tag(_PLACES)],
    Discriminator(lambda data: _PLACES if isinstance(data, dict) else _ALL_DEVICE),
]


class ValuesRecord(RootModel[_VALUES]):
    """What a plain block saves, in a file: a list where all of it is on the device."""

    model_config = ConfigDict(strict=True, defer_build=True)


class Plain:
    """A block of operations that are run as they are, inside a checkpoint that saves some values by name."""

    name = SavedValues.kind
    schema: type[BaseModel] = ValuesRecord

    def matches(self, eqn: Equation, is_active: bool) -> bool:
        """Whether a block that ends with this equation is of this kind: any is."""
        del eqn, is_active
        return True

    def analyse(self, local: LocalBlock, analyser: Analyser) -> BlockAnalysis:
        """Find the block's options."""
        found, model, saved = analyse_block(local, analyser)
        if analyser.profiler is not None:
            found = analyser.profiler.profiled(model, found, saved)
        is_apart = local.active_outputs and analyser.is_apart(local.span.equations[-1])
        return kept_only(found) if is_apart else found

    def run(self, block: KeptBlock) -> None:
        """Run the block inside a checkpoint."""
        names = {v: f"{block.prefix}.{i}" for i, v in enumerate(block.save.named_values)}
        on_host = set(block.save.host_values)
        places = {name: Place.HOST if v in on_host else Place.DEVICE for v, name in names.items()}
        block.checkpointed(functools.partial(evaluate, block.equations, names=names), places)

    def to_json(self, save: SavedValues) -> Any:
        """The values' numbers."""
        return {"device": list(save.values), "host": list(save.host)} if save.host else list(save.values)

    def from_json(self, data: Any) -> SavedValues:
        """Read what `to_json` made."""
        if isinstance(data, list):
            return SavedValues(tuple(data))
        return SavedValues(tuple(data["device"]), tuple(data["host"]))

    def check(self, save: SavedValues, equations: Sequence[Equation], where: str) -> None:
        """Refuse values that the block does not make."""
        made = {v for eqn in equations for v in eqn.outputs}
        read = {v for eqn in equations for v in eqn.reads}
        there = {"": made, ".device": made, ".host": made | read}
        for name, values in ((".device" if save.host else "", save.values), (".host", save.host)):
            for i, v in enumerate(values):
                if v not in there[name]:
                    raise ValueError(f"{where}{name}[{i}] is {v}, which the block does not make, or is named twice")
                for known in there.values():
                    known.discard(v)
        if any(eqn.has_effects for eqn in equations):
            raise ValueError(f"{where}: a block with a side effect cannot save by name")

    def describe(self, save: SavedValues) -> Iterator[str]:
        """What waits on the host; reports list what is on the device of every block."""
        if save.host:
            yield f"{len(save.host)} value{'s' * (len(save.host) != 1)} on the host"

    def held(self, eqn: Equation) -> str:
        """What is held of a block without a name."""
        del eqn
        return "what JAX keeps"


def analyse_block(local: LocalBlock, analyser: Analyser) -> tuple[BlockAnalysis, Model, list[frozenset[int]]]:
    """Find the options of a block of operations; the last one leaves it to JAX.

    Returns:
        The options, the model that they are from, and what each holds, in numbers of the model.
    """
    joint = differentiate(local)
    model = Model(local, joint, analyser.timer, analyser.target)
    kept: list[tuple[Option, frozenset[int]]] = []
    spare_bytes = max(map(model.size, model.savable), default=0) // _SAME_BYTES
    spare_time = sum(model.time.values()) // _SAME_TIME
    # Of a loop's whole body the peaks where what was saved is read from stacks come on top of the options' own.
    peak = lambda option: option.stacked_peak_bytes or 0  # noqa: E731
    for saved in save_sets(model):
        option = model.option(f"save {len(saved)}" if saved else "nothing", saved)
        most = peak(option) + spare_bytes
        if not any(peak(o) <= most and dominates(o, option, spare_bytes, spare_time) for o, _ in kept):
            kept.append((option, saved))
    left, held = model.left_to_jax()
    # Where leaving the block to JAX takes no more of anything, no checkpoint is due.
    useful = [not (dominates(left, o, spare_bytes) and peak(left) <= peak(o) + spare_bytes) for o, _ in kept]
    kept = [*itertools.compress(kept, useful), (left, held)]
    backward = analyser.timer(joint.backward, joint.avals, [*joint.waiting, *joint.gradients])
    analysis = BlockAnalysis(
        forward=model.forward(),
        forward_peak_bytes=model.forward_peak_bytes(),
        options=tuple(option for option, _ in kept),
        unplanned_cost=sum(model.time.values()) + sum(backward),
        residual_bytes=model.residual_bytes(),
    )
    return analysis, model, [saved for _, saved in kept]


def save_sets(model: Model) -> list[frozenset[int]]:
    """Sets worth considering: once as if every value had its price, once as if outputs were held anyway.

    All iterations of a loop are run identically, and other blocks that repeat may be, so for these sets between those
    of the hull are worth having too, and those of results of costly operations alone: fewer values are alive while what
    follows is recomputed.
    """
    local, residuals = model.local, model.joint.residuals
    fine = [Operation(reads=e.reads, makes=e.outputs, time=model.time[id(e)]) for e in model.joint.forward]
    read = {v for eqn in model.needed(residuals, frozenset()) for v in eqn.outputs}
    outputs = read.intersection(model.outputs, model.savable)
    found: dict[frozenset[int], None] = {}
    for operations in (fine, _costly(fine)) if local.is_repeated else (fine,):
        for sizes in (model.savable, model.savable | dict.fromkeys(outputs, 1)) if outputs else (model.savable,):
            for saved in minimum_cuts(
                operations,
                targets=residuals,
                save_bytes=sizes,
                max_between=_MAX_BETWEEN if local.is_repeated else 0,
                is_early=operations is not fine,
            ):
                found.setdefault(_without_tiny(model, saved) if model.drops_tiny else saved)
    return list(found)


def _without_tiny(model: Model, saved: frozenset[int]) -> frozenset[int]:
    """The set without what is tiny beside its largest value, where that is recomputed for next to nothing."""
    least = max(map(model.size, saved), default=0) / _TINY
    large = frozenset(v for v in saved if model.size(v) >= least)
    work = [sum(model.time[id(eqn)] for eqn in model.needed(model.joint.residuals, s)) for s in (large, saved)]
    return large if work[0] - work[1] <= _FOR_NOTHING * sum(model.time.values()) else saved


def _costly(operations: Sequence[Operation]) -> list[Operation]:
    """The operations, where none but the costly ones takes time."""
    least = _COSTLY * sum(op.time for op in operations)
    return [op if op.time >= least else replace(op, time=0) for op in operations]
