"""How regions and blocks are named wherever a plan is shown."""

from collections.abc import Iterator, Sequence

from ckptsolvers import Keep
from ckptsolvers.schedule import Node

from jaxckpt.result._protocols import PlanLike


def runs(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Nodes one after the other, kept blocks in a row together."""
    run: list[Node] = []
    for node in nodes:
        if run and not (isinstance(node, Keep) and isinstance(run[-1], Keep)):
            yield run
            run = []
        run.append(node)
    if run:
        yield run


def span(start: int, stop: int, plan: PlanLike) -> str:
    """Blocks as a person reads them, with what they are."""
    blocks = f"block {start}" if stop == start + 1 else f"blocks {start}-{stop - 1}"
    first, last = plan.block_labels[start], plan.block_labels[stop - 1]
    return f"{blocks}  {first}" if first == last else f"{blocks}  {first} ... {last}"
