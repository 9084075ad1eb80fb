"""Time and quality of the solvers: `python benchmarks/solvers.py [speed] [quality] [gap]`.

Prints tables, writes benchmarks/out/solvers.json, and plots the quality next to it if matplotlib is there.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ckptsolvers import (
    Block,
    ChainTable,
    InfeasibleError,
    Option,
    Problem,
    Value,
    chain,
    simulate,
    solve_chain,
    solve_chen,
    solve_lower_sets,
    solve_revolve,
)
from ckptsolvers.brute import all_schedules
from ckptsolvers.checkmate import solve_checkmate
from ckptsolvers.chen import segments
from ckptsolvers.dag import Dag, DagStep, Node, plain_steps, simulate_dag, steps_of_computes
from ckptsolvers.revolve import revolve_schedule
from ckptsolvers.training import BlockGraph, training_graph

OUT = Path(__file__).parent / "out"


def mixed_chain(num_blocks: int, num_options: int, seed: int = 0) -> Problem:
    """A heterogeneous chain whose options trade saved bytes for time, from nothing saved to nothing recomputed."""
    rng = random.Random(seed)
    times, sizes = ([rng.randint(1, 90) for _ in range(num_blocks)] for _ in range(2))
    options = []
    for cost in times:
        most = rng.randint(20, 200)
        last = num_options - 1
        options.append([(most * i // last, cost * (last - i) // last) for i in range(num_options)])
    return chain(times, sizes, cotangent_bytes=sizes, options=options)


def stack(num_layers: int, num_stages: int, seed: int = 0) -> Problem:
    """Like layers of a few stages each, two of whose values skip two stages."""
    rng = random.Random(seed)
    parts = [(rng.randint(10, 90), rng.randint(10_000, 90_000), rng.randint(5_000, 200_000)) for _ in range(num_stages)]
    n, values, blocks = num_layers * num_stages, [], []
    for k in range(n):
        cost, size, saved = parts[k % num_stages]
        readers = {k + 1, *([k + 3] if k % 3 == 0 and k + 3 <= n else [])}
        values.append(Value(size_bytes=size, made_by=k, read_by=tuple(sorted(readers)), cotangent_bytes=size))
        options = tuple(
            Option(
                name=name,
                saved_bytes=held,
                recompute_time=again,
                forward_times=(cost if held else 0, cost),
                forward_peak_bytes=size + held,
                backward_peak_bytes=2 * size + held,
            )
            for name, held, again in (("all", saved, 0), ("none", 0, cost))
        )
        blocks.append(Block(forward_times=(0, cost), forward_peak_bytes=size, options=options))
    return Problem(blocks=tuple(blocks), values=tuple(values))


def vgg19() -> Dag:
    """The training graph of VGG19 at 224 x 224: 16 convolutions, 5 pools, 3 dense layers, softmax and the loss."""
    shapes, side, channels_in = [], 224, 3
    for num, channels in ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)):
        for _ in range(num):
            shapes.append((4 * channels * side**2, 18 * channels_in * channels * side**2))
            channels_in = channels
        side //= 2
        shapes.append((4 * channels * side**2, 4 * channels * side**2))
    shapes += [(16384, 2 * 25088 * 4096), (16384, 2 * 4096**2), (4000, 2 * 4096 * 1000), (4000, 4000), (4, 1000)]
    nodes = (Node(size_bytes=s, time=f, reads=(i - 1,) if i else ()) for i, (s, f) in enumerate(shapes))
    return training_graph(Dag(tuple(nodes)))


def timed(run: Callable[[], object], repeats: int = 3) -> float:
    """The least wall time of a few runs."""
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return min(took)


def speed() -> list[dict]:
    """Time of each solver on the sizes it is meant for."""
    graph = vgg19()
    budget = simulate_dag(graph, plain_steps(graph)).peak_bytes * 4 // 5
    layers = stack(126, 6)
    layer_bytes = sum(value.size_bytes for value in layers.values) // 5
    code = "import time; t = time.perf_counter(); import ckptsolvers; print(time.perf_counter() - t)"
    rows = [
        ("import ckptsolvers", min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))),
        ("revolve, 10,000 steps", timed(lambda: revolve_schedule(10_000, 100))),
        ("checkmate, VGG19 (51 nodes), 80 % of its peak", timed(lambda: solve_checkmate(graph, budget_bytes=budget))),
        ("chain table, 126 layers x 6 stages", timed(lambda: ChainTable(layers, max_bytes=layer_bytes), 1)),
    ]
    for n in (25, 50, 100, 200):
        problem = mixed_chain(n, 4)
        rows.append((f"chain table, {n} blocks x 4 options", timed(partial(ChainTable, problem, max_bytes=30 * n))))
    for n in (25, 50, 100, 200):
        problem = mixed_chain(n, 4)
        for solve in (solve_chen, solve_revolve, solve_lower_sets):
            name = f"{solve.__name__}, {n} blocks x 4 options"
            rows.append((name, timed(partial(attempt, solve, problem, 40 * n), 1)))
    return [{"what": what, "seconds": round(seconds, 4)} for what, seconds in rows]


def attempt(solve: Callable[..., object], problem: Problem, budget_bytes: int) -> object:
    """A solver's answer, or None where nothing of its class fits."""
    try:
        return solve(problem, budget_bytes=budget_bytes)
    except InfeasibleError:
        return None


