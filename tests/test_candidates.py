"""Which of a solver's schedules are worth a compile."""

import pytest
from ckptsolvers import Block, Option, Problem
from ckptsolvers.solve import SOLVERS

from jaxckpt.errors import OptionError
from jaxckpt.search.candidates import candidates, check_solver


def option(saved_bytes, recompute_time):
    return Option(
        name=str(saved_bytes),
        saved_bytes=saved_bytes,
        recompute_time=recompute_time,
        forward_times=(10**6,),
        forward_peak_bytes=0,
        backward_peak_bytes=saved_bytes,
    )


def peaks(*options):
    """Of the candidates for one block with these options."""
    block = Block(forward_times=(10**6,), forward_peak_bytes=0, options=tuple(option(*o) for o in options))
    best, _ = candidates([Problem(blocks=(block,), values=())], "auto")
    return [c.judgement.peak_bytes for c in best]


def test_a_candidate_with_fewer_bytes_and_hardly_more_work_stays():
    assert peaks((10_000, 500_000), (50_000, 1_000), (50_100, 500), (90_000, 0)) == [10_000, 50_000, 50_100, 90_000]


def test_of_candidates_close_together_those_that_save_work_stay():
    assert peaks((10_000, 500_000), (50_000, 90_000), (50_100, 500), (90_000, 0)) == [10_000, 50_100, 90_000]


def test_a_solver_of_the_package_is_known_by_its_name():
    with pytest.raises(OptionError, match="write one of auto, chain, chen, revolve, lower_sets, ilp, or a function"):
        check_solver("brute_force")
    for name in {*SOLVERS, "auto"} - {"brute_force"}:
        check_solver(name)
