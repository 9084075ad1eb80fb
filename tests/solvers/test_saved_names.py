"""Which names to save: every choice judged, branch and bound, and problems made smaller."""

import itertools
import math

import pytest
from ckptsolvers.errors import InvalidProblemError
from ckptsolvers.names import (
    NamedValue,
    NameProblem,
    all_name_choices,
    judge_names,
    name_bytes,
    needed_names,
    simplified,
    solve_names,
)
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def problems(draw, most_names=4):
    """Parts that earlier ones read, now and then in a circle, with names between them."""
    num_names = draw(st.integers(1, most_names))
    num_parts = draw(st.integers(2, 9))
    name_of = [-1, *(draw(st.integers(-1, num_names - 1)) for _ in range(num_parts - 1))]
    readers = [()]
    for part in range(1, num_parts):
        parts = st.integers(0, part - 1) if draw(st.integers(0, 5)) else st.integers(0, num_parts - 1)
        readers.append(tuple((p, name_of[p]) for p in draw(st.lists(parts, min_size=1, max_size=3))))
    sizes = st.integers(0, 20)
    values = [
        NamedValue(part=part, name=name, size_bytes=draw(st.integers(1, 20)))
        for part, name in enumerate(name_of)
        if name >= 0
    ]
    return NameProblem(
        names=tuple(f"name{i}" for i in range(num_names)),
        readers=tuple(readers),
        work=tuple(draw(sizes) for _ in range(num_parts)),
        held_bytes=tuple(draw(sizes) for _ in range(num_parts)),
        values=tuple(values),
    )


# y = f(x), named 0; z = g(y), named 1; the derivative needs both names' values.
CHAIN = NameProblem(
    names=("y", "z"),
    readers=((), ((0, -1),), ((1, 0), (3, 1)), ((0, -1),), ((2, -1),)),
    work=(100, 0, 7, 0, 1),
    held_bytes=(0, 0, 0, 0, 3),
    values=(NamedValue(part=1, name=0, size_bytes=10), NamedValue(part=3, name=1, size_bytes=20)),
)


def test_a_saved_value_cuts_what_leads_to_it():
    assert judge_names(CHAIN, ()).work == 108
    both = judge_names(CHAIN, (0, 1))
    assert (both.work, both.held_bytes) == (100, 30) and name_bytes(CHAIN, both) == [10, 20]
    assert [c.saved for c in all_name_choices(CHAIN)] == [(0, 1), (), (0,), (1,)]
    assert needed_names(CHAIN) == {0, 1}


def test_a_restricted_problem_saves_nothing_else():
    alone = CHAIN.restricted(["z"])
    assert alone.names == ("z",) and {c.work for c in all_name_choices(alone)} == {108}


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_smaller_problem_has_the_same_choices(problem):
    small = simplified(problem)
    for n in range(len(problem.names) + 1):
        for saved in itertools.combinations(range(len(problem.names)), n):
            assert judge_names(small, saved) == judge_names(problem, saved)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 80))
def test_branch_and_bound_finds_the_least_work(problem, most_bytes):
    answer = solve_names(problem, most_bytes=most_bytes)
    best = next((c for c in all_name_choices(problem) if c.held_bytes <= most_bytes), None)
    if best is None:
        assert answer.choice is None and answer.bound_work == math.inf
        return
    assert answer.choice is not None and answer.choice.held_bytes <= most_bytes
    assert answer.choice.work == best.work
    assert best.work - 1e-3 * max(1, best.work) <= answer.bound_work <= best.work


@settings(max_examples=40, deadline=None)
@given(problems())
def test_choices_that_are_left_out_do_not_come_back(problem):
    wanted = {c.saved for c in all_name_choices(problem)}
    found = set()
    while (choice := solve_names(problem, most_bytes=10**6, without=found).choice) is not None:
        assert choice.saved not in found
        found.add(choice.saved)
    assert found == wanted


def test_parts_that_are_not_there_are_refused():
    with pytest.raises(InvalidProblemError):
        NameProblem(names=("a",), readers=((), ((5, -1),)), work=(1, 1), held_bytes=(0, 0), values=())
    with pytest.raises(InvalidProblemError):
        NameProblem(names=("a",), readers=((), ((0, 0),)), work=(1, 1), held_bytes=(0, 0), values=())
    with pytest.raises(InvalidProblemError):
        NameProblem(names=(), readers=(), work=(), held_bytes=(), values=())
