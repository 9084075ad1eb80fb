"""How often each rule of the memory model, each way to cut, and each kind of option and loop was exercised.

Functions of the product are wrapped from outside, wherever a module holds them, and what a rule did is read off their
arguments and results. Lines need no marks then, and a function that is gone or renamed stops the fuzzer, so that a rule
that nothing counts any more is noticed.
"""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ckptsolvers.schedule import Keep
from jax.extend.core import primitives as prims

from jaxckpt.kinds import cond_options, scan_options
from jaxckpt.memory import across, fusion, peak
from jaxckpt.model import cut
from jaxckpt.model.tree import Tree
from jaxckpt.program import primitives
from jaxckpt.targets import cpu, gpu, tpu

FOUND: Counter = Counter()
# What must have been exercised, so that 0 is shown where nothing was.
RULES = (
    "rule: elementwise results fuse",
    "rule: what a product reads is a buffer",
    "rule: a costly result that is read twice is a buffer",
    "rule: a costly result is made again for each reader",
    "rule: reductions read fused operands",
    "rule: a reduction's operand is copied",
    "rule: a broadcast for several reductions is a buffer",
    "rule: an operand of a product is copied",
    "rule: an operand of a convolution is copied",
    "rule: another shape of a buffer is no buffer",
    "rule: an operation writes over an operand",
    "rule: a scatter into zeros scatters into what it is added to",
    "rule: a scatter needs zeros of its own",
    "rule: a pooling's derivative holds indices",
    "rule: a pooling runs outside of regions",
    "rule: products fuse operands",
    "rule: what is ready first runs first",
    "rule: the heap has gaps",
    "rule: a copy is held from the forward to the backward",
    "rule: what is stacked is read in place",
    "rule: float32 is held as bfloat16",
    "rule: images are padded to lanes",
    "rule: logits stay outside of regions",
    "cut: fine",
    "cut: coarse",
    "cut: merged repetitions",
    "cut: cheap operations sunk into readers",
    "cut: what no tangent flows into waits",
    "cut: around loops, branches and effects",
    "cut: before the loss",
    "cut: before heads",
    "cut: high cuts dropped",
    "option: values saved by name",
    "option: nothing saved",
    "option: left to JAX",
    "option: region over several blocks",
    "option: region in a region",
    "option: an effect",
    "option: branches planned",
    "option: values saved in a branch",
    "option: values saved in a loop's body",
    "option: a region in a loop's body",
    "option: a loop in a branch",
    "option: a branch in a loop",
    "loop: one level",
    "loop: several levels",
    "loop: several parts",
    "loop: binomial",
    "loop: divided in reverse",
    "loop: divided with an index in its carry",
    "loop: left to JAX",
    "loop: binomial divisions considered",
    "loop: mixes considered",
    "loop: levels considered",
)


