"""Uniform rules for picking one option per block, for the methods whose papers know no options."""

from collections import Counter

from ckptsolvers.problem import Option, Problem


def option_rules(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Pick one option per block by each of a few rules.

    The first two rules are "least recompute" and "least saved". Each option name that more than half of the blocks
    share gives one more, with "least recompute" where a block lacks the name. Rules that pick the same options as an
    earlier one are left out.

    Returns:
        The option of each block, `[n]`, by the rule's name.
    """
    least_recompute = _pick(problem, lambda b, o: (o.recompute_time, saved_bytes(problem, b, o)))
    rules = {
        "least recompute": least_recompute,
        "least saved": _pick(problem, lambda b, o: (saved_bytes(problem, b, o), o.recompute_time)),
    }
    names = Counter(name for block in problem.blocks for name in {option.name for option in block.options})
    for name in sorted(name for name, count in names.items() if 2 * count > problem.num_blocks):
        rules[name] = tuple(
            next((o for o, option in enumerate(block.options) if option.name == name), fallback)
            for block, fallback in zip(problem.blocks, least_recompute, strict=True)
        )
    distinct: dict[tuple[int, ...], str] = {}
    for name, picked in rules.items():
        distinct.setdefault(picked, name)
    return {name: picked for picked, name in distinct.items()}


def saved_bytes(problem: Problem, block: int, option: Option) -> int:
    """What an option holds from the block's forward to its backward, its own outputs included."""
    outputs = problem.outputs[block]
    return option.saved_bytes + sum(problem.values[outputs[p]].size_bytes for p in option.saved_outputs)


def _pick(problem: Problem, key) -> tuple[int, ...]:
    return tuple(
        min(range(len(block.options)), key=lambda o: (*key(b, block.options[o]), o))
        for b, block in enumerate(problem.blocks)
    )
