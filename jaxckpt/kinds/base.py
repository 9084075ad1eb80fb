"""What a kind of block is, and the registry of all there are.

A kind is one way to treat a block, by the operation that the block ends with: how it is recognised, which options
there are to keep it, how it is run under one, and what plan files and reports say of it. Nobody else asks what kind a
block is.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Protocol

import networkx as nx
from ckptsolvers import Schedule
from pydantic import BaseModel

from jaxckpt.errors import OptionError
from jaxckpt.model.block import Model
from jaxckpt.model.blocks import Blocks
from jaxckpt.model.cut import Span
from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import NOTHING_SAVED, BlockAnalysis, Place, Save
from jaxckpt.model.time import Timer
from jaxckpt.model.tree import Tree, blocks_from_json, check_cover
from jaxckpt.program.ir import Equation, Program
from jaxckpt.targets.chip import Target


class Profiler(Protocol):
    """Puts what was measured of a block in the place of what is modelled."""

    def profiled(self, model: Model, analysis: BlockAnalysis, saved: Sequence[frozenset[int]]) -> BlockAnalysis:
        """The same options with other numbers.

        Args:
            model: the block's.
            analysis: its modelled options.
            saved: `[num_options]`, what each holds, in numbers of the model.
        """
        ...


class Applier(Protocol):
    """Runs programs under plans. A kind whose plans have programs inside, as a loop's has its body, is given one."""

    def function(self, program: Program, tree: Tree, prefix: str, *, is_body: bool = False) -> "Flat":
        """A program under a plan, as a function of flat inputs.

        Args:
            program: the flat program.
            tree: its plan.
            prefix: what the names of saved values begin with, so that plans do not save each other's values.
            is_body: whether forward and backward of the program are loops of their own.
        """
        ...


class Flat(Protocol):
    """A function from a program's inputs to its outputs, both flat."""

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run it."""
        ...


class Analyser(Protocol):
    """What the analysis of a block is done with, and how programs inside it are analysed in turn."""

    @property
    def timer(self) -> Timer:
        """What equations cost, in the unit of the plan's cost."""
        ...

    @property
    def target(self) -> Target:
        """The chip."""
        ...

    @property
    def applier(self) -> Applier:
        """What runs programs under plans."""
        ...

    @property
    def host_budget(self) -> int | None:
        """Bytes of the host that saved values may take; None where none are sent there."""
        ...

    @property
    def profiler(self) -> Profiler | None:
        """What puts measured numbers in the place of modelled ones; None where nothing is profiled."""
        ...

    def is_apart(self, eqn: Equation) -> bool:
        """Whether the target runs an operation with less memory where no region covers it."""
        ...

    def inside(
        self,
        program: Program,
        graph: nx.DiGraph,
        spans: Sequence[Span],
        *,
        active: Collection[int],
        invariant: Collection[int],
    ) -> Blocks:
        """Analyse the blocks of a program that a block runs, such as a loop's body.

        Args:
            program: the flat program, whose inputs are held elsewhere.
            graph: its graph.
            spans: its blocks in order.
            active: values that tangents flow through.
            invariant: inputs that are the same in every iteration.
        """
        ...


class Checkpointed(Protocol):
    """Runs a part of a block inside one `jax.checkpoint`.

    Blocks whose equations and saves are equal but for the numbers of values are traced once: the first one's body
    stands for all of them.
    """

    def __call__(self, body: Callable[[dict[int, Any]], None], places: Mapping[str, Place] = NOTHING_SAVED) -> None:
        """Run a body, and save what it names.

        Args:
            body: adds its results to the dict of values that it is given, and reads nothing of the program but that.
            places: where to save values, by name; all others are recomputed.
        """
        ...


class Uncovered(Protocol):
    """Runs a part of a block as it is, and what equal ones have in common is traced once."""

    def __call__(self, body: Callable[[dict[int, Any]], None]) -> None:
        """Run a body.

        Args:
            body: adds its results to the dict of values that it is given, and reads nothing of the program but that.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBlock:
    """A block that is due to run and is kept for its backward.

    Attributes:
        equations: in order.
        save: what it saves.
        values: of the program so far, by number; what the block makes is added.
        prefix: what names of values that it saves begin with; equal blocks have equal names.
        checkpointed: runs a part of it inside one `jax.checkpoint`, on what the block reads, for what is read later.
        uncovered: runs a part of it as it is, likewise.
        applier: runs programs inside the block under their own plans.
    """

    equations: Sequence[Equation]
    save: Save
    values: dict[int, Any]
    prefix: str
    checkpointed: Checkpointed
    uncovered: Uncovered
    applier: Applier


class Kind(Protocol):
    """One kind of block.

    Attributes:
        name: of the kind, in plan files; saves have it as their `kind`.
        schema: of what `to_json` makes, a pydantic model; `jaxckpt.compilation.records.Record` is a strict one.
    """

    name: str
    schema: type[BaseModel]

    def matches(self, eqn: Equation, is_active: bool) -> bool:
        """Whether an operation is treated as a block of this kind; it is then the last one of a block of its own.

        Args:
            eqn: the operation.
            is_active: whether tangents flow through it.
        """
        ...

    def analyse(self, local: LocalBlock, analyser: Analyser) -> BlockAnalysis:
        """Find the options to keep a block of this kind; the last one leaves it to JAX.

        Args:
            local: the block, which ends with an operation of this kind. What stands before it leads to its operands.
            analyser: what that is done with.
        """
        ...

    def run(self, block: KeptBlock) -> None:
        """Run a block as its save says, and add what it makes to the values."""
        ...

    def to_json(self, save: Any) -> Any:
        """A save of this kind as plain data, the kind's name left out: a dict, but for kinds of jaxckpt's own."""
        ...

    def from_json(self, data: Any) -> Save:
        """Read what `to_json` made; the schema has been checked.

        Raises:
            ValueError, TypeError, KeyError: it cannot be.
        """
        ...

    def check(self, save: Any, equations: Sequence[Equation], where: str) -> None:
        """Refuse a save that is not one of this block, before anything is run.

        Args:
            save: from a file, perhaps.
            equations: the block's, in order.
            where: the path of the save in the file.

        Raises:
            ValueError: with the path of what is wrong.
        """
        ...

    def describe(self, save: Any) -> Iterator[str]:
        """Lines of a report that say how a block is run under a save."""
        ...

    def held(self, eqn: Equation) -> str:
        """What a block that ends with this operation holds without a name, in a few words."""
        ...


class UnknownKindError(LookupError):
    """A plan has a block of a kind that is not registered."""


_OWN: list[Kind] = []
_REGISTERED: list[Kind] = []


def register_kind(kind: Kind) -> Kind:
    """Add a kind of block. It is asked before jaxckpt's own kinds, the newest one first.

    Args:
        kind: see `Kind`.

    Returns:
        The kind.

    Raises:
        OptionError: its name is taken.
    """
    if any(kind.name == other.name for other in kinds()):
        raise OptionError(f"a kind of block named {kind.name!r} is there already; give it a name of its own")
    _REGISTERED.insert(0, kind)
    return kind


def register_own(*own: Kind) -> None:
    """Add jaxckpt's own kinds, in the order in which they are asked; the last one takes every block."""
    _OWN.extend(own)