def _wrap(home: Any, name: str, count: Callable[..., Any]) -> Callable[[], None]:
    """Count what a function does, in every module that holds it; what is returned takes that back."""
    original = getattr(home, name)

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return count(found, *args, **kwargs) or found

    if isinstance(home, type):
        places = [home]
    else:
        modules = [m for n, m in list(sys.modules.items()) if n.split(".")[0] == "jaxckpt"]
        places = [m for m in modules if vars(m).get(name) is original]
    for place in places:
        setattr(place, name, counted)
    return lambda: [setattr(place, name, original) for place in places] and None


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count inside; the counter is for all programs since the last `clear`."""
    wrapped = [
        (fusion, "resolve", _resolved),
        (fusion, "_broadcast", lambda found, *_: _add("rule: a broadcast for several reductions is a buffer", found)),
        (fusion, "_with_operands_made", _operands_made),
        (peak, "_packed_bytes", lambda found, *_: _LAST.update(packed=found)),
        (peak, "_breadth_first", _breadth_first),
        (peak, "peak_of_runs", _peak),
        (across, "held_across", _held),
        (cut, "cut_program", _cut),
        (cut, "merged_spans", _merged),
        (cut, "_sunk", lambda found, *_: _add("cut: cheap operations sunk into readers", found)),
        (cut, "_order", lambda found, *_: _add("cut: what no tangent flows into waits", found != sorted(found))),
        (cut, "_around_alone", lambda found, *_: _add("cut: around loops, branches and effects", found)),
        (cut, "_before_loss", lambda found, *_: _add("cut: before the loss", found)),
        (cut, "_before_heads", lambda found, *_: _add("cut: before heads", found)),
        (cut, "_thin", lambda found, borders, *_: _add("cut: high cuts dropped", len(found) < len(borders))),
        (scan_options, "levels", lambda found, *_: _listed("loop: levels considered", found)),
        (scan_options, "mixes", lambda found, *_: _listed("loop: mixes considered", found)),
        (scan_options, "binomial_divisions", lambda found, *_: _listed("loop: binomial divisions considered", found)),
        (cpu.CpuCompiler, "outside_regions", _outside),
        (gpu.GpuCompiler, "rules", lambda found, *_: _add("rule: products fuse operands", found.matmuls_fuse_operands)),
        (tpu.TpuCompiler, "layouts", _layouts),
        (tpu.TpuCompiler, "heads", _heads),
    ]
    undo = [_wrap(*what) for what in wrapped]
    try:
        yield FOUND
    finally:
        for take_back in reversed(undo):
            take_back()


_LAST: dict[str, Any] = {}


def _add(name: str, happened: Any) -> None:
    assert name in RULES, name
    if happened:
        FOUND[name] += 1


def _held(found: Any, *_: Any, **__: Any) -> None:
    _add("rule: a copy is held from the forward to the backward", found.copies)


def _cut(found: Any, *_: Any, is_coarse: bool = False, **__: Any) -> None:
    _add(f"cut: {'coarse' if is_coarse else 'fine'}", found)


def _merged(found: Any, program: Any, spans: Any, *_: Any) -> None:
    _add("cut: merged repetitions", len(found) < len(spans))


def _listed(name: str, found: Any) -> Any:
    items = list(found)
    _add(name, [item for item in items if len(item) > 1 or len(item[0].lengths) > 1 or item[0].num_states is not None])
    return iter(items)


def _resolved(found: Any, equations: Any, size: Any, rules: Any, kept: Any, stacked: Any = ()) -> None:
    readers = Counter(v for run in found.runs for v in run.reads)
    kept = found.find(kept)
    for eqn in equations:
        if rules.copies(eqn):
            kind = "convolution" if eqn.primitive is prims.conv_general_dilated_p else "product"
            _add(f"rule: an operand of a {kind} is copied", True)
        scatters = eqn.primitive is prims.scatter_add_p
        _add("rule: a scatter needs zeros of its own", scatters and rules.scratch_bytes(eqn))
        _add("rule: a pooling's derivative holds indices", not scatters and rules.index_bytes(eqn))
        twice = eqn.primitive in primitives.EXPENSIVE and eqn.outputs and readers[eqn.outputs[0]] > 1
        _add("rule: a costly result is made again for each reader", twice and rules.repeats_expensive)
    _add("rule: a scatter into zeros scatters into what it is added to", rules.scatters)
    _add("rule: another shape of a buffer is no buffer", found.same)
    _add("rule: what is stacked is read in place", stacked)
    for run in found.runs:
        is_buffer = not found.buffers.isdisjoint(run.makes)
        _add("rule: elementwise results fuse", run.is_fused and not is_buffer)
        _add("rule: what a product reads is a buffer", not run.reads_fused)
        _add("rule: reductions read fused operands", not run.is_fused and run.reads_fused)
        _add("rule: an operation writes over an operand", run.overwrites is not None)
        twice = run.is_expensive and is_buffer and any(readers[v] > 1 for v in run.makes) and kept.isdisjoint(run.makes)
        _add("rule: a costly result that is read twice is a buffer", twice)


def _operands_made(found: Any, runs: Any, *_: Any) -> None:
    _add("rule: a reduction's operand is copied", len(found) > len(runs))


def _breadth_first(found: Any, runs: Any, buffers: Any, *_: Any) -> None:
    in_order = [run for run in runs if not buffers.isdisjoint(run.makes)]
    _add("rule: what is ready first runs first", found != in_order)


def _peak(found: int, *_: Any, is_breadth_first: bool, **__: Any) -> None:
    # The heap's bytes decide where they are more than what is alive.
    _add("rule: the heap has gaps", is_breadth_first and _LAST.get("packed") == found)


def _outside(found: Any, *_: Any) -> Any:
    def counted(eqn: Any) -> bool:
        is_outside = found(eqn)
        _add("rule: a pooling runs outside of regions", is_outside)
        return is_outside

    return counted


def _layouts(found: Any, *_: Any, **__: Any) -> None:
    _add("rule: float32 is held as bfloat16", found.narrow)
    _add("rule: images are padded to lanes", found.features)


def _heads(found: Any, *_: Any) -> Any:
    def counted(eqn: Any) -> bool:
        is_head = found(eqn)
        _add("rule: logits stay outside of regions", is_head)
        return is_head

    return counted


def count_plan(plan: Any, program: Any) -> None:
    """Count what a plan is made of."""
    if plan.schedule is not None:
        _tree(Tree(blocks=plan.blocks, schedule=plan.schedule, saved=plan.block_saves), program, inside="")


def _tree(tree: Tree, program: Any, inside: str) -> None:
    for node, depth in tree.schedule.walk():
        if not isinstance(node, Keep):
            _add("option: region over several blocks", node.stop - node.start > 1)
            _add("option: region in a region", depth)
            _add("option: a region in a loop's body", inside == "loop")
    kept = {node.block for node, _ in tree.schedule.walk() if isinstance(node, Keep)}
    for k, save in enumerate(tree.saved):
        if k in kept:
            _save(save, program.equations[tree.blocks[k][-1]], inside)


def _save(save: Any, eqn: Any, inside: str) -> None:
    where = {"loop": "option: values saved in a loop's body", "branch": "option: values saved in a branch"}
    if save.kind == "plain":
        _add("option: values saved by name" if save.values else "option: nothing saved", True)
        if inside:
            _add(where[inside], save.values)
    elif save.kind == "scan":
        _loop(save, eqn, inside)
    elif save.kind == "cond":
        _add("option: branches planned", True)
        _add("option: a branch in a loop", inside == "loop")
        for branch, tree in zip(cond_options.branches_of(eqn), save.branches, strict=True):
            _tree(tree, branch.body, "branch")
    elif save.kind == "jax":
        _add("option: left to JAX", True)
        _add("loop: left to JAX", scan_options.loop_of(eqn) is not None)
        _add("option: an effect", eqn.effects)
    else:
        _add("option: an effect", save.kind == "effect")


def _loop(save: Any, eqn: Any, inside: str) -> None:
    loop = scan_options.loop_of(eqn)
    is_divided = len(save.parts) > 1
    for part in save.parts:
        is_divided = is_divided or len(part.lengths) > 1
        _add("loop: binomial", part.num_states is not None)
        _add("loop: one level", part.num_states is None and len(part.lengths) == 1)
        _add("loop: several levels", len(part.lengths) > 1)
        _tree(part.body, loop.body, "loop")
    _add("loop: several parts", len(save.parts) > 1)
    _add("loop: divided in reverse", is_divided and loop.reverse)
    carries = [loop.body.avals[v] for v in loop.carry]
    _add("loop: divided with an index in its carry", is_divided and any(a.dtype.kind == "i" for a in carries))
    _add("option: a loop in a branch", inside == "branch")
