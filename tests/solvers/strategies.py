"""Problems that Hypothesis makes: chains, and blocks with skips, several outputs, several options, dead outputs."""

from ckptsolvers import Block, Option, Problem, Value, chain
from ckptsolvers.dag import Dag, Node
from hypothesis import strategies as st

small = st.integers(0, 4)


@st.composite
def chains(draw, max_blocks=6, max_options=2):
    n = draw(st.integers(1, max_blocks))

    def row(values=small):
        return draw(st.lists(values, min_size=n, max_size=n))

    return chain(
        row(st.integers(1, 4)),
        row(st.integers(1, 4)),
        cotangent_bytes=row(),
        forward_transient_bytes=row(),
        backward_transient_bytes=row(),
        options=[draw(st.lists(st.tuples(small, small), min_size=1, max_size=max_options)) for _ in range(n)],
    )


@st.composite
def problems(draw, max_blocks=5, max_options=2):
    n = draw(st.integers(1, max_blocks))
    values = [value for k in range(n) for value in draw(st.lists(_values(n, k), max_size=2))]
    blocks = []
    for k in range(n):
        num_outputs = sum(v.made_by == k for v in values)
        num_inputs = sum(k in v.read_by for v in values)
        options = tuple(draw(_options(num_outputs, num_inputs, o)) for o in range(draw(st.integers(1, max_options))))
        blocks.append(Block(forward_times=draw(_times(num_outputs)), forward_peak_bytes=draw(small), options=options))
    return Problem(blocks=tuple(blocks), values=tuple(values))


def _values(n, k):
    some = st.sets(st.integers(k + 1, n), min_size=1, max_size=3).map(lambda r: tuple(sorted(r)))
    readers = st.one_of(st.just((k + 1,)), some)
    return st.builds(Value, size_bytes=st.integers(1, 4), made_by=st.just(k), read_by=readers, cotangent_bytes=small)


def _times(num_outputs):
    return st.lists(small, min_size=num_outputs + 1, max_size=num_outputs + 1).map(lambda t: tuple(sorted(t)))


def _options(num_outputs, num_inputs, o):
    return st.builds(
        Option,
        name=st.just(f"option {o}"),
        saved_bytes=small,
        recompute_time=small,
        forward_times=_times(num_outputs),
        forward_peak_bytes=small,
        backward_peak_bytes=small,
        saved_outputs=st.one_of(st.just(()), _some(num_outputs)),
        unread_inputs=st.one_of(st.just(tuple(range(num_inputs))), _some(num_inputs)),
    )


def _some(count):
    return st.sets(st.integers(0, count - 1)).map(lambda s: tuple(sorted(s))) if count else st.just(())


@st.composite
def dags(draw, max_nodes=7):
    n = draw(st.integers(1, max_nodes))
    nodes = []
    for i in range(n):
        reads = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        nodes.append(
            Node(
                size_bytes=draw(st.integers(0, 3)),
                time=draw(st.integers(0, 3)),
                reads=tuple(sorted(reads)),
                transient_bytes=draw(st.integers(0, 1)),
                is_once=draw(st.integers(0, 5)) == 0,
            )
        )
    return Dag(tuple(nodes))


@st.composite
def skip_chains(draw, max_blocks=6):
    """Blocks with one output each, which the next block reads and perhaps later ones: residuals and long skips."""
    n = draw(st.integers(1, max_blocks))
    values, blocks = [], []
    for k in range(n):
        later = draw(st.sets(st.integers(k + 1, n - 1), max_size=1)) if k < n - 1 else set()
        size, cotangent, time = draw(st.integers(1, 4)), draw(st.integers(0, 4)), draw(st.integers(1, 4))
        values.append(
            Value(size_bytes=size, made_by=k, read_by=tuple(sorted({k + 1} | later)), cotangent_bytes=cotangent)
        )
        own = draw(st.booleans())
        blocks.append((size, time, own))
    made = []
    for k, (size, time, own) in enumerate(blocks):
        grads = sum(v.cotangent_bytes for v in values if v.made_by == k or k in v.read_by)
        option = Option(
            name="plain",
            saved_bytes=0,
            saved_outputs=(0,) if own else (),
            recompute_time=draw(small),
            forward_times=(time if own else 0, time),
            forward_peak_bytes=size + draw(st.just(1)),
            backward_peak_bytes=grads + (size if own else 0),
            last_forward_peak_bytes=draw(st.sampled_from((0, size + 3))),
        )
        made.append(Block(forward_times=(0, time), forward_peak_bytes=size + 1, options=(option,)))
    return Problem(blocks=tuple(made), values=tuple(values))


def replay(actions, num_steps, num_states):
    """Check that actions reverse a loop of so many steps, holding so many states at most."""
    held, at, due = set(), 0, num_steps - 1
    for action in actions:
        if action.kind == "store":
            assert at == action.step and at not in held
            held.add(at)
        elif action.kind == "restore":
            assert action.step in held
            at = action.step
        elif action.kind == "drop":
            held.remove(action.step)
        elif action.kind == "advance":
            assert at == action.step
            at = action.stop
        else:
            assert at == action.step == due
            due -= 1
        assert len(held) <= num_states
    assert due == -1 and not held
