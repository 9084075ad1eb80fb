"""Which of a function's own names to save: counted as it is traced, measured as it is pasted."""

import functools
import itertools
import json
import random
import time
import warnings

import jax
import jax.numpy as jnp
import pytest
from ckptsolvers.names import all_name_choices, judge_names
from helpers import assert_close, no_compiles
from jax.ad_checkpoint import checkpoint_name
from zoo import named

import jaxckpt
from jaxckpt import _compat
from jaxckpt.api.named import named_loss
from jaxckpt.cli import main
from jaxckpt.program.flops import gradient_cost
from jaxckpt.result.names import Names

save_only = jax.checkpoint_policies.save_only_these_names


def pasted_policy(found: Names):
    """The policy as a user pastes it: text that becomes code."""
    return eval(found.code, {"jax": jax})


def temp_and_all_bytes(fun, *args, donate_argnums=()):
    """What the compiler says of a function, in the user's own jit."""
    options = _compat.CPU_REMAT_OPTIONS or None
    compiled = jax.jit(fun, compiler_options=options, donate_argnums=donate_argnums).lower(*args).compile()
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.temp_size_in_bytes, held + stats.temp_size_in_bytes


def problem_of(fun, args):
    subject = named_loss(fun, args, "flops", None, 0, False)
    return subject.problem()


@pytest.mark.parametrize("scanned", [True, False])
def test_a_choice_costs_what_the_gradient_under_its_policy_does(scanned):
    args = named.specs(num_layers=2)
    problem = problem_of(named.decoder(jax.checkpoint_policies.dots_saveable, scanned=scanned), args)
    # Nothing needs the last one.
    assert set(problem.names) == set(named.NAMES) - {"mlpwo"}
    rng = random.Random(0)
    chosen = [(), named.NAMES, *(tuple(n for n in named.NAMES if rng.random() < 0.5) for _ in range(14))]
    for saved in chosen:
        traced = gradient_cost(jax.value_and_grad(named.decoder(save_only(*saved), scanned=scanned)), *args)
        judged = judge_names(problem, [i for i, name in enumerate(problem.names) if name in saved])
        assert judged.work == traced.flops, saved


def test_layers_that_are_written_out_are_one_problem():
    scanned, unrolled = (
        problem_of(named.decoder(scanned=scanned), named.specs(num_layers=6)) for scanned in (True, False)
    )
    assert len(unrolled.work) <= len(scanned.work)
    ranks = [
        [tuple(sorted(problem.names[i] for i in c.saved)) for c in all_name_choices(problem)]
        for problem in (scanned, unrolled)
    ]
    assert set(ranks[0]) == set(ranks[1])


