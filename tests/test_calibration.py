"""Calibration: what was measured once makes the next plan quicker, and a plan depends on its record alone."""

import dataclasses
import functools
import itertools
import json
import random
import time

import jax
import mutations
import pytest
from helpers import analysed
from zoo.models import chain_args, chain_loss, residual_args, residual_loss, unet_args, unet_loss

import jaxckpt
from jaxckpt import Calibration, PlanFileError
from jaxckpt.program.trace import trace
from jaxckpt.search import analysis
from jaxckpt.search.budget_search import BudgetSearch
from jaxckpt.search.calibration import Sample, family_of, remembered
from jaxckpt.search.surrogate import Surrogate

UNET = unet_args(levels=5)
PROGRAM = "0123456789abcdef0123"


def record(*samples):
    return Calibration(target="cpu", jaxlib_version="1", family="f").with_samples(samples)


def sample(fraction, ratio, program=PROGRAM):
    return Sample(program=program[:16], fraction=fraction, ratio=ratio)


def kept(tmp_path):
    return sorted((tmp_path / "jaxckpt" / "calibration").glob("*.json"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    analysis._ANALYSES.clear()


def test_later_plans_take_no_compile_to_search_and_carry_the_hash():
    record_of = functools.partial(remembered, trace(unet_loss, UNET).program, None)
    first = jaxckpt.plan(unet_loss, *UNET, budget="65%")
    assert first.calibration is None
    found = record_of()
    second = jaxckpt.plan(unet_loss, *UNET, budget="65%")
    assert second.calibration == found.hash
    assert second.num_compiles <= first.num_compiles
    # It may have learnt more: with a record that says it all, the program without a plan and the plan are compiled.
    assert jaxckpt.plan(unet_loss, *UNET, budget="65%").num_compiles == 2
    assert second.measured_peak_bytes <= second.budget_bytes
    assert second.calibration in str(second) and "calibrated" not in str(first)


def test_the_same_record_gives_the_same_plan_whatever_is_on_disk():
    found = record(sample(0.3, 1.1, "other"), sample(0.8, 0.9, "other"))
    one = jaxckpt.plan(unet_loss, *UNET, budget="60%", calibration=found)
    analysis._ANALYSES.clear()
    jaxckpt.plan(unet_loss, *UNET, budget="75%")
    two = jaxckpt.plan(unet_loss, *UNET, budget="60%", calibration=found)
    assert json.dumps(one.to_json()) == json.dumps(two.to_json())
    assert one.calibration == found.hash


def test_none_neither_reads_nor_writes(tmp_path):
    plan = jaxckpt.plan(unet_loss, *UNET, budget="60%", calibration=None)
    assert plan.calibration is None and not kept(tmp_path)
    jaxckpt.plan(unet_loss, *UNET, budget="60%")
    assert len(kept(tmp_path)) == 1
    assert jaxckpt.plan(unet_loss, *UNET, budget="60%", calibration=None) == plan


def test_an_equal_plan_leaves_the_record_as_it_is(tmp_path):
    jaxckpt.plan(unet_loss, *UNET, budget="60%")
    jaxckpt.plan(unet_loss, *UNET, budget="60%")
    (path,) = kept(tmp_path)
    before = path.read_text()
    jaxckpt.plan(unet_loss, *UNET, budget="60%")
    assert path.read_text() == before


def test_a_program_that_was_measured_is_predicted_better_without_a_compile():
    measured = jaxckpt.plan(unet_loss, *UNET, budget="70%")
    blind = jaxckpt.plan(unet_loss, *UNET, budget=measured.budget_bytes, verify=False, calibration=None)
    told = jaxckpt.plan(unet_loss, *UNET, budget=measured.budget_bytes, verify=False)

    def error(plan):
        return abs(jaxckpt.measure(plan.apply(unet_loss), *UNET).device_bytes / plan.predicted_peak_bytes - 1)

    assert error(told) < error(blind) and told.calibration


def test_sizes_and_depth_do_not_change_the_family_but_operations_do():
    def family(fun, args):
        return family_of(trace(fun, args).program)

    small, large = (residual_args(layers=n, rows=16 * n, width=4 * n) for n in (2, 5))
    assert family(residual_loss, small) == family(residual_loss, large)
    assert family(chain_loss, chain_args()) != family(residual_loss, small)
    halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), small)
    assert family(residual_loss, halves) != family(residual_loss, small)


