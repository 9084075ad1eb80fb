"""A plan: what to save and what to recompute, with the numbers it was chosen by. Frozen, printable, saved as JSON."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import networkx as nx
from ckptsolvers import Keep, Schedule

from jaxckpt import _compat
from jaxckpt.apply import ON_DEVICE, planned
from jaxckpt.compilation.files import check_digest, read_object, with_digest, write_text
from jaxckpt.compilation.objective import objective
from jaxckpt.compilation.records import Signed, check_record, record_of
from jaxckpt.errors import PlanFileError, PlanMismatchError
from jaxckpt.kinds.base import UnknownKindError, save_from_json, save_to_json
from jaxckpt.kinds.check import check_tree
from jaxckpt.kinds.schema import BlockRecords, SaveRecords, ScheduleRecord
from jaxckpt.model.cut import spans_at
from jaxckpt.model.option import Place, Save
from jaxckpt.model.tree import Tree, blocks_from_json, check_cover
from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Program
from jaxckpt.program.nnx import pure
from jaxckpt.program.static import bind_static, bound_call, places_and_names
from jaxckpt.program.trace import trace
from jaxckpt.result._protocols import FrontierLike
from jaxckpt.result.comparison import Comparison, arrays_like, compare_runs
from jaxckpt.result.notebook import report_html
from jaxckpt.result.page import vega
from jaxckpt.result.page.content import Content, Reading
from jaxckpt.result.page.page import page_html
from jaxckpt.result.page.reading import read_plan
from jaxckpt.result.report import show_plan
from jaxckpt.targets.sharding import trace_placed

SCHEMA = 8
_FORMAT = "jaxckpt plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedGroup:
    """Values of one shape that equal blocks save.

    Attributes:
        source: `file:line (function)` of the first one.
        primitive: what makes them.
        scope: name stack of the first one.
        shape_dtype: such as `float32[8,512]`.
        count: how many there are.
        size_bytes: of all of them together.
        place: of memory in which they wait, "device" or "host".
    """

    source: str
    primitive: str
    scope: str
    shape_dtype: str
    count: int
    size_bytes: int
    place: str = Place.DEVICE.value


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recomputation plan for one program.

    Attributes:
        budget_bytes: what was asked for, `reserve` taken off; None where `max_cost` was given.
        max_cost: the limit on cost, as a fraction of the unplanned cost; None where a budget was given.
        unplanned_peak_bytes: device bytes without a plan.
        written_peak_bytes: device bytes with the function's own checkpoints, where the plan replaces them and the
            budget is a share; None elsewhere.
        predicted_peak_bytes: device bytes under the plan, from the model.
        measured_peak_bytes: device bytes under the plan, from the compiler; None if it was not compiled.
        is_at_most: whether the compiler says no more of `measured_peak_bytes` than that they are not more.
        num_rematerialized: instructions that XLA's own rematerialization made again; None if it was not compiled.
        num_recomputed: products and convolutions that checkpoints make again in the compiled program; None if it was
            not compiled.
        num_asked: the same in the program that the compiler was given.
        flags: compiler flags of the environment under which it was compiled that change what is recomputed.
        host_budget_bytes: bytes of the host that saved values may take, on each device's behalf; None where none are
            sent there.
        predicted_host_bytes: bytes on the host, from the model: what waits there for its backward, and arguments that
            live there.
        measured_host_bytes: the same, from the compiler; None if it was not compiled, or if the compiler does not tell
            them from bytes on the device.
        link_bytes: what crosses the link to the host each way in a step, on each device's behalf.
        idle_time: what the step waits for that link, modelled, in the unit of `cost`; it is in `recompute_cost`.
        num_worse_on_host: how many plans that send values to the host were compiled and take more of the device than
            one that costs no more and sends none.
        next_peak_bytes: measured device bytes of the next cheaper plan, which does not fit; None if not measured.
        least_peak_bytes: device bytes of the plan that takes least, which are a budget that has a plan; None where they
            were not measured.
        expected_least_bytes: the same, predicted where they were not measured.
        is_unplanned_measured: whether `unplanned_peak_bytes` was measured.
        is_stopped: whether `max_compiles` ended the search before there was nothing left that is worth a compile.
        forward_flops: of one forward pass.
        recompute_flops: beyond the unplanned value and gradient.
        recompute_cost: the same in the unit of `cost`: FLOPs, or modelled picoseconds, which are less than 0 where
            loops stack so much less that the step is expected to be faster.
        unplanned_cost: of the unplanned value and gradient, in that unit.
        cost: "time" or "flops".
        solver: which solver chose.
        target: for which chip.
        num_compiles: how many programs were compiled to find it.
        calibration: hash of the calibration record it was made with; None where there was none.
        fingerprint: of the program it was made for.
        jax_version: under which JAX.
        keeps_checkpoints: whether the function's own checkpoints are left as they are.
        parameter_bytes: of what is differentiated.
        constant_bytes: of the arrays that the function closes over, which are constants of the user's own jit: no
            arguments, and in the peaks only where the compiler counts constants, as on TPUs.
        saved: what is saved, grouped by equal blocks.
        schedule: the tree of regions; None where the program runs as it is.
        blocks: `[n]`, positions of each block's equations in the flat program.
        block_saves: `[n]`, what each block saves: values by name, how a loop is run, or what JAX decides.
        block_labels: `[n]`, how a person recognises each block.
        lines: digests of the program's lines, to say what changed.
        unknown: primitives counted by their bytes, for want of a rule.
        is_profiled: whether its blocks were compiled one by one before, and not modelled.
        split: over how many devices its values are cut; where there are several, bytes are those of each.
        draws_wait: whether random numbers wait for what is computed before them, since the target's compiler would
            draw them all before anything else.
        schedule_digest: of what is applied: the program, the schedule, the blocks and what they save. The peaks were
            predicted or measured of that.
    """

    budget_bytes: int | None
    max_cost: float | None
    unplanned_peak_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    is_at_most: bool
    num_rematerialized: int | None
    num_recomputed: int | None
    num_asked: int | None
    flags: tuple[str, ...]
    next_peak_bytes: int | None
    least_peak_bytes: int | None
    expected_least_bytes: int
    is_unplanned_measured: bool
    is_stopped: bool
    forward_flops: int
    recompute_flops: int
    recompute_cost: int
    unplanned_cost: int
    cost: str
    solver: str
    target: str
    num_compiles: int
    calibration: str | None
    fingerprint: str
    jax_version: str
    keeps_checkpoints: bool
    parameter_bytes: int
    constant_bytes: int
    saved: tuple[SavedGroup, ...]
    schedule: Schedule | None
    blocks: tuple[tuple[int, ...], ...]
    block_saves: tuple[Save, ...]
    block_labels: tuple[str, ...]
    lines: tuple[str, ...]
    unknown: tuple[str, ...]
    is_profiled: bool
    draws_wait: bool
    schedule_digest: str
    written_peak_bytes: int | None = None
    host_budget_bytes: int | None = None
    predicted_host_bytes: int = 0
    measured_host_bytes: int | None = None
    link_bytes: int = 0
    idle_time: int = 0
    num_worse_on_host: int = 0
    split: int = 1

    @property
    def host_bytes(self) -> int:
        """The best number there is for the bytes on the host: measured, else predicted."""
        return self.predicted_host_bytes if self.measured_host_bytes is None else self.measured_host_bytes

    @property
    def is_on_host(self) -> bool:
        """Whether something that it saves waits on the host."""
        return any(save.is_on_host for save in self.block_saves)

    @property
    def peak_bytes(self) -> int:
        """The best number there is for the plan's peak: measured, else predicted."""
        return self.predicted_peak_bytes if self.measured_peak_bytes is None else self.measured_peak_bytes

    def __str__(self) -> str:
        """The report a person reads."""
        return show_plan(self)

    def apply(
        self,
        fun: Callable,
        *,
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
    ) -> Callable:
        """Return the function with the plan in it.

        Args:
            fun: the function the plan was made for; it is traced at each call, as under `jax.jit`.
            static_argnums: as the plan was made with.
            static_argnames: likewise.

        Returns:
            A function of the same arguments with the same results, which recomputes as planned when differentiated.

        Raises:
            PlanMismatchError: when called, if the function or its shapes are not those of the plan.
            PlanFileError: when called, if the plan came from a file and is none of this program.
        """
        static = places_and_names(fun, static_argnums, static_argnames)

        @functools.wraps(fun)
        def with_plan(*args: Any, **kwargs: Any) -> Any:
            bound = bind_static(fun, args, kwargs, *static)
            call = pure(bound.fun, bound.args, bound.kwargs)
            traced = trace(call.fun, call.args, call.kwargs, keep_checkpoints=self.keeps_checkpoints)
            self.check(traced.program)
            if self.schedule is None and self.keeps_checkpoints:
                return fun(*args, **kwargs)
            dynamic = traced.dynamic(jax.tree.leaves((call.args, call.kwargs)))
            is_twice = _compat.num_reverse([*traced.consts, *dynamic]) > 1
            with ON_DEVICE(is_twice):
                results = self._planned(traced.program)(*traced.consts, *dynamic)
            return call.finish(jax.tree.unflatten(traced.out_tree, results))

        return with_plan

    def compare(
        self,
        fun: Callable,
        /,
        *args: Any,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
        **kwargs: Any,
    ) -> Comparison:
        """Run the function with the plan and without, value and gradients, and say how far they differ.

        Args:
            fun: the function the plan was made for.
            *args: its arguments, arrays. Specs stand for random ones, the same each time.
            argnums: as in `jax.grad`.
            has_aux: as in `jax.grad`.
            static_argnums: as the plan was made with.
            static_argnames: likewise.
            **kwargs: its named arguments.

        Returns:
            The largest differences, each with the leaf that it is at. Where the result is no scalar, gradients are a
            vjp's, for random cotangents.

        Raises:
            PlanMismatchError: the function or its shapes are not those of the plan.
            NotDifferentiableError: nothing to differentiate.

        Example:
            >>> import jax, jax.numpy as jnp, jaxckpt
            >>> def loss(w, x):
            ...     for _ in range(8):
            ...         x = jnp.tanh(x @ w)
            ...     return jnp.sum(x**2)
            >>> w, x = jnp.eye(64), jnp.ones((1024, 64))
            >>> jaxckpt.plan(loss, w, x, budget="80%").compare(loss, w, x).is_close
            True
        """
        bound = bound_call(fun, args, kwargs, static_argnums, static_argnames, "compare")
        args, kwargs = arrays_like((bound.args, bound.kwargs))
        traced = trace_placed(bound.fun, args, kwargs, keep_checkpoints=self.keeps_checkpoints)
        self.check(traced.program)
        call = pure(bound.fun, args, kwargs)
        leaves = traced.dynamic(jax.tree.leaves((call.args, call.kwargs)))
        goal = objective(traced, argnums, has_aux)
        return compare_runs(call.fun, traced, self._planned(traced.program), goal, leaves)

    def _repr_html_(self) -> str:
        """The report, as notebooks show it."""
        return report_html(str(self))

    def to_html(
        self,
        fun: Callable | None = None,
        /,
        *args: Any,
        path: str | os.PathLike | None = None,
        frontier: FrontierLike | None = None,
        reading: Reading | None = None,
        name: str = "",
        command: str = "",
        source: bool = False,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
        **kwargs: Any,
    ) -> str:
        """One page about the plan that needs nothing from anywhere: memory over time with the plan and without.

        Args:
            fun: the function the plan was made for, which is compiled twice to see where its bytes go; without it the
                page has the plan alone.
            *args: its arguments, arrays or specs.
            path: a file to write the page to.
            frontier: of the function, to see this plan among others.
            reading: of the compiled programs, where they were read already.
            name: of the function, as the page has it.
            command: that makes the page, as the page has it.
            source: whether the page shows the text of source lines.
            argnums: as in `jax.grad`.
            has_aux: as in `jax.grad`.
            static_argnums: as the plan was made with.
            static_argnames: likewise.
            **kwargs: named arguments of the function.

        Returns:
            The page, the same text for the same plan and versions.

        Raises:
            OptionError: the extra `html` is not installed.
            PlanMismatchError: the function or its shapes are not those of the plan.
        """
        vega.check_installed()
        name = name or getattr(fun, "__name__", "plan")
        if reading is None and fun is not None:
            options = {"argnums": argnums, "has_aux": has_aux, "source": source}
            static = {"static_argnums": static_argnums, "static_argnames": static_argnames}
            reading = read_plan(self, fun, args, kwargs, **options, **static)
        if reading is None:
            reading = Reading(
                why_not="Nothing was compiled for this page: give to_html the function and its arguments."
            )
        content = Content(name=name, plans=(self,), reading=reading, frontier=frontier, command=command)
        text = page_html(content)
        if path is not None:
            write_text(path, text)
        return text

    def flat(self, program: Program) -> Callable[..., list[Any]]:
        """Return the planned program as a function of flat inputs.

        Args:
            program: the program it was made for.

        Raises:
            PlanFileError: the plan is not one of this program, with the path of what is wrong.
        """
        self._check_blocks(program)
        return self._planned(program)

    def _planned(self, program: Program) -> Callable[..., list[Any]]:
        if self.schedule is None:
            return functools.partial(run, program)
        spans = spans_at(program, self.blocks)
        prefix = f"jaxckpt.{self.fingerprint[:8]}"
        return planned(program, spans, self.schedule, self.block_saves, prefix, draws_wait=self.draws_wait)

    def _check_blocks(self, program: Program) -> None:
        if self.schedule is None:
            return
        tree = Tree(blocks=self.blocks, schedule=self.schedule, saved=self.block_saves)
        try:
            check_tree(program, tree, saves="block_saves")
        except (ValueError, LookupError, TypeError) as error:
            raise PlanFileError(f"the plan is damaged: {error}; plan again") from error

    def check(self, program: Program) -> None:
        """Refuse a program that is not the plan's.

        Raises:
            PlanMismatchError: with the first thing that differs.
            PlanFileError: the program is the plan's, but the plan is damaged, with the path of what is wrong.
        """
        if program.fingerprint() == self.fingerprint:
            return self._check_blocks(program)
        lines = program.lines()
        ours = self.lines
        for i, (line, digest) in enumerate(zip(lines, ours, strict=False)):
            if _digest(line) != digest:
                change = f"line {i + 1} of the program is now `{line[:160]}`"
                break
        else:
            change = f"the program has {len(lines)} lines where the plan's has {len(ours)}"
        version = ""
        if self.jax_version != _compat.JAX_VERSION:
            version = f" (the plan was made under jax {self.jax_version}, this is {_compat.JAX_VERSION})"
        raise PlanMismatchError(
            f"the plan was made for another function or other shapes: {change}{version}; plan again"
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, under the names of its attributes, with a digest of its content."""
        data: dict[str, Any] = {"format": _FORMAT, "schema": SCHEMA}
        for f in fields(self):
            data[f.name] = getattr(self, f.name)
        data["saved"] = [{g.name: getattr(group, g.name) for g in fields(group)} for group in self.saved]
        data["schedule"] = None if self.schedule is None else self.schedule.to_json()
        data["block_saves"] = [save_to_json(save) for save in self.block_saves]
        return with_digest(data)

    @classmethod
    def from_json(cls, data: Any, where: str = "this") -> "Plan":
        """Read what `to_json` made.

        Raises:
            PlanFileError: anything else, or another schema; with the path of every violation.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise PlanFileError(f"{where} is not a jaxckpt plan")
        _check_schema(data.get("schema"), where)
        values = {name: value for name, value in data.items() if name not in ("format", "schema", "digest")}
        try:
            check_record(_RECORD, values, where)
            check_digest(data, where)
            values["saved"] = tuple(SavedGroup(**group) for group in data["saved"])
            values["schedule"] = None if data["schedule"] is None else Schedule.from_json(data["schedule"])
            values["blocks"] = blocks_from_json(data["blocks"])
            values["block_saves"] = tuple(map(save_from_json, data["block_saves"]))
            for name in ("block_labels", "lines", "unknown", "flags"):
                values[name] = tuple(data[name])
            plan = cls(**values)
            _check_shape(plan)
        except UnknownKindError as error:
            raise PlanFileError(f"{where} {error}") from error
        except PlanFileError:
            raise
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise PlanFileError(f"{where} is damaged: {error}") from error
        return plan

    def to_text(self) -> str:
        """The plan as the text of a file."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON; the file is there whole or not at all, and a link to a file stays one.

        Raises:
            PlanFileError: the path is no regular file's, or its folder is not there.
            OSError: it cannot be written; an old file is as it was.
        """
        write_text(path, self.to_text())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Read a plan. Whatever the file's bytes are, that takes less than a second and 100 MiB.

        Raises:
            PlanFileError: a file that is no plan, is damaged, or is of another schema.
            OSError: a file that is not there or cannot be read.
        """
        return cls.from_json(read_object(path, _FORMAT), str(path))

    @classmethod
    def load_kept(cls, path: Path, folder: Path) -> "Plan":
        """Read a plan of a cache's folder, as `load` does; files of others and links out of it are refused too."""
        return cls.from_json(read_object(path, _FORMAT, folder), str(path))

    def to_networkx(self) -> nx.DiGraph:
        """The tree of regions as a graph: nodes `keep`, `recompute` and the root, edges from parent to child."""
        graph = nx.DiGraph()
        graph.add_node(0, kind="root", start=0, stop=len(self.blocks))
        parents = [0]
        for node, depth in self.schedule.walk() if self.schedule else ():
            number = len(graph)
            kind = "keep" if isinstance(node, Keep) else "recompute"
            graph.add_node(number, kind=kind, start=node.start, stop=node.stop)
            graph.add_edge(parents[depth], number)
            del parents[depth + 1 :]
            parents.append(number)
        return graph


def line_digests(program: Program) -> tuple[str, ...]:
    """A short digest for each of a program's lines."""
    return tuple(map(_digest, program.lines()))


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:8]