@pytest.mark.parametrize("scanned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_pasted_policy_measures_the_same_bytes(scanned):
    args = named.specs(num_layers=3)
    written = named.decoder(save_only("query_proj", "lost"), scanned=scanned)
    found = jaxckpt.names(written, *args, budget="85%", cost="flops", max_compiles=5)
    assert found.measured_peak_bytes <= found.budget_bytes < found.unplanned_peak_bytes
    pasted = named.decoder(pasted_policy(found), scanned=scanned)
    temp, size = temp_and_all_bytes(jax.value_and_grad(pasted), *args)
    assert (found.measurement.temp_bytes, found.measured_peak_bytes) == (temp, size)
    assert found.written_peak_bytes == temp_and_all_bytes(jax.value_and_grad(written), *args)[1]
    flops = gradient_cost(jax.value_and_grad(pasted), *args).flops
    assert found.unplanned_flops + found.recompute_flops == flops
    assert found.saved and set(found.saved) < set(named.NAMES)
    idle = {name.name: name.idle for name in found.names if name.idle}
    assert "backward" in idle["mlpwo"] and "nowhere" in idle["lost"] and len(idle) == 2
    (region,) = found.regions
    assert region.saves == {"query_proj"} and region.names == named.NAMES


@pytest.mark.slow
def test_no_choice_that_fits_costs_less():
    """All 256 choices are judged; of those that cost less, the ten that hold least are compiled."""
    args, fun = named.specs(), named.decoder()
    found = jaxckpt.names(fun, *args, budget=1_300_000, cost="flops")
    problem = problem_of(fun, args)
    judged = {
        judge_names(problem, saved)
        for n in range(len(problem.names) + 1)
        for saved in itertools.combinations(range(len(problem.names)), n)
    }
    assert found.num_judged == len(judged)
    cheaper = [c for c in judged if c.work < found.unplanned_flops + found.recompute_flops]
    assert cheaper and found.bound_recompute_cost == found.recompute_flops
    for choice in sorted(cheaper, key=lambda c: (c.held_bytes, c.work))[:10]:
        policy = save_only(*(problem.names[i] for i in choice.saved))
        assert temp_and_all_bytes(jax.value_and_grad(named.decoder(policy)), *args)[1] > found.budget_bytes


def test_twenty_names_are_within_the_printed_bound():
    args = named.many_specs()
    fun = named.decoder(layer=named.many_layer)
    with no_compiles():
        most = jaxckpt.names(fun, *args, budget="1GB", cost="flops", verify=False)
        # A margin is left where nothing is measured.
        budget = int(1.1 * (most.least_peak_bytes + most.peak_bytes) / 2)
        started = time.perf_counter()
        found = jaxckpt.names(fun, *args, budget=budget, cost="flops", verify=False)
    assert time.perf_counter() - started < 30
    assert found.num_judged is None and len(found.names) == 20 and 0 < len(found.saved) < 20
    assert 0 < found.bound_recompute_cost <= found.recompute_cost
    assert found.recompute_cost - found.bound_recompute_cost <= 0.001 * found.unplanned_cost
    assert "branch and bound" in str(found)
    flops = gradient_cost(jax.value_and_grad(named.decoder(pasted_policy(found), layer=named.many_layer)), *args).flops
    assert flops == found.unplanned_flops + found.recompute_flops
    # No choice that differs in up to two names is better.
    problem = problem_of(fun, args)
    numbers = {problem.names.index(name) for name in found.saved}
    best = judge_names(problem, numbers)
    for changed in itertools.chain(*(itertools.combinations(range(20), n) for n in (1, 2))):
        other = judge_names(problem, numbers.symmetric_difference(changed))
        assert other.work >= best.work or other.held_bytes > best.held_bytes


@pytest.mark.slow
def test_twenty_names_are_measured():
    args = named.many_specs(num_layers=3)
    found = jaxckpt.names(named.decoder(layer=named.many_layer), *args, budget="75%", cost="flops")
    assert found.measured_peak_bytes <= found.budget_bytes and found.num_judged is None
    pasted = jax.value_and_grad(named.decoder(pasted_policy(found), layer=named.many_layer))
    assert temp_and_all_bytes(pasted, *args)[1] == found.measured_peak_bytes


@pytest.mark.slow
def test_a_step_gets_the_names_of_what_it_differentiates():
    def step(policy, params, x):
        value, gradient = jax.value_and_grad(named.decoder(policy))(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    args = named.specs()
    written = functools.partial(step, None)
    least = temp_and_all_bytes(written, *args, donate_argnums=0)[1]
    found = jaxckpt.names(written, *args, budget=int(1.2 * least), cost="flops", donate_argnums=0)
    assert found.written_peak_bytes == least < found.measured_peak_bytes <= found.budget_bytes
    pasted = functools.partial(step, pasted_policy(found))
    assert temp_and_all_bytes(pasted, *args, donate_argnums=0)[1] == found.measured_peak_bytes
    assert found.saved


def test_a_policy_changes_no_value():
    args = jax.tree.map(
        lambda s: jax.random.normal(jax.random.key(0), s.shape, s.dtype) * 0.2, named.specs(num_layers=2)
    )
    found = jaxckpt.names(named.decoder(), *args, budget="95%", verify=False)
    assert_close(jax.grad(named.decoder(found.policy))(*args), jax.grad(named.decoder(scanned=False))(*args), 1e-5)


def test_flax_modules_keep_their_remat():
    nn = pytest.importorskip("flax.linen")

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            up = checkpoint_name(nn.Dense(256, name="up")(x), "up")
            gate = checkpoint_name(nn.Dense(256, name="gate")(x), "gate")
            return x + checkpoint_name(nn.Dense(32, name="down")(nn.silu(gate) * up), "down")

    class Model(nn.Module):
        policy: object = None

        @nn.compact
        def __call__(self, x):
            for i in range(4):
                x = nn.remat(Layer, policy=self.policy)(name=f"layer{i}")(x)
            return x

    def loss(policy, params, x):
        return jnp.mean(Model(policy).apply(params, x) ** 2)

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        params = jax.eval_shape(Model().init, jax.random.key(0), x)
        found = jaxckpt.names(functools.partial(loss, None), params, x, budget="85%", cost="flops")
        pasted = jax.value_and_grad(functools.partial(loss, pasted_policy(found)))
        assert temp_and_all_bytes(pasted, params, x)[1] == found.measured_peak_bytes <= found.budget_bytes
    assert [name.name for name in found.names if name.idle] == ["down"]
    assert "test_names.py" in found.regions[0].source or found.regions[0].source


def cond_loss(policy, w, x):
    """Names in both branches, in a loop inside of the region, twice, and outside of it."""

    def cell(h, _):
        return checkpoint_name(jnp.tanh(h @ w), "state"), None

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x):
        h, _ = jax.lax.scan(cell, x, length=3)
        h = checkpoint_name(jnp.sin(h @ w), "twice") + checkpoint_name(jnp.cos(x @ w), "twice")
        branches = (lambda h: checkpoint_name(jnp.tanh(h @ w), "left") @ w, lambda h: checkpoint_name(h @ w, "right"))
        return jax.lax.switch(jnp.int32(x[0, 0] > 0), branches, h)

    outside = checkpoint_name(jnp.tanh(x @ w), "outside")
    return jnp.sum(layer(layer(outside)) ** 2)


def test_loops_branches_and_names_at_several_places():
    args = jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.ShapeDtypeStruct((64, 32), jnp.float32)
    with no_compiles():
        found = jaxckpt.names(functools.partial(cond_loss, None), *args, budget="1GB", cost="flops", verify=False)
    assert {name.name: bool(name.idle) for name in found.names} == {
        **{"outside": True, "state": False, "twice": False, "left": False, "right": True}
    }
    assert "outside" in next(name.idle for name in found.names if name.name == "outside")
    problem = problem_of(functools.partial(cond_loss, None), args)
    for saved in [(), ("state",), ("twice",), ("state", "twice"), ("state", "twice", "left")]:
        traced = gradient_cost(jax.grad(functools.partial(cond_loss, save_only(*saved))), *args).flops
        judged = judge_names(problem, [i for i, name in enumerate(problem.names) if name in saved])
        assert abs(judged.work - traced) <= 0.01 * traced, saved


def test_regions_without_names_keep_their_policy():
    dots = jax.checkpoint_policies.dots_saveable

    def loss(policy, w, x):
        x = jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w), policy=dots)(x)
        x = jax.checkpoint(lambda x: jnp.tanh(checkpoint_name(x @ w, "a") @ w), policy=policy)(x)
        return jnp.sum(x**2)

    args = jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.ShapeDtypeStruct((64, 32), jnp.float32)
    found = jaxckpt.names(functools.partial(loss, dots), *args, budget="1GB", cost="flops", verify=False)
    assert found.saved == ("a",) and "stays as it is" in str(found)
    assert [region.is_about_names for region in found.regions] == [False, True]
    assert found.regions[1].num_others == 2
    flops = gradient_cost(jax.value_and_grad(functools.partial(loss, found.policy)), *args).flops
    assert flops == found.unplanned_flops + found.recompute_flops


