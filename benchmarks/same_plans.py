"""Do two commits plan alike: a digest of every candidate and of every plan chosen, for the zoo on three targets.

    python benchmarks/same_plans.py OLD NEW [--models llama unet] [--targets cpu] [--verify]

OLD and NEW are commits; `.` is the working tree. A change that only moves code must give the same digests; one that
changes plans on purpose shows here which, and says so. The digest is of what a plan does: each block's equations, the
tree of regions, what each block saves, the plans of loops and branches, predicted bytes and cost. Fingerprints, the
form of plan files and the numbers of options are no part of it. Caches are empty, and no calibration record is read.

Rows of a commit are kept in benchmarks/out, so that a comparison goes on where it stopped. Exit 1 where plans differ.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "out" / "same_plans"
TARGETS = ("cpu", "h100", "v5e")
BUDGETS = ("30%", "50%", "80%")
# Another number where the digests mean something else than before.
_FORM = 1
_TREE = "tree"
# Quick to compile on CPU, loops and none.
VERIFIED = ("gpt2", "gpt2-scan", "llama", "llama-scan", "vit", "unet", "lstm", "moe")


def main() -> int:
    """Compare, and return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", nargs="?", help="a commit, or . for the working tree")
    parser.add_argument("new", nargs="?", default=".")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--size", default="base", help="of the zoo's models: base (realistic) or tiny")
    parser.add_argument("--verify", action="store_true", help="only the verified plans of eight quick models on CPU")
    parser.add_argument("--row", nargs=3, metavar=("MODEL", "TARGET", "SIZE"), help="print one row of this tree")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(_row(*options.row)))
        return 0
    if not options.old:
        parser.error("name two commits")
    wanted = [(m, "cpu", "verified") for m in options.models or VERIFIED]
    if not options.verify:
        wanted = [(m, t, options.size) for t in options.targets for m in options.models or names()]
    old, new = (_rows(commit, wanted) for commit in (options.old, options.new))
    num_plans = num_different = 0
    for key in map(" ".join, wanted):
        different = [part for part in {**old[key], **new[key]} if old[key].get(part) != new[key].get(part)]
        num_plans, num_different = num_plans + len(old[key]), num_different + len(different)
        for part in different:
            print(f"{key}, {part}:\n  {old[key].get(part)}\n  {new[key].get(part)}")
    print(f"{len(wanted)} models and targets, {num_plans} digests, {num_different} different")
    return 1 if num_different else 0