def test_a_programs_own_samples_are_interpolated_and_others_averaged():
    own = record(sample(0.2, 1.2), sample(0.4, 1.0), sample(0.3, 9.0, "another"))
    # Between two plans what they hold beyond their predictions is interpolated, in bytes.
    assert own.ratio(PROGRAM, 0.3) == pytest.approx(1 + 0.02 / 0.3)
    assert own.ratio(PROGRAM, 0.9) == 1.0
    assert record(sample(0.4, 1.1)).ratio(PROGRAM, 0.8) == pytest.approx(1.05)
    assert record(sample(0.4, 1.1)).ratio(PROGRAM, 0.1) == pytest.approx(1.13)
    assert own.spread(PROGRAM) == 0
    others = record(sample(0.2, 1.3, "a"), sample(0.2, 1.1, "b"))
    assert 1.1 < others.ratio(PROGRAM, 0.5) < 1.3
    assert 0 < others.spread(PROGRAM) <= 0.05
    assert record().ratio(PROGRAM, 0.5) == 1.0


def test_a_new_sample_takes_the_place_of_its_near_ones():
    found = record(sample(0.2, 1.2), sample(0.5, 1.1)).with_samples([sample(0.2001, 1.5), sample(0.7, 0.0)])
    assert found.samples == (sample(0.5, 1.1), sample(0.2001, 1.5))


def test_a_record_survives_a_file_and_damage_is_refused(tmp_path):
    found = record(sample(0.2, 1.2))
    path = tmp_path / "record.json"
    found.save(path)
    assert Calibration.load(path) == found and Calibration.load(path).hash == found.hash
    assert dataclasses.replace(found, target="h100").hash != found.hash
    for text in ("", "{}", path.read_text()[:-40], path.read_text().replace("1.2", "-1"), "[1]"):
        path.write_text(text)
        with pytest.raises(PlanFileError, match="calibration record"):
            Calibration.load(path)


def ratio_damaged(data, rng):
    one = rng.choice(data["samples"])
    name = rng.choice(["ratio", "fraction", "kind", "program"])
    one[name] = {"program": "0" * 16, "kind": 3}.get(name, one["ratio"] * rng.choice([0.5, 1.1, 10.0]))
    return data


