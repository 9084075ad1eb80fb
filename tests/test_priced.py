"""Prices of bytes on the host: what the chain table finds at them, against every schedule there is."""

import random
import statistics

import pytest
from ckptsolvers import Block, Keep, Option, Problem, Schedule, Value, simulate
from ckptsolvers.brute import all_schedules

from jaxckpt.model.priced import on_device, priced
from jaxckpt.search.candidates import candidates


def drawn(seed):
    """A chain of blocks, each of which saves everything, sends it to the host, or makes it again."""
    draw = random.Random(seed)
    n = 3
    sizes, times = ([draw.randint(1, 3) for _ in range(n)] for _ in range(2))
    blocks = []
    for k in range(n):
        saved, time, again = draw.randint(1, 3), times[k], draw.randint(1, 3)
        idle = max(0, saved - time) * draw.randint(0, 1)
        common = {"forward_times": (time, time), "forward_peak_bytes": sizes[k]}
        options = [
            Option(name="nothing", saved_bytes=0, recompute_time=again, backward_peak_bytes=saved, **common),
            Option(
                name="host", saved_bytes=0, recompute_time=idle, backward_peak_bytes=saved, host_bytes=saved, **common
            ),
            Option(name="everything", saved_bytes=saved, recompute_time=0, backward_peak_bytes=saved, **common),
        ]
        blocks.append(Block(forward_times=(0, time), forward_peak_bytes=sizes[k], options=tuple(options)))
    values = [Value(size_bytes=sizes[k], made_by=k, read_by=(k + 1,), cotangent_bytes=0) for k in range(n)]
    return Problem(blocks=tuple(blocks), values=tuple(values))


def least_work(judged, peak, host):
    return min((j.work for j in judged if j.peak_bytes <= peak and j.host_bytes <= host), default=None)


def test_the_judge_counts_what_is_held_on_the_host_at_once():
    problem = drawn(0)
    options = [option.host_bytes for block in problem.blocks for option in block.options if option.host_bytes]
    sent = Schedule(tuple(Keep(k, 1) for k in range(problem.num_blocks)))
    assert simulate(problem, sent).host_bytes == sum(options)
    assert simulate(problem, Schedule(tuple(Keep(k, 2) for k in range(problem.num_blocks)))).host_bytes == 0


def test_prices_find_nearly_what_every_schedule_there_is_has():
    ratios = []
    for seed in range(16):
        problem = drawn(seed)
        everything = [simulate(problem, schedule) for schedule in all_schedules(problem)]
        for host in sorted({j.host_bytes for j in everything}):
            found, _ = candidates([problem], "auto", (), host)
            judged = [c.judgement for c in found]
            assert all(j.host_bytes <= host for j in judged)
            for peak in sorted({j.peak_bytes for j in everything}):
                best, ours = least_work(everything, peak, host), least_work(judged, peak, host)
                assert (best is None) == (ours is None)
                if best is not None:
                    assert ours >= best
                    ratios.append(ours / best)
    assert statistics.mean(ratios) < 1.02


@pytest.mark.parametrize("seed", range(4))
def test_without_room_on_the_host_it_is_the_problem_of_the_device(seed):
    problem = drawn(seed)
    plain, _ = candidates([problem], "auto")
    assert [c.schedule for c in candidates([problem], "auto", (), 0)[0]] == [c.schedule for c in plain]
    assert all(not c.judgement.host_bytes for c in plain)
    device = on_device(problem)
    assert on_device(on_device(problem)) == device and not priced(problem, 0)
