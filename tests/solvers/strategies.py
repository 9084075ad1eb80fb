"""Problems that Hypothesis makes: chains, and blocks with skips, several outputs, several options, dead outputs."""

from ckptsolvers import Block, Option, Problem, Value, chain
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
        options = tuple(draw(_options(num_outputs, o)) for o in range(draw(st.integers(1, max_options))))
        blocks.append(Block(forward_times=draw(_times(num_outputs)), forward_peak_bytes=draw(small), options=options))
    return Problem(blocks=tuple(blocks), values=tuple(values))


def _values(n, k):
    readers = st.sets(st.integers(k + 1, n), min_size=1, max_size=3).map(lambda r: tuple(sorted(r)))
    return st.builds(Value, size_bytes=st.integers(1, 4), made_by=st.just(k), read_by=readers, cotangent_bytes=small)


def _times(num_outputs):
    return st.lists(small, min_size=num_outputs + 1, max_size=num_outputs + 1).map(lambda t: tuple(sorted(t)))


def _options(num_outputs, o):
    return st.builds(
        Option,
        name=st.just(f"option {o}"),
        saved_bytes=small,
        recompute_time=small,
        forward_times=_times(num_outputs),
        forward_peak_bytes=small,
        backward_peak_bytes=small,
        saved_outputs=st.sets(st.integers(0, num_outputs - 1)).map(lambda s: tuple(sorted(s)))
        if num_outputs
        else st.just(()),
    )
