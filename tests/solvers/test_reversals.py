"""Multistage and online checkpointing of time-stepping loops."""

from math import comb

import pytest
from ckptsolvers import InvalidProblemError
from ckptsolvers.multistage import multistage_actions, num_slow_accesses
from ckptsolvers.online import OnlineCheckpoints, num_online_forwards
from ckptsolvers.revolve import num_forwards
from hypothesis import given
from hypothesis import strategies as st
from strategies import replay


@given(st.integers(1, 50), st.integers(1, 8))
def test_online_checkpoints_reverse_the_loop(num_steps, num_states):
    online = OnlineCheckpoints(num_states)
    actions = [action for _ in range(num_steps - 1) for action in online.advance()]
    if num_steps == 1:
        actions = list(online.advance())[:1]
        online = OnlineCheckpoints(num_states)
    replay([*actions, *online.reverse()], num_steps, num_states)


@pytest.mark.parametrize("num_states", range(1, 10))
def test_online_is_optimal_while_no_step_runs_more_than_twice(num_states):
    for num_steps in range(1, comb(num_states + 2, 2) + 1):
        assert num_online_forwards(num_steps, num_states) == num_forwards(num_steps, num_states)


@pytest.mark.parametrize("num_states", [2, 3, 5, 8])
def test_online_stays_within_a_fifth_of_the_optimum(num_states):
    for num_steps in range(1, comb(num_states + 4, 4), 7):
        optimum = num_forwards(num_steps, num_states)
        assert optimum <= num_online_forwards(num_steps, num_states) <= 1.2 * optimum


def test_multistage_uses_fast_memory_for_the_busiest_slots():
    staged = list(multistage_actions(40, 2, 3))
    in_fast = in_slow = 0
    for one in staged:
        change = {"store": 1, "drop": -1}.get(one.action.kind, 0)
        in_fast += change * one.is_fast
        in_slow += change * (one.slot is not None and not one.is_fast)
        assert in_fast <= 2 and in_slow <= 3
    accesses = [num_slow_accesses(40, fast, 5 - fast) for fast in range(6)]
    assert accesses == sorted(accesses, reverse=True) and accesses[-1] == 0
    advances = sum(s.action.stop - s.action.step for s in staged if s.action.kind == "advance")
    assert advances == num_forwards(40, 5)


def test_bad_counts_are_refused():
    with pytest.raises(InvalidProblemError, match="num_states=0"):
        OnlineCheckpoints(0)
    with pytest.raises(InvalidProblemError, match="must not be negative"):
        list(multistage_actions(3, -1, 2))
    with pytest.raises(InvalidProblemError, match="num_steps=0"):
        num_forwards(0, 1)
