"""Peak bytes of a few equations, by hand. Arrays are 8 x 8 float32, 256 bytes; arguments are free."""

import jax
import jax.numpy as jnp

from jaxckpt.memory.across import held_across
from jaxckpt.memory.fusion import Copy
from jaxckpt.memory.peak import _packed_bytes, peak_bytes
from jaxckpt.program.ir import size_bytes
from jaxckpt.program.trace import trace
from jaxckpt.targets.chip import find_target
from jaxckpt.targets.rules import FusionRules

X = jax.ShapeDtypeStruct((8, 8), jnp.float32)
A = 256


def peak(fun, *args, kept=None, held=(), stacked=(), external=()):
    program = trace(fun, args).program
    return peak_bytes(
        program.equations,
        lambda v: size_bytes(program.avals[v]),
        kept=program.outputs if kept is None else kept,
        held=held,
        stacked=[program.inputs[i] for i in stacked],
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


def test_a_slice_of_a_stack_is_a_buffer_for_what_is_not_fused_only():
    assert peak(lambda x: jnp.sum(x * 2), X, stacked=[0]) == 4
    assert peak(lambda x, w: x @ w, X, X, stacked=[0]) == 2 * A


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


def across(fun, *args, num_forward):
    """The program, and what is held between its first equations and the others."""
    program = trace(fun, args).program
    backward = program.equations[num_forward:]
    made = {v for eqn in program.equations[:num_forward] for v in eqn.outputs}
    found = held_across(
        program.equations[:num_forward],
        backward,
        lambda v: size_bytes(program.avals[v]),
        results=(),
        cotangents={v for eqn in backward for v in eqn.reads} - made,
        kept=(),
        rules=FusionRules(),
    )
    return program, found


def test_across_is_what_the_backward_reads_of_the_forward():
    program, found = across(lambda x, w, v: jnp.sum(jnp.tanh(x @ w) @ v), X, X, X, num_forward=2)
    assert found.values == set(program.equations[1].outputs)


def test_a_fused_value_across_is_made_again_from_its_buffer():
    program, found = across(lambda x, w: jnp.sum((x @ w) * 2 + 1), X, X, num_forward=2)
    assert found.values == set(program.equations[0].outputs)
    assert found.forward_peak_bytes == A


def test_a_copy_across_stands_for_what_only_it_reads():
    def fun(x, w, v):
        y = x @ w
        return v @ y

    program = trace(fun, (X, X, X)).program
    first, second = (eqn for eqn in program.equations if eqn.primitive.name == "dot_general")
    rules = FusionRules(copies=lambda eqn: first.outputs if eqn is second else ())
    found = held_across([first], [second], lambda v: A, results=(), cotangents=program.inputs[2:], kept=(), rules=rules)
    assert not found.values
    assert found.copies == {Copy(first.outputs[0], second.outputs[0])}
    assert found.forward_peak_bytes == 2 * A


CPU = FusionRules(kernel_holds=lambda eqn: eqn.primitive.name != "select_n")


def cpu_peak(fun, *args):
    program = trace(fun, args).program
    return peak_bytes(program.equations, lambda v: size_bytes(program.avals[v]), kept=program.outputs, rules=CPU)


def test_a_reductions_kernel_does_arithmetic_itself():
    assert cpu_peak(lambda x: jnp.sum(jnp.tanh(x * 2) + 1), X) == 4
    assert cpu_peak(lambda x: jnp.sum(jnp.where(x > 0, x, 0.0)), X) >= A


def test_what_a_reduction_shares_is_a_buffer():
    def fun(x, w):
        y = x - w
        return jnp.sum(y * y), jnp.max(y + 1)

    assert cpu_peak(fun, X, X) >= A
    # A row that two products repeat is written out once.
    row, wide = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    times = lambda x, r: jax.lax.mul(x, jax.lax.broadcast_in_dim(r, (64, 64), (1,)))  # noqa: E731
    assert cpu_peak(lambda x, r: jnp.sum(times(x, r)), wide, row) == 4
    shared = lambda x, y, r: (lambda b: (jnp.sum(x * b), jnp.sum(y * b)))(jnp.broadcast_to(r, (64, 64)))  # noqa: E731
    assert cpu_peak(shared, wide, wide, row) >= 64 * 64 * 4


def test_what_is_ready_first_runs_first():
    def fun(x, w, v):
        y = x @ w
        for _ in range(4):
            y = y @ w
        return jnp.sum((v @ w) * jnp.sum(y))

    program = trace(fun, (X, X, X)).program
    size = lambda v: size_bytes(program.avals[v])  # noqa: E731
    found = [
        peak_bytes(program.equations, size, kept=program.outputs, rules=FusionRules(is_breadth_first=flag)) // A
        for flag in (False, True)
    ]
    assert found == [2, 3]


def test_a_heap_has_gaps():
    # Two large buffers, one after the other, share a place; what spans both cannot use the gap between them.
    assert _packed_bytes([(4, 0, 1), (4, 2, 3)]) == 4
    assert _packed_bytes([(4, 0, 2), (4, 2, 3)]) == 8
    # The small one that lives through both lies on top, although only five bytes are there at any time.
    assert _packed_bytes([(4, 0, 1), (4, 2, 3), (1, 0, 3)]) == 5
    assert _packed_bytes([(3, 0, 1), (3, 1, 2), (2, 2, 4), (2, 1, 1), (2, 2, 3)]) == 8


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
            program.equations,
            lambda v: size_bytes(program.avals[v]),
            rules=find_target(name).compiler.rules(program.avals),
        )
        for name in ("h100", "cpu")
    ]
    assert peaks[1] - peaks[0] in (0, x.nbytes)
    dot = next(e for e in program.equations if e.primitive.name == "dot_general")
    assert len(find_target("cpu").compiler.rules(program.avals).copies(dot)) == 1
    assert not find_target("h100").compiler.rules(program.avals).copies(dot)


