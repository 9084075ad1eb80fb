"""The block problem: what to save and what to recompute, over blocks in a fixed order.

A program is cut into blocks 0..n-1. A `Value` is made by one block and read by later ones; the values alive at cut i
(made before block i, read at or after it) are L(i) in the papers' notation. A chain is the case of one value per cut,
and skip connections are values with more than one reader.

Times and bytes are integers in whatever unit the caller likes, as long as it is the same everywhere. What is alive
before block 0 (arguments) is outside the problem: it costs nothing to hold and is always there.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptsolvers.errors import InvalidProblemError

_LARGEST = 2**60  # three such sums still fit in a signed 64-bit integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A value that crosses a cut.

    Attributes:
        size_bytes: what holding it costs.
        made_by: the block that makes it.
        read_by: the blocks that read it, ascending; the number of blocks stands for the end of the program.
        cotangent_bytes: what its cotangent costs while it waits for the block's backward; 0 where there is none.
    """

    size_bytes: int
    made_by: int
    read_by: tuple[int, ...]
    cotangent_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to keep a block for its backward: what to save of it, and what recomputing the rest costs.

    Attributes:
        name: for reports.
        saved_bytes: interior values held from the block's forward to its backward, its outputs not among them.
        host_bytes: interior values and inputs held on the host meanwhile; they cost the device nothing.
        saved_outputs: positions, among the block's outputs, of those its own backward reads.
        recompute_time: time to make what the backward needs from the block's inputs and what was saved.
        forward_times: `[num_outputs + 1]`, time to make the saved values and the first j outputs. Outputs stand in
            the order of the first block that reads them.
        forward_peak_bytes: most bytes alive at once during the forward, beyond what was alive before it.
        backward_peak_bytes: the same for the backward, with what was saved, the cotangents of the block's outputs
            and those of its inputs among it.
        unread_inputs: positions, among the block's inputs, of those neither its backward nor what it makes again
            reads. One that the block before it made, kept under an option without saved outputs, is dropped.
        last_forward_peak_bytes: the same as `forward_peak_bytes` where the block is the last one before its backward,
            so that a compiler may run what of the backward is ready beside the forward; 0 where that does not happen.
    """

    name: str
    saved_bytes: int
    recompute_time: int
    forward_times: tuple[int, ...]
    forward_peak_bytes: int
    backward_peak_bytes: int
    saved_outputs: tuple[int, ...] = ()
    unread_inputs: tuple[int, ...] = ()
    last_forward_peak_bytes: int = 0
    host_bytes: int = 0

    def peak_until(self, block: int, until: int) -> int:
        """Its forward's peak as the given block, in an interval that ends before block `until`."""
        return max(self.forward_peak_bytes, self.last_forward_peak_bytes if block + 1 == until else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A run of equations that is kept or recomputed as a whole.

    Attributes:
        forward_times: `[num_outputs + 1]`, time to make the first j outputs, in the order of their first reader.
        forward_peak_bytes: most bytes alive at once while it runs and nothing of it is saved, beyond what was alive
            before it, outputs included.
        options: the ways to keep it, at least one.
    """

    forward_times: tuple[int, ...]
    forward_peak_bytes: int
    options: tuple[Option, ...]

    @property
    def forward_time(self) -> int:
        """Time to make all outputs."""
        return self.forward_times[-1]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Blocks in order, and the values that cross their cuts.

    Attributes:
        blocks: `[n]`.
        values: in any order.
        outputs: `[n]`, for each block its values, as positions in `values`, in the order of their first reader.
        inputs: `[n]`, for each block the values it reads, ascending.

    Raises:
        InvalidProblemError: a negative or overflowing number, a reader that does not come after the maker, a block
            without options, or times whose number is not the number of outputs plus one.
    """

    blocks: tuple[Block, ...]
    values: tuple[Value, ...]
    outputs: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    inputs: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Index the values by block and check every number."""
        n = len(self.blocks)
        if n == 0:
            raise InvalidProblemError("a problem needs at least one block; blocks is empty")
        outputs: list[list[int]] = [[] for _ in range(n)]
        inputs: list[list[int]] = [[] for _ in range(n)]
        for v, value in enumerate(self.values):
            _check_value(v, value, n)
            outputs[value.made_by].append(v)
            for reader in value.read_by:
                if reader < n:
                    inputs[reader].append(v)
        for made in outputs:
            made.sort(key=lambda v: (self.values[v].read_by[0], v))
        for k, block in enumerate(self.blocks):
            _check_block(k, block, len(outputs[k]), len(inputs[k]))
        times = sum(2 * max(o.forward_times[-1] + o.recompute_time for o in b.options) for b in self.blocks)
        sizes = sum(v.size_bytes + v.cotangent_bytes for v in self.values)
        sizes += sum(max(o.backward_peak_bytes + o.saved_bytes for o in b.options) for b in self.blocks)
        if times * n >= _LARGEST or sizes >= _LARGEST:
            raise InvalidProblemError(f"sums of bytes or times overflow 64 bits: {sizes=:,}, {times=:,} for {n} blocks")
        object.__setattr__(self, "outputs", tuple(map(tuple, outputs)))
        object.__setattr__(self, "inputs", tuple(map(tuple, inputs)))

    @property
    def num_blocks(self) -> int:
        """Number of blocks, n."""
        return len(self.blocks)

    @property
    def forward_time(self) -> int:
        """Time of one plain forward sweep."""
        return sum(block.forward_time for block in self.blocks)

    def unread(self, block: int, option: int) -> set[int]:
        """The values that a block reads when it runs forward, and under this option never again."""
        return {self.inputs[block][p] for p in self.blocks[block].options[option].unread_inputs}

    def droppable(self, block: int, option: int, until: int) -> list[int]:
        """What the block before made for this one alone, and this one, kept under the option, does not read again."""
        if block == 0 or not self.blocks[block].options[option].unread_inputs:
            return []
        unread = self.unread(block, option)
        made = self.outputs[block - 1]
        return [v for v in made if v in unread and not self.is_wanted(self.values[v], block, until)]

    def is_wanted(self, value: Value, after: int, until: int) -> bool:
        """Whether a block in `(after, until)` reads the value, or the program's end does when `until` is n."""
        i = bisect_right(value.read_by, after)
        return i < len(value.read_by) and (value.read_by[i] < until or until == self.num_blocks)

    def num_wanted(self, block: int, until: int) -> int:
        """How many of a block's outputs are read before block `until`; they are the first ones."""
        outputs = self.outputs[block]
        # Every value is read by some later block, or by the program's end.
        return len(outputs) if until == self.num_blocks else sum(self.values[v].read_by[0] < until for v in outputs)


def chain(
    forward_times: Sequence[int],
    sizes_bytes: Sequence[int],
    *,
    cotangent_bytes: Sequence[int] | None = None,
    forward_transient_bytes: Sequence[int] | None = None,
    backward_transient_bytes: Sequence[int] | None = None,
    options: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Problem:
    """Build a chain: block k reads the output of block k-1 and nothing else.

    Args:
        forward_times: `[n]`, time of each block.
        sizes_bytes: `[n]`, bytes of each block's output; the last one is the program's.
        cotangent_bytes: `[n]`, of each output's cotangent; none by default.
        forward_transient_bytes: `[n]`, beyond the output; none by default.
        backward_transient_bytes: `[n]`, beyond what is saved and the cotangents; none by default.
        options: for each block, pairs (bytes saved, time to make the rest again); by default the one pair
            (0, 0), which saves nothing and counts the block's own rebuild in its backward.

    Returns:
        The problem.

    Raises:
        InvalidProblemError: lengths that differ, or what `Problem` refuses.

    Example:
        >>> chain([1, 1, 1], [4, 4, 4]).num_blocks
        3
    """
    n = len(forward_times)
    zeros = [0] * n
    cts = list(cotangent_bytes or zeros)
    fwd_extra, bwd_extra = list(forward_transient_bytes or zeros), list(backward_transient_bytes or zeros)
    choices = options or [[(0, 0)]] * n
    if not all(len(x) == n for x in (sizes_bytes, cts, fwd_extra, bwd_extra, choices)):
        raise InvalidProblemError(f"every list of a chain must have one entry per block; forward_times has {n}")
    check_numbers("sizes_bytes", *sizes_bytes)
    check_numbers("forward_times", *forward_times)
    check_numbers("a transient or a cotangent", *cts, *fwd_extra, *bwd_extra)
    blocks = []
    for k in range(n):
        fwd_peak = sizes_bytes[k] + fwd_extra[k]
        grads = cts[k] + (cts[k - 1] if k else 0) + bwd_extra[k]
        blocks.append(
            Block(
                forward_times=(0, forward_times[k]),
                forward_peak_bytes=fwd_peak,
                options=tuple(
                    Option(
                        name=f"save {saved}",
                        saved_bytes=saved,
                        recompute_time=again,
                        forward_times=(forward_times[k] if saved else 0, forward_times[k]),
                        forward_peak_bytes=fwd_peak + saved,
                        backward_peak_bytes=saved + grads,
                    )
                    for saved, again in choices[k]
                ),
            )
        )
    values = tuple(
        Value(size_bytes=sizes_bytes[k], made_by=k, read_by=(k + 1,), cotangent_bytes=cts[k]) for k in range(n)
    )
    return Problem(blocks=tuple(blocks), values=values)


def _check_value(v: int, value: Value, n: int) -> None:
    if not 0 <= value.made_by < n:
        raise InvalidProblemError(f"values[{v}].made_by={value.made_by} is not one of the {n} blocks")
    readers = value.read_by
    if not readers or list(readers) != sorted(set(readers)) or readers[0] <= value.made_by or readers[-1] > n:
        raise InvalidProblemError(
            f"values[{v}].read_by={readers} must be ascending blocks after made_by={value.made_by}, at most {n}"
        )
    check_numbers(f"values[{v}]", value.size_bytes, value.cotangent_bytes)


def _check_block(k: int, block: Block, num_outputs: int, num_inputs: int) -> None:
    if not block.options:
        raise InvalidProblemError(f"blocks[{k}] has no options; give at least one way to keep it")
    for where, item in [(f"blocks[{k}]", block), *((f"blocks[{k}].options[{o}]", x) for o, x in _numbered(block))]:
        times = item.forward_times
        if len(times) != num_outputs + 1 or list(times) != sorted(times):
            raise InvalidProblemError(f"{where}.forward_times={times} must be {num_outputs + 1} ascending times")
        check_numbers(where, *times, item.forward_peak_bytes)
    for o, option in _numbered(block):
        check_numbers(
            f"blocks[{k}].options[{o}]",
            *(
                option.saved_bytes,
                option.recompute_time,
                option.backward_peak_bytes,
                option.last_forward_peak_bytes,
                option.host_bytes,
            ),
        )
        if any(not 0 <= p < num_outputs for p in option.saved_outputs):
            raise InvalidProblemError(f"blocks[{k}].options[{o}].saved_outputs={option.saved_outputs} names no output")
        if any(not 0 <= p < num_inputs for p in option.unread_inputs):
            raise InvalidProblemError(f"blocks[{k}].options[{o}].unread_inputs={option.unread_inputs} names no input")


def _numbered(block: Block) -> list[tuple[int, Option]]:
    return list(enumerate(block.options))


def check_numbers(where: str, *numbers: int) -> None:
    """Refuse a size or a time that is no integer, negative, or so large that sums overflow.

    Raises:
        InvalidProblemError: with where it stands.
    """
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise InvalidProblemError(f"{where} holds {number!r}; sizes and times are Python integers")
        if not 0 <= number < _LARGEST:
            raise InvalidProblemError(f"{where} holds {number}, which is negative or above 2**60")
