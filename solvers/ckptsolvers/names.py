"""Which named values to save, where everything else is made again: all choices judged, or branch and bound.

A program is written with regions of which nothing is saved but values that have certain names. A name stands for one
value or for many, and is saved everywhere or nowhere. Saving one cuts the recomputation that leads to it: what is made
again is what the backward pass reaches from its needs without passing a saved value. That is the closure problem
(Picard, 1976) with two differences: a cut costs bytes and not work, and the cuts of one name stand or fall together. So
it is a knapsack over closures, and NP-hard by the names alone.

Up to `MOST_JUDGED` names every choice is judged. Beyond, an integer program has one binary variable for each name; what
is made again follows from those and need not be integral. HiGHS solves it by branch and bound, and says how far from
the optimum it may be.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ckptsolvers.errors import InvalidProblemError
from ckptsolvers.linear import LinearProgram

# With so many names all choices are judged, at 1,024 of them.
MOST_JUDGED = 10
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedValue:
    """A place where a name stands.

    Attributes:
        part: the part that is needed if the value is; where it is saved, nothing that leads to it is.
        name: which name it has.
        size_bytes: what it holds from forward to backward where it is saved and needed.
        work: what saving it costs then.
    """

    part: int
    name: int
    size_bytes: int
    work: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NameProblem:
    """Work that is done again, and what cuts it.

    A part is needed if one of its readers is: a pair of a part that is needed and a name that is not saved, or -1 for
    a reader that no name stands before. Part 0 is always needed. Readers may be in a circle, as a loop's are.

    Attributes:
        names: `[num_names]`.
        readers: `[num_parts]`, of each its readers.
        work: `[num_parts]`, what a part that is needed costs.
        held_bytes: `[num_parts]`, what is held from forward to backward for a part that is needed.
        values: where names stand.
    """

    names: tuple[str, ...]
    readers: tuple[tuple[tuple[int, int], ...], ...]
    work: tuple[int, ...]
    held_bytes: tuple[int, ...]
    values: tuple[NamedValue, ...]

    def __post_init__(self) -> None:
        """Refuse parts and names that are not there."""
        parts, names = range(len(self.work)), range(len(self.names))
        pairs = [(p, a) for pairs in self.readers for p, a in pairs] + [(v.part, v.name) for v in self.values]
        if not len(self.readers) == len(self.work) == len(self.held_bytes) or not self.work:
            raise InvalidProblemError("readers, work and held_bytes have one entry for each part, and there is one")
        if any(p not in parts or (a != -1 and a not in names) for p, a in pairs):
            raise InvalidProblemError("a reader or a value is of a part or a name that is not there")
        stand = {(v.part, v.name) for v in self.values}
        if any(a >= 0 and (p, a) not in stand for pairs in self.readers for p, a in pairs):
            raise InvalidProblemError("a name stands before a reader whose value does not have it")

    def restricted(self, names: Sequence[str]) -> "NameProblem":
        """The same problem with these names to choose among; the others are not saved."""
        kept = [i for i, name in enumerate(self.names) if name in set(names)]
        new = {-1: -1, **dict.fromkeys(range(len(self.names)), -1), **{i: k for k, i in enumerate(kept)}}
        return NameProblem(
            names=tuple(self.names[i] for i in kept),
            readers=tuple(tuple(sorted({(p, new[a]) for p, a in pairs})) for pairs in self.readers),
            work=self.work,
            held_bytes=self.held_bytes,
            values=tuple(replace(v, name=new[v.name]) for v in self.values if new[v.name] >= 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NameChoice:
    """Names that are saved.

    Attributes:
        saved: their numbers, ascending; of each a value is needed.
        work: what is done again, and what saving costs.
        held_bytes: what is held from forward to backward.
    """

    saved: tuple[int, ...]
    work: int
    held_bytes: int


def judge_names(problem: NameProblem, saved: Collection[int]) -> NameChoice:
    """Say what a choice of names costs; names that nothing needs are left out of it."""
    needed = _needed(problem, set(saved))
    work = sum(w for w, there in zip(problem.work, needed, strict=True) if there)
    size = sum(b for b, there in zip(problem.held_bytes, needed, strict=True) if there)
    held = [v for v in problem.values if v.name in saved and needed[v.part]]
    return NameChoice(
        saved=tuple(sorted({v.name for v in held})),
        work=work + sum(v.work for v in held),
        held_bytes=size + sum(v.size_bytes for v in held),
    )


def _needed(problem: NameProblem, saved: set[int]) -> list[bool]:
    followers: list[list[int]] = [[] for _ in problem.readers]
    for part, pairs in enumerate(problem.readers):
        for reader, name in pairs:
            if name not in saved:
                followers[reader].append(part)
    needed = [False] * len(followers)
    needed[0], todo = True, [0]
    while todo:
        for part in followers[todo.pop()]:
            if not needed[part]:
                needed[part] = True
                todo.append(part)
    return needed


def all_name_choices(problem: NameProblem) -> list[NameChoice]:
    """Every choice that differs from the others, the least work first.

    Returns:
        Choices with the same values saved are one, without the names that do nothing in it; of those that cost and hold
        the same, the one with the fewest names comes first. `2 ** num_names` are judged, each in linear time.
    """
    n = len(problem.names)
    found = {}
    for mask in range(2**n):
        choice = judge_names(problem, [i for i in range(n) if mask >> i & 1])
        found[choice.saved] = choice
    return sorted(found.values(), key=lambda c: (c.work, c.held_bytes, len(c.saved), c.saved))


def name_bytes(problem: NameProblem, choice: NameChoice) -> list[int]:
    """`[num_names]`, what the values of each name hold under a choice."""
    needed, found = _needed(problem, set(choice.saved)), [0] * len(problem.names)
    for v in problem.values:
        if v.name in choice.saved and needed[v.part]:
            found[v.name] += v.size_bytes
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class NameAnswer:
    """What branch and bound found.

    Attributes:
        choice: the best; None where nothing was found.
        bound_work: no choice within the limit, other than those that were left out, costs less; infinite where there
            is none.
    """

    choice: NameChoice | None
    bound_work: float


def solve_names(
    problem: NameProblem, *, most_bytes: int, without: Iterable[Collection[int]] = (), time_limit_s: float = 10.0
) -> NameAnswer:
    """Find the names to save with the least work, by branch and bound.

    Args:
        problem: any; beyond some thirty names it may take exponential time.
        most_bytes: what a choice may hold.
        without: choices that are left out.
        time_limit_s: when to stop with the best so far and a bound.
    """
    program = LinearProgram()
    unit_work, unit_bytes = max(1, *problem.work, *(v.work for v in problem.values)), max(1, most_bytes)
    saves = [program.add_binary() for _ in problem.names]
    made = [program.add_continuous(upper=1.0, cost=w / unit_work) for w in problem.work]
    held = {made[i]: size / unit_bytes for i, size in enumerate(problem.held_bytes) if size}
    program.add_equal({made[0]: 1.0}, 1.0)
    for part, pairs in enumerate(problem.readers):
        for reader, name in pairs:
            if reader != part:
                # A part is needed if its reader is, unless the name between them is saved.
                cut = {} if name < 0 else {saves[name]: -1.0}
                program.add_at_most({made[reader]: 1.0, **cut, made[part]: -1.0}, 0.0)
    for value in problem.values:
        there = program.add_continuous(upper=1.0, cost=value.work / unit_work)
        program.add_at_most({made[value.part]: 1.0, saves[value.name]: 1.0, there: -1.0}, 1.0)
        held[there] = value.size_bytes / unit_bytes
    if held:
        program.add_at_most(held, 1.0 if most_bytes > 0 else 0.0)
    for choice in without:
        chosen, needed = set(choice), _needed(problem, set(choice))
        # Names of which nothing is needed beside these make no other choice.
        told = chosen | {v.name for v in problem.values if needed[v.part]}
        program.add_at_most({saves[i]: 1.0 if i in chosen else -1.0 for i in told}, len(chosen) - 1.0)
    found = program.solve(time_limit_s=time_limit_s)
    if found.is_infeasible:
        return NameAnswer(choice=None, bound_work=math.inf)
    bound = found.bound * unit_work if math.isfinite(found.bound) else 0.0
    bound = max(0.0, bound - _TOLERANCE * abs(bound))
    if found.values is None:
        return NameAnswer(choice=None, bound_work=bound)
    choice = judge_names(problem, [i for i, s in enumerate(saves) if found.values[s] > 0.5])
    return NameAnswer(choice=choice, bound_work=bound)


def simplified(problem: NameProblem) -> NameProblem:
    """The same problem with parts merged that are needed in the same cases.

    Layers that are written out one after the other come down to one, and a chain of operations to one part. Parts in
    a circle stay as they are.

    Returns:
        A problem with the same choices, of the same work and bytes.
    """
    kind: dict[int, int] = {}
    kinds: dict[object, int] = {"always": 0}
    rows: list[tuple[tuple[int, int], ...]] = [()]
    for part in _readers_first(problem):
        pairs = frozenset((kind.get(reader, -1), name) for reader, name in problem.readers[part])
        if part == 0 or (0, -1) in pairs:
            key: object = "always"
        elif any(k < 0 for k, _ in pairs):  # in a circle: a kind of its own, whose readers are filled in below
            key = ("circle", part)
        elif len(pairs) == 1 and next(iter(pairs))[1] == -1:
            kind[part] = next(iter(pairs))[0]
            continue
        else:
            key = pairs
        if key not in kinds:
            kinds[key] = len(rows)
            rows.append(tuple(sorted(pairs)))
        kind[part] = kinds[key]
    merged = [kind[part] for part in range(len(problem.readers))]
    for key, number in kinds.items():
        if isinstance(key, tuple):
            rows[number] = tuple(sorted({(merged[r], a) for r, a in problem.readers[key[1]]}))
    work, held = [0] * len(rows), [0] * len(rows)
    for part, k in enumerate(merged):
        work[k] += problem.work[part]
        held[k] += problem.held_bytes[part]
    values: dict[tuple[int, int], tuple[int, int]] = {}
    for v in problem.values:
        size, extra = values.get((merged[v.part], v.name), (0, 0))
        values[merged[v.part], v.name] = size + v.size_bytes, extra + v.work
    return NameProblem(
        names=problem.names,
        readers=tuple(rows),
        work=tuple(work),
        held_bytes=tuple(held),
        values=tuple(
            NamedValue(part=p, name=a, size_bytes=size, work=extra) for (p, a), (size, extra) in values.items()
        ),
    )


def _readers_first(problem: NameProblem) -> list[int]:
    """All parts, each after its readers where there is no circle."""
    waiting = [len({r for r, _ in pairs}) for pairs in problem.readers]
    waiting[0] = 0
    followers: list[list[int]] = [[] for _ in waiting]
    for part, pairs in enumerate(problem.readers):
        for reader in {r for r, _ in pairs}:
            followers[reader].append(part)
    order, done, touched = [], [False] * len(waiting), set[int]()
    ready = [part for part, count in enumerate(waiting) if not count]
    while len(order) < len(waiting):
        if not ready:  # a circle: one whose readers are known in part goes first, the last of them
            ready.append(max(touched) if touched else max(p for p, is_done in enumerate(done) if not is_done))
        part = ready.pop()
        touched.discard(part)
        if done[part]:
            continue
        done[part] = True
        order.append(part)
        for follower in followers[part]:
            waiting[follower] -= 1
            if done[follower]:
                continue
            touched.add(follower)
            if not waiting[follower]:
                ready.append(follower)
    return order


def needed_names(problem: NameProblem) -> frozenset[int]:
    """The names of which saving does something: of one that is alone a value is needed."""
    needed = _needed(problem, set())
    return frozenset(v.name for v in problem.values if needed[v.part])
