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
