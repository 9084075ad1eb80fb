"""Options of blocks: what they predict is what JAX and XLA then do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import CASES, analysed, analysis_of
from zoo import gpt, models, unet

from jaxckpt.model.option import LEFT_TO_JAX, SavedValues
from jaxckpt.program import primitives
from jaxckpt.program.flops import gradient_cost
from jaxckpt.program.interpret import run

# Of the gradient's FLOPs: elementwise work at the borders of blocks, which JAX does not always repeat.
FLOPS_TOLERANCE = 0.005
# Of the measured bytes, both ways. The planner corrects what is left by measuring.
BYTES_TOLERANCE = 0.25


def shapes(args):
    return jax.eval_shape(lambda *a: a, *args)


def spread(items, most):
    """That many of them, the first and the last among them."""
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def counted(s, fun):
    specs = [jax.ShapeDtypeStruct(s.program.avals[v].shape, s.program.avals[v].dtype) for v in s.program.inputs]
    return gradient_cost(s.objective.differentiated(fun), *specs).flops


@functools.cache
def recomputations(name):
    """FLOPs predicted beyond the unplanned gradient, those counted in the planned one's jaxpr, and the gradient's."""
    s = analysis_of(name)
    base = counted(s, lambda *x: run(s.program, *x))
    found = []
    for candidate in spread(s.candidates, 4):
        found.append((s.recompute_flops(candidate), counted(s, s.planned(candidate)) - base, base))
    return found


@pytest.mark.parametrize("name", CASES)
def test_predicted_recomputation_is_what_jax_does(name):
    for predicted, found, base in recomputations(name):
        assert abs(predicted - found) <= FLOPS_TOLERANCE * base


@pytest.mark.parametrize("name", CASES)
def test_recomputation_is_never_predicted_too_low(name):
    for predicted, found, base in recomputations(name):
        assert predicted >= found - FLOPS_TOLERANCE * base


_GPT = dataclasses.replace(gpt.TINY, num_tokens=128, width=64, batch=4)
MEASURED = {
    "chain": (models.chain_loss, shapes(models.chain_args(layers=16, rows=2048, width=64))),
    "residual": (models.residual_loss, shapes(models.residual_args(layers=8, rows=2048, width=64))),
    "unet": (models.unet_loss, shapes(models.unet_args(levels=6, rows=2048, width=64))),
    "conv": (models.conv_loss, shapes(models.conv_args(layers=6, batch=8, size=32, channels=16))),
    "gpt": (gpt.make_loss(_GPT), gpt.specs(_GPT)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_predicted_bytes_are_near_those_measured(name):
    fun, args = MEASURED[name]
    s = analysed(fun, *args)
    for candidate in (s.unplanned, *spread(s.candidates, 2)):
        measured = s.measure(None if candidate.schedule == s.unplanned.schedule else candidate).device_bytes
        predicted = s.fixed_bytes + candidate.judgement.peak_bytes
        assert abs(predicted - measured) <= BYTES_TOLERANCE * measured, (predicted, measured)


@pytest.mark.parametrize("name", CASES)
def test_the_cost_without_a_plan_is_what_jax_does(name):
    s = analysis_of(name)
    assert s.unplanned_cost == pytest.approx(counted(s, lambda *x: run(s.program, *x)), rel=FLOPS_TOLERANCE)


def test_identical_layers_are_analysed_once():
    distinct = []
    for num_layers in (3, 5):
        config = dataclasses.replace(gpt.TINY, num_layers=num_layers)
        blocks = analysed(gpt.make_loss(config), *gpt.specs(config)).blocks
        assert len(blocks.numbers) == len(blocks.spans)
        distinct.append((len(set(blocks.numbers)), len(blocks.spans)))
    (few, small), (as_few, large) = distinct
    assert few == as_few and large > small + few


def test_blocks_that_differ_are_told_apart():
    weights, x = models.chain_args(layers=3)
    wide = [weights[0], weights[1], weights[2][:, :16]]
    s = analysed(models.chain_loss, *shapes((wide, x)))
    dots = {k: e.outputs[0] for k, span in enumerate(s.blocks.spans) for e in span.equations if primitives.is_matmul(e)}
    widths = {s.blocks.numbers[k]: s.program.avals[v].shape for k, v in dots.items()}
    assert all(widths[s.blocks.numbers[k]] == s.program.avals[v].shape for k, v in dots.items())
    assert len(set(widths.values())) == 2


def test_a_chain_by_hand():
    # Three layers y = tanh(x @ w), [256, 32] float32. A block ends after its matmul, which is what it hands on.
    s = analysed(models.chain_loss, *shapes(models.chain_args(layers=3)))
    size = 4 * 256 * 32
    problem = s.blocks.problem
    assert [v.size_bytes for v in problem.values][:2] == [size, size]
    assert [v.cotangent_bytes for v in problem.values][:2] == [size, size]
    assert problem.forward_time == s.forward_flops == 3 * (2 * 256 * 32 * 32 + 256 * 32) + 2 * 256 * 32
    for block in problem.blocks:
        assert block.options[-1].name == "everything" and block.options[-1].recompute_time == 0


@pytest.mark.parametrize("name", ["residual", "gpt"])
def test_every_block_may_keep_everything_or_nothing(name):
    blocks = analysis_of(name).blocks
    nothing = SavedValues(())
    for block in blocks.blocks:
        saves = [option.save for option in block.options]
        assert saves.count(LEFT_TO_JAX) == 1 and saves[-1] == LEFT_TO_JAX
        # Saving nothing, unless JAX needs no more by itself; what an operation needs room for is held all the same.
        assert nothing in saves or len(saves) == 1
        least = block.options[saves.index(nothing)].saved_bytes if nothing in saves else 0
        assert all(option.saved_bytes >= least for option in block.options[:-1])


@pytest.mark.parametrize("name", ["residual", "gpt"])
def test_no_option_is_beaten_by_another(name):
    for block in analysis_of(name).blocks.problem.blocks:
        named = block.options[:-1]
        keys = [(o.saved_bytes, o.saved_outputs, o.recompute_time, o.backward_peak_bytes) for o in named]
        assert len(set(keys)) == len(keys)


def test_the_work_of_keeping_everything_is_one_sweep():
    for s in map(analysis_of, CASES):
        assert s.unplanned.judgement.extra_work == 0
        assert s.recompute_flops(s.unplanned) == 0


def test_a_unet_under_a_plan_takes_on_cpu_what_is_predicted():
    with jax.numpy_rank_promotion("allow"):
        config = unet.Config(levels=1, width=16, image=64)
        s = analysed(unet.make_loss(config), *unet.specs(config), target="cpu")
        candidate = s.candidates[0]
        predicted = s.fixed_bytes + candidate.judgement.peak_bytes
        assert abs(predicted / s.measure(candidate).device_bytes - 1) <= 0.1


def test_the_backward_of_a_loss_runs_right_behind_it():
    def loss(params, x, labels):
        h = jnp.tanh(x @ params["w"])
        parts = [(h[i : i + 512], labels[i : i + 512]) for i in (0, 512)]
        logits = [(part @ params["out"], labels) for part, labels in parts]
        return sum(optax.softmax_cross_entropy_with_integer_labels(*each).mean() for each in logits)

    array = jax.ShapeDtypeStruct
    params = {"w": array((64, 64), jnp.float32), "out": array((64, 8192), jnp.float32)}
    s = analysed(loss, params, array((1024, 64), jnp.float32), array((1024,), jnp.int32), target="cpu")
    logits = 4 * 512 * 8192
    last = s.blocks.problem.blocks[-1].options[-1]
    # Nothing of it waits but what its inputs' cotangents are, and no more than they and the logits are there at once.
    assert last.saved_bytes == last.backward_peak_bytes <= 1.1 * logits and last.forward_peak_bytes <= 2.2 * logits
    # One part's logits are held while the other part runs: three such buffers, where six were counted once.
    kept = next(c for c in s.candidates if c.judgement.peak_bytes >= 2.9 * logits)
    assert kept.judgement.peak_bytes <= 3.5 * logits
    assert s.measure(kept).temp_bytes <= 1.1 * kept.judgement.peak_bytes
