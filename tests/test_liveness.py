"""Peak bytes of a few equations, by hand. Arrays are 8 x 8 float32, 256 bytes; arguments are free."""

import jax
import jax.numpy as jnp

from jaxckpt.liveness import buffers_across, peak_bytes
from jaxckpt.trace import size_bytes, trace

X = jax.ShapeDtypeStruct((8, 8), jnp.float32)
A = 256


def peak(fun, *args, kept=None, held=(), external=()):
    program = trace(fun, args).program
    return peak_bytes(
        program.equations,
        lambda v: size_bytes(program.avals[v]),
        kept=program.outputs if kept is None else kept,
        held=held,
        external=external,
    )


def test_two_neighbours_of_a_matmul_chain_are_alive_at_once():
    assert peak(lambda x, w: x @ w, X, X) == A
    assert peak(lambda x, w: x @ w @ w, X, X) == 2 * A
    assert peak(lambda x, w: x @ w @ w @ w @ w, X, X) == 2 * A


def test_what_is_read_again_later_lives_until_then():
    def fun(x, w):
        first = x @ w
        return (first @ w @ w) @ first

    assert peak(fun, X, X) == 3 * A


def test_elementwise_results_are_no_buffers():
    assert peak(lambda x: jnp.sum(jnp.abs(x * 2 + 1)), X) == 4
    assert peak(lambda x: jnp.sum(jnp.tanh(x) * 2), X) == 4


def test_a_costly_result_read_twice_is_a_buffer():
    def fun(x):
        y = jnp.exp(x)
        return jnp.sum(y * 2), jnp.max(y + 1)

    assert peak(fun, X) >= A
    cheap = lambda x: (jnp.sum((x + 1) * 2), jnp.max((x + 1) - 3))  # noqa: E731
    assert peak(cheap, X) == 8


def test_an_operand_of_a_matmul_is_a_buffer():
    # tanh is made for the dot: it overwrites the first product.
    assert peak(lambda x, w: jnp.tanh(x @ w) @ w, X, X) == 2 * A
    assert peak(lambda x, w: (x * 2) @ w, X, X) == 2 * A


def test_a_fused_loop_writes_over_an_operand_that_dies_with_it():
    assert peak(lambda x, w: jnp.tanh(x @ w), X, X) == A

    def read_again(x, w):
        y = x @ w
        return jnp.tanh(y), y

    assert peak(read_again, X, X) == 2 * A


def test_a_fused_result_keeps_what_it_is_made_from_alive():
    def fun(x, w):
        y = x @ w
        z = y * 2  # no buffer: read by the sum at the end
        return jnp.sum(z) + jnp.sum(x @ w @ w)

    program = trace(fun, (X, X)).program
    dots = [e for e in program.equations if e.primitive.name == "dot_general"]
    assert len(dots) == 3
    # The first product waits for its sum, or dies at it, and two more stand beside it at most.
    assert 2 * A <= peak(fun, X, X) <= 3 * A + 8


def test_a_reshaped_value_is_the_same_buffer():
    assert peak(lambda x, w: (x @ w).reshape(4, 16).reshape(8, 8) @ w, X, X) == 2 * A


def test_held_values_count_until_their_last_reader():
    program = trace(lambda x, w: jnp.sum(x @ w @ w), (X, X)).program
    x = program.inputs[0]
    size = lambda v: size_bytes(program.avals[v])  # noqa: E731
    free = peak_bytes(program.equations, size, kept=program.outputs)
    held = peak_bytes(program.equations, size, kept=program.outputs, held=[x])
    to_the_end = peak_bytes(program.equations, size, kept=[*program.outputs, x], held=[x])
    assert free == held == 2 * A  # x dies at the first product
    assert to_the_end == 3 * A


def test_external_results_do_not_count():
    program = trace(lambda x, w: x @ w @ w, (X, X)).program
    assert peak_bytes(program.equations, lambda v: size_bytes(program.avals[v]), external=program.outputs) == A


def across(fun, *args, num_forward, reductions_fuse_broadcasts=True):
    """The program, and the buffers between its first equations and the others."""
    program = trace(fun, args).program
    found = buffers_across(
        program.equations[:num_forward],
        program.equations[num_forward:],
        lambda v: size_bytes(program.avals[v]),
        kept=(),
        reductions_fuse_broadcasts=reductions_fuse_broadcasts,
    )
    return program, found


def test_buffers_across_are_what_the_backward_reads_of_the_forward():
    program, found = across(lambda x, w, v: jnp.sum(jnp.tanh(x @ w) @ v), X, X, X, num_forward=2)
    assert found == set(program.equations[1].outputs)


def test_a_fused_value_across_is_made_again_from_its_buffer():
    program, found = across(lambda x, w: jnp.sum((x @ w) * 2 + 1), X, X, num_forward=2)
    assert found == set(program.equations[0].outputs)
