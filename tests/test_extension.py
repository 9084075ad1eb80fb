"""The package extended from outside, each time in one place: a kind of block, a solver, a chip, a compiler.

Written as somebody would who has the package installed and its documentation, docs/extending.md.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import ckptsolvers
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, count, jit
from jax.extend.core import primitives as prims
from zoo.models import chain_args, chain_loss

import jaxckpt
from jaxckpt.compilation.files import with_digest
from jaxckpt.compilation.records import Record
from jaxckpt.kinds import base
from jaxckpt.kinds.plain import analyse_block
from jaxckpt.model.option import BlockAnalysis, Save, Work
from jaxckpt.program.interpret import evaluate
from jaxckpt.targets import chip, registry
from jaxckpt.targets.cpu import CpuCompiler


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """No test sees what another one registered."""
    monkeypatch.setattr(base, "_REGISTERED", [])
    monkeypatch.setattr(chip, "_DEFINED", {})
    monkeypatch.setattr(registry, "_REGISTERED", {})


# A kind of block: a sort, which is either left to JAX or done once more, with nothing between.


@dataclass(frozen=True, slots=True)
class SortAgain(Save):
    """The block sorts once more in its backward."""

    kind: ClassVar[str] = "sort"
    reason: str


class SortRecord(Record):
    """What a plan file says of a sort."""

    reason: str


class Sort:
    """Blocks that end with a sort."""

    name = SortAgain.kind
    schema = SortRecord

    def matches(self, eqn: Any, is_active: bool) -> bool:
        return is_active and eqn.primitive is prims.sort_p

    def analyse(self, local: Any, analyser: Any) -> BlockAnalysis:
        analysis, *_ = analyse_block(local, analyser)
        *others, left = analysis.options
        nothing = next(option for option in others if not option.save.named_values)
        again = replace(nothing, name="sort again", save=SortAgain("it is cheap"), recompute=Work())
        return replace(analysis, options=(again, left))

    def run(self, block: Any) -> None:
        block.checkpointed(functools.partial(evaluate, block.equations))

    def to_json(self, save: SortAgain) -> dict[str, Any]:
        return {"reason": save.reason}

    def from_json(self, data: dict[str, Any]) -> SortAgain:
        return SortAgain(data["reason"])

    def check(self, save: SortAgain, equations: Any, where: str) -> None:
        if equations[-1].primitive is not prims.sort_p:
            raise ValueError(f"{where}: the block ends with no sort")

    def describe(self, save: SortAgain) -> Iterator[str]:
        yield f"sorts again, since {save.reason}"

    def held(self, eqn: Any) -> str:
        return "a sorted copy"


def sorting_loss(w, x):
    for _ in range(4):
        x = jnp.sort(jnp.tanh(x @ w), axis=-1)
    return jnp.sum(x**2)


SORTED = jnp.eye(32) * 0.9, jnp.linspace(-1, 1, 512 * 32).reshape(512, 32)


def kinds_of(plan):
    return {save.kind for save in plan.block_saves}


def test_a_kind_of_block(tmp_path):
    plain = jaxckpt.plan(sorting_loss, *SORTED, budget="70%", cost="flops")
    jaxckpt.register_kind(Sort())
    plan = jaxckpt.plan(sorting_loss, *SORTED, budget="70%", cost="flops")
    assert "sort" in kinds_of(plan) - kinds_of(plain), "its options are chosen, and an earlier analysis is not reused"
    assert 0 < plan.measured_peak_bytes <= plan.budget_bytes
    assert "sorts again, since it is cheap" in str(plan)
    sorts = [count(jax.grad(fun), *SORTED)["sort"] for fun in (sorting_loss, plan.apply(sorting_loss))]
    assert sorts[1] > sorts[0]
    got, wanted = (jit(jax.grad(fun))(*SORTED) for fun in (plan.apply(sorting_loss), sorting_loss))
    assert_close(got, wanted, 1e-5)
    plan.save(tmp_path / "plan.json")
    assert jaxckpt.Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_with_a_kind_that_is_not_there_is_refused_by_its_name(tmp_path, monkeypatch):
    jaxckpt.register_kind(Sort())
    jaxckpt.plan(sorting_loss, *SORTED, budget="70%", cost="flops", verify=False).save(tmp_path / "plan.json")
    monkeypatch.setattr(base, "_REGISTERED", [])
    with pytest.raises(jaxckpt.PlanFileError, match=r"plan\.json has a block of kind 'sort', .*register_kind"):
        jaxckpt.Plan.load(tmp_path / "plan.json")


def test_a_kinds_own_schema_and_meaning_are_checked():
    jaxckpt.register_kind(Sort())
    plan = jaxckpt.plan(sorting_loss, *SORTED, budget="70%", cost="flops", verify=False)
    k = next(k for k, save in enumerate(plan.block_saves) if save.kind == "sort")
    data = plan.to_json()
    data["block_saves"][k]["reason"] = 3
    with pytest.raises(jaxckpt.PlanFileError, match=rf"block_saves\[{k}\]\.reason: input should be a valid string"):
        jaxckpt.Plan.from_json(with_digest(data))
    other = next(k for k, save in enumerate(plan.block_saves) if save.kind != "sort")
    saves = tuple(plan.block_saves[k] if i == other else save for i, save in enumerate(plan.block_saves))
    with pytest.raises(jaxckpt.PlanFileError, match=rf"block_saves\[{other}\]: the block ends with no sort"):
        replace(plan, block_saves=saves).apply(sorting_loss)(*SORTED)


def test_a_kind_is_registered_once():
    jaxckpt.register_kind(Sort())
    with pytest.raises(jaxckpt.OptionError, match="'sort' is there already"):
        jaxckpt.register_kind(Sort())


def test_the_decorator_plans_with_a_kind_that_was_registered_since(tmp_path):
    def saves():
        fun = jaxckpt.auto_remat(sorting_loss, budget="70%", cost="flops", verify=False, cache_dir=tmp_path)
        return count(jax.grad(fun), *SORTED)["sort"]

    before = saves()
    jaxckpt.register_kind(Sort())
    assert saves() != before


# A solver: recompute the first blocks, as many as it takes.


def first_blocks(problem: ckptsolvers.Problem, *, budget_bytes: int) -> ckptsolvers.Schedule:
    """Recompute blocks from the first on until the rest fits."""
    left = [ckptsolvers.Keep(k, len(block.options) - 1) for k, block in enumerate(problem.blocks)]
    for num in range(problem.num_blocks):
        region = [ckptsolvers.region(tuple(left[:num]))] if num else []
        schedule = ckptsolvers.Schedule((*region, *left[num:]))
        if ckptsolvers.simulate(problem, schedule).peak_bytes <= budget_bytes:
            return schedule
    raise ckptsolvers.InfeasibleError(budget_bytes, None, "first_blocks")


def test_a_solver():
    args = chain_args(layers=12)
    plan = jaxckpt.plan(chain_loss, *args, budget="80%", solver=first_blocks)
    assert plan.solver == "first_blocks" and 0 < plan.measured_peak_bytes <= plan.budget_bytes
    assert plan.schedule is not None and plan.schedule.num_regions == 1 and plan.schedule.nodes[0].start == 0
    got, wanted = (jit(jax.grad(fun))(*args) for fun in (plan.apply(chain_loss), chain_loss))
    assert_close(got, wanted, 1e-5)


# A chip, and a compiler with one rule of its own.


class SlowStacks(CpuCompiler):
    """The CPU's, but what a loop saves takes long to stack."""

    stacking_passes = 1_000


