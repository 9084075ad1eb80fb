"""What values take on a target, by hand: a TPU's compiler rounds operands of products and pads images."""

import jax
import jax.numpy as jnp
import pytest
from ckptsolvers import Recompute
from helpers import analysed
from jax import lax

from jaxckpt.program.ir import size_bytes
from jaxckpt.program.trace import trace
from jaxckpt.targets.chip import find_target

X = jax.ShapeDtypeStruct((256, 128), jnp.float32)
W = jax.ShapeDtypeStruct((128, 128), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 64), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)


def shares(fun, *args, target="v5e", **options):
    """Of each result of an equation, what it takes as a share of what its dtype says, by primitive."""
    program = trace(fun, args).program
    layouts = find_target(target).compiler.layouts(program.avals, program.equations, **options)
    return {
        eqn.primitive.name: layouts.held_bytes(v) / size_bytes(program.avals[v])
        for eqn in program.equations
        for v in eqn.outputs
    }


def test_what_products_alone_read_is_rounded_on_a_tpu():
    fun = lambda x, w: jnp.sum(jnp.abs(x) @ w)  # noqa: E731
    assert shares(fun, X, W)["abs"] == 0.5
    assert shares(fun, X, W, target="h100")["abs"] == 1


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_product_of_another_precision_reads_all_digits(precision):
    assert shares(lambda x, w: jnp.matmul(jnp.abs(x), w, precision=precision), X, W)["abs"] == 1


def test_what_anything_else_reads_too_keeps_its_digits():
    def fun(x, w):
        y = jnp.abs(x)
        return y @ w, jnp.sum(y * 2)

    assert shares(fun, X, W)["abs"] == 1


def test_another_shape_on_the_way_to_a_product_does_not_matter():
    fun = lambda x, w: jnp.abs(x).T.reshape(2, 64, 256) @ w.repeat(2, 0)  # noqa: E731
    found = shares(fun, X, W)
    assert found["abs"] == found["transpose"] == found["reshape"] == 0.5


def test_what_is_no_float32_is_as_it_is():
    half = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)
    assert shares(lambda x, w: jnp.abs(x) @ w.astype(x.dtype), half, W)["abs"] == 1


def test_a_derivative_reads_what_an_exponential_made():
    fun = lambda x, w: jnp.exp(x) @ w  # noqa: E731
    assert shares(fun, X, W)["exp"] == 0.5
    assert shares(fun, X, W, read_by_derivatives=True)["exp"] == 1


def convolution(x, k):
    return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_features_of_images_fill_the_lanes():
    def fun(x, k):
        y = jnp.abs(x)
        z = convolution(y, k)
        pooled = lax.reduce_window(jnp.sin(z), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.sum(jnp.cos(pooled)), pooled.reshape(-1, 64) @ jnp.ones((64, 64))

    found = shares(fun, IMAGE, KERNEL)
    assert found["abs"] == 1, "padded to twice, and rounded to half"
    assert found["conv_general_dilated"] == found["sin"] == found["reduce_window_max"] == 2
    assert found["dot_general"] == 1, "matrices are laid out so that nothing is padded"
    assert set(shares(fun, IMAGE, KERNEL, target="cpu").values()) == {1}


def test_features_may_come_first():
    first = jax.ShapeDtypeStruct((2, 64, 32, 32), jnp.float32)
    fun = lambda x, k: jnp.sin(lax.conv(x, k, (1, 1), "SAME"))  # noqa: E731
    kernel = jax.ShapeDtypeStruct((64, 64, 3, 3), jnp.float32)
    assert shares(fun, first, kernel)["sin"] == 2


def logits_loss(params, tokens):
    x = params["embed"][tokens]
    for w in params["layers"]:
        x = x + jnp.tanh(x @ w)
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))
    return -jnp.mean(jax.nn.log_softmax(x @ params["embed"].T)[:, 0])


def logits_args(vocab, tokens=1024, width=512):
    embed = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    layers = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * 4
    return {"embed": embed, "layers": layers}, jax.ShapeDtypeStruct((tokens,), jnp.int32)


@pytest.mark.parametrize(("target", "vocab", "expected"), [("v5e", 8192, 1), ("v5e", 1024, 0), ("h100", 8192, 0)])
def test_logits_are_what_many_times_smaller_values_make(target, vocab, expected):
    program = trace(logits_loss, logits_args(vocab)).program
    found = find_target(target).compiler.heads(program.avals, program.equations)
    heads = [eqn for eqn in program.equations if found(eqn)]
    assert len(heads) == expected
    assert all(program.avals[eqn.outputs[0]].shape == (1024, vocab) for eqn in heads)


def test_on_a_tpu_no_region_covers_the_logits_and_one_may_end_at_the_stream():
    found = analysed(logits_loss, *logits_args(8192), target="v5e")
    for blocks in found.cuts:
        made = [found.program.avals[span.outputs[0]].shape for span in blocks.spans]
        head = made.index((1024, 8192))
        assert len(blocks.problem.blocks[head].options) == 1
        # What ends before the norm need not make its last product again.
        assert not any(eqn.primitive.name == "dot_general" for eqn in blocks.spans[head - 1].equations)
    for candidate in found.candidates:
        assert not any(
            node.start <= head < node.stop
            for node in candidate.schedule.nodes
            if isinstance(node, Recompute)
            for head in [len(found.blocks_of(candidate).spans) - 2]
        )


def scanned_logits_loss(params, tokens):
    x, _ = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), params["embed"][tokens], params["layers"])
    return -jnp.mean(jax.nn.log_softmax(x @ params["embed"].T)[:, 0])


def test_logits_are_alive_in_the_backward_of_a_loop_on_a_tpu_alone():
    def peak(target):
        embed, layers = jax.ShapeDtypeStruct((8192, 512), jnp.float32), jax.ShapeDtypeStruct((4, 512, 512), jnp.float32)
        tokens = jax.ShapeDtypeStruct((1024,), jnp.int32)
        found = analysed(scanned_logits_loss, {"embed": embed, "layers": layers}, tokens, target=target)
        (loop,) = [k for k, s in enumerate(found.cuts[0].spans) if s.equations[-1].primitive is lax.scan_p]
        return min(option.backward_peak_bytes for option in found.cuts[0].problem.blocks[loop].options)

    assert peak("v5e") >= 1024 * 8192 * 4 > peak("h100")