def test_on_cpu_a_poolings_derivative_holds_four_indices_an_element():
    def fun(x):
        return jnp.sum(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))

    program = trace(jax.grad(fun), (jnp.ones((2, 8, 8, 4)),)).program
    (pool,) = [e for e in program.equations if e.primitive.name == "select_and_scatter_add"]
    scratch = find_target("cpu").compiler.rules(program.avals).scratch_bytes(pool)
    assert scratch == 4 * 4 * (2 * 8 * 8 * 4 + 2 * 4 * 4 * 4)
    assert not find_target("v5e").compiler.rules(program.avals).scratch_bytes(pool)


def test_a_tpus_products_read_what_is_fused_into_them():
    def attention(q, k, v):
        scores = q @ k.T
        return jax.nn.softmax(scores) @ v, scores

    x = jax.ShapeDtypeStruct((512, 8), jnp.float32)
    program = trace(attention, (x, x, x)).program
    peaks = {}
    for name in ("v5e", "h100"):
        rules = find_target(name).compiler.rules(program.avals)
        size = lambda v: size_bytes(program.avals[v])  # noqa: E731
        peaks[name] = peak_bytes(program.equations, size, kept=program.outputs, rules=rules)
    scores = 512 * 512 * 4
    assert scores <= peaks["v5e"] < 1.2 * scores and peaks["h100"] >= 2 * scores


def test_a_scatter_that_is_added_to_something_scatters_into_that():
    def loss(logits, labels):
        picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=1) - picked)

    specs = jax.ShapeDtypeStruct((64, 512), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    program = trace(jax.grad(loss), specs).program
    size = lambda v: size_bytes(program.avals[v])  # noqa: E731
    for name, most in (("cpu", 2.2), ("h100", 1.2)):
        rules = find_target(name).compiler.rules(program.avals, program.equations)
        assert len(rules.scatters) == 1
        # The exponentials, where they are not made again, and the gradient, but no zeros to scatter into.
        peak = peak_bytes(program.equations, size, kept=program.outputs, rules=rules)
        assert size(program.outputs[0]) <= peak <= most * size(program.outputs[0])
        scatter = next(e for e in program.equations if e.primitive.name == "scatter-add")
        assert not rules.scratch_bytes(scatter)


def test_what_is_costly_is_made_again_on_gpus_for_each_reader():
    def fun(x, ct):
        scores = x @ x
        weights = jnp.exp(scores)
        return jnp.sum(weights), scores, (ct * weights) @ x

    spec = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    program = trace(fun, (spec, spec)).program
    backward = [e for e in program.equations if e.outputs[0] == program.outputs[2] or program.inputs[1] in e.reads]
    forward = [e for e in program.equations if e not in backward]
    held = {}
    for name in ("cpu", "h100"):
        across = held_across(
            *(forward, backward, lambda v: size_bytes(program.avals[v])),
            results=program.outputs[:2],
            cotangents=[program.inputs[1]],
            kept=[program.outputs[2]],
            rules=find_target(name).compiler.rules(program.avals),
        )
        held[name] = {v for v in across.values if program.avals[v].shape == (256, 256)}
    scores, (weights,) = program.outputs[1], next(e for e in forward if e.primitive.name == "exp").outputs
    assert held == {"cpu": {weights}, "h100": {scores}}
