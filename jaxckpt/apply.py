"""A schedule becomes a function: the program's blocks, run inside nested `jax.checkpoint` regions."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from ckptsolvers import Keep, Schedule
from ckptsolvers.schedule import Node
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import _compat
from jaxckpt.errors import JaxckptWarning
from jaxckpt.kinds.base import KeptBlock, kind_named
from jaxckpt.model.cut import Span, spans_at
from jaxckpt.model.likeness import Likeness, Scopes, WithoutScopes
from jaxckpt.model.option import NOTHING_SAVED, Place, Save
from jaxckpt.model.tree import Tree
from jaxckpt.program.draws import read_by_draws, waiting_keys
from jaxckpt.program.interpret import outputs_of
from jaxckpt.program.ir import Program
from jaxckpt.targets.sharding import HOST

# JAX's names of kinds of memory.
_DEVICE_MEMORY = "device"
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
        offload_dst=HOST,
    )


@dataclass(frozen=True, slots=True)
class Application:
    """Runs programs under plans.

    Attributes:
        draws_wait: whether random numbers wait for what is computed before them, for a compiler that draws them all
            before anything else.
    """

    draws_wait: bool = False

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
            with _compat.ordered_checkpoints():
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
    draws_wait: bool = False,
) -> Callable[..., list[Any]]:
    """Return the program as a function that recomputes as scheduled when it is differentiated.

    Args:
        program: the flat program.
        spans: `[n]`, its blocks.
        schedule: what to keep and what to recompute.
        saved: `[n]`, what each kept block saves.
        prefix: what the names of saved values begin with.
        draws_wait: as in `Application`.

    Returns:
        A function from the program's inputs to its outputs, both flat lists.
    """
    return Application(draws_wait=draws_wait).planned(program, spans, schedule, saved, prefix)


class _Runner:
    """Runs the blocks of one program.

    Regions and blocks that are equal but for the numbers of their values are one function: JAX's caches, which go by
    identity, then serve all but the first, as they serve a layer that a user wrote once.
    """

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
        self.host = frozenset(host)
        self.spans, self.saved, self.prefix, self.applier = spans, saved, prefix, applier
        # In a loop's body, nothing of an outermost region's recomputation can be merged with its first run.
        self.prevent_cse = not is_body
        self.last_reader: dict[int, int] = {}
        self.maker: dict[int, int] = {v: k for k, span in enumerate(spans) for v in span.outputs}
        for k, span in enumerate(spans):
            self.last_reader.update(dict.fromkeys(span.inputs, k))
        self.last_reader.update({x: len(spans) for x in program.outputs if isinstance(x, int)})
        self.likeness = Likeness()
        self.keys: dict[Hashable, int] = {}
        self.numbers: dict[Hashable, int] = {}
        self.functions: dict[Hashable, Callable[..., list[Any]]] = {}

    def run(self, nodes: Sequence[Node], env: dict[int, Any], depth: int = 0, *, is_inner: bool = False) -> None:
        """Run nodes.

        Args:
            nodes: in order.
            env: values of the program so far; what is read later is added.
            depth: how many scopes, outermost first, stand around all of this already.
            is_inner: a checkpoint is around it.
        """
        # Scopes that a part has to itself go around it, so that parts in different ones can be equal.
        for node, scopes in zip(nodes, self._scopes(nodes, depth), strict=True):
            with _compat.within_stack(scopes.around):
                if isinstance(node, Keep):
                    self._keep(node, env, scopes.depth, is_inner)
                else:
                    inside = functools.partial(self.run, node.children, depth=scopes.depth, is_inner=True)
                    self._region(node, env, scopes.depth, is_inner, inside)

    def _scopes(self, nodes: Sequence[Node], depth: int) -> list[Scopes]:
        """The scopes around each of the nodes: exact ones, but of equal nodes that reach over several layers."""
        equations = [[eqn for span in self.spans[n.start : n.stop] for eqn in span.equations] for n in nodes]
        exact = [self.likeness.common_scopes(eqns, depth) for eqns in equations]
        merged = [self.likeness.merged_scopes(eqns, depth) for eqns in equations]
        keys = [None if m is None else self._key(node, m.depth) for node, m in zip(nodes, merged, strict=True)]
        repeated = Counter(keys)
        return [e if m is None or repeated[key] == 1 else m for e, m, key in zip(exact, merged, keys, strict=True)]

    def _keep(self, node: Keep, env: dict[int, Any], depth: int, is_inner: bool) -> None:
        save = self.saved[node.block]
        keys = self._waiting_keys(self.spans[node.block], env) if self.applier.draws_wait else {}
        given = {v: env[v] for v in keys}
        env.update(keys)
        block = KeptBlock(
            equations=WithoutScopes(self.spans[node.block].equations, depth),
            save=save,
            values=env,
            prefix=self.prefix,
            checkpointed=functools.partial(self._region, node, env, depth, is_inner),
            uncovered=functools.partial(self._call, node, env, depth, *_uncovered()),
            applier=self.applier,
        )
        kind_named(save.kind).run(block)
        env.update(given)

    def _waiting_keys(self, span: Span, env: dict[int, Any]) -> dict[int, Any]:
        """The block's keys, so that it draws its random numbers after what it reads of earlier blocks."""
        needed = read_by_draws(span.equations)
        before = sorted((v for v in span.inputs if v in self.maker), key=self.maker.__getitem__)
        return waiting_keys(env, needed, span.inputs, before) if needed else {}

    def _region(
        self,
        node: Node,
        env: dict[int, Any],
        depth: int,
        is_inner: bool,
        body: Callable[[dict[int, Any]], None],
        places: Mapping[str, Place] = NOTHING_SAVED,
    ) -> None:
        """Run blocks inside one `jax.checkpoint`.

        Args:
            node: which blocks, and how.
            env: values of the program so far; those read after the blocks are added.
            depth: how many scopes stand around this already.
            is_inner: another checkpoint is around this one.
            body: adds what the blocks make to a dict of values.
            places: where values are saved, by name.
        """
        reads, _ = self._ends(node)
        # By position, so that equal regions name equal inputs alike.
        named = {} if is_inner else {i: f"{self.prefix}.input.{i}" for i, v in enumerate(reads) if v in self.host}
        places = {**places, **dict.fromkeys(named.values(), Place.HOST)}
        if ON_DEVICE.value and Place.HOST in places.values():
            _warn_on_device()
            places = dict.fromkeys(places, Place.DEVICE)

        def with_names(inner: dict[int, Any]) -> None:
            # A name counts where it is one of the region's own values, so inputs are named inside.
            inner |= {reads[i]: checkpoint_name(inner[reads[i]], name) for i, name in named.items()}
            body(inner)

        saved = tuple(places.items())
        prevent_cse = self.prevent_cse or is_inner
        policy = _policy(saved) if places else None
        checkpointed = functools.partial(jax.checkpoint, policy=policy, prevent_cse=prevent_cse)
        self._call(node, env, depth, checkpointed, (saved, prevent_cse, tuple(named)), with_names)

    def _call(
        self,
        node: Node,
        env: dict[int, Any],
        depth: int,
        wrap: Callable[[Callable], Callable],
        how: Hashable,
        body: Callable[[dict[int, Any]], None],
    ) -> None:
        """Run blocks as one function, the one of equal blocks that ran before if there are any.

        Args:
            node: which blocks.
            env: values of the program so far; those read after the blocks are added.
            depth: how many scopes stand around this already.
            wrap: what is around the function.
            how: the same for equal ones.
            body: adds what the blocks make to a dict of values.
        """
        reads, wanted = self._ends(node)
        key = how, ON_DEVICE.value, self._key(node, depth)
        fun = self.functions.get(key)
        if fun is None:

            def inside(*inputs: Any) -> list[Any]:
                inner = dict(zip(reads, inputs, strict=True))
                body(inner)
                return [inner[v] for v in wanted]

            fun = self.functions[key] = wrap(inside)
        env.update(zip(wanted, fun(*(env[v] for v in reads)), strict=True))

    def _ends(self, node: Node) -> tuple[list[int], list[int]]:
        """What blocks read from outside, and what is read of them later."""
        spans = self.spans[node.start : node.stop]
        made = {v for span in spans for v in span.outputs}
        reads = list(dict.fromkeys(v for span in spans for v in span.inputs if v not in made))
        return reads, [v for span in spans for v in span.outputs if self.last_reader[v] >= node.stop]

    def _key(self, node: Node, depth: int) -> int:
        """The same for equal nodes, the scopes around them left out."""
        where = node.start, node.stop, _shape(node, node.start), depth
        found = self.keys.get(where)
        if found is None:
            blocks = slice(node.start, node.stop)
            likeness = self.likeness.key(self.spans[blocks], self.saved[blocks], *self._ends(node), depth)
            found = self.keys[where] = self.numbers.setdefault((where[2], likeness), len(self.numbers))
        return found


def _uncovered() -> tuple[Callable[[Callable], Callable], str]:
    """What is around a block that is left to JAX, and a name for it: one function of equal blocks."""
    if _compat.checks_each_operation() or not _compat.is_staged():
        # What runs operation by operation is neither compiled as one function at each call, nor hidden from checks.
        return lambda fun: fun, "each operation"
    return functools.partial(jax.jit, inline=True), "one function"


def _shape(node: Node, start: int) -> Hashable:
    """Which blocks are kept and covered, counted from the first."""
    if isinstance(node, Keep):
        return node.block - start
    return tuple(_shape(child, start) for child in node.children)