def test_a_budget_that_nothing_fits_is_refused_with_the_least():
    args, fun = named.specs(num_layers=3), named.decoder()
    with pytest.raises(jaxckpt.InfeasibleBudgetError) as caught:
        jaxckpt.names(fun, *args, budget="10%")
    least = caught.value.least_peak_bytes
    assert least is not None and f"{least:,}" in str(caught.value) and caught.value.measured
    found = jaxckpt.names(fun, *args, budget=least)
    assert found.measured_peak_bytes == least
    with pytest.warns(jaxckpt.JaxckptWarning, match="nothing fits"):
        found = jaxckpt.names(fun, *args, budget=least - 1, on_infeasible="least", max_compiles=2)
    assert found.measured_peak_bytes == least
    with pytest.raises(jaxckpt.InfeasibleBudgetError) as caught:
        jaxckpt.names(fun, *args, budget=1000, verify=False)
    assert caught.value.least_peak_bytes is None and caught.value.expected_least_bytes > 1000


def test_only_some_names_and_a_reserve():
    args, fun = named.specs(num_layers=3), named.decoder()
    found = jaxckpt.names(
        fun, *args, budget="1GB", reserve="1MB", cost="flops", verify=False, only=["query_proj", "mlpwo", "lost"]
    )
    assert found.saved == ("query_proj",) and found.budget_bytes == 10**9 - 10**6
    assert [name.name for name in found.names] == ["query_proj", "mlpwo", "lost"]
    assert found.maxtext == "remat_policy: custom\nquery_proj: device\nmlpwo: remat"


