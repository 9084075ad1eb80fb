"""Save sets: what minimum cuts find is what trying every set finds, up to ties."""

import itertools
import random

import pytest
from ckptsolvers.mincut import Operation, save_sets

SIZES = (1, 100, 10_000)


def random_block(seed):
    """A few operations, each reading values made before it; value 0 is there from the start."""
    rng = random.Random(seed)
    num = rng.randint(2, 7)
    operations = [
        Operation(reads=tuple({rng.randint(0, i), rng.randint(0, i)}), makes=(i + 1,), time=rng.choice((0, 1, 50, 900)))
        for i in range(num)
    ]
    targets = sorted(rng.sample(range(1, num + 1), rng.randint(1, num)))
    return operations, targets, {v: rng.choice(SIZES) for v in range(1, num + 1) if rng.random() < 0.8}


def work(operations, targets, saved):
    """Time of all operations that lead to the targets."""
    maker = {v: op for op in operations for v in op.makes}
    needed, again = [v for v in targets if v not in saved], {}
    while needed:
        op = maker.get(needed.pop())
        if op is not None and op.makes not in again:
            again[op.makes] = op.time
            needed += [v for v in op.reads if v not in saved]
    return sum(again.values())


@pytest.mark.parametrize("seed", range(40))
def test_the_corners_of_the_hull_are_those_of_all_sets(seed):
    operations, targets, sizes = random_block(seed)
    every = [
        (sum(sizes[v] for v in saved), work(operations, targets, saved))
        for num in range(len(sizes) + 1)
        for saved in itertools.combinations(sizes, num)
    ]
    found = save_sets(operations, targets=targets, save_bytes=sizes)
    points = [(sum(sizes[v] for v in saved), work(operations, targets, saved)) for saved in found]
    assert points[0][0] == 0 and points[-1] == min(every, key=lambda p: (p[1], p[0]))
    # No set lies below the line through two neighbours.
    for (left, slow), (right, fast) in itertools.pairwise(points):
        for size, time in every:
            assert (time - slow) * (right - left) >= (fast - slow) * (size - left)


def test_equal_blocks_get_equal_sets():
    operations, targets, sizes = random_block(3)
    assert len({save_sets(operations, targets=targets, save_bytes=sizes) for _ in range(3)}) == 1


def points_of(operations, targets, sizes, found):
    return [(sum(sizes[v] for v in saved), work(operations, targets, saved)) for saved in found]


def test_sets_on_one_line_are_found_between_its_ends():
    # Products of one depth: every saved byte is worth the same time.
    sizes = dict(enumerate((100, 100, 50, 400, 50, 800), start=1))
    operations = [Operation(reads=(0,), makes=(v,), time=7 * size) for v, size in sizes.items()]
    hull = save_sets(operations, targets=list(sizes), save_bytes=sizes)
    assert [len(saved) for saved in hull] == [0, len(sizes)]
    found = save_sets(operations, targets=list(sizes), save_bytes=sizes, max_between=1000)
    points = points_of(operations, list(sizes), sizes, found)
    assert all(time == 7 * (1500 - size) for size, time in points)
    assert max(b - a for (a, _), (b, _) in itertools.pairwise(points)) <= 100


@pytest.mark.parametrize("seed", range(40))
def test_sets_between_hold_the_hull_and_none_of_the_others_is_beaten(seed):
    operations, targets, sizes = random_block(seed)
    hull = save_sets(operations, targets=targets, save_bytes=sizes)
    found = save_sets(operations, targets=targets, save_bytes=sizes, max_between=1000)
    assert set(hull) <= set(found)
    points = points_of(operations, targets, sizes, found)
    others = {p for p, saved in zip(points, found, strict=True) if saved not in hull}
    assert not any(a != b and a[0] <= b[0] and a[1] <= b[1] for a in points for b in others)


def test_an_early_set_saves_what_the_costly_operation_made():
    product, shifted = Operation(reads=(0,), makes=(1,), time=900), Operation(reads=(1,), makes=(2,), time=0)
    cut = {"targets": (2,), "save_bytes": {1: 100, 2: 100}}
    assert save_sets([product, shifted], **cut)[-1] == {2}
    assert save_sets([product, shifted], is_early=True, **cut)[-1] == {1}
