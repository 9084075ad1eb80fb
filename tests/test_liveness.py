"""Peak bytes of a few equations, by hand. Arrays are 8 x 8 float32, 256 bytes; arguments are free."""

import jax
import jax.numpy as jnp

from jaxckpt.habits import habits_of
from jaxckpt.liveness import Habits, buffers_across, peak_bytes
from jaxckpt.targets import find
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
        habits=Habits(reductions_fuse_broadcasts=reductions_fuse_broadcasts),
    )
    return program, found


def test_buffers_across_are_what_the_backward_reads_of_the_forward():
    program, found = across(lambda x, w, v: jnp.sum(jnp.tanh(x @ w) @ v), X, X, X, num_forward=2)
    assert found == set(program.equations[1].outputs)


def test_a_fused_value_across_is_made_again_from_its_buffer():
    program, found = across(lambda x, w: jnp.sum((x @ w) * 2 + 1), X, X, num_forward=2)
    assert found == set(program.equations[0].outputs)


def test_a_scatter_writes_over_the_array_it_changes():
    def fun(x, i):
        return jnp.sum(jnp.zeros((64, 64)).at[i].add(x @ x)) + 0 * jnp.sum(x)

    program = trace(fun, (jnp.ones((64, 64)), jnp.zeros(64, int))).program
    size = 64 * 64 * 4
    # The product and the array, which is not there twice.
    assert 2 * size <= peak_bytes(program.equations, lambda v: size_bytes(program.avals[v])) < 3 * size


def test_on_cpu_an_operand_in_another_layout_is_a_buffer_more():
    def fun(x, y):
        return jnp.einsum("btd,bte->de", jnp.tanh(x), y)

    x = jnp.ones((4, 32, 16))
    program = trace(fun, (x, x)).program
    peaks = [
        peak_bytes(
            program.equations, lambda v: size_bytes(program.avals[v]), habits=habits_of(find(name), program.avals)
        )
        for name in ("h100", "cpu")
    ]
    assert peaks[1] - peaks[0] in (0, x.nbytes)
    dot = next(e for e in program.equations if e.primitive.name == "dot_general")
    assert len(habits_of(find("cpu"), program.avals).copies(dot)) == 1
    assert not habits_of(find("h100"), program.avals).copies(dot)


def test_on_cpu_a_poolings_derivative_holds_four_indices_an_element():
    def fun(x):
        return jnp.sum(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))

    program = trace(jax.grad(fun), (jnp.ones((2, 8, 8, 4)),)).program
    (pool,) = [e for e in program.equations if e.primitive.name == "select_and_scatter_add"]
    scratch = habits_of(find("cpu"), program.avals).scratch_bytes(pool)
    assert scratch == 4 * 4 * (2 * 8 * 8 * 4 + 2 * 4 * 4 * 4)
    assert not habits_of(find("v5e"), program.avals).scratch_bytes(pool)


def test_a_tpus_products_read_what_is_fused_into_them():
    def attention(q, k, v):
        scores = q @ k.T
        return jax.nn.softmax(scores) @ v, scores

    x = jax.ShapeDtypeStruct((512, 8), jnp.float32)
    program = trace(attention, (x, x, x)).program
    peaks = {}
    for name in ("v5e", "h100"):
        habits = habits_of(find(name), program.avals)
        size = lambda v: size_bytes(program.avals[v])  # noqa: E731
        peaks[name] = peak_bytes(program.equations, size, kept=program.outputs, habits=habits)
    scores = 512 * 512 * 4
    assert scores <= peaks["v5e"] < 1.2 * scores and peaks["h100"] >= 2 * scores