def test_what_cannot_be_chosen_from_is_said():
    args = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    plain = lambda w, x: jnp.sum(checkpoint_name(x @ w, "a") ** 2)  # noqa: E731
    with pytest.raises(jaxckpt.OptionError, match=r"no jax\.checkpoint of its own"):
        jaxckpt.names(plain, *args, budget="50%")
    nameless = lambda w, x: jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w) @ w)(x) ** 2)  # noqa: E731
    with pytest.raises(jaxckpt.OptionError, match="checkpoint_name"):
        jaxckpt.names(nameless, *args, budget="50%")
    with pytest.raises(jaxckpt.NotDifferentiableError):
        jaxckpt.names(lambda x: x, jax.ShapeDtypeStruct((8,), jnp.int32), budget="50%")
    fun = named.decoder()
    for options, wanted in [
        ({"budget": 0.6}, "budget"),
        ({"budget": "60%", "cost": "energy"}, "cost"),
        ({"budget": "60%", "only": "query_proj"}, "list of names"),
        ({"budget": "60%", "max_compiles": 0}, "max_compiles"),
        ({"budget": "60%", "donate_argnums": 0}, "donate_argnums is for a step"),
    ]:
        with pytest.raises(jaxckpt.JaxckptError, match=wanted), no_compiles():
            jaxckpt.names(fun, *named.specs(), **options)


def test_plan_and_others_know_the_solver_by_name():
    args, fun = named.specs(num_layers=3), named.decoder()
    found = jaxckpt.plan(fun, *args, budget="1GB", solver="names", verify=False)
    assert isinstance(found, Names) and found.cost == "time"
    with pytest.raises(jaxckpt.OptionError, match="takes a budget"):
        jaxckpt.plan(fun, *args, max_cost=1.1, solver="names")
    with pytest.raises(jaxckpt.OptionError, match="paste"):
        jaxckpt.auto_remat(fun, budget="50%", solver="names")
    step = lambda w, x: jax.grad(fun)(w, x)  # noqa: E731
    with pytest.raises(jaxckpt.NotDifferentiableError, match=r"jaxckpt\.names"):
        jaxckpt.plan(step, *args, budget="60%", solver="names")


def test_the_command_prints_the_policy(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_decoder.py").write_text(
        "from zoo import named\nloss = named.decoder()\n\n\ndef example_args():\n    return named.specs(num_layers=3)\n"
    )
    monkeypatch.chdir(tmp_path)
    call = ["names", "own_decoder:loss", "--budget", "90%", "--no-verify", "--cost", "flops"]
    assert main([*call, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert main([*call, "--code"]) == 0
    assert capsys.readouterr().out.strip() == data["code"]
    assert main([*call, "--maxtext"]) == 0
    out = capsys.readouterr().out
    assert out.strip() == data["maxtext"] and "remat_policy: custom" in out and "mlpwo: remat" in out
    assert main(call) == 0
    out = capsys.readouterr().out
    assert data["code"] in out and data["maxtext"] in out and "does nothing" in out
    same = ["plan", "own_decoder:loss", "--solver", "names", "--budget", "90%", "--no-verify", "--cost", "flops"]
    assert main([*same, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == data
    assert main([*same, "-o", "plan.json"]) == 2
    assert "no plan file" in capsys.readouterr().err
    assert main(["names", "own_decoder:loss", "--budget", "1KB", "--no-verify"]) == 1
    assert "no choice of names fits" in capsys.readouterr().err


@pytest.mark.targets
@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_names_for_chips_that_are_not_here(target):
    args, fun = named.specs(num_layers=4, width=128, hidden=512, batch=64, tokens=128), named.decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error", jaxckpt.JaxckptWarning)
        found = jaxckpt.names(fun, *args, budget="80%", cost="flops", target=target, max_compiles=5)
    assert found.measured_peak_bytes <= found.budget_bytes
    pasted = jaxckpt.measure(named.decoder(pasted_policy(found)), *args, target=target)
    assert pasted.device_bytes == found.measured_peak_bytes
