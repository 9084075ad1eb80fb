"""A schedule becomes a function: the program's blocks, run inside nested `jax.checkpoint` regions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ckptsolvers import Keep, Schedule
from ckptsolvers.schedule import Node

from jaxckpt.cuts import Span
from jaxckpt.trace import Program, evaluate, outputs_of

# A group of values to save in a block: None leaves the block to JAX, without a checkpoint.
Saved = tuple[int, ...] | None


@functools.lru_cache(maxsize=4096)
def _policy(names: tuple[str, ...]) -> Callable[..., bool]:
    # JAX caches traces on the policy, and a new closure each time would defeat that.
    return jax.checkpoint_policies.save_only_these_names(*names)


def planned(
    program: Program, spans: Sequence[Span], schedule: Schedule, saved: Sequence[Saved], prefix: str = "jaxckpt"
) -> Callable[..., list[Any]]:
    """Return the program as a function that recomputes as scheduled when it is differentiated.

    Args:
        program: the flat program.
        spans: `[n]`, its blocks.
        schedule: what to keep and what to recompute.
        saved: `[n]`, what each kept block saves.
        prefix: what the names of saved values begin with, so that plans do not save each other's values.

    Returns:
        A function from the program's inputs to its outputs, both flat lists.
    """
    runner = _Runner(program, spans, saved, prefix)

    def fun(*inputs: Any) -> list[Any]:
        env = dict(zip(program.inputs, inputs, strict=True))
        runner.run(schedule.nodes, env)
        return outputs_of(program, env)

    return fun


class _Runner:
    def __init__(self, program: Program, spans: Sequence[Span], saved: Sequence[Saved], prefix: str):
        self.spans, self.saved, self.prefix = spans, saved, prefix
        self.last_reader: dict[int, int] = {}
        for k, span in enumerate(spans):
            self.last_reader.update(dict.fromkeys(span.inputs, k))
        self.last_reader.update({x: len(spans) for x in program.outputs if isinstance(x, int)})

    def run(self, nodes: Sequence[Node], env: dict[int, Any]) -> None:
        for node in nodes:
            if isinstance(node, Keep):
                self._keep(node, env)
            else:
                self._region(node.start, node.stop, lambda inner, node=node: self.run(node.children, inner), (), env)

    def _keep(self, node: Keep, env: dict[int, Any]) -> None:
        span, saved = self.spans[node.block], self.saved[node.block]
        if saved is None:
            evaluate(span.equations, env)
            return
        names = {v: f"{self.prefix}.{node.block}.{i}" for i, v in enumerate(saved)}
        self._region(
            node.start, node.stop, lambda inner: evaluate(span.equations, inner, names), tuple(names.values()), env
        )

    def _region(self, start: int, stop: int, body: Callable, names: tuple[str, ...], env: dict[int, Any]) -> None:
        """Run blocks start..stop-1 inside one `jax.checkpoint`, on what they read, for what is read after them."""
        made = {v for span in self.spans[start:stop] for v in span.outputs}
        reads = list(dict.fromkeys(v for span in self.spans[start:stop] for v in span.inputs if v not in made))
        wanted = [v for span in self.spans[start:stop] for v in span.outputs if self.last_reader[v] >= stop]

        def inside(*inputs: Any) -> list[Any]:
            inner = dict(zip(reads, inputs, strict=True))
            body(inner)
            return [inner[v] for v in wanted]

        results = jax.checkpoint(inside, policy=_policy(names) if names else None)(*(env[v] for v in reads))
        env.update(zip(wanted, results, strict=True))
