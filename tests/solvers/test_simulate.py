"""The judge itself: it must refuse step lists that are broken, and count what a slow second count counts."""

from typing import Any

import pytest
from ckptsolvers import InvalidScheduleError, Judgement, Keep, Schedule, chain, region, simulate
from ckptsolvers.brute import all_schedules
from ckptsolvers.schedule import Step
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems

PROBLEM = chain([1] * 4, [1] * 4, options=[[(1, 0)]] * 4)
TREE = Schedule((region((Keep(0, 0), Keep(1, 0))), Keep(2, 0), Keep(3, 0)))


class Fixed:
    """A schedule whose flat list is given instead of derived."""

    def __init__(self, steps):
        self.given = steps

    def steps(self, problem):
        return iter(self.given)


def replay(steps) -> Judgement:
    fixed: Any = Fixed(steps)
    return simulate(PROBLEM, fixed)


def test_the_unbroken_list_is_accepted():
    assert replay(list(TREE.steps(PROBLEM))) == simulate(PROBLEM, TREE)


def test_every_deletion_of_a_forward_or_backward_is_refused():
    steps = list(TREE.steps(PROBLEM))
    for i in range(len(steps)):
        if steps[i].kind != "drop":
            with pytest.raises(InvalidScheduleError):
                replay((*steps[:i], *steps[i + 1 :]))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.insert(0, s.pop()),  # a backward first
        lambda s: s.insert(0, Step("drop", values=(0,))),  # drops what was never made
        lambda s: s.insert(1, Step("drop", values=(0,))),  # drops what the next forward reads
        lambda s: s.pop(),  # the last backward never runs
        lambda s: s.append(s[-1]),  # a backward runs twice
        lambda s: s.append(Step("forward", 0, None, 4)),  # something is still held at the end
        lambda s: s.__setitem__(-1, Step("backward", 0, None)),  # no option
        lambda s: s.__setitem__(0, Step("forward", 3, None, 4)),  # its input is not there
    ],
)
def test_broken_lists_are_refused(change):
    steps = list(TREE.steps(PROBLEM))
    change(steps)
    with pytest.raises(InvalidScheduleError):
        replay(steps)


@pytest.mark.parametrize(
    "nodes",
    [
        (Keep(0, 0), Keep(1, 0), Keep(2, 0)),  # the last block is missing
        (Keep(0, 0), Keep(2, 0), Keep(1, 0), Keep(3, 0)),  # out of order
        (Keep(0, 0), Keep(1, 0), Keep(2, 0), Keep(3, 1)),  # no such option
        (Keep(0, 0), Keep(1, 0), Keep(2, 0), Keep(3, 0), Keep(4, 0)),  # one too many
    ],
)
def test_trees_that_do_not_fit_the_problem_are_refused(nodes):
    with pytest.raises(InvalidScheduleError):
        simulate(PROBLEM, Schedule(nodes))


def test_counts_by_hand():
    # Two blocks recomputed: at the peak values 1 and 2 are held, with the interiors of blocks 2 and 3 and value 3.
    judged = simulate(PROBLEM, TREE)
    assert judged.num_forwards == (2, 2, 1, 1)
    assert judged.extra_work == judged.work - 4 == 2
    assert (judged.peak_bytes, judged.peak_block, judged.peak_phase) == (5, 3, "forward")


@settings(max_examples=60)
@given(problems(max_blocks=3), st.randoms(use_true_random=False))
def test_a_slow_recount_agrees(problem, random):
    """Recount peak and work from the flat list with nothing but sets, at every step anew."""
    schedule = random.choice(list(all_schedules(problem)))
    judged = simulate(problem, schedule)
    assert recount(problem, schedule) == (judged.peak_bytes, judged.work)


def recount(problem, schedule):
    held, saved, done, peak, work = set(), {}, problem.num_blocks, 0, 0
    for step in schedule.steps(problem):
        if step.kind == "drop":
            held -= set(step.values)
            continue
        block = problem.blocks[step.block]
        # Cotangents wait from the first backward that makes them to their maker's backward.
        waiting = [v for v in problem.values if v.read_by[-1] >= done and v.made_by < done]
        now = 0
        if step.kind == "backward":
            own = {problem.outputs[step.block][p] for p in block.options[step.option].saved_outputs}
            held -= own
            del saved[step.block]
            waiting = [v for v in waiting if v.made_by != step.block]
            now = block.options[step.option].backward_peak_bytes
            done, work = step.block, work + block.options[step.option].recompute_time
        runs = block if step.option is None else block.options[step.option]
        wanted = problem.num_wanted(step.block, step.until)
        if step.kind == "forward":
            now = runs.forward_peak_bytes
            work += runs.forward_times[wanted]
        now += sum(problem.values[v].size_bytes for v in held) + sum(saved.values())
        peak = max(peak, now + sum(v.cotangent_bytes for v in waiting))
        if step.kind == "forward":
            held |= set(problem.outputs[step.block][:wanted])
            if step.option is not None:
                saved[step.block] = runs.saved_bytes
                held |= {problem.outputs[step.block][p] for p in runs.saved_outputs}
    return peak, work