def digest_schedule(
    program_digest: str,
    keeps_checkpoints: bool,
    schedule: Schedule | None,
    blocks: Sequence[Sequence[int]],
    block_saves: Sequence[Save],
    draws_wait: bool,
) -> str:
    """A digest of what is applied, to which a plan's peaks belong."""
    tree = None if schedule is None else schedule.to_json()
    saves = [save_to_json(save) for save in block_saves]
    text = json.dumps([program_digest, keeps_checkpoints, tree, blocks, saves, draws_wait], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_RECORD = record_of(
    Plan,
    recompute_cost=Signed,
    saved=list[record_of(SavedGroup)],
    schedule=ScheduleRecord | None,
    blocks=BlockRecords,
    block_saves=SaveRecords,
)


def _check_schema(schema: Any, where: str) -> None:
    if schema == SCHEMA and type(schema) is int:
        return
    if type(schema) is not int:
        raise PlanFileError(f"{where} is damaged: its schema is {str(schema)[:40]!r}; plan again")
    what = "was written by an older jaxckpt; plan again" if schema < SCHEMA else "is of a newer one; upgrade jaxckpt"
    raise PlanFileError(f"{where} has plan schema {schema}, this jaxckpt reads {SCHEMA}: it {what}")


def _check_shape(plan: Plan) -> None:
    if not len(plan.blocks) == len(plan.block_saves) == len(plan.block_labels):
        raise ValueError(f"block_saves has {len(plan.block_saves)} entries for {len(plan.blocks)} blocks")
    if plan.schedule is None and plan.blocks:
        raise ValueError(f"schedule is null, and there are {len(plan.blocks)} blocks")
    if plan.schedule is not None:
        check_cover(plan.schedule, len(plan.blocks))
    applied = plan.fingerprint, plan.keeps_checkpoints, plan.schedule, plan.blocks, plan.block_saves, plan.draws_wait
    if digest_schedule(*applied) != plan.schedule_digest:
        raise ValueError(
            "its schedule, blocks and saves are not those that its peaks are of (schedule_digest); plan again"
        )