def scanned(ws, x):
    return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0] ** 2)


LOOP = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32), jax.ShapeDtypeStruct((1024, 64), jnp.float32)


def test_a_chip():
    mine = jaxckpt.define_target("my-chip", like="cpu", memory="1GB", bandwidth=1e9)
    assert mine.memory_bytes == 10**9
    plan = jaxckpt.plan(scanned, *LOOP, budget="50%", target="my-chip")
    assert plan.target == "my-chip" and 0 < plan.measured_peak_bytes <= plan.budget_bytes
    # A hundred times slower memory than the CPU's has, and the same products: moving bytes takes longer.
    assert plan.unplanned_cost > jaxckpt.plan(scanned, *LOOP, budget="50%", target="cpu").unplanned_cost


def test_a_compiler():
    jaxckpt.register_compiler("slow-stacks", SlowStacks())
    jaxckpt.define_target("my-chip", like="cpu", compiler="slow-stacks")
    own, cpu = (jaxckpt.plan(scanned, *LOOP, budget="100%", target=t, verify=False) for t in ("my-chip", "cpu"))
    # Where stacking takes long, a plan that stacks less is taken though everything fits.
    assert own.unplanned_cost > cpu.unplanned_cost
    assert own.schedule is not None and own.recompute_cost < 0


def test_compiles_in_a_process_of_their_own_know_them_all(monkeypatch):
    monkeypatch.setenv("JAXCKPT_ISOLATE", "1")
    jaxckpt.register_kind(Sort())
    jaxckpt.register_compiler("slow-stacks", SlowStacks())
    jaxckpt.define_target("my-chip", like="cpu", compiler="slow-stacks", memory="1GB")
    plan = jaxckpt.plan(sorting_loss, *SORTED, budget="70%", cost="flops", target="my-chip")
    assert "sort" in kinds_of(plan) and 0 < plan.measured_peak_bytes <= plan.budget_bytes