def quality() -> list[dict]:
    """Extra work of each solver over budgets between the least and the plain peak of a mixed chain."""
    problem = mixed_chain(60, 3)
    plain = simulate(problem, segments((), (2,) * 60)).peak_bytes
    rows = []
    for percent in (15, 20, 25, 30, 40, 50, 60, 80):
        row: dict = {"budget": f"{percent} %"}
        for solve in (solve_chain, solve_lower_sets, solve_chen, solve_revolve):
            solution = attempt(solve, problem, plain * percent // 100)
            extra = None if solution is None else solution.judgement.extra_work / problem.forward_time  # type: ignore
            row[solve.__name__.removeprefix("solve_")] = None if extra is None else round(100 * extra, 1)
        rows.append(row)
    return rows


def skip_graph(kind: str, n: int, seed: int) -> Problem:
    """A forward graph of n nodes with residual skips, U-shaped skips, or both."""
    rng = random.Random(f"{kind} {n} {seed}")
    later: dict[int, set[int]] = {k: {k + 1} for k in range(n)}
    if kind in ("residual", "both"):
        for k in range(0, n - 3, 3):
            later[k].add(k + 3)
    if kind in ("U", "both"):
        for k in range(n // 2 - 1):
            later[k].add(n - 1 - k)
    depth = [min(k, n - 1 - k) if kind != "residual" else 0 for k in range(n)]
    sizes = [rng.randint(2, 6) + 2 * (n // 2 - d if kind != "residual" else 0) for d in depth]
    times = [rng.randint(1, 9) for _ in range(n)]
    values = [
        Value(size_bytes=sizes[k], made_by=k, read_by=tuple(sorted(later[k])), cotangent_bytes=sizes[k] * (k < n - 1))
        for k in range(n)
    ]
    blocks = []
    for k in range(n):
        grads = sum(v.cotangent_bytes for v in values if v.made_by == k or k in v.read_by)
        option = Option(
            name="inputs",
            saved_bytes=0,
            recompute_time=0,
            forward_times=(0, times[k]),
            forward_peak_bytes=sizes[k],
            backward_peak_bytes=grads,
        )
        blocks.append(Block(forward_times=(0, times[k]), forward_peak_bytes=sizes[k], options=(option,)))
    return Problem(blocks=tuple(blocks), values=tuple(values))


def gap() -> list[dict]:
    """The nested optimum against the general one, half way between the least nested peak and the plain one."""
    rows = []
    for kind in ("residual", "U", "both"):
        for n in (8, 10, 12, 14, 16, 20):
            for seed in range(2):
                rows.append(gap_row(kind, n, seed))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def gap_row(kind: str, n: int, seed: int) -> dict:
    problem = skip_graph(kind, n, seed)
    table = ChainTable(problem, max_bytes=10_000, num_levels=10_000)
    levels = table.steps()
    budget = (levels[0] + levels[-1]) * table.unit_bytes // 2
    nested = solve_chain(problem, budget_bytes=budget)
    graph = BlockGraph(problem)
    general = solve_checkmate(graph.dag, budget_bytes=budget, time_limit_s=60, stages=graph.stages)
    backward = 2 * problem.forward_time  # as for dense layers
    best, bound = general.judgement.work, general.bound_work or 0
    return {
        "graph": f"{kind}, {n} nodes, #{seed}",
        "budget": budget,
        "least nested peak": levels[0] * table.unit_bytes,
        "plain peak": levels[-1] * table.unit_bytes,
        "plain forward": problem.forward_time,
        "nested forward": nested.judgement.work,
        "general forward": best,
        "general bound": bound,
        "gap of a step %": round(100 * (nested.judgement.work - bound) / (bound + backward), 1),
        "gap of the forwards %": round(100 * (nested.judgement.work - bound) / bound, 1),
        "seconds": round(general.solve_s, 1),
        "nested, freed at last read": freed_early(graph, budget) if n <= 8 else None,
        "beyond nesting": beyond_nesting(graph, general.steps) if best < nested.judgement.work else "",
    }


def freed_early(graph: BlockGraph, budget_bytes: int) -> int | None:
    """The least work of any tree if every value were freed at its last read, not when its maker's backward is due."""
    works = []
    for schedule in all_schedules(graph.problem):
        computes = [step.node for step in graph.steps(schedule) if step.kind == "compute"]
        judged = simulate_dag(graph.dag, steps_of_computes(graph.dag, computes))
        if judged.peak_bytes <= budget_bytes:
            works.append(judged.work)
    return min(works, default=None)


def beyond_nesting(graph: BlockGraph, steps: tuple[DagStep, ...]) -> str:
    """What a general schedule does that no tree of regions can, counted over its backward pass."""
    block_of = {node: k for k, node in enumerate(graph.forward)}
    backward_of = {node: k for k, node in enumerate(graph.backward)}
    held: set[int] = set()
    seen: set[int] = set()
    again: list[int] = []
    before: set[int] = set()
    around = skipped = 0
    for step in steps:
        if step.node in backward_of:
            if again:
                inside = set(range(min(again), max(again))) - set(again)
                around += len(inside & before)
                skipped += len(inside - before)
            again, before = [], set(held)
        elif step.node in block_of:
            k = block_of[step.node]
            if step.kind == "drop":
                held.discard(k)
            else:
                if k in seen:
                    again.append(k)
                held.add(k)
                seen.add(k)
    parts = []
    if around:
        parts.append(f"runs blocks around a value it still holds ({around})")
    if skipped:
        parts.append(f"leaves out blocks between those it recomputes ({skipped})")
    return "; ".join(parts) or "drops a value between two of its readers and recomputes it"


def show(title: str, rows: list[dict]) -> None:
    """Print a table in Markdown."""
    print(f"\n## {title}\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join("-" if value is None else str(value) for value in row.values()) + " |")


def plot(rows: list[dict], path: Path) -> None:
    """Draw extra work against the budget."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots()
    for name in list(rows[0])[1:]:
        points = [(int(row["budget"].split()[0]), row[name]) for row in rows if row[name] is not None]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="budget, % of the plain peak", ylabel="recomputed forwards, %", title="60 mixed blocks")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Run the sections named on the command line, all by default."""
    sections = {"speed": speed, "quality": quality, "gap": gap}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"any of {', '.join(sections)}; all by default")
    wanted = parser.parse_args().sections or list(sections)
    if unknown := set(wanted) - set(sections):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    OUT.mkdir(exist_ok=True)
    path = OUT / "solvers.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    for name in wanted:
        results[name] = sections[name]()
        show(name, results[name])
        path.write_text(json.dumps(results, indent=1))
    if "quality" in wanted:
        plot(results["quality"], OUT / "solvers.png")


if __name__ == "__main__":
    main()
