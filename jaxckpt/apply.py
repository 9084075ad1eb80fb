"""A schedule becomes a function: the program's blocks, run inside nested `jax.checkpoint` regions."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from ckptsolvers import Keep, Schedule
from ckptsolvers.schedule import Node
from jax.ad_checkpoint import checkpoint_name

from jaxckpt.errors import JaxckptWarning
from jaxckpt.kinds.base import KeptBlock, kind_named
from jaxckpt.model.cut import Span, spans_at
from jaxckpt.model.option import NOTHING_SAVED, Place, Save
from jaxckpt.model.tree import Tree
from jaxckpt.program.interpret import outputs_of
from jaxckpt.program.ir import Program

# JAX's names of kinds of memory.
_DEVICE_MEMORY, _HOST_MEMORY = "device", "pinned_host"
# Set where what a plan sends to the host stays on the device: JAX cannot transpose such a copy, so what is
# differentiated in reverse twice has none.
ON_DEVICE = jax.make_user_context(False)


@functools.cache
def _warn_on_device() -> None:
    warnings.warn(
        "what a plan sends to the host stays on the device where it is differentiated in reverse twice, which JAX "
        "cannot do with copies to the host",
        JaxckptWarning,
        3,
    )


@functools.lru_cache(maxsize=4096)
def _policy(places: tuple[tuple[str, Place], ...]) -> Callable[..., bool]:
    """A policy that saves values at their places, by name."""
    names = {place: [name for name, at in places if at is place] for place in Place}
    # JAX caches traces on the policy, and a new closure each time would defeat that.
    if not names[Place.HOST]:
        return jax.checkpoint_policies.save_only_these_names(*names[Place.DEVICE])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=names[Place.DEVICE],
        names_which_can_be_offloaded=names[Place.HOST],
        offload_src=_DEVICE_MEMORY,
        offload_dst=_HOST_MEMORY,
    )


@dataclass(frozen=True, slots=True)
class Application:
    """Runs programs under plans.

    Attributes:
        is_forward_mode: what is run must have a derivative in forward mode too, which binomial loops have not: they
            are run as checkpointed ones.
    """

    is_forward_mode: bool = False

    def function(self, program: Program, tree: Tree, prefix: str, *, is_body: bool = False) -> Callable[..., list[Any]]:
        """A program under a plan, as a function of flat inputs.

        Args:
            program: the flat program.
            tree: its plan.
            prefix: what the names of saved values begin with, so that plans do not save each other's values.
            is_body: the program is a loop's body, whose forward and backward are loops of their own.
        """
        spans = spans_at(program, tree.blocks)
        return self.planned(program, spans, tree.schedule, tree.saved, prefix, is_body=is_body, host=tree.host)

    def planned(
        self,
        program: Program,
        spans: Sequence[Span],
        schedule: Schedule,
        saved: Sequence[Save],
        prefix: str,
        *,
        is_body: bool = False,
        host: Sequence[int] = (),
    ) -> Callable[..., list[Any]]:
        """The same for blocks that are there already, `[n]` spans and what each of them saves."""
        runner = _Runner(program, spans, saved, prefix, self, is_body, host)

        def fun(*inputs: Any) -> list[Any]:
            env = dict(zip(program.inputs, inputs, strict=True))
            runner.run(schedule.nodes, env)
            return outputs_of(program, env)

        return fun


def planned(
    program: Program,
    spans: Sequence[Span],
    schedule: Schedule,
    saved: Sequence[Save],
    prefix: str = "jaxckpt",
    *,
    is_forward_mode: bool = False,
) -> Callable[..., list[Any]]:
    """Return the program as a function that recomputes as scheduled when it is differentiated.

    Args:
        program: the flat program.
        spans: `[n]`, its blocks.
        schedule: what to keep and what to recompute.
        saved: `[n]`, what each kept block saves.
        prefix: what the names of saved values begin with.
        is_forward_mode: it must have a derivative in forward mode too.

    Returns:
        A function from the program's inputs to its outputs, both flat lists.
    """
    return Application(is_forward_mode).planned(program, spans, schedule, saved, prefix)


class _Runner:
    def __init__(
        self,
        program: Program,
        spans: Sequence[Span],
        saved: Sequence[Save],
        prefix: str,
        applier: Application,
        is_body: bool,
        host: Sequence[int] = (),
    ):
        # Of inputs those that one region around everything reads from the host.
        self.host = {v: f"{prefix}.input.{i}" for i, v in enumerate(host)}
        self.spans, self.saved, self.prefix, self.applier = spans, saved, prefix, applier
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
                self._region(node.start, node.stop, env, is_inner, children)

    def _keep(self, node: Keep, env: dict[int, Any], is_inner: bool) -> None:
        save = self.saved[node.block]
        block = KeptBlock(
            equations=self.spans[node.block].equations,
            save=save,
            values=env,
            prefix=f"{self.prefix}.{node.block}",
            checkpointed=functools.partial(self._region, node.start, node.stop, env, is_inner),
            applier=self.applier,
        )
        kind_named(save.kind).run(block)

    def _region(
        self,
        start: int,
        stop: int,
        env: dict[int, Any],
        is_inner: bool,
        body: Callable[[dict[int, Any]], None],
        places: Mapping[str, Place] = NOTHING_SAVED,
    ) -> None:
        """Run blocks start..stop-1 inside one `jax.checkpoint`, on what they read, for what is read after them.

        Args:
            start: the first block.
            stop: the one after the last.
            env: values of the program so far; those read after the blocks are added.
            is_inner: another checkpoint is around this one.
            body: adds what the blocks make to a dict of values.
            places: where values are saved, by name.
        """
        made = {v for span in self.spans[start:stop] for v in span.outputs}
        reads = list(dict.fromkeys(v for span in self.spans[start:stop] for v in span.inputs if v not in made))
        wanted = [v for span in self.spans[start:stop] for v in span.outputs if self.last_reader[v] >= stop]

        def inside(*inputs: Any) -> list[Any]:
            inner = dict(zip(reads, inputs, strict=True))
            # A name counts where it is one of the region's own values, so inputs are named inside.
            inner |= {v: checkpoint_name(inner[v], name) for v, name in named.items()}
            body(inner)
            return [inner[v] for v in wanted]

        named = {} if is_inner else {v: name for v, name in self.host.items() if v in reads}
        places = {**places, **dict.fromkeys(named.values(), Place.HOST)}
        if ON_DEVICE.value and Place.HOST in places.values():
            _warn_on_device()
            places = dict.fromkeys(places, Place.DEVICE)
        policy = _policy(tuple(places.items())) if places else None
        checkpointed = jax.checkpoint(inside, policy=policy, prevent_cse=self.prevent_cse or is_inner)
        env.update(zip(wanted, checkpointed(*(env[v] for v in reads)), strict=True))