def kinds() -> tuple[Kind, ...]:
    """All kinds in the order in which they are asked."""
    return (*_REGISTERED, *_OWN)


def registered() -> tuple[str, ...]:
    """Names of the kinds that were registered from outside, for the keys of what is remembered and kept on disk."""
    return tuple(f"{kind.name}:{type(kind).__module__}.{type(kind).__qualname__}" for kind in _REGISTERED)


def kind_of(eqn: Equation, is_active: bool) -> Kind:
    """The kind of a block that ends with this operation."""
    return next(kind for kind in kinds() if kind.matches(eqn, is_active))


def is_alone(eqn: Equation, is_active: bool) -> bool:
    """Whether an operation must be the last one of a block of its own."""
    return kind_of(eqn, is_active) is not kinds()[-1]


def kind_named(name: str) -> Kind:
    """The kind whose saves bear this name.

    Raises:
        UnknownKindError: there is none.
    """
    found = next((kind for kind in kinds() if kind.name == name), None)
    if found is None:
        raise UnknownKindError(
            f"has a block of kind {name!r}, which is none of {', '.join(sorted(kind.name for kind in kinds()))}; "
            "register it with jaxckpt.register_kind before the plan is read"
        )
    return found


# Kinds whose data is no object and stands for itself.
_BARE = {NoneType: "jax", list: "plain"}


def save_to_json(save: Save) -> Any:
    """What a block saves as plain data: an object with the kind's name, but for the two kinds that most blocks are."""
    data = kind_named(save.kind).to_json(save)
    return {"kind": save.kind, **data} if isinstance(data, dict) else data


def save_from_json(data: Any) -> Save:
    """Read what `save_to_json` made.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
        UnknownKindError: it is of a kind that is not there.
    """
    kind, rest = split_save(data)
    return kind.from_json(rest)


def split_save(data: Any) -> tuple[Kind, Any]:
    """The kind of a save that `save_to_json` made, and the kind's own data.

    Raises:
        ValueError: it is something else.
        UnknownKindError: the kind is not there.
    """
    if type(data) in _BARE:
        return kind_named(_BARE[type(data)]), data
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str) or data["kind"] == "jax":
        raise ValueError("it is neither null, a list of values, nor an object with the name of a kind")
    return kind_named(data["kind"]), {name: x for name, x in data.items() if name != "kind"}


def tree_to_json(tree: Tree) -> dict[str, Any]:
    """A program's plan as plain data."""
    return {
        "blocks": tree.blocks,
        "schedule": tree.schedule.to_json(),
        "saved": [save_to_json(save) for save in tree.saved],
        **({"host": list(tree.host)} if tree.host else {}),
    }


def tree_from_json(data: dict[str, Any]) -> Tree:
    """Read what `tree_to_json` made.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
    """
    tree = Tree(
        blocks=blocks_from_json(data["blocks"]),
        schedule=Schedule.from_json(data["schedule"]),
        saved=tuple(map(save_from_json, data["saved"])),
        host=tuple(data.get("host") or ()),
    )
    check_cover(tree.schedule, len(tree.blocks))
    return tree


def describe_tree(tree: Tree) -> str:
    """What a plan inside a block saves and recomputes, in a few words."""
    if not tree.saved:
        return "does nothing"
    named = sum(len(save.named_values) for save in tree.saved)
    num_left = sum(save.is_left_to_jax for save in tree.saved)
    num_inside = len(tree.saved) - num_left - sum(save.is_by_name for save in tree.saved)
    parts = [f"saves {named} value{'s' * (named != 1)} by name"] if named else []
    if on_host := sum(len(save.host_values) for save in tree.saved):
        parts.append(f"{on_host} of them on the host")
    if tree.host:
        parts.append(f"holds {len(tree.host)} input{'s' * (len(tree.host) != 1)} on the host")
    if num_left == len(tree.saved):
        parts.append("is left to JAX")
    elif num_left:
        parts.append(f"leaves {num_left} of {len(tree.saved)} blocks to JAX")
    if num_inside:
        parts.append(f"plans {num_inside} inside")
    if num := tree.schedule.num_regions:
        parts.append(f"makes {num} region{'s' * (num != 1)} again")
    return ", ".join(parts) or "saves nothing inside"
