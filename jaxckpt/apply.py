"""A schedule becomes a function: the program's blocks, run inside nested `jax.checkpoint` regions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ckptsolvers import Keep, Schedule
from ckptsolvers.schedule import Node

from jaxckpt.kinds.cond import run_branches
from jaxckpt.kinds.scan import Run, run_loop
from jaxckpt.model.cut import Span, spans_at
from jaxckpt.model.tree import BranchPlan, LoopPart, LoopPlan, Saved
from jaxckpt.program.control_flow import Loop, branches_of, loop_of
from jaxckpt.program.interpret import evaluate, outputs_of
from jaxckpt.program.ir import Constant, Equation, Program


@functools.lru_cache(maxsize=4096)
def _policy(names: tuple[str, ...]) -> Callable[..., bool]:
    # JAX caches traces on the policy, and a new closure each time would defeat that.
    return jax.checkpoint_policies.save_only_these_names(*names)


def planned(
    program: Program,
    spans: Sequence[Span],
    schedule: Schedule,
    saved: Sequence[Saved],
    prefix: str = "jaxckpt",
    *,
    is_body: bool = False,
    is_forward_mode: bool = False,
) -> Callable[..., list[Any]]:
    """Return the program as a function that recomputes as scheduled when it is differentiated.

    Args:
        program: the flat program.
        spans: `[n]`, its blocks.
        schedule: what to keep and what to recompute.
        saved: `[n]`, what each kept block saves.
        prefix: what the names of saved values begin with, so that plans do not save each other's values.
        is_body: the program is a loop's body, whose forward and backward are loops of their own.
        is_forward_mode: it must have a derivative in forward mode too, which binomial loops have not: they are run as
            checkpointed ones.

    Returns:
        A function from the program's inputs to its outputs, both flat lists.
    """
    runner = _Runner(program, spans, saved, prefix, is_body, is_forward_mode)

    def fun(*inputs: Any) -> list[Any]:
        env = dict(zip(program.inputs, inputs, strict=True))
        runner.run(schedule.nodes, env)
        return outputs_of(program, env)

    return fun


def run_conditional(
    equations: Sequence[Equation], plan: BranchPlan, prefix: str, env: dict[int, Any], *, is_forward_mode: bool = False
) -> None:
    """Run a block that ends with a conditional, each branch as its plan says; adds what is made to the values."""
    *before, eqn = equations
    evaluate(before, env)
    operands = [x.value if isinstance(x, Constant) else env[x] for x in eqn.inputs]
    # A conditional whose branch is known is inlined by compilers, so nothing keeps forward and backward apart.
    bodies = [
        planned(
            branch.body,
            spans_at(branch.body, tree.blocks),
            tree.schedule,
            tree.saved,
            f"{prefix}.{i}",
            is_forward_mode=is_forward_mode,
        )
        for i, (branch, tree) in enumerate(zip(branches_of(eqn), plan.branches, strict=True))
    ]
    env.update(zip(eqn.outputs, run_branches(eqn, operands, bodies), strict=True))


class _Runner:
    def __init__(
        self,
        program: Program,
        spans: Sequence[Span],
        saved: Sequence[Saved],
        prefix: str,
        is_body: bool,
        is_forward_mode: bool,
    ):
        self.spans, self.saved, self.prefix, self.is_forward_mode = spans, saved, prefix, is_forward_mode
        # In a loop's body, nothing of an outermost region's recomputation can be merged with its first run.
        self.prevent_cse = not is_body
        self.last_reader: dict[int, int] = {}
        for k, span in enumerate(spans):
            self.last_reader.update(dict.fromkeys(span.inputs, k))
        self.last_reader.update({x: len(spans) for x in program.outputs if isinstance(x, int)})

    def run(self, nodes: Sequence[Node], env: dict[int, Any], *, is_inner: bool = False) -> None:
        for node in nodes:
            if isinstance(node, Keep):
                self._keep(node, env, is_inner)
            else:
                children = functools.partial(self.run, node.children, is_inner=True)
                self._region(node.start, node.stop, children, (), env, is_inner)

    def _keep(self, node: Keep, env: dict[int, Any], is_inner: bool) -> None:
        span, saved = self.spans[node.block], self.saved[node.block]
        if saved is None:
            evaluate(span.equations, env)
        elif isinstance(saved, LoopPlan):
            self._loop(node.block, saved, env)
        elif isinstance(saved, BranchPlan):
            prefix = f"{self.prefix}.{node.block}"
            run_conditional(span.equations, saved, prefix, env, is_forward_mode=self.is_forward_mode)
        else:
            names = {v: f"{self.prefix}.{node.block}.{i}" for i, v in enumerate(saved)}
            body = functools.partial(evaluate, span.equations, names=names)
            self._region(node.start, node.stop, body, tuple(names.values()), env, is_inner)

    def _loop(self, block: int, plan: LoopPlan, env: dict[int, Any]) -> None:
        *before, eqn = self.spans[block].equations
        evaluate(before, env)
        operands = [x.value if isinstance(x, Constant) else env[x] for x in eqn.inputs]
        runs = [self._run(loop_of(eqn), part, f"{self.prefix}.{block}.{i}") for i, part in enumerate(plan.parts)]
        env.update(zip(eqn.outputs, run_loop(eqn, operands, runs), strict=True))

    def _run(self, loop: Loop | None, part: LoopPart, prefix: str) -> Run:
        assert loop is not None, "only a scan has a plan of its own"
        lengths, num_states = part.lengths, part.num_states
        if num_states is not None and self.is_forward_mode:
            # A binomial loop has a derivative of its own, and in reverse only.
            num_states = None
        tree = part.body
        body = planned(
            loop.body,
            spans_at(loop.body, tree.blocks),
            tree.schedule,
            tree.saved,
            prefix,
            # A binomial loop runs an iteration's forward and backward together.
            is_body=num_states is None,
            is_forward_mode=self.is_forward_mode,
        )
        return Run(lengths=lengths, body=body, num_states=num_states)

    def _region(
        self, start: int, stop: int, body: Callable, names: tuple[str, ...], env: dict[int, Any], is_inner: bool
    ) -> None:
        """Run blocks start..stop-1 inside one `jax.checkpoint`, on what they read, for what is read after them."""
        made = {v for span in self.spans[start:stop] for v in span.outputs}
        reads = list(dict.fromkeys(v for span in self.spans[start:stop] for v in span.inputs if v not in made))
        wanted = [v for span in self.spans[start:stop] for v in span.outputs if self.last_reader[v] >= stop]

        def inside(*inputs: Any) -> list[Any]:
            inner = dict(zip(reads, inputs, strict=True))
            body(inner)
            return [inner[v] for v in wanted]

        policy = _policy(names) if names else None
        checkpointed = jax.checkpoint(inside, policy=policy, prevent_cse=self.prevent_cse or is_inner)
        env.update(zip(wanted, checkpointed(*(env[v] for v in reads)), strict=True))
