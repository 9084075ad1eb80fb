"""What a page shows of compiled programs: the function or the step compiled with its plans and without, and read."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.compilation.objective import cotangent_specs, input_specs, measured_specs, objective
from jaxckpt.compilation.program_memory import program_memory
from jaxckpt.errors import CompilerError
from jaxckpt.model.time import timer
from jaxckpt.program.interpret import run
from jaxckpt.program.static import bound_call
from jaxckpt.program.trace import Traced
from jaxckpt.result._protocols import AppliedLike
from jaxckpt.result.page.content import Reading
from jaxckpt.result.page.lines import Costs, line_costs, texts_of
from jaxckpt.search.step import Step
from jaxckpt.search.step_search import FoundStep
from jaxckpt.targets.chip import find_target, labelled_target
from jaxckpt.targets.sharding import described, trace_placed

_FLAT = re.compile(r"args\[(\d+)\]")
Read = Callable[[], CompiledMemory]


def read_plan(
    plan: AppliedLike,
    fun: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    source: bool = False,
) -> Reading:
    """Compile value and gradient under a plan and without, and read where their bytes go.

    Args:
        plan: of the function.
        fun: the function, like what follows as the plan was made with.
        args: its arguments.
        kwargs: its named arguments.
        argnums: as in `jax.grad`.
        has_aux: as in `jax.grad`.
        static_argnums: as in `plan`.
        static_argnames: as in `plan`.
        source: whether the text of source lines is read.

    Returns:
        Both memories; a program that the compiler refuses is left out, with the reason.

    Raises:
        PlanMismatchError: the function or its shapes are not those of the plan.
        TargetError: an unknown target.
    """
    target = labelled_target(plan.target)
    with described(target):
        bound = bound_call(fun, args, kwargs, static_argnums, static_argnames, "to_html")
        traced = trace_placed(bound.fun, bound.args, bound.kwargs, keep_checkpoints=plan.keeps_checkpoints)
        program = traced.program
        plan.check(program)
        goal = objective(traced, argnums, has_aux)
        plain, flat = functools.partial(run, program), plan.flat(program)
        options = find_target(target).compiler.offload_options if plan.is_on_host else None
        names = _names(fun, bound.args, bound.kwargs, traced)

        def memory(runner: Callable) -> CompiledMemory:
            found = program_memory(
                goal.differentiated(runner),
                measured_specs(program, goal),
                target,
                closed_over=program.closed_over,
                jit_options={"compiler_options": dict(options)} if options else {},
            )
            return _named(found, names)

        def costs(runner: Callable) -> Costs:
            specs = [*input_specs(program), *cotangent_specs(program, goal)]
            return line_costs(
                jax.make_jaxpr(goal.differentiated(runner))(*specs), timer(plan.cost, find_target(target))
            )

        runs = (plain, flat) if plan.schedule is not None else (plain,)
        return _reading([functools.partial(memory, f) for f in runs], tuple(costs(f) for f in runs), source)


def read_step(found: FoundStep, *, source: bool = False) -> Reading:
    """Compile a step under its plans and without, and read where its bytes go.

    Args:
        found: the step, and what was chosen for it.
        source: whether the text of source lines is read.

    Returns:
        Both memories; a program that the compiler refuses is left out, with the reason.
    """
    step, choices = found.step, list(dict.fromkeys((found.step.without, found.picks)))
    price = timer(step.options.cost, find_target(step.target))
    costs = tuple(line_costs(step.jaxpr(picks), price) for picks in choices)
    return _reading([functools.partial(_step_memory, step, picks) for picks in choices], costs, source)


def _step_memory(step: Step, picks: Any) -> CompiledMemory:
    return program_memory(step.under(picks), step.args, step.target, step.donate_argnums, jit_options=step.jit_options)


def _reading(reads: Sequence[Read], costs: tuple[Costs, ...], source: bool) -> Reading:
    """Without a plan, and under it where there is one."""
    programs: list[CompiledMemory | None] = []
    problems = []
    for read, which in zip(reads, ("Without a plan", "Under the plan"), strict=False):
        try:
            programs.append(read())
        except CompilerError as error:
            programs.append(None)
            problems.append(f"{which}: {error}.")
    unplanned, planned = (*programs, None)[:2]
    lines = {b.source for memory in programs if memory for b in memory.buffers} | {x for c in costs for x in c}
    return Reading(
        unplanned=unplanned,
        planned=planned,
        why_not=" ".join(problems),
        costs=(costs[0], costs[-1]),
        texts=texts_of(lines) if source else None,
    )


def _names(fun: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], traced: Traced) -> list[str]:
    """What users call the arguments that are flat in what is compiled, in its order."""
    try:
        given = list(inspect.signature(fun).parameters)
    except (TypeError, ValueError):
        given = []
    given += [f"args[{i}]" for i in range(len(given), len(args))]
    leaves = jax.tree_util.tree_leaves_with_path((list(args), dict(kwargs)))
    paths = []
    for path, _ in leaves:
        head, *rest = path[1:]
        first = given[head.idx] if isinstance(head, jax.tree_util.SequenceKey) else str(getattr(head, "key", head))
        paths.append(first + jax.tree_util.keystr(tuple(rest)))
    return list(traced.dynamic(paths)) if len(paths) == len(traced.is_array) else []


def _named(memory: CompiledMemory, names: Sequence[str]) -> CompiledMemory:
    """The same with the users' names of arguments; as it is where there are others than expected."""
    num = sum(buffer.role == "argument" for buffer in memory.buffers)
    if num != len(names):
        return memory
    buffers = []
    for buffer in memory.buffers:
        match = _FLAT.fullmatch(buffer.scope)
        is_one = buffer.role == "argument" and match is not None and int(match[1]) < len(names)
        buffers.append(replace(buffer, scope=names[int(match[1])]) if match and is_one else buffer)
    return replace(memory, buffers=tuple(buffers))