@pytest.mark.parametrize("num", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_a_mutated_record_is_refused_or_the_same(tmp_path, num):
    rng, path = random.Random(1931), tmp_path / "record.json"
    found = record(*(sample(0.1 * i, 1 + 0.01 * i) for i in range(1, 9)))
    refused, slowest = 0, 0.0
    for i in range(num):
        path.write_bytes(mutations.damaged(found.to_text().encode(), rng, ratio_damaged))
        started = time.perf_counter()
        try:
            assert Calibration.load(path) == found, f"mutation {i} is another record"
        except PlanFileError as error:
            assert str(path) in str(error)
            refused += 1
        slowest = max(slowest, time.perf_counter() - started)
    print(f"{num} mutated records: {refused} refused, {num - refused} the same, slowest {slowest:.3f} s")
    assert slowest < 1 and num / 2 < refused <= num


def test_a_damaged_record_on_disk_is_begun_again(tmp_path, caplog):
    jaxckpt.plan(unet_loss, *UNET, budget="60%")
    (path,) = kept(tmp_path)
    path.write_text("nonsense")
    plan = jaxckpt.plan(unet_loss, *UNET, budget="60%")
    assert plan.calibration is None and "begun again" in caplog.text
    assert Calibration.load(path).samples


def test_what_is_no_record_is_refused():
    with pytest.raises(jaxckpt.OptionError, match=r"Calibration\.load"):
        jaxckpt.plan(unet_loss, *UNET, budget="60%", calibration="record.json")


def climbed(ratios, budget, **options):
    """A search over 100 candidates, 100 to 1000 bytes, whose measured bytes are off by these ratios."""
    predicted = [100 + 9 * i for i in range(101)]
    costs = [(1000 - p) / 3000 for p in predicted]
    search = BudgetSearch(Surrogate(0, **options), predicted, costs, lambda i: int(predicted[i] * ratios(predicted[i])))
    return search, search.cheapest(budget)


def test_room_is_left_for_what_is_missed():
    unknown = Surrogate(100, unplanned_bytes=1000)
    # A share of what is predicted, and buffers as large for every plan.
    assert unknown.at_most(500, 0) == pytest.approx(100 + 1.03 * 500 + 40)
    assert unknown.at_most(100, 0) == pytest.approx(100 + 1.03 * 100 + 40)
    known = Surrogate(100, unplanned_bytes=1000, before=[(0, 500, 550.0)])
    assert known.at_most(500, 0) == pytest.approx(100 + 1.03 * 550)
    # The farther away, the more; a plan of another kind says nothing of what is missed.
    over = [known.at_most(p, 0) / known.mean(p, 0) for p in (500, 450, 400, 300)]
    assert over == sorted(over) and over[0] < over[-1]
    assert known.at_most(500, 1) > known.mean(500, 1) + 40


def test_that_a_large_plan_takes_less_than_predicted_says_nothing_of_smaller_ones():
    known = Surrogate(0, unplanned_bytes=1000, before=[(0, 500, 400.0)])
    assert known.mean(200, 0) < 200 < known.at_most(200, 0)
    assert known.at_most(600, 0) < 600


@pytest.mark.parametrize("budget", [150, 300, 500, 800])
@pytest.mark.parametrize("slope", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("level", [0.8, 1.0, 1.3])
def test_a_smooth_error_takes_three_compiles_at_most(budget, slope, level):
    search, chosen = climbed(lambda p: level + slope * (p - 100) / 900, budget)
    if chosen is not None:
        used = search.known[chosen] / budget
        assert used <= 1 and (used >= 0.9 or chosen == 100 or search.known[chosen + 1] > budget)
        # More where measured bytes hardly grow with predicted ones, while each still saves half a percent of the step.
        late = [search.costs[i] for i in search.known][2:]
        assert len(late) <= 1 or (level + slope <= 0.5 and len(late) <= 4)
        assert all(after <= before - 0.005 for before, after in itertools.pairwise(late))


def test_what_is_known_already_is_where_the_climb_begins():
    search, _ = climbed(lambda p: 1.0, 105)
    assert search.known == {0: 100}
    search.measured(100)
    assert search.cheapest(104) == 0 and set(search.known) == {0, 100}


def test_what_is_expected_saves_compiles():
    def ratios(p):
        return 1.4 - 0.4 * p / 1000

    blind, _ = climbed(ratios, 600)
    told, chosen = climbed(ratios, 600, prior_ratio=ratios)
    assert len(told.known) == 1 < len(blind.known)
    assert told.known[chosen] >= 0.9 * 600


def test_a_family_that_disagrees_leaves_room():
    unsure, _ = climbed(lambda p: 1.0, 600, spread=0.05)
    sure, _ = climbed(lambda p: 1.0, 600)
    first = lambda search: next(iter(search.known.values()))  # noqa: E731
    assert first(unsure) <= 600 / 1.05 < first(sure)


def test_bytes_that_fall_where_more_is_predicted_are_found():
    """As where a plan's real peak stands elsewhere: from the 20th on, all take 30 bytes less than the 19th."""
    predicted = [100 + i for i in range(101)]
    costs = [2.0 - 0.09 * i if i < 20 else 0.2 - 0.001 * i for i in range(101)]
    search = BudgetSearch(Surrogate(0), predicted, costs, lambda i: predicted[i] - 35 * (i >= 20))
    chosen = search.cheapest(115)
    assert chosen is not None and chosen >= 20 and search.known[chosen] <= 115
    assert len(search.known) <= 6


def two_kinds(offsets, budget, **options):
    """A search over two kinds of 60 candidates, the second a little better by what is predicted."""
    rows = sorted((100 + 10 * i + 2 * (not kind), 0.6 - 0.01 * i, kind) for i in range(60) for kind in (0, 1))
    predicted, costs, kinds = zip(*rows, strict=True)
    measure = lambda i: predicted[i] + offsets[kinds[i]]  # noqa: E731
    search = BudgetSearch(Surrogate(0, **options), predicted, costs, measure, kinds=kinds)
    return search, search.cheapest(budget)


@pytest.mark.parametrize("offsets", [(0, 60), (60, 0), (60, 60), (0, 0)])
def test_the_kind_that_takes_less_than_the_other_is_found(offsets):
    search, chosen = two_kinds(offsets, 405)
    least = min(
        cost for i, cost in enumerate(search.costs) if search.predicted_bytes[i] + offsets[search.kinds[i]] <= 405
    )
    assert search.costs[chosen] <= least + 0.011
    assert len(search.known) <= 4


def test_what_a_record_knows_of_each_kind_saves_compiles():
    before = [(0, 392, 392), (1, 390, 450)]
    search, chosen = two_kinds((0, 60), 405, before=before)
    assert next(iter(search.known)) == chosen and search.kinds[chosen] == 0 and len(search.known) <= 2
    assert search.known[chosen] >= 0.97 * 405


def test_every_candidate_is_predicted_as_it_was_measured():
    found = analysed(unet_loss, *UNET)
    peaks = [c.judgement.peak_bytes for c in found.candidates]
    search = BudgetSearch(Surrogate(0), peaks, [0.0] * len(peaks), lambda i: 2 * peaks[i] + i)
    for i in (3, 7, 5):
        search.measured(i)
    assert [search.corrected(i) for i in (3, 5, 7)] == pytest.approx([2 * peaks[i] + i for i in (3, 5, 7)])