def _rows(commit: str, wanted: Sequence[tuple[str, str, str]]) -> dict[str, dict[str, str]]:
    """The rows of a commit, those that are not kept made in a checkout of it."""
    made_with = f"{_FORM}-{metadata.version('jax')}"
    known = {}
    with _checkout(commit) as (folder, name):
        for row in wanted:
            key = " ".join(row)
            path = OUT / f"{name}-{made_with}" / f"{key}.json"
            if name != _TREE and path.exists():
                known[key] = json.loads(path.read_text())
                continue
            known[key] = _made(folder, row)
            print(f"{name[:8]} {key}", file=sys.stderr, flush=True)
            if name != _TREE:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(known[key], indent=1))
    return known


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[tuple[Path, str]]:
    if commit == ".":
        yield ROOT, _TREE
        return
    git = lambda *args: subprocess.run(  # noqa: E731
        ["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True
    ).stdout.strip()
    name = git("rev-parse", "--verify", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        git("worktree", "add", "--detach", f"{folder}/tree", name)
        try:
            yield Path(folder, "tree"), name
        finally:
            git("worktree", "remove", "--force", f"{folder}/tree")


def _made(folder: Path, row: Sequence[str]) -> dict[str, str]:
    """A row, made by the package in a folder in a process of its own, with empty caches."""
    path = os.pathsep.join(str(folder / part) for part in (".", "solvers", "tests"))
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {
            "PYTHONPATH": path,
            "XDG_CACHE_HOME": cache,
            "JAX_PLATFORMS": "cpu",
            "JAXCKPT_NO_CACHE": "1",
        }
        command = [sys.executable, "-P", __file__, "--row", *row]
        done = subprocess.run(command, env=env, cwd=folder, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def names() -> list[str]:
    """The zoo's models, and small ones of each shape of graph."""
    sys.path[:0] = [str(ROOT / "tests")]
    from zoo.catalogue import CATALOGUE, DEEP
    from zoo.models import MODELS

    return [*CATALOGUE, *DEEP, *MODELS, "conditional", "effects"]


def _case(name: str, size: str) -> tuple[Any, tuple, bool]:
    from zoo.catalogue import CATALOGUE, DEEP
    from zoo.models import MODELS

    if name in MODELS:
        return MODELS[name].fun, MODELS[name].specs(), MODELS[name].has_aux
    if name in ("conditional", "effects"):
        return *globals()[f"_{name}"](), False
    case = (CATALOGUE | DEEP)[name].case(None if size == "base" else "tiny")
    return case.fun, case.specs, False


def _conditional() -> tuple[Any, tuple]:
    """Layers scanned in one of two branches, after which come layers as they are."""
    import jax
    import jax.numpy as jnp

    def scanned(w: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) + x, None), x, w)[0]

    def loss(w: Any, x: Any, flag: Any) -> Any:
        x = jax.lax.cond(flag, scanned, lambda w, x: jnp.sin(x @ w[0]), w, x)
        for i in range(3):
            x = jnp.tanh(x @ w[i])
        return jnp.sum(x**2)

    spec = jax.ShapeDtypeStruct
    return loss, (spec((16, 64, 64), "float32"), spec((2048, 64), "float32"), spec((), "bool"))


def _effects() -> tuple[Any, tuple]:
    """Layers with a callback between them, and a while loop."""
    import jax
    import jax.numpy as jnp

    def loss(w: Any, x: Any) -> Any:
        for i in range(8):
            x = jnp.tanh(x @ w)
            if i == 3:
                jax.debug.callback(lambda s: None, jnp.sum(x))
        steps = jax.lax.while_loop(lambda n: n < 3, lambda n: n + 1, 0)
        return jnp.sum(x**2) * steps

    return loss, (jax.ShapeDtypeStruct((64, 64), "float32"), jax.ShapeDtypeStruct((1024, 64), "float32"))


def _row(name: str, target: str, size: str) -> dict[str, str]:
    """Digests of what this tree's package plans for a model, by what each is of."""
    import jax

    jax.config.update("jax_numpy_rank_promotion", "allow")
    fun, specs, has_aux = _case(name, "tiny" if size == "verified" else size)
    found: dict[str, str] = {}
    for cost in ("time", "flops"):
        if size != "verified":
            try:
                study = _analysed(fun, specs, has_aux, cost, target)
                found |= {f"{cost}, candidate {i}": _candidate(study, c) for i, c in enumerate(_all_candidates(study))}
            except ValueError as error:  # what cannot be planned is told apart too
                found[f"{cost}, candidates"] = type(error).__name__
        for budget in BUDGETS:
            found[f"{cost}, {budget}"] = _planned(
                fun,
                *specs,
                budget=budget,
                cost=cost,
                target=target,
                has_aux=has_aux,
                verify=size == "verified",
                calibration=None,
            )
    return found


def _planned(*args: Any, **options: Any) -> str:
    import jaxckpt

    try:
        return _plan(jaxckpt.plan(*args, **options))
    except jaxckpt.InfeasibleBudgetError as error:
        return f"least {error.expected_least_bytes} of {error.unplanned_peak_bytes}"
    except ValueError as error:
        return type(error).__name__


def _first(*places: str) -> Any:
    """The first of some `module:name` that this tree has; the names have moved and may move again."""
    for place in places:
        module, name = place.split(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(f"jaxckpt.{module}"), name)
    raise ImportError(f"none of {places} is there")


def _analysed(fun: Any, specs: tuple, has_aux: bool, cost: str, target: str) -> Any:
    trace_placed = _first(
        "compilation.objective:trace_placed", "targets.sharding:trace_placed", "shardings:trace_placed"
    )
    objective = _first("compilation.objective:objective", "measurement:objective")
    find = _first(
        "search.analysis:find_analysis",
        "search.planner:find_analysis",
        "search.planner:find_study",
        "planner:find_study",
    )
    traced = trace_placed(fun, specs)
    return find(traced.program, objective(traced, 0, has_aux), cost, "auto", target)


def _all_candidates(study: Any) -> list[Any]:
    """Every candidate, under the name that this tree has for them."""
    return study.all_candidates if hasattr(study, "all_candidates") else study.rungs


def _candidate(study: Any, candidate: Any) -> str:
    blocks = study.blocks_of(candidate)
    tree = _tree([span.positions for span in blocks.spans], candidate.schedule, study.saved(candidate))
    numbers = (candidate.judgement.peak_bytes, study.extra_cost(candidate), study.recompute_flops(candidate))
    return _digest(tree, *numbers)


def _plan(plan: Any) -> str:
    tree = None if plan.schedule is None else _tree(plan.blocks, plan.schedule, plan.block_saves)
    numbers = (
        plan.unplanned_peak_bytes,
        plan.predicted_peak_bytes,
        plan.measured_peak_bytes,
        plan.expected_least_bytes,
        plan.recompute_cost,
        plan.recompute_flops,
        plan.unplanned_cost,
        plan.num_compiles,
    )
    return _digest(tree, *numbers)


def _tree(blocks: Sequence[Sequence[int]], schedule: Any, saved: Sequence[Any]) -> Any:
    """What a plan of a program does, as plain data."""

    def node(x: Any) -> Any:
        if hasattr(x, "option"):
            return [list(map(int, blocks[x.block])), _saves(saved[x.block])]
        return {"recompute": [node(child) for child in x.children]}

    return [node(x) for x in schedule.nodes]


def _saves(saved: Any) -> Any:
    """What a block saves: values by number, a plan of a loop or of branches, or what JAX keeps."""
    for name in ("plan", "values"):
        if hasattr(saved, name):
            saved = getattr(saved, name)
    if isinstance(saved, tuple):
        return list(saved)
    body = lambda tree: _tree(tree.blocks, tree.schedule, tree.saved)  # noqa: E731
    if hasattr(saved, "parts"):
        return [[list(p.lengths), p.num_states, body(p.body)] for p in saved.parts]
    if hasattr(saved, "branches"):
        return [body(tree) for tree in saved.branches]
    return "left to JAX"


def _digest(tree: Any, *numbers: Any) -> str:
    text = json.dumps([tree, numbers])
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {' '.join(map(str, numbers))}"


if __name__ == "__main__":
    sys.exit(main())
