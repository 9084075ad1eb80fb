"""Where a program is cut: every equation in a block, few bytes across, cheap things sunk."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import CASES, analysed, analysis_of
from zoo import gpt, gpt2
from zoo.models import chain_args, chain_loss

from jaxckpt.kinds.base import is_alone
from jaxckpt.model.cut import _SINKABLE, _borders, cut_program, merged_spans, spans_at
from jaxckpt.program import dataflow
from jaxckpt.program.ir import size_bytes
from jaxckpt.program.trace import trace


@pytest.mark.parametrize("name", CASES)
def test_blocks_partition_the_equations(name):
    program, spans = analysis_of(name).program, analysis_of(name).blocks.spans
    placed = [i for span in spans for i in span.positions]
    assert set(placed) == set(range(len(program.equations)))
    sunk = {i for i in placed if placed.count(i) > 1}
    # Only what costs nothing to speak of stands in several blocks.
    assert {program.equations[i].primitive for i in sunk} <= _SINKABLE


@pytest.mark.parametrize("name", CASES)
def test_blocks_read_only_what_was_made_before_them(name):
    program, spans = analysis_of(name).program, analysis_of(name).blocks.spans
    known = set(program.inputs)
    for span in spans:
        assert known.issuperset(span.inputs)
        local = set(span.inputs)
        for eqn in span.equations:
            assert local.issuperset(eqn.reads)
            local.update(eqn.outputs)
        known.update(span.outputs)
    assert known.issuperset(x for x in program.outputs if isinstance(x, int))


@pytest.mark.parametrize("name", CASES)
def test_cutting_at_the_same_places_gives_the_same_blocks(name):
    program, spans = analysis_of(name).program, analysis_of(name).blocks.spans
    assert spans_at(program, [span.positions for span in spans]) == spans


def test_a_chain_is_cut_once_a_layer_and_carries_one_value():
    spans = analysis_of("chain").blocks.spans
    assert len(spans) == 8
    assert [len(span.outputs) for span in spans] == [1] * 8
    assert [sum(e.primitive.name == "dot_general" for e in span.equations) for span in spans] == [1] * 8


def test_between_two_layers_a_transformer_is_cut_at_its_stream():
    config = dataclasses.replace(gpt.TINY, num_layers=3)
    s = analysed(gpt.make_loss(config), *gpt.specs(config))
    stream = config.batch * config.num_tokens * config.width * 4
    last = {}
    for k, span in enumerate(s.blocks.spans):
        last.update(dict.fromkeys(span.inputs, k))
    crossing = [
        sum(
            size_bytes(s.program.avals[v])
            for span in s.blocks.spans[: k + 1]
            for v in span.outputs
            if last.get(v, -1) > k
        )
        for k in range(len(s.blocks.spans) - 1)
    ]
    assert crossing.count(stream) >= 3, crossing


@pytest.mark.parametrize("vocab", [8, 1024])
def test_a_loss_of_large_logits_is_a_block_of_its_own(vocab):
    config = dataclasses.replace(gpt.TINY, vocab=vocab)
    for blocks in analysed(gpt.make_loss(config), *gpt.specs(config)).cuts:
        loss = {e.primitive.name for e in blocks.spans[-1].equations}
        assert ("dot_general" not in loss) == (vocab == 1024)


def test_a_mask_is_made_in_the_blocks_that_read_it():
    s = analysis_of("gpt")
    crossing = [s.program.avals[v] for span in s.blocks.spans for v in span.outputs]
    assert not [aval for aval in crossing if aval.dtype == bool]


def test_what_no_tangent_reaches_waits_until_it_is_read():
    def loss(weights, x, key):
        masks = [jax.random.bernoulli(k, 0.5, x.shape) for k in jax.random.split(key, len(weights))]
        for w, mask in zip(weights, masks, strict=True):
            x = jnp.where(mask, jnp.tanh(x @ w), 0)
        return jnp.sum(x)

    weights, x = jax.eval_shape(lambda *a: a, *chain_args(layers=4))
    s = analysed(loss, weights, x, jax.eval_shape(jax.random.key, 0))
    dots = [
        k for k, span in enumerate(s.blocks.spans) if any(e.primitive.name == "dot_general" for e in span.equations)
    ]
    bits = [
        k for k, span in enumerate(s.blocks.spans) if any(e.primitive.name == "random_bits" for e in span.equations)
    ]
    assert dots[0] < bits[-1] and bits[-1] > dots[-2]


@pytest.mark.parametrize("most", [2, 5, 9])
def test_no_more_blocks_than_allowed(most):
    config = dataclasses.replace(gpt.TINY, num_layers=4)
    program = trace(gpt.make_loss(config), gpt.specs(config)).program
    dag = dataflow.build_graph(program)
    active = dataflow.active_values(program, set(program.inputs[:-1]), {program.outputs[0]})
    spans = cut_program(program, dag, active, max_blocks=most, is_alone=is_alone)
    assert 1 <= len(spans) <= most
    assert {i for span in spans for i in span.positions} == set(range(len(program.equations)))


def test_the_graph_has_an_edge_for_every_value_read():
    program = trace(chain_loss, chain_args(layers=2)).program
    dag = dataflow.build_graph(program)
    for i, eqn in enumerate(program.equations):
        assert dag.nodes[i]["primitive"] == eqn.primitive.name
        read = {v for _, _, edge in dag.in_edges(i, data=True) for v in edge["values"]}
        assert read == set(eqn.reads) - set(program.inputs)
    for _, _, edge in dag.edges(data=True):
        assert edge["size_bytes"] == sum(size_bytes(program.avals[v]) for v in edge["values"])


def test_tangents_stop_where_a_gradient_does():
    def fun(x, y):
        return jnp.sum(jnp.sin(x) * jax.lax.stop_gradient(jnp.cos(x)) + y.astype(x.dtype))

    program = trace(fun, (jnp.ones(3), jnp.arange(3))).program
    active = dataflow.active_values(program, {program.inputs[0]}, {program.outputs[0]})
    made = {e.primitive.name: set(e.outputs) for e in program.equations}
    assert made["sin"] <= active and made["cos"].isdisjoint(active)


def pooled(w, x):
    """Two convolutions with residual sums, and a pooling between them."""

    def conv(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.nn.relu(x + conv(w[0], x))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.sum(jax.nn.relu(x + conv(w[1], x)) ** 2)


POOLED = jax.ShapeDtypeStruct((2, 3, 3, 8, 8), jnp.float32), jax.ShapeDtypeStruct((2, 32, 32, 8), jnp.float32)


def poolings(s):
    """The blocks with a pooling."""
    return [
        k for k, span in enumerate(s.blocks.spans) if any("reduce_window" in e.primitive.name for e in span.equations)
    ]


def test_on_cpu_a_pooling_is_alone_and_no_region_covers_it():
    s = analysed(pooled, *POOLED, target="cpu")
    (k,) = poolings(s)
    assert len(s.blocks.spans[k].equations) == 1
    assert len(s.blocks.problem.blocks[k].options) == 1
    assert s.candidates
    for candidate in s.candidates:
        (k,) = [k for k, b in enumerate(candidate.problem.blocks) if b.forward_peak_bytes > 2**40]
        assert candidate.judgement.num_forwards[k] == 1
        assert candidate.judgement.peak_bytes < 2**40


def test_elsewhere_a_pooling_is_like_any_operation():
    s = analysed(pooled, *POOLED, target="h100")
    (k,) = poolings(s)
    assert s.blocks.problem.blocks[k].forward_peak_bytes < 2**40


def test_what_is_made_of_a_value_of_the_same_size_is_held_instead_of_it():
    # Right behind the costly operation where nothing is lower, or else behind the last of the lowest places.
    assert _borders([0, 4], [1, 1, 1, 2, 0]) == [1]
    assert _borders([0, 4], [2, 1, 1, 2, 0]) == [3]


def test_what_repeats_is_merged_and_nothing_else():
    spans = analysis_of("chain").blocks.spans
    program = analysis_of("chain").program

    def sizes(classes):
        merged = merged_spans(program, spans, classes)
        assert [i for span in merged for i in span.positions] == [i for span in spans for i in span.positions]
        return [len(span.equations) // len(spans[1].equations) for span in merged[1:-1]]

    assert sizes("xababab8") == [2, 2, 2]
    assert sizes("abababab") == [2, 2], "a first and a last one too"
    assert sizes("yxababab") == [1, 2, 2], "too"
    assert sizes("abcdabcd") == [1] * 6, "two repetitions are too few"
    assert sizes("aaaaaaaa") == sizes("abcdefgh") == sizes("ababxyzw") == [1] * 6
    assert sizes(["x", "a", None, "a", None, "a", None, "y"]) == [1] * 6, "what must stay as it is"


def test_what_repeats_is_treated_identically_too_on_a_tpu():
    config = gpt2.Config(num_layers=6, width=64, num_heads=2, num_tokens=128, vocab=64)
    with jax.numpy_rank_promotion("allow"):
        s = analysed(gpt2.make_loss(config), *gpt2.specs(config), target="v5e")
    fine, coarse, merged = s.cuts
    assert len(fine.spans) > len(coarse.spans) > len(merged.spans) >= 6
    assert {s.kind(c) for c in s.all_candidates} == {0, 1, 2, 3}
    repeated = [k for k, number in enumerate(merged.numbers) if merged.numbers.count(number) >= 4]
    kept = [
        tuple(n.option for n in c.schedule.nodes if n.start in repeated) for c in s.all_candidates if c.is_identical
    ]
    # One option for all of them, and almost every option they have at one budget or another.
    assert all(len(options) == len(repeated) >= 4 and len(set(options)) == 1 for options in kept)
    assert len(set(kept)) > len(merged.problem.blocks[repeated[0]].options) // 2
    # What was measured of one plan is never taken for another's.
    assert len({c.digest for c in s.all_candidates}) == len(s.all_candidates)
